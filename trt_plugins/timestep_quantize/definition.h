#pragma once

namespace quest {

inline constexpr char kTimestepQuantizeName[] = "TimestepQuantize";
inline constexpr char kAxisField[] = "axis";

}  // namespace quest
