/// Stands in for common/launch.cuh where the kernels are compiled for the CPU: each block's threads run one after the other.
///
/// So the kernels' own source is tested, and sanitized, on machines without a GPU. What it cannot show: races, and the GPU's arithmetic.
#pragma once

#include <cuda_runtime_api.h>

#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

// NOLINTBEGIN(bugprone-reserved-identifier,cert-dcl37-c,cert-dcl51-cpp): CUDA's names
#undef __launch_bounds__
#define __launch_bounds__(threads)
#undef __shared__
#define __shared__ static
#undef __syncthreads
#define __syncthreads() static_cast<void>(0)

namespace quest::device {

inline uint3 threadIdx{};
inline uint3 blockIdx{};

using std::min;

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32); }

/// The bytes of \p a and \p b, numbered 0 to 7, that the digits of \p selector name.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (uint32_t i = 0; i < 4; ++i) result |= static_cast<uint32_t>((bytes >> (8 * (selector >> (4 * i) & 7U))) & 0xffU) << (8 * i);
    return result;
}

// NOLINTEND(bugprone-reserved-identifier,cert-dcl37-c,cert-dcl51-cpp)

}  // namespace quest::device

#include "common/device.cuh"

namespace quest::device {

template <typename Arguments>
cudaError_t launch(void (*kernel)(Arguments), Arguments arguments, uint32_t blocks, int32_t samples, cudaStream_t /*stream*/) {
    arguments.firstSample = 0;
    for (blockIdx.y = 0; blockIdx.y < static_cast<uint32_t>(samples); ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
            // The first warp comes twice: once to fill what the block shares, then with all others.
            for (uint32_t t = 0; t < kWarp + kThreads; ++t) {
                threadIdx.x = t < kWarp ? t : t - kWarp;
                kernel(arguments);
            }
        }
    }
    return cudaSuccess;
}

}  // namespace quest::device
