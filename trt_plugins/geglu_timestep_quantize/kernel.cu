#include "geglu_timestep_quantize/kernel.h"

#include "common/launch.cuh"

#include <limits>

namespace quest
{
namespace
{

using namespace device;

struct Arguments
{
    void const* x;
    int8_t* codes;
    uint32_t units;        //!< of a sample's codes: vectors, or single elements
    Divisor unitsInRow;
    Tables tables;
    int32_t firstSample;
};

//! \p N codes a thread, from \p N values and \p N gates.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) gegluKernel(Arguments const a)
{
    int32_t const n = a.firstSample + static_cast<int32_t>(blockIdx.y);
    uint32_t const unit = blockIdx.x * kThreads + threadIdx.x;
    uint32_t const r = a.unitsInRow.quotient(unit);
    uint32_t const channels = a.unitsInRow.number * N;
    uint32_t const c = (unit - r * a.unitsInRow.number) * N;
    int64_t const place = (static_cast<int64_t>(n) * a.units + unit) * N;

    Pack<T, N> value;
    Pack<T, N> gate;
    Pack<float, N> channel;
    if (unit < a.units)
    {
        T const* from = static_cast<T const*>(a.x) + 2 * (place - c) + c;
        value = load<N>(from);
        gate = load<N>(from + channels);
        if (a.tables.channels != 1)
        {
            channel = load<N>(a.tables.channel + c);
        }
        else
        {
#pragma unroll
            for (int i = 0; i < N; ++i)
            {
                channel.elements[i] = a.tables.channel[0];
            }
        }
    }
    SharedRow const shared = rowOf(a.tables, n);
    if (unit >= a.units)
    {
        return;
    }
    float x[N];
#pragma unroll
    for (int i = 0; i < N; ++i)
    {
        x[i] = geglu(toFloat(value.elements[i]), toFloat(gate.elements[i]));
    }
    if constexpr (N == 1)
    {
        a.codes[place] = exactCode(x[0], stepOf(shared.row.scale, channel.elements[0]), shared.row);
    }
    else
    {
        uint32_t packed[N / 4];
        quantize(x, channel.elements, shared, packed);
        store<N>(a.codes + place, packed);
    }
}

template <typename T>
cudaError_t launchTyped(GegluTimestepQuantizeProblem const& p, uint32_t codes, cudaStream_t stream)
{
    constexpr uint32_t kSize = kVector<T>;
    auto const channels = static_cast<uint32_t>(p.channels);
    bool const aligned = isAligned(p.x, kVectorBytes) && isAligned(p.codes, kSize) && isAligned(p.tables.channel, kVectorBytes);
    bool const vectors = channels % kSize == 0 && aligned;
    uint32_t const size = vectors ? kSize : 1;
    Arguments const a{p.x, p.codes, codes / size, Divisor(channels / size), p.tables, 0};
    return launch(vectors ? gegluKernel<T, kSize> : gegluKernel<T, 1>, a, blocksFor(a.units, kThreads), p.samples, stream);
}

} // namespace

cudaError_t launchGegluTimestepQuantize(GegluTimestepQuantizeProblem const& problem, cudaStream_t stream) noexcept
{
    int64_t const codes = static_cast<int64_t>(problem.rows) * problem.channels;
    if (problem.samples < 0 || problem.tables.buckets < 1 || codes > std::numeric_limits<int32_t>::max())
    {
        return cudaErrorInvalidValue;
    }
    if (problem.samples == 0 || codes == 0)
    {
        return cudaSuccess;
    }
    auto const count = static_cast<uint32_t>(codes);
    switch (problem.type)
    {
    case FloatType::kFloat32: return launchTyped<float>(problem, count, stream);
    case FloatType::kFloat16: return launchTyped<__half>(problem, count, stream);
    case FloatType::kBfloat16: return launchTyped<__nv_bfloat16>(problem, count, stream);
    }
    return cudaErrorInvalidValue;
}

} // namespace quest
