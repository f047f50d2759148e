/* Hides AVX-512, VNNI and AMX from a program on an Intel processor that has them, so that its libraries choose their AVX2 kernels.
 *
 * Built as a shared library and preloaded. Linux can make the CPUID instruction fault (arch_prctl(2), ARCH_SET_CPUID); the handler
 * executes it and takes the bits out. It changes what a library sees, not what the processor can do.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { ARCH_SET_CPUID = 0x1012, FEATURES = 7 };

static struct sigaction users; /* what the program itself installs for SIGSEGV */
static int (*real_sigaction)(int, const struct sigaction *, struct sigaction *);

static void hide(uint32_t leaf, uint32_t subleaf, uint32_t out[4]) {
  if (leaf == FEATURES && subleaf == 0) {
    out[1] &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31); /* AVX-512 F, DQ, IFMA, PF, ER, CD, BW, VL */
    out[2] &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);                                    /* VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
    out[3] &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25); /* 4VNNIW, 4FMAPS, VP2INTERSECT, AMX, FP16 */
  } else if (leaf == FEATURES && subleaf == 1) {
    out[0] &= ~(1u << 4 | 1u << 5 | 1u << 21 | 1u << 23); /* AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA */
    out[3] &= ~(1u << 4 | 1u << 5 | 1u << 10 | 1u << 19); /* AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16, AVX10 */
  }
}

static void on_fault(int number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const unsigned char *instruction = (const unsigned char *)registers[REG_RIP];
  if (info->si_code == SI_KERNEL && instruction[0] == 0x0f && instruction[1] == 0xa2) {
    uint32_t leaf = (uint32_t)registers[REG_RAX], subleaf = (uint32_t)registers[REG_RCX], out[4];
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1UL);
    __asm__ volatile("cpuid" : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3]) : "a"(leaf), "c"(subleaf));
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0UL);
    hide(leaf, subleaf, out);
    registers[REG_RAX] = out[0], registers[REG_RBX] = out[1], registers[REG_RCX] = out[2], registers[REG_RDX] = out[3];
    registers[REG_RIP] += 2;
  } else if (users.sa_flags & SA_SIGINFO) {
    users.sa_sigaction(number, info, context);
  } else if (users.sa_handler != SIG_DFL && users.sa_handler != SIG_IGN) {
    users.sa_handler(number);
  } else {
    struct sigaction none = {.sa_handler = SIG_DFL};
    real_sigaction(SIGSEGV, &none, NULL); /* the fault comes again, and ends the program */
  }
}

int sigaction(int number, const struct sigaction *action, struct sigaction *old) {
  if (!real_sigaction) real_sigaction = dlsym(RTLD_NEXT, "sigaction");
  if (number != SIGSEGV) return real_sigaction(number, action, old);
  if (old) *old = users;
  if (action) users = *action;
  return 0;
}

void (*signal(int number, void (*handler)(int)))(int) {
  struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART}, old;
  return sigaction(number, &action, &old) ? SIG_ERR : old.sa_handler;
}

__attribute__((constructor)) static void start(void) {
  real_sigaction = dlsym(RTLD_NEXT, "sigaction");
  struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
  real_sigaction(SIGSEGV, &ours, NULL);
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0UL);
}
