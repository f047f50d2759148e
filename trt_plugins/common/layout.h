/// Where the elements of a tensor lie, for each of TensorRT's formats that the kernels read and write.
#pragma once

#include "common/host_device.h"

#include <cstdint>

namespace quest {

/// A tensor [samples, channels, pixels]: element (n, c, p) lies at n * sample + (c / run) * block + c % run + p * pixel.
///
/// All of TensorRT's formats with the vector dimension third to last are of this form: \p run channels lie side by side.
struct Layout {
    int32_t run;       ///< a power of two
    int32_t channels;  ///< with padding
    int64_t sample;
    int64_t block;
    int64_t pixel;
};

/// kLINEAR: [samples][channels][pixels].
constexpr Layout linear(int32_t channels, int64_t pixels) { return {1, channels, channels * pixels, pixels, 1}; }

constexpr int32_t roundedUp(int32_t number, int32_t multiple) { return (number + multiple - 1) / multiple * multiple; }

/// kCHW2, kCHW4, kCHW32: [samples][channels / vector][pixels][vector], the last vector padded.
constexpr Layout vectorMajor(int32_t vector, int32_t channels, int64_t pixels) {
    const int32_t padded = roundedUp(channels, vector);
    return {vector, padded, padded * pixels, vector * pixels, vector};
}

/// kHWC, kHWC8, kHWC16: [samples][pixels][channels, padded to whole vectors].
constexpr Layout vectorMinor(int32_t vector, int32_t channels, int64_t pixels) {
    const int32_t padded = roundedUp(channels, vector);
    int32_t run = 1;  // all channels lie side by side; the kernels take them in powers of two
    while (run < 32 && padded % (2 * run) == 0) run *= 2;
    return {run, padded, padded * pixels, run, padded};
}

/// The place of element (0, c, p).
QUEST_HOST_DEVICE constexpr int64_t offsetOf(const Layout& layout, int32_t c, int64_t p) {
    return c / layout.run * layout.block + c % layout.run + p * layout.pixel;
}

/// The types of x.
enum class FloatType : int32_t {
    kFloat32 = 0,
    kFloat16 = 1,
    kBfloat16 = 2,
};

constexpr int32_t sizeOf(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

}  // namespace quest
