#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "json.h"

namespace quest_deploy {

/// What a JSON file of ours holds at most.
constexpr std::uintmax_t kMaxJsonBytes = std::uintmax_t{1} << 24;

/// A file's content; throws Error, which ends with `repair`, where it cannot be read or holds more than `limit` bytes.
std::vector<char> read_file(const std::filesystem::path& path, const char* repair, std::uintmax_t limit = UINTMAX_MAX);

/// A document of quest-deploy's, `content` being that of the file at `path`, as quest_deploy/artifacts/schema.py (parse_document) reads it:
/// of this format and version, and with its own hash. Throws Error for anything else.
Json parse_document(const std::filesystem::path& path, const std::vector<char>& content, const char* format, std::int64_t version,
                    const char* repair);

}  // namespace quest_deploy
