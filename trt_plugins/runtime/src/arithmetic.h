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

/// Classifier-free guidance.
QUEST_DEPLOY_BOTH inline float guided(float unconditional, float conditional, float guidance) {
    return unconditional + guidance * (conditional - unconditional);
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
