#pragma once

#include <cuda_runtime_api.h>

#include "arithmetic.h"

namespace quest_deploy {

/// What the kernels of a step work on, all in the GPU's memory. The number of the step lies there too, so that one recording of a step
/// serves them all.
struct StepBuffers {
    const StepScales* table;
    int* step;
    int length;              ///< of the histories, in steps
    std::size_t count;       ///< values of one batch of samples
    std::size_t rows;        ///< samples that the engine gets, the batch or twice that
    bool halves;             ///< whether it gets each sample twice
    float guidance;
    float *samples, *predictions;  ///< the histories, [length, count]
    float *input, *timestep;       ///< the engine's, [rows, ...] and [rows]
    const float* output;           ///< the engine's, [rows, ...]
    const float* noise;            ///< [steps, count], or null
};

/// Write the engine's inputs.
cudaError_t launch_prepare(const StepBuffers& buffers, cudaStream_t stream);
/// Take the engine's output, write the next sample and go on to the next step.
cudaError_t launch_update(const StepBuffers& buffers, cudaStream_t stream);

}  // namespace quest_deploy
