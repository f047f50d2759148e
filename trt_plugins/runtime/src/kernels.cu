#include "kernels.h"

namespace quest_deploy {

namespace {

constexpr unsigned kThreads = 256, kMaxBlocks = 4096;

unsigned blocks(std::size_t values) {
    const std::size_t wanted = (values + kThreads - 1) / kThreads;
    return static_cast<unsigned>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
}

__global__ void prepare(StepBuffers b) {
    const int step = *b.step;
    const StepScales& scales = b.table[step];
    const float* current = b.samples + static_cast<std::size_t>(step % b.length) * b.count;
    const std::size_t first = blockIdx.x * static_cast<std::size_t>(blockDim.x) + threadIdx.x, stride = static_cast<std::size_t>(gridDim.x) * blockDim.x;
    for (std::size_t i = first; i < b.count; i += stride) {
        const float scaled = scales.input_scale * current[i];
        b.input[i] = scaled;
        if (b.halves) b.input[b.count + i] = scaled;
    }
    for (std::size_t i = first; i < b.rows; i += stride) b.timestep[i] = scales.timestep;
}

__global__ void update(StepBuffers b) {
    const int step = *b.step;
    const StepScales& scales = b.table[step];
    float* newest = b.predictions + static_cast<std::size_t>(step % b.length) * b.count;
    float* next = b.samples + static_cast<std::size_t>((step + 1) % b.length) * b.count;
    const std::size_t first = blockIdx.x * static_cast<std::size_t>(blockDim.x) + threadIdx.x, stride = static_cast<std::size_t>(gridDim.x) * blockDim.x;
    for (std::size_t i = first; i < b.count; i += stride) {
        newest[i] = b.halves ? guided(b.output[i], b.output[b.count + i], b.guidance) : b.output[i];
        const float fresh = b.noise == nullptr ? 0.0F : b.noise[static_cast<std::size_t>(step) * b.count + i];
        next[i] = next_sample(scales, b.samples + i, b.predictions + i, b.length, b.count, step, fresh);
    }
}

// A kernel of its own: the blocks of `update` all read the number, and none knows when the last has.
__global__ void advance(int* step) {
    ++*step;
}

}  // namespace

cudaError_t launch_prepare(const StepBuffers& buffers, cudaStream_t stream) {
    prepare<<<blocks(buffers.count), kThreads, 0, stream>>>(buffers);
    return cudaGetLastError();
}

cudaError_t launch_update(const StepBuffers& buffers, cudaStream_t stream) {
    update<<<blocks(buffers.count), kThreads, 0, stream>>>(buffers);
    if (const cudaError_t result = cudaGetLastError(); result != cudaSuccess) return result;
    advance<<<1, 1, 0, stream>>>(buffers.step);
    return cudaGetLastError();
}

}  // namespace quest_deploy
