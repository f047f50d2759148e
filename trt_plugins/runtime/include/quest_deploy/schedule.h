#pragma once

#include <cstddef>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "quest_deploy/error.h"

namespace quest_deploy {

/// One call of the model, and what it makes of the sample:
///
///     prediction  = model(input_scale * sample, timestep)
///     next sample = sample_scales[0] * sample + sample_scales[1] * the one before + ...
///                 + prediction_scales[0] * prediction + prediction_scales[1] * the one before + ...
///                 + noise_scale * fresh Gaussian noise
struct ScheduleStep {
    float timestep = 0;
    float input_scale = 1;
    std::vector<float> sample_scales;      ///< the newest sample's first
    std::vector<float> prediction_scales;  ///< the newest prediction's first
    float noise_scale = 0;
};

/// A scheduler as a table. `quest-deploy schedule` writes one for any of diffusers' schedulers that is linear
/// (quest_deploy/serving/schedule.py).
struct Schedule {
    float init_noise_sigma = 1;  ///< what the first sample's Gaussian noise is multiplied by
    std::vector<ScheduleStep> steps;

    static constexpr std::size_t kMaxHistory = 8;

    /// Read a table from its JSON file; throws Error where it is missing or damaged.
    static Schedule load(const std::filesystem::path& path);
    /// Throws Error for a table that no loop can run: none or too many scales, numbers that are not finite.
    void check() const;
    /// How many samples, or predictions, a step reads at most, the newest included.
    std::size_t history() const;
    /// Whether any step adds noise.
    bool noisy() const;
};

/// What a model predicts: `input` holds rows * elements values, `prediction` is to get as many.
using Predict = std::function<void(const std::vector<float>& input, float timestep, std::vector<float>& prediction)>;

/// The denoising loop in the host's memory, around any model: what Denoiser runs on the GPU, step for step.
///
/// `sample`: [batch, ...], changed in place. `guidance`: where it is above 1, the model gets the sample twice, [2 * batch, ...], and
/// predicts without the condition for the first half and with it for the second. `noise`: [steps, batch, ...] of Gaussian noise where the
/// schedule adds some, else empty. `image_guidance`: where it is not 0, the sample edits an image (instruct-pix2pix); with a `guidance`
/// above 1 the model then gets it three times, for all conditions, for the image without the text, and for neither. What the model reads
/// beside the sample, such as an image, is `predict`'s. Throws Error for sizes that do not fit.
void denoise_on_host(const Schedule& schedule, const Predict& predict, std::vector<float>& sample, float guidance = 1,
                     const std::vector<float>& noise = {}, float image_guidance = 0);

}  // namespace quest_deploy
