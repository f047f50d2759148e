// Denoise a batch with an engine of a workspace. docs/embedding.md shows how to make its input and to see its result.
#include <quest_deploy/denoiser.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr char kUsage[] =
    "usage: denoise WORKSPACE BACKEND SCHEDULE SAMPLE RESULT [options]\n"
    "  BACKEND              tensorrt, or tensorrt-rtx where this program was built for it\n"
    "  SCHEDULE             a table that `quest-deploy schedule` wrote\n"
    "  SAMPLE, RESULT       files of float32: Gaussian noise, and what becomes of it, [batch, ...]\n"
    "  --condition NAME=FILE   an input of the model besides the sample, [rows, ...]; may be repeated; image_condition is what the\n"
    "                       model's sample has behind the latents, where it inpaints or edits an image\n"
    "  --noise FILE         fresh noise, [steps, batch, ...], for schedules that add some\n"
    "  --batch N            samples [1]\n"
    "  --guidance G         classifier-free guidance [none]; where it is above 1, rows are twice the batch, the empty conditions first;\n"
    "                       of a model that embeds it, its weight\n"
    "  --image-guidance G   the image's weight, of a model that edits one; under guidance rows are then three times the batch:\n"
    "                       all conditions, the empty text with the image, the empty text with zeros for the image\n"
    "  --sample-shape CxHxW the engine's sample's, where it takes several\n"
    "  --condition-shape NAME=CxHxW   another input's, where it takes several; may be repeated\n"
    "  --plugins FILE       the plugin library, where the engine needs it\n"
    "  --device N           the GPU [0]\n"
    "  --no-cuda-graph      launch each kernel by itself\n";
struct Usage : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Arguments {
    std::string workspace, backend, schedule, sample, result, noise;
    std::map<std::string, std::string> conditions;
    quest_deploy::EngineOptions engine;
    quest_deploy::DenoiserOptions denoiser;
};

/// `text`, all of it, as the value of an option.
template <typename Number>
Number parse_number(const std::string& option, const std::string& text) {
    Number value{};
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    const bool whole = error == std::errc() && end == text.data() + text.size();
    if (!whole || !std::isfinite(static_cast<double>(value))) throw Usage(option + ": expected a number, not " + text);
    return value;
}

quest_deploy::Shape parse_shape(const std::string& option, const std::string& text) {
    quest_deploy::Shape shape;
    for (std::size_t at = 0; at <= text.size();) {
        const std::size_t end = std::min(text.find('x', at), text.size());
        shape.push_back(parse_number<std::int64_t>(option, text.substr(at, end - at)));
        at = end + 1;
    }
    return shape;
}

Arguments parse(std::vector<std::string> words) {
    Arguments found;
    std::vector<std::string> places;
    for (std::size_t i = 0; i < words.size(); ++i) {
        const std::string word = words[i];
        const auto value = [&]() -> const std::string& {
            if (i + 1 == words.size()) throw Usage(word + " needs a value");
            return words[++i];
        };
        const auto named = [&](const std::string& expected) {
            const std::string given = value();
            const std::size_t equals = given.find('=');
            if (equals == std::string::npos) throw Usage(word + ": expected NAME=" + expected + ", not " + given);
            return std::pair(given.substr(0, equals), given.substr(equals + 1));
        };
        if (word.rfind("--", 0) != 0) places.push_back(word);
        else if (word == "--condition") {
            const auto [name, file] = named("FILE");
            found.conditions[name] = file;
        } else if (word == "--condition-shape") {
            const auto [name, shape] = named("CxHxW");
            found.denoiser.condition_shapes[name] = parse_shape(word, shape);
        } else if (word == "--noise") found.noise = value();
        else if (word == "--batch") found.denoiser.batch = parse_number<std::int64_t>(word, value());
        else if (word == "--guidance") found.denoiser.guidance = parse_number<float>(word, value());
        else if (word == "--image-guidance") found.denoiser.image_guidance = parse_number<float>(word, value());
        else if (word == "--sample-shape") found.denoiser.sample_shape = parse_shape(word, value());
        else if (word == "--plugins") found.engine.plugin_library = value();
        else if (word == "--device") found.engine.device = parse_number<int>(word, value());
        else if (word == "--no-cuda-graph") found.denoiser.cuda_graph = false;
        else throw Usage("unknown option " + word);
    }
    if (places.size() != 5) throw Usage("expected five places, found " + std::to_string(places.size()));
    found.workspace = places[0], found.backend = places[1], found.schedule = places[2], found.sample = places[3], found.result = places[4];
    return found;
}

std::vector<float> read_floats(const std::string& path) {
    std::ifstream stream(path, std::ios::binary | std::ios::ate);
    const std::streamoff bytes = stream ? static_cast<std::streamoff>(stream.tellg()) : -1;
    if (bytes < 0 || bytes % 4 != 0) throw quest_deploy::Error(path + ": expected a file of float32 values");
    std::vector<float> values(static_cast<std::size_t>(bytes) / 4);
    if (!stream.seekg(0).read(reinterpret_cast<char*>(values.data()), bytes)) throw quest_deploy::Error(path + " cannot be read");
    return values;
}

void write_floats(const std::string& path, const std::vector<float>& values) {
    const std::string temporary = path + ".part";
    std::ofstream stream(temporary, std::ios::binary);
    stream.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size() * 4));
    stream.close();
    if (stream && std::rename(temporary.c_str(), path.c_str()) == 0) return;
    std::remove(temporary.c_str());
    throw quest_deploy::Error(path + " cannot be written");
}

/// Sets `exit_code` to 1 once the input is read: what fails then is the job.
void denoise(const Arguments& arguments, int& exit_code) {
    using Clock = std::chrono::steady_clock;
    const auto workspace = quest_deploy::Workspace::open(arguments.workspace);
    const auto record = workspace.engine(arguments.backend);
    const auto schedule = quest_deploy::Schedule::load(arguments.schedule);
    std::vector<float> sample = read_floats(arguments.sample);
    const std::vector<float> noise = arguments.noise.empty() ? std::vector<float>() : read_floats(arguments.noise);
    std::map<std::string, std::vector<float>> conditions;
    for (const auto& [name, file] : arguments.conditions) conditions[name] = read_floats(file);
    exit_code = 1;
    const auto engine = quest_deploy::Engine::open(record, arguments.engine);
    quest_deploy::Denoiser denoiser(engine, schedule, arguments.denoiser);
    for (const auto& [name, values] : conditions) denoiser.set_condition(name, values);
    for (float& value : sample) value *= schedule.init_noise_sigma;
    const auto start = Clock::now();
    denoiser.run(sample, noise);
    const std::chrono::duration<double> seconds = Clock::now() - start;
    write_floats(arguments.result, sample);
    std::cout << workspace.model() << ": " << arguments.denoiser.batch << " samples, " << schedule.steps.size() << " steps in "
              << 1e3 * seconds.count() << " ms, copies included\n";
}

}  // namespace

int main(int count, char** words) {
    int exit_code = 2;
    try {
        denoise(parse(std::vector<std::string>(words + 1, words + count)), exit_code);
        return 0;
    } catch (const Usage& error) {
        std::cerr << "error: " << error.what() << "\n" << kUsage;
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << "\n";
    }
    return exit_code;
}
