#pragma once

namespace quest {

inline constexpr char kGegluTimestepQuantizeName[] = "GegluTimestepQuantize";

}  // namespace quest
