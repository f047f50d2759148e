#include "timestep_quantize/kernel.h"

#include "common/launch.cuh"

#include <limits>

namespace quest {
namespace {

using namespace device;

/// Channels of one pixel that a thread of the blocked kernel computes.
constexpr int kGroup = 16;

/// How the linear kernel finds the channels of a vector.
enum class Channels {
    kOne,    ///< the channel vector is one number
    kPlane,  ///< a vector lies within one channel
    kRow,    ///< a vector's elements are consecutive channels
};

struct LinearArguments {
    const void* x;
    int8_t* codes;
    uint32_t vectors;        ///< of a sample
    uint32_t stride;         ///< from a thread's vector to its next; kRow: whole rows, so that all are of the same channels
    Divisor vectorsInPlane;  ///< kPlane: inner / vector
    Divisor period;          ///< kPlane: C; kRow: C / vector
    Tables tables;
    int32_t firstSample;
};

template <typename T, Channels kChannels, int kUnroll>
__global__ void __launch_bounds__(kThreads) linearKernel(const LinearArguments a) {
    constexpr int kSize = kVector<T>;
    constexpr int kSteps = kChannels == Channels::kRow ? kSize : 1;
    constexpr int kLookups = kChannels == Channels::kPlane ? kUnroll : 1;
    const int32_t n = a.firstSample + static_cast<int32_t>(blockIdx.y);
    const auto begin = static_cast<int64_t>(n) * a.vectors * kSize;
    const uint32_t first = blockIdx.x * kThreads + threadIdx.x;

    // All loads go out before the first result is waited for.
    Pack<T, kSize> x[kUnroll];
    Pack<float, kSteps> channel[kLookups];
    bool inside[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        const uint32_t v = first + u * a.stride;
        inside[u] = first < a.stride && v < a.vectors;
        if (inside[u]) {
            x[u] = load<kSize>(static_cast<const T*>(a.x) + begin + static_cast<int64_t>(v) * kSize);
            if (u < kLookups) {
                const uint32_t c =
                    kChannels == Channels::kOne
                        ? 0
                        : (kChannels == Channels::kRow ? a.period.remainder(v) * kSize : a.period.remainder(a.vectorsInPlane.quotient(v)));
                channel[u] = load<kSteps>(a.tables.channel + c);
            }
        }
    }
    const SharedRow shared = rowOf(a.tables, n);
    Steps<kSteps> steps[kLookups];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        if (inside[u]) {
            if (u < kLookups) steps[u] = stepsOf(channel[u], shared.row);
            float values[kSize];
            unpack(x[u], values);
            uint32_t packed[kSize / 4];
            quantize(values, steps[u < kLookups ? u : 0], shared, packed);
            store<kSize>(a.codes + begin + static_cast<int64_t>(first + u * a.stride) * kSize, packed);
        }
    }
}

struct BlockedArguments {
    const void* x;
    Layout xLayout;
    int64_t xStep;  ///< from one load of a group to the next
    int8_t* codes;
    Layout codesLayout;
    int64_t codesStep;  ///< from one store of a group to the next
    int32_t channels;
    int64_t pixels;
    Divisor stride;   ///< from a thread's pixel to its next
    uint32_t groups;  ///< of a sample's channels, with padding, times the stride: threads
    Tables tables;
    bool channelIsAligned;
    int32_t firstSample;
};

/// Store the codes of one group from \p to on, with zeros for padding.
template <int kStore>
__device__ void storeGroup(const BlockedArguments& a, int32_t c0, int8_t* to, uint32_t (&packed)[kGroup / 4]) {
    if (c0 + kGroup > a.channels) {
#pragma unroll
        for (int i = 0; i < kGroup; i += 4) {
            const int32_t real = a.channels - (c0 + i);
            packed[i / 4] &= real >= 4 ? 0xffffffffU : (real <= 0 ? 0U : (1U << (8 * real)) - 1U);
        }
    }
    if constexpr (kStore == kGroup) {
        store<kGroup>(to, packed);
    } else {
#pragma unroll
        for (int i = 0; i < kGroup; i += kStore) {
            if (c0 + i < a.codesLayout.channels) {
                if constexpr (kStore == 4) {
                    const uint32_t part[1] = {packed[i / 4]};
                    store<4>(to + i / kStore * a.codesStep, part);
                } else {
                    to[i * a.codesStep] = static_cast<int8_t>(packed[i / 4] >> (8 * (i % 4)));
                }
            }
        }
    }
}

/// Any layout to any other: a thread takes 16 channels of some pixels, \p kLoad at a time, and stores \p kStore codes at a time.
template <typename T, int kLoad, int kStore, int kUnroll>
__global__ void __launch_bounds__(kThreads) blockedKernel(const BlockedArguments a) {
    const int32_t n = a.firstSample + static_cast<int32_t>(blockIdx.y);
    const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
    // Neighbours write what lies side by side: the two halves of 32 channels, or the next pixel where each code is stored alone.
    constexpr uint32_t kSideBySide = kStore == 1 ? 1 : 2;
    const uint32_t rest = index / kSideBySide;
    const uint32_t block = a.stride.quotient(rest);
    const auto c0 = static_cast<int32_t>((block * kSideBySide + index % kSideBySide) * kGroup);
    const int64_t firstPixel = rest - block * a.stride.number;
    const bool inside = c0 < a.codesLayout.channels;

    // All loads go out before the first result is waited for.
    Pack<T, kLoad> x[kUnroll][kGroup / kLoad] = {};
    Pack<float, kGroup> channel;
    if (inside) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t pixel = firstPixel + u * static_cast<int64_t>(a.stride.number);
            const T* from = static_cast<const T*>(a.x) + n * a.xLayout.sample + offsetOf(a.xLayout, c0, pixel);
#pragma unroll
            for (int i = 0; i < kGroup; i += kLoad)
                if (c0 + i < a.xLayout.channels && pixel < a.pixels) x[u][i / kLoad] = load<kLoad>(from + i / kLoad * a.xStep);
        }
        if (a.channelIsAligned && c0 + kGroup <= a.tables.channels) {
            channel = load<kGroup>(a.tables.channel + c0);
        } else {
#pragma unroll
            for (int i = 0; i < kGroup; ++i)
                channel.elements[i] = a.tables.channel[min(c0 + i, a.tables.channels - 1)];  // the only one, or any for padding
        }
    }
    const SharedRow shared = rowOf(a.tables, n);
    if (!inside) return;
    const Steps<kGroup> steps = stepsOf(channel, shared.row);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        const int64_t pixel = firstPixel + u * static_cast<int64_t>(a.stride.number);
        if (pixel >= a.pixels) return;
        float values[kGroup];
#pragma unroll
        for (int i = 0; i < kGroup; ++i) values[i] = toFloat(x[u][i / kLoad].elements[i % kLoad]);
        uint32_t packed[kGroup / 4];
        quantize(values, steps, shared, packed);
        storeGroup<kStore>(a, c0, a.codes + n * a.codesLayout.sample + offsetOf(a.codesLayout, c0, pixel), packed);
    }
}

struct ElementArguments {
    const void* x;
    int8_t* codes;
    uint32_t elements;  ///< of a sample
    Divisor inner;
    Divisor channels;
    Tables tables;
    int32_t firstSample;
};

/// Linear tensors of any shape and alignment, an element a thread.
template <typename T>
__global__ void __launch_bounds__(kThreads) elementKernel(const ElementArguments a) {
    const int32_t n = a.firstSample + static_cast<int32_t>(blockIdx.y);
    const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
    const Row row = rowOf(a.tables, n).row;
    if (i < a.elements) {
        const uint32_t c = a.tables.channels == 1 ? 0 : a.channels.remainder(a.inner.quotient(i));
        const int64_t place = static_cast<int64_t>(n) * a.elements + i;
        a.codes[place] = exactCode(toFloat(static_cast<const T*>(a.x)[place]), stepOf(row.scale, a.tables.channel[c]), row);
    }
}

template <typename T, int kUnroll>
auto* linearKernelFor(bool one, bool planes) {
    return one ? linearKernel<T, Channels::kOne, kUnroll>
               : (planes ? linearKernel<T, Channels::kPlane, kUnroll> : linearKernel<T, Channels::kRow, kUnroll>);
}

template <typename T>
cudaError_t launchLinear(const TimestepQuantizeProblem& p, uint32_t elements, cudaStream_t stream) {
    constexpr uint32_t kSize = kVector<T>;
    const auto inner = static_cast<uint32_t>(p.inner);
    const auto channels = static_cast<uint32_t>(p.channels);
    const bool one = p.tables.channels == 1;
    const bool planes = inner % kSize == 0;
    const bool rows = inner == 1 && channels % kSize == 0 && isAligned(p.tables.channel, kVectorBytes);
    if (elements % kSize != 0 || !isAligned(p.x, kVectorBytes) || !isAligned(p.codes, kSize) || !(one || planes || rows)) {
        const ElementArguments a{p.x, p.codes, elements, Divisor(inner), Divisor(channels), p.tables, 0};
        return launch(elementKernel<T>, a, blocksFor(elements, kThreads), p.samples, stream);
    }
    const uint32_t vectors = elements / kSize;
    const bool many = static_cast<uint64_t>(vectors) * static_cast<uint32_t>(p.samples) >= kEnough;
    const uint32_t unroll = many ? kMany : 1;
    const bool byRows = !one && !planes;
    const uint32_t unit = byRows ? channels / kSize : 1;  // a thread's vectors are some of these apart
    const uint32_t stride = blocksFor(vectors / unit, unroll) * unit;
    const LinearArguments a{p.x,      p.codes, vectors, stride, Divisor(planes ? inner / kSize : 1), Divisor(byRows ? unit : channels),
                            p.tables, 0};
    auto* const kernel = many ? linearKernelFor<T, kMany>(one, planes) : linearKernelFor<T, 1>(one, planes);
    return launch(kernel, a, blocksFor(stride, kThreads), p.samples, stream);
}

/// From one run of \p size channels to the next, both within a group of 16 channels.
int64_t stepIn(const Layout& layout, int32_t size) {
    const bool sideBySide = layout.run >= kGroup || layout.block == layout.run;
    return sideBySide ? size : layout.block;
}

template <typename T, int kLoad, int kUnroll>
cudaError_t launchBlocked(const TimestepQuantizeProblem& p, cudaStream_t stream) {
    const int32_t kStore = p.codesLayout.run >= kGroup ? kGroup : (p.codesLayout.run == 4 ? 4 : 1);
    constexpr int32_t kBlock = 2 * kGroup;
    const uint32_t stride = blocksFor(static_cast<uint32_t>(p.inner), kUnroll);
    const uint64_t groups = uint64_t{stride} * static_cast<uint32_t>(roundedUp(p.codesLayout.channels, kBlock) / kGroup);
    if (groups > static_cast<uint64_t>(std::numeric_limits<int32_t>::max())) return cudaErrorInvalidValue;
    const BlockedArguments a{p.x,
                             p.xLayout,
                             stepIn(p.xLayout, kLoad),
                             p.codes,
                             p.codesLayout,
                             stepIn(p.codesLayout, kStore),
                             p.channels,
                             p.inner,
                             Divisor(stride),
                             static_cast<uint32_t>(groups),
                             p.tables,
                             isAligned(p.tables.channel, kVectorBytes),
                             0};
    auto* const kernel = kStore == kGroup ? blockedKernel<T, kLoad, kGroup, kUnroll>
                                          : (kStore == 4 ? blockedKernel<T, kLoad, 4, kUnroll> : blockedKernel<T, kLoad, 1, kUnroll>);
    return launch(kernel, a, blocksFor(a.groups, kThreads), p.samples, stream);
}

template <typename T, int kLoad>
cudaError_t launchBlocked(const TimestepQuantizeProblem& p, cudaStream_t stream) {
    constexpr int kPixels = 2;  // a group is two vectors or more to load
    const uint64_t groups =
        static_cast<uint64_t>(p.inner) * static_cast<uint32_t>(p.codesLayout.channels / kGroup) * static_cast<uint32_t>(p.samples);
    return groups >= kEnough / 2 ? launchBlocked<T, kLoad, kPixels>(p, stream) : launchBlocked<T, kLoad, 1>(p, stream);
}

bool isLinear(const Layout& layout) { return layout.run == 1 && layout.pixel == 1; }

template <typename T>
cudaError_t launchTyped(const TimestepQuantizeProblem& p, uint32_t elements, cudaStream_t stream) {
    if (isLinear(p.xLayout) && isLinear(p.codesLayout)) return launchLinear<T>(p, elements, stream);
    if (p.outer != 1) return cudaErrorInvalidValue;
    if (!isAligned(p.x, isLinear(p.xLayout) ? sizeof(T) : kVectorBytes) || !isAligned(p.codes, isLinear(p.codesLayout) ? 1 : kVectorBytes))
        return cudaErrorMisalignedAddress;
    if (p.xLayout.run >= kVector<T>) return launchBlocked<T, kVector<T>>(p, stream);
    if (sizeof(T) == 2 && p.xLayout.run == 2) return launchBlocked<T, sizeof(T) == 2 ? 2 : 1>(p, stream);
    return launchBlocked<T, 1>(p, stream);
}

}  // namespace

cudaError_t launchTimestepQuantize(const TimestepQuantizeProblem& problem, cudaStream_t stream) noexcept {
    // A code's layout may pad the channels; a sample must still be counted in 31 bits.
    const int64_t elements = static_cast<int64_t>(problem.outer) * problem.channels * problem.inner;
    return launchByType(problem, elements, [&](uint32_t count, auto zero) { return launchTyped<decltype(zero)>(problem, count, stream); });
}

}  // namespace quest
