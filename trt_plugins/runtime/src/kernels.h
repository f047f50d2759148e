#pragma once

#include <cuda_runtime_api.h>

#include "arithmetic.h"

namespace quest_deploy {

/// What the kernels of a step work on, all in the GPU's memory. The number of the step lies there too, so that one recording of a step
/// serves them all.
struct StepBuffers {
    const StepScales* table;
    int* step;
    int length;         ///< of the histories, in steps
    std::size_t count;  ///< values of one batch of samples
    std::size_t rows;   ///< samples that the engine gets, the batch or twice that
    bool halves;        ///< whether it gets each sample twice
    float guidance;
    float *samples, *predictions;  ///< the histories, [length, count]
    float *input, *timestep;       ///< the engine's, [rows, ...] and [rows]
    const float* output;           ///< the engine's, [rows, ...]
    const float* noise;            ///< [steps, count], or null
};

/// Write value number `i` of the engine's inputs.
QUEST_DEPLOY_BOTH inline void prepare_value(const StepBuffers& b, int step, std::size_t i) {
    const StepScales& scales = b.table[step];
    if (i < b.count) {
        const float scaled = scales.input_scale * b.samples[static_cast<std::size_t>(step % b.length) * b.count + i];
        b.input[i] = scaled;
        if (b.halves) b.input[b.count + i] = scaled;
    }
    if (i < b.rows) b.timestep[i] = scales.timestep;
}

/// Take value number `i` of the engine's output and write that of the next sample. The next sample's place may be that of the oldest one
/// that the step reads: each value is read before it is written, by the same thread.
QUEST_DEPLOY_BOTH inline void update_value(const StepBuffers& b, int step, std::size_t i) {
    float* newest = b.predictions + static_cast<std::size_t>(step % b.length) * b.count;
    float* next = b.samples + static_cast<std::size_t>((step + 1) % b.length) * b.count;
    newest[i] = b.halves ? guided(b.output[i], b.output[b.count + i], b.guidance) : b.output[i];
    const float fresh = b.noise == nullptr ? 0.0F : b.noise[static_cast<std::size_t>(step) * b.count + i];
    next[i] = next_sample(b.table[step], b.samples + i, b.predictions + i, b.length, b.count, step, fresh);
}

/// Write the engine's inputs.
cudaError_t launch_prepare(const StepBuffers& buffers, cudaStream_t stream);
/// Take the engine's output, write the next sample and go on to the next step.
cudaError_t launch_update(const StepBuffers& buffers, cudaStream_t stream);

}  // namespace quest_deploy
