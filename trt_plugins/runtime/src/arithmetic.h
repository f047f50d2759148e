// One step's arithmetic, for the host and for the GPU.
#pragma once

#include <cstddef>
#include <vector>

#include "quest_deploy/schedule.h"

#ifdef __CUDACC__
#define QUEST_DEPLOY_BOTH __host__ __device__
#else
#define QUEST_DEPLOY_BOTH
#endif

namespace quest_deploy {

/// A ScheduleStep of fixed size, as the GPU reads it.
struct StepScales {
    float timestep, input_scale, noise_scale;
    int samples, predictions;  ///< how many of them it reads
    float sample_scales[Schedule::kMaxHistory], prediction_scales[Schedule::kMaxHistory];
};

/// A schedule's steps as the GPU reads them.
std::vector<StepScales> step_scales(const Schedule& schedule);

/// How many rows of the model's batch a sample takes under guidance; see DenoiserOptions.
QUEST_DEPLOY_BOTH inline int rows_of_sample(float guidance, float image_guidance) {
    if (!(guidance > 1)) return 1;
    return image_guidance != 0 ? 3 : 2;
}

/// Classifier-free guidance of one value, from its predictions in `rows` rows, `apart` values apart: without and with the condition; of
/// an edited image with all, without text, and without text and image.
QUEST_DEPLOY_BOTH inline float guided(const float* predictions, std::size_t apart, int rows, float guidance, float image_guidance) {
    if (rows == 1) return predictions[0];
    if (rows == 2) return predictions[0] + guidance * (predictions[apart] - predictions[0]);
    const float text = predictions[0], image = predictions[apart], nothing = predictions[2 * apart];
    return nothing + guidance * (text - image) + image_guidance * (image - nothing);
}

/// The sample after step number `step`; `samples` and `predictions` hold those of the last `length` steps, each `count` values apart,
/// that of step s in place s modulo `length`.
QUEST_DEPLOY_BOTH inline float next_sample(const StepScales& scales, const float* samples, const float* predictions, int length,
                                           std::size_t count, int step, float noise) {
    float next = scales.noise_scale * noise;
    for (int back = 0; back < scales.samples; ++back)
        next += scales.sample_scales[back] * samples[static_cast<std::size_t>((step - back) % length) * count];
    for (int back = 0; back < scales.predictions; ++back)
        next += scales.prediction_scales[back] * predictions[static_cast<std::size_t>((step - back) % length) * count];
    return next;
}

}  // namespace quest_deploy
