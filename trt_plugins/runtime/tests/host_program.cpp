// What tests/trt_plugins/test_cpp_runtime.py runs: the parts of the runtime that need neither CUDA nor TensorRT.
//
//   host_program sha256 FILE
//   host_program canonical FILE                    the JSON of FILE as it is hashed
//   host_program engine WORKSPACE BACKEND          an engine's record, its plan read and its hash checked
//   host_program runs FOLDER BACKEND VERSION CC    whether that TensorRT and that GPU run the engine in FOLDER
//   host_program plugin FOLDER LIBRARY             whether LIBRARY is the engine's
//   host_program denoise SCHEDULE SAMPLE RESULT GUIDANCE [NOISE]
#include <cmath>
#include <fstream>
#include <iostream>
#include <iterator>

#include "../src/files.h"
#include "../src/json.h"
#include "../src/sha256.h"
#include "quest_deploy/schedule.h"
#include "quest_deploy/workspace.h"

namespace {

std::vector<float> read_floats(const std::string& path) {
    const std::vector<char> bytes = quest_deploy::read_file(path, "write it");
    std::vector<float> values(bytes.size() / sizeof(float));
    std::copy(bytes.begin(), bytes.end(), reinterpret_cast<char*>(values.data()));
    return values;
}

/// Stands for a UNet: not linear, and it depends on the timestep and, under guidance, on which half a sample is in.
void fake_model(const std::vector<float>& input, float timestep, std::vector<float>& prediction) {
    for (std::size_t i = 0; i < input.size(); ++i) {
        const float condition = i >= input.size() / 2 ? 0.25F : 0.0F;
        prediction[i] = input[i] / (1 + std::fabs(input[i])) + 0.0005F * timestep + condition;
    }
}

int run(const std::vector<std::string>& words) {
    using namespace quest_deploy;
    const std::string& command = words.at(0);
    if (command == "sha256") {
        const std::vector<char> content = read_file(words.at(1), "");
        std::cout << sha256(content.data(), content.size()) << "\n";
    } else if (command == "canonical") {
        const std::vector<char> content = read_file(words.at(1), "");
        std::cout << Json::parse(std::string(content.begin(), content.end()), words.at(1), "write it again").canonical() << "\n";
    } else if (command == "engine") {
        const Workspace workspace = Workspace::open(words.at(1));
        const EngineRecord record = workspace.engine(words.at(2));
        std::cout << workspace.model() << " " << record.backend << " " << record.runtime_version << " " << record.compute_capabilities.at(0)
                  << " " << record.read_plan().size() << "\n";
    } else if (command == "runs") {
        const EngineRecord record = EngineRecord::open(words.at(1));
        check_runtime(record, words.at(2), words.at(3));
        check_gpu(record, std::stoi(words.at(4)));
    } else if (command == "plugin") {
        EngineRecord::open(words.at(1)).check_plugin(words.at(2));
    } else if (command == "denoise") {
        const Schedule schedule = Schedule::load(words.at(1));
        std::vector<float> sample = read_floats(words.at(2));
        for (float& value : sample) value *= schedule.init_noise_sigma;
        denoise_on_host(schedule, fake_model, sample, std::stof(words.at(4)),
                        words.size() > 5 ? read_floats(words[5]) : std::vector<float>());
        std::ofstream(words.at(3), std::ios::binary)
            .write(reinterpret_cast<const char*>(sample.data()), static_cast<std::streamsize>(sample.size() * sizeof(float)));
    } else {
        throw Error("unknown command " + command);
    }
    return 0;
}

}  // namespace

int main(int count, char** words) {
    try {
        return run({words + 1, words + count});
    } catch (const quest_deploy::Error& error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
}
