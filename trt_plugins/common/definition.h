/// What every op of the library is registered under, and its operands in their order.
///
/// exporters/ops/timestep_quantize.py defines them for Python; tests/trt_plugins/ compares the two.
#pragma once

#include <cstdint>

namespace quest {

inline constexpr char kNamespace[] = "quest";
inline constexpr char kVersion[] = "1";

enum Input : int32_t {
    kX,
    kBucket,
    kScale,
    kLow,
    kHigh,
    kOffset,
    kChannel,
    kInputs,
};

inline constexpr const char* kInputNames[kInputs] = {"x", "bucket", "scale", "low", "high", "offset", "channel"};

}  // namespace quest
