/* A disk that is full from the nth write on: for a folder, counts what takes room there and fails it with ENOSPC.
 *
 * Built as a shared library and preloaded. Python, libstdc++ and Rust's library all write through these functions.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long left = -1; /* writes that still succeed; -1: all */
static long counted;

/* From now on the nth operation under `under` fails, and so do all after it; 0 never. */
void full_disk_from(const char *under, long nth) {
  snprintf(folder, sizeof folder, "%s", under);
  left = nth - 1, counted = 0;
}

long full_disk_counted(void) { return counted; }

static int fails(const char *path) {
  if (!folder[0] || strncmp(path, folder, strlen(folder)) != 0) return 0;
  counted++;
  if (left < 0 || left-- > 0) return 0;
  left = 0;
  errno = ENOSPC;
  return 1;
}

static int fails_at(int descriptor) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fails(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int descriptor, const void *data, size_t size) { return fails_at(descriptor) ? -1 : REAL(write)(descriptor, data, size); }

ssize_t writev(int descriptor, const struct iovec *parts, int count) { return fails_at(descriptor) ? -1 : REAL(writev)(descriptor, parts, count); }

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t at) {
  return fails_at(descriptor) ? -1 : REAL(pwrite64)(descriptor, data, size, at);
}

ssize_t pwrite(int descriptor, const void *data, size_t size, off_t at) { return fails_at(descriptor) ? -1 : REAL(pwrite)(descriptor, data, size, at); }

ssize_t sendfile(int to, int from, off_t *at, size_t size) { return fails_at(to) ? -1 : REAL(sendfile)(to, from, at, size); }

int ftruncate(int descriptor, off_t size) { return fails_at(descriptor) ? -1 : REAL(ftruncate)(descriptor, size); }

int fsync(int descriptor) { return fails_at(descriptor) ? -1 : REAL(fsync)(descriptor); }

int mkdir(const char *path, mode_t mode) { return fails(path) ? -1 : REAL(mkdir)(path, mode); }

int rename(const char *from, const char *to) { return fails(to) ? -1 : REAL(rename)(from, to); }

int link(const char *from, const char *to) { return fails(to) ? -1 : REAL(link)(from, to); }

static int create(const char *name, const char *path, int flags, mode_t mode) {
  if ((flags & O_CREAT) && fails(path)) return -1;
  return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, name))(path, flags, mode);
}

int open(const char *path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return create("open", path, flags, mode);
}

int open64(const char *path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return create("open64", path, flags, mode);
}
