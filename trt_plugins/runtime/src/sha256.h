// SHA-256 (FIPS 180-4), so that an engine's hash can be checked where no cryptographic library is installed.
// Ours, since the package registries have no headers of one, as they have nlohmann's JSON.
#pragma once

#include <cstddef>
#include <string>

namespace quest_deploy {

/// The SHA-256 of `size` bytes, as lower-case hexadecimal.
std::string sha256(const void* data, std::size_t size);

}  // namespace quest_deploy
