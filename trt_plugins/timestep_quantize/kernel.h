/// quest::TimestepQuantize on the GPU, without TensorRT.
#pragma once

#include "timestep_quantize/problem.h"

#include <cuda_runtime_api.h>

namespace quest {

/// Put the kernel on \p stream; allocates nothing and waits for nothing. Padding in the layout of codes is set to zero.
///
/// \return cudaErrorInvalidValue for more than 2^31 - 1 elements a sample or a layout with outer > 1, else what the launch returns.
cudaError_t launchTimestepQuantize(const TimestepQuantizeProblem& problem, cudaStream_t stream) noexcept;

}  // namespace quest
