/// FP16 and bf16 as floats, on the CPU, without CUDA's headers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace quest {

inline float floatFromBits(uint32_t bits) {
    float value = 0.F;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline float floatFromBfloat16(uint16_t bits) { return floatFromBits(static_cast<uint32_t>(bits) << 16); }

inline float floatFromHalf(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000U) << 16;
    const uint32_t exponent = (bits >> 10) & 0x1fU;
    const uint32_t fraction = bits & 0x3ffU;
    if (exponent == 0)  // a multiple of 2^-24
    {
        const float magnitude = std::ldexp(static_cast<float>(fraction), -24);
        return sign != 0 ? -magnitude : magnitude;
    }
    const uint32_t wide = exponent == 0x1fU ? 0xffU : exponent + (127 - 15);
    return floatFromBits(sign | (wide << 23) | (fraction << 13));
}

}  // namespace quest
