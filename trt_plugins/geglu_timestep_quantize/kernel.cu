#include "geglu_timestep_quantize/kernel.h"

#include "common/launch.cuh"

namespace quest {
namespace {

using namespace device;

struct Arguments {
    const void* x;
    int8_t* codes;
    uint32_t units;   ///< of a sample's codes: vectors, or single elements
    uint32_t stride;  ///< whole rows, from a thread's unit to its next: all are of the same channels
    Divisor unitsInRow;
    Tables tables;
    int32_t firstSample;
};

/// \p N codes at a time, from \p N values and \p N gates, \p kUnroll times a thread.
template <typename T, int N, int kUnroll>
__global__ void __launch_bounds__(kThreads) gegluKernel(const Arguments a) {
    const int32_t n = a.firstSample + static_cast<int32_t>(blockIdx.y);
    const uint32_t first = blockIdx.x * kThreads + threadIdx.x;
    const uint32_t channels = a.unitsInRow.number * N;
    const uint32_t c = a.unitsInRow.remainder(first) * N;
    const int64_t place = (static_cast<int64_t>(n) * a.units + first) * N;

    // All loads go out before the first result is waited for.
    Pack<T, N> value[kUnroll];
    Pack<T, N> gate[kUnroll];
    Pack<float, N> channel;
    if (first < a.stride) {
        const T* from = static_cast<const T*>(a.x) + 2 * (place - c) + c;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (first + u * a.stride < a.units) {
                const T* const row = from + static_cast<int64_t>(a.stride) * 2 * u * N;
                value[u] = load<N>(row);
                gate[u] = load<N>(row + channels);
            }
        }
        if (a.tables.channels != 1) {
            channel = load<N>(a.tables.channel + c);
        } else {
#pragma unroll
            for (int i = 0; i < N; ++i) channel.elements[i] = a.tables.channel[0];
        }
    }
    const SharedRow shared = rowOf(a.tables, n);
    if (first >= a.stride) return;
    const Steps<N> steps = stepsOf(channel, shared.row);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        if (first + u * a.stride >= a.units) return;
        float x[N];
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = geglu(toFloat(value[u].elements[i]), toFloat(gate[u].elements[i]));
        int8_t* to = a.codes + place + u * static_cast<int64_t>(a.stride) * N;
        if constexpr (N == 1) {
            *to = exactCode(x[0], steps.step[0], shared.row);
        } else {
            uint32_t packed[N / 4];
            quantize(x, steps, shared, packed);
            store<N>(to, packed);
        }
    }
}

template <typename T>
cudaError_t launchTyped(const GegluTimestepQuantizeProblem& p, uint32_t codes, cudaStream_t stream) {
    constexpr uint32_t kSize = kVector<T>;
    const auto channels = static_cast<uint32_t>(p.channels);
    const bool aligned = isAligned(p.x, kVectorBytes) && isAligned(p.codes, kSize) && isAligned(p.tables.channel, kVectorBytes);
    const bool vectors = channels % kSize == 0 && aligned;
    const uint32_t size = vectors ? kSize : 1;
    const uint32_t units = codes / size;
    constexpr int kUnroll = 2;  // a unit is two vectors to load
    const bool many = vectors && static_cast<uint64_t>(units) * static_cast<uint32_t>(p.samples) >= kEnough;
    const uint32_t stride = blocksFor(static_cast<uint32_t>(p.rows), many ? kUnroll : 1) * (channels / size);
    const Arguments a{p.x, p.codes, units, stride, Divisor(channels / size), p.tables, 0};
    auto* const kernel = many ? gegluKernel<T, kSize, kUnroll> : (vectors ? gegluKernel<T, kSize, 1> : gegluKernel<T, 1, 1>);
    return launch(kernel, a, blocksFor(stride, kThreads), p.samples, stream);
}

}  // namespace

cudaError_t launchGegluTimestepQuantize(const GegluTimestepQuantizeProblem& problem, cudaStream_t stream) noexcept {
    const int64_t codes = static_cast<int64_t>(problem.rows) * problem.channels;
    return launchByType(problem, codes, [&](uint32_t count, auto zero) { return launchTyped<decltype(zero)>(problem, count, stream); });
}

}  // namespace quest
