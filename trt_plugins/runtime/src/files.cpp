#include "files.h"

#include <fstream>
#include <string>

#include "quest_deploy/error.h"
#include "sha256.h"

namespace quest_deploy {

namespace fs = std::filesystem;

std::vector<char> read_file(const fs::path& path, const char* repair, std::uintmax_t limit) {
    std::error_code problem;
    const std::uintmax_t size = fs::file_size(path, problem);
    if (problem) throw Error(path.string() + " cannot be read (" + problem.message() + "); " + repair);
    if (size > limit) throw Error(path.string() + ": expected at most " + std::to_string(limit) + " bytes; " + repair);
    std::vector<char> content;
    try {
        content.resize(size);
    } catch (const std::exception&) {  // std::bad_alloc, std::length_error
        throw Error(path.string() + ": there is not enough memory to read its " + std::to_string(size) + " bytes; " + repair);
    }
    std::ifstream stream(path, std::ios::binary);
    if (!stream.read(content.data(), static_cast<std::streamsize>(size))) throw Error(path.string() + " cannot be read; " + repair);
    return content;
}

Json parse_document(const fs::path& path, const std::vector<char>& content, const char* format, std::int64_t version, const char* repair) {
    const std::string expected = path.string() + ": expected a " + format;
    Json document = Json::parse(std::string(content.begin(), content.end()), path.string(), repair);
    if (document.at("format").as_string() != format) throw Error(expected + "; " + repair);
    if (document.at("version").as_integer() != version) throw Error(expected + " of version " + std::to_string(version) + "; " + repair);
    const std::string canonical = document.canonical("sha256");
    if (document.at("sha256").as_string() != sha256(canonical.data(), canonical.size()))
        throw Error(path.string() + " was edited; " + repair);
    return document;
}

}  // namespace quest_deploy
