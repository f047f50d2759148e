/// Launches over the samples of a batch; \p Arguments have a member firstSample that the kernel adds to blockIdx.y.
#pragma once

#include "common/device.cuh"

namespace quest::device {

/// Launch \p kernel for all samples, as many at once as a grid takes.
template <typename Arguments>
cudaError_t launch(void (*kernel)(Arguments), Arguments arguments, uint32_t blocks, int32_t samples, cudaStream_t stream) {
    for (int32_t first = 0; first < samples; first += kMaxSamplesInGrid) {
        arguments.firstSample = first;
        const int32_t now = samples - first < kMaxSamplesInGrid ? samples - first : kMaxSamplesInGrid;
        kernel<<<dim3(blocks, static_cast<uint32_t>(now)), kThreads, 0, stream>>>(arguments);
        if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

}  // namespace quest::device
