/// quest::GegluTimestepQuantize on the GPU, without TensorRT.
#pragma once

#include "geglu_timestep_quantize/problem.h"

#include <cuda_runtime_api.h>

namespace quest {

/// Put the kernel on \p stream; allocates nothing and waits for nothing.
///
/// \return cudaErrorInvalidValue for more than 2^31 - 1 elements a sample, else what the launch returns.
cudaError_t launchGegluTimestepQuantize(const GegluTimestepQuantizeProblem& problem, cudaStream_t stream) noexcept;

}  // namespace quest
