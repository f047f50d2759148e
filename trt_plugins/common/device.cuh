/// What the kernels share: loads and stores of 16 bytes, the choice of a sample's row, and the rounding of a few elements at once.
#pragma once

#include "common/arithmetic.h"
#include "common/layout.h"
#include "common/tables.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>
#include <limits>

#ifndef NDEBUG
#include <cstdio>
#endif

namespace quest::device {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;
constexpr int kMaxSamplesInGrid = 65535;

/// Loads that a thread sends out before it computes, where there is enough work to keep the GPU busy; else one.
constexpr int kMany = 4;
constexpr uint64_t kEnough = uint64_t{1} << 18;

/// Elements of T in a vector load.
template <typename T>
constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T));

/// Divides by a number that is known before the launch: one multiplication and one shift, exact for dividends below 2^31.
struct Divisor {
    uint32_t number;
    uint32_t multiplier = 0;
    uint32_t shift = 0;

    explicit Divisor(uint32_t n) : number(n) {
        while ((uint64_t{1} << shift) < n) ++shift;
        multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - n)) / n + 1);
    }

    __device__ uint32_t quotient(uint32_t dividend) const { return (__umulhi(dividend, multiplier) + dividend) >> shift; }

    __device__ uint32_t remainder(uint32_t dividend) const { return dividend - quotient(dividend) * number; }
};

__device__ inline float toFloat(float value) { return value; }

__device__ inline float toFloat(__half value) { return __half2float(value); }

__device__ inline float toFloat(__nv_bfloat16 value) { return __bfloat162float(value); }

/// \p N elements as they lie in memory. They stay packed until they are used: converting one would wait for its load, and hold up the
/// loads that come after.
template <typename T, int N>
struct alignas(N * sizeof(T) < kVectorBytes ? N * sizeof(T) : kVectorBytes) Pack {
    static_assert(N * sizeof(T) < kVectorBytes || N * sizeof(T) % kVectorBytes == 0);
    T elements[N];
};

/// \p from is aligned to the size of the pack, or to 16 bytes where that is larger.
template <int N, typename T>
__device__ Pack<T, N> load(const T* from) {
    return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <typename T, int N>
__device__ void unpack(const Pack<T, N>& pack, float (&to)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = toFloat(pack.elements[i]);
}

/// \p N codes that lie side by side, 4, 8 or 16 of them, aligned so.
template <int N>
__device__ void store(int8_t* to, const uint32_t (&packed)[N / 4]) {
    if constexpr (N == 16) {
        *reinterpret_cast<uint4*>(to) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    } else if constexpr (N == 8) {
        *reinterpret_cast<uint2*>(to) = make_uint2(packed[0], packed[1]);
    } else {
        static_assert(N == 4);
        *reinterpret_cast<uint32_t*>(to) = packed[0];
    }
}

/// The bucket of sample \p n, clamped to the tables.
__device__ inline int32_t bucketOf(const Tables& tables, int32_t n) {
    const int64_t given =
        tables.bucketIsInt64 ? static_cast<const int64_t*>(tables.bucket)[n] : static_cast<const int32_t*>(tables.bucket)[n];
    const int64_t last = tables.buckets - 1;
#ifndef NDEBUG
    if ((given < 0 || given > last) && blockIdx.x == 0 && threadIdx.x == 0) {
        printf("quest: sample %d has bucket %lld, expected 0 to %lld; clamped\n", n, static_cast<long long>(given),
               static_cast<long long>(last));
    }
#endif
    return static_cast<int32_t>(given < 0 ? 0 : (given > last ? last : given));
}

/// What the threads of a block share: the row of their sample, and what fastCode makes of it.
struct SharedRow {
    Row row;
    FastRow fast;
};

/// Read the tables' row of sample \p n; all threads of the block must call it. The first warp reads, the others wait.
///
/// Where a warp can hold the whole tables, its lanes load them while the bucket is still on its way: one latency instead of two.
__device__ inline SharedRow rowOf(const Tables& tables, int32_t n) {
    __shared__ SharedRow shared;
    if (threadIdx.x < kWarp) {
        const bool whole = tables.buckets <= kWarp;
        const auto lane = static_cast<int32_t>(threadIdx.x);
        const int32_t bucket = bucketOf(tables, n);
        const int32_t mine = whole ? min(lane, tables.buckets - 1) : bucket;
        const Row row{tables.scale[mine], tables.low[mine], tables.high[mine], tables.offset[mine]};
        const FastRow fast = fastRow(row);
        if (lane == (whole ? bucket : 0)) shared = {row, fast};
    }
    __syncthreads();
    return shared;
}

/// What the elements of \p S channels are divided by, in one sample.
template <int S>
struct Steps {
    float step[S];
    float reciprocal[S];
    bool areOrdinary;
};

template <int S>
__device__ Steps<S> stepsOf(const Pack<float, S>& channel, const Row& row) {
    Steps<S> result;
    result.areOrdinary = true;
#pragma unroll
    for (int i = 0; i < S; ++i) {
        result.step[i] = stepOf(row.scale, channel.elements[i]);
        result.reciprocal[i] = reciprocalOf(result.step[i]);
        result.areOrdinary = isOrdinary(result.step[i]) && result.areOrdinary;
    }
    return result;
}

/// The codes of \p N elements, packed four to a word; \p S is 1 where all are of one channel, else N.
template <int N, int S>
__device__ void quantize(const float (&x)[N], const Steps<S>& steps, const SharedRow& shared, uint32_t (&packed)[N / 4]) {
    static_assert(S == 1 || S == N);
    float farthest = 0.F;
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        uint32_t codes[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float distance;
            codes[j] = fastCode(x[i + j], steps.reciprocal[S == 1 ? 0 : i + j], shared.fast, distance);
            farthest = fmaxf(farthest, distance);
        }
        packed[i / 4] = __byte_perm(__byte_perm(codes[0], codes[1], 0x0040), __byte_perm(codes[2], codes[3], 0x0040), 0x5410);
    }
    if (farthest > shared.fast.farthest || !steps.areOrdinary)  // rare: some 2^-14 of all elements lie so close to a tie
    {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            packed[i / 4] = 0;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const auto code = static_cast<uint8_t>(exactCode(x[i + j], steps.step[S == 1 ? 0 : i + j], shared.row));
                packed[i / 4] |= static_cast<uint32_t>(code) << (8 * j);
            }
        }
    }
}

/// Blocks for \p work units of which a block does \p ofBlock.
constexpr uint32_t blocksFor(uint32_t work, uint32_t ofBlock) {
    return static_cast<uint32_t>((static_cast<uint64_t>(work) + ofBlock - 1) / ofBlock);
}

/// Call \p launchTyped with the number of codes in a sample and a zero of the type of x, once \p problem is known to be valid and not
/// empty.
///
/// \return cudaErrorInvalidValue for more than 2^31 - 1 codes a sample, else what \p launchTyped returns.
template <typename Problem, typename LaunchTyped>
cudaError_t launchByType(const Problem& problem, int64_t codes, const LaunchTyped& launchTyped) {
    if (problem.samples < 0 || problem.tables.buckets < 1 || codes > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidValue;
    if (problem.samples == 0 || codes == 0) return cudaSuccess;
    const auto count = static_cast<uint32_t>(codes);
    switch (problem.type) {
        case FloatType::kFloat32:
            return launchTyped(count, float{});
        case FloatType::kFloat16:
            return launchTyped(count, __half{});
        case FloatType::kBfloat16:
            return launchTyped(count, __nv_bfloat16{});
    }
    return cudaErrorInvalidValue;
}

inline bool isAligned(const void* pointer, std::size_t bytes) { return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0; }

}  // namespace quest::device
