#include "quest_deploy/schedule.h"

#include <algorithm>
#include <cmath>

#include "arithmetic.h"
#include "files.h"

namespace quest_deploy {

namespace {

constexpr char kFormat[] = "quest-deploy schedule";
constexpr std::int64_t kVersion = 2;
constexpr char kRepair[] = "write it again with `quest-deploy schedule`";

std::vector<float> numbers(const Json& list) {
    std::vector<float> found;
    for (const Json& entry : list.as_array()) found.push_back(static_cast<float>(entry.as_number()));
    return found;
}

void check_scales(const std::vector<float>& scales, std::size_t most, const std::string& where) {
    if (scales.empty() || scales.size() > most)
        throw Error(where + "1 to " + std::to_string(most) + " scales, found " + std::to_string(scales.size()));
    if (!std::all_of(scales.begin(), scales.end(), [](float x) { return std::isfinite(x); })) throw Error(where + "finite numbers");
}

}  // namespace

Schedule Schedule::load(const std::filesystem::path& path) {
    const Json content = parse_document(path, read_file(path, kRepair, kMaxJsonBytes), kFormat, kVersion, kRepair);
    Schedule schedule;
    schedule.init_noise_sigma = static_cast<float>(content.at("init_noise_sigma").as_number());
    for (const Json& entry : content.at("steps").as_array()) {
        ScheduleStep step;
        step.timestep = static_cast<float>(entry.at("timestep").as_number());
        step.input_scale = static_cast<float>(entry.at("input_scale").as_number());
        step.noise_scale = static_cast<float>(entry.at("noise_scale").as_number());
        step.sample_scales = numbers(entry.at("sample_scales"));
        step.prediction_scales = numbers(entry.at("prediction_scales"));
        schedule.steps.push_back(std::move(step));
    }
    try {
        schedule.check();
    } catch (const Error& error) {
        throw Error(path.string() + ": " + error.what() + "; " + kRepair);
    }
    return schedule;
}

void Schedule::check() const {
    if (steps.empty()) throw Error("a schedule without steps");
    for (std::size_t i = 0; i < steps.size(); ++i) {
        const ScheduleStep& step = steps[i];
        const std::string where = "step " + std::to_string(i) + " of the schedule: expected ";
        const std::size_t most = std::min(kMaxHistory, i + 1);
        check_scales(step.sample_scales, most, where);
        check_scales(step.prediction_scales, most, where);
        check_scales({step.timestep, step.input_scale, step.noise_scale, init_noise_sigma}, 4, where);
    }
}

std::size_t Schedule::history() const {
    std::size_t most = 1;
    for (const ScheduleStep& step : steps) most = std::max({most, step.sample_scales.size(), step.prediction_scales.size()});
    return most;
}

bool Schedule::noisy() const {
    return std::any_of(steps.begin(), steps.end(), [](const ScheduleStep& step) { return step.noise_scale != 0; });
}

std::vector<StepScales> step_scales(const Schedule& schedule) {
    std::vector<StepScales> found;
    for (const ScheduleStep& step : schedule.steps) {
        StepScales scales{};
        scales.timestep = step.timestep;
        scales.input_scale = step.input_scale;
        scales.noise_scale = step.noise_scale;
        scales.samples = static_cast<int>(step.sample_scales.size());
        scales.predictions = static_cast<int>(step.prediction_scales.size());
        std::copy(step.sample_scales.begin(), step.sample_scales.end(), scales.sample_scales);
        std::copy(step.prediction_scales.begin(), step.prediction_scales.end(), scales.prediction_scales);
        found.push_back(scales);
    }
    return found;
}

void denoise_on_host(const Schedule& schedule, const Predict& predict, std::vector<float>& sample, float guidance,
                     const std::vector<float>& noise, float image_guidance) {
    schedule.check();
    const std::size_t count = sample.size(), length = schedule.history();
    const std::size_t wanted = schedule.noisy() ? count * schedule.steps.size() : 0;
    if (noise.size() != wanted)
        throw Error("expected " + std::to_string(wanted) + " values of noise, found " + std::to_string(noise.size()));
    const int rows = rows_of_sample(guidance, image_guidance);
    std::vector<float> input(static_cast<std::size_t>(rows) * count), prediction(input.size()), samples(length * count),
        predictions(length * count);
    std::copy(sample.begin(), sample.end(), samples.begin());
    const std::vector<StepScales> table = step_scales(schedule);
    for (std::size_t step = 0; step < table.size(); ++step) {
        const float* current = samples.data() + step % length * count;
        for (std::size_t i = 0; i < input.size(); ++i) input[i] = table[step].input_scale * current[i % count];
        predict(input, table[step].timestep, prediction);
        if (prediction.size() != input.size())
            throw Error("expected " + std::to_string(input.size()) + " predicted values, found " + std::to_string(prediction.size()));
        float* newest = predictions.data() + step % length * count;
        float* next =
            samples.data() + (step + 1) % length * count;  // where the oldest sample that is read may lie: read first, then written
        for (std::size_t i = 0; i < count; ++i) {
            newest[i] = guided(prediction.data() + i, count, rows, guidance, image_guidance);
            const float fresh = noise.empty() ? 0 : noise[step * count + i];
            next[i] = next_sample(table[step], samples.data() + i, predictions.data() + i, static_cast<int>(length), count,
                                  static_cast<int>(step), fresh);
        }
    }
    const float* last = samples.data() + table.size() % length * count;
    std::copy(last, last + count, sample.begin());
}

}  // namespace quest_deploy
