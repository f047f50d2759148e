#include "kernels.h"

namespace quest_deploy {

namespace {

constexpr unsigned kThreads = 256, kMaxBlocks = 4096;

unsigned blocks(std::size_t values) {
    const std::size_t wanted = (values + kThreads - 1) / kThreads;
    return static_cast<unsigned>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
}

__device__ std::size_t first_value() { return blockIdx.x * static_cast<std::size_t>(blockDim.x) + threadIdx.x; }

__device__ std::size_t stride() { return static_cast<std::size_t>(gridDim.x) * blockDim.x; }

__global__ void prepare(StepBuffers buffers) {
    const int step = *buffers.step;
    const std::size_t values = buffers.count(), rows = static_cast<std::size_t>(buffers.rows) * buffers.batch;
    for (std::size_t i = first_value(); i < values || i < rows; i += stride()) prepare_value(buffers, step, i);
}

__global__ void update(StepBuffers buffers) {
    const int step = *buffers.step;
    for (std::size_t i = first_value(); i < buffers.count(); i += stride()) update_value(buffers, step, i);
}

// A kernel of its own: the blocks of `update` all read the number, and none knows when the last has.
__global__ void advance(int* step) { ++*step; }

}  // namespace

cudaError_t launch_prepare(const StepBuffers& buffers, cudaStream_t stream) {
    prepare<<<blocks(buffers.count()), kThreads, 0, stream>>>(buffers);
    return cudaGetLastError();
}

cudaError_t launch_update(const StepBuffers& buffers, cudaStream_t stream) {
    update<<<blocks(buffers.count()), kThreads, 0, stream>>>(buffers);
    if (const cudaError_t result = cudaGetLastError(); result != cudaSuccess) return result;
    advance<<<1, 1, 0, stream>>>(buffers.step);
    return cudaGetLastError();
}

}  // namespace quest_deploy
