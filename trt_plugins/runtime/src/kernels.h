#pragma once

#include <cuda_runtime_api.h>

#include "arithmetic.h"

namespace quest_deploy {

/// What the kernels of a step work on, all in the GPU's memory. The number of the step lies there too, so that one recording of a step
/// serves them all.
struct StepBuffers {
    const StepScales* table;
    int* step;
    int length;                         ///< of the histories, in steps
    std::size_t batch;                  ///< samples
    std::size_t each;                   ///< values of one sample, the first ones of a row of the engine's input and of its output
    std::size_t input_row, output_row;  ///< values of one row of those: behind the sample's are an image's, or a variance's
    int rows;                           ///< of the engine's batch that a sample takes, `batch` rows apart
    float guidance, image_guidance;
    float *samples, *predictions;  ///< the histories, [length, batch, each]
    float *input, *timestep;       ///< the engine's, [rows * batch, input_row] and [rows * batch]
    const float* output;           ///< the engine's, [rows * batch, output_row]
    const float* noise;            ///< [steps, batch, each], or null

    QUEST_DEPLOY_BOTH std::size_t count() const { return batch * each; }
};

/// Write value number `i` of the engine's inputs.
QUEST_DEPLOY_BOTH inline void prepare_value(const StepBuffers& b, int step, std::size_t i) {
    const StepScales& scales = b.table[step];
    const auto rows = static_cast<std::size_t>(b.rows);
    if (i < b.count()) {
        const float scaled = scales.input_scale * b.samples[static_cast<std::size_t>(step % b.length) * b.count() + i];
        for (std::size_t row = 0; row < rows; ++row) b.input[(row * b.batch + i / b.each) * b.input_row + i % b.each] = scaled;
    }
    if (i < rows * b.batch) b.timestep[i] = scales.timestep;
}

/// Take value number `i` of the engine's output and write that of the next sample. The next sample's place may be that of the oldest one
/// that the step reads: each value is read before it is written, by the same thread.
QUEST_DEPLOY_BOTH inline void update_value(const StepBuffers& b, int step, std::size_t i) {
    const std::size_t count = b.count();
    float* newest = b.predictions + static_cast<std::size_t>(step % b.length) * count;
    float* next = b.samples + static_cast<std::size_t>((step + 1) % b.length) * count;
    const float* predictions = b.output + i / b.each * b.output_row + i % b.each;
    newest[i] = guided(predictions, b.batch * b.output_row, b.rows, b.guidance, b.image_guidance);
    const float fresh = b.noise == nullptr ? 0.0F : b.noise[static_cast<std::size_t>(step) * count + i];
    next[i] = next_sample(b.table[step], b.samples + i, b.predictions + i, b.length, count, step, fresh);
}

/// Write the engine's inputs.
cudaError_t launch_prepare(const StepBuffers& buffers, cudaStream_t stream);
/// Take the engine's output, write the next sample and go on to the next step.
cudaError_t launch_update(const StepBuffers& buffers, cudaStream_t stream);

}  // namespace quest_deploy
