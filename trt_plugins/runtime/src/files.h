#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

namespace quest_deploy {

/// A file's content; throws Error, which ends with `repair`, where it cannot be read or holds more than `limit` bytes.
std::vector<char> read_file(const std::filesystem::path& path, const char* repair, std::uintmax_t limit = UINTMAX_MAX);

}  // namespace quest_deploy
