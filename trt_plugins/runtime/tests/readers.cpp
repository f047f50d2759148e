// The runtime's readers under the sanitizers, for tests/trt_plugins/test_cpp_readers.py. KIND is json, manifest, engine, schedule, or
// planted, whose defects show that the sanitizers see them.
//
//   readers KIND show FOLDER...             one line each: "read" and what, or "refused" and why
//   readers KIND threads FOLDER...          the same by several threads at once, each of which must find the same
//   readers KIND mutate SEED RUNS FILE...   read so many mutations of the files, and count what is read
//
// Built with QUEST_LIBFUZZER it is clang's fuzzer instead, of the kind that the environment's QUEST_READER names.
#include <array>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <map>
#include <random>
#include <sstream>
#include <thread>

#include "../src/files.h"
#include "../src/sha256.h"
#include "quest_deploy/schedule.h"
#include "quest_deploy/workspace.h"

namespace {

using namespace quest_deploy;
namespace fs = std::filesystem;

constexpr int kThreads = 4;
constexpr std::size_t kSample = 6;

std::string text_of(const fs::path& path) {
    const std::vector<char> content = read_file(path, "", kMaxJsonBytes);
    return {content.begin(), content.end()};
}

/// What the canonical text says is what the document said.
std::string read_json(const fs::path& folder) {
    const std::string canonical = Json::parse(text_of(folder / "value.json"), "value", "").canonical();
    if (Json::parse(canonical, "canonical", "").canonical() != canonical) std::abort();
    return canonical;
}

std::string read_manifest(const fs::path& folder) {
    const Workspace workspace = Workspace::open(folder);
    std::string found = workspace.model();
    for (const char* backend : {"tensorrt", "tensorrt-rtx"}) {
        try {
            found += " " + workspace.engine(backend).plan_sha256;
        } catch (const Error&) {
            found += " none";
        }
    }
    return found;
}

std::string read_engine(const fs::path& folder) {
    const EngineRecord record = EngineRecord::open(folder);
    std::ostringstream found;
    found << record.backend << " " << record.runtime_version << " " << record.graph_sha256 << " " << record.hardware_compatibility_level
          << " " << record.version_compatible << " " << record.weight_streaming << " " << record.weight_streaming_budget.value_or(-1) << " "
          << record.plugin_library << " " << record.plugin_sha256 << " " << record.plan_sha256 << " " << record.read_plan().size();
    for (const std::string& capability : record.compute_capabilities) found << " " << capability;
    try {
        check_runtime(record, record.backend, "10.16.1.11");
        check_gpu(record, 89);
    } catch (const Error&) {  // another TensorRT's, or another GPU's
    }
    return found.str();
}

std::string read_schedule(const fs::path& folder) {
    const Schedule schedule = Schedule::load(folder / "schedule.json");
    std::ostringstream found;
    found << std::setprecision(9) << schedule.init_noise_sigma;
    for (const ScheduleStep& step : schedule.steps) {
        found << " | " << step.timestep << " " << step.input_scale << " " << step.noise_scale;
        for (const auto* scales : {&step.sample_scales, &step.prediction_scales}) {
            found << " :";
            for (const float scale : *scales) found << " " << scale;
        }
    }
    std::vector<float> sample(kSample, 1.0F);
    const std::vector<float> noise(schedule.noisy() ? kSample * schedule.steps.size() : 0, 0.5F);
    denoise_on_host(schedule, [](const std::vector<float>& input, float, std::vector<float>& out) { out = input; }, sample, 2, noise);
    return found.str();
}

int calls = 0;  // of the planted reader, by several threads

/// Beyond its end, an overflow and a race, for the sanitizers.
std::string read_planted(const fs::path& folder) {
    const std::string text = text_of(folder / "planted.txt");
    ++calls;
    const std::vector<char> content(text.begin(), text.end());
    if (content.size() > 1 && content[0] == '[') return std::string(1, content.data()[content.size()]);
    int sum = 1;
    for (const char byte : content) sum *= byte;
    return std::to_string(sum);
}

struct Kind {
    const char* file;
    std::string (*read)(const fs::path& folder);
};

const Kind& kind_of(const std::string& name) {
    static const std::map<std::string, Kind> kinds{{"json", {"value.json", read_json}},
                                                   {"manifest", {"manifest.json", read_manifest}},
                                                   {"engine", {"engine.json", read_engine}},
                                                   {"schedule", {"schedule.json", read_schedule}},
                                                   {"planted", {"planted.txt", read_planted}}};
    return kinds.at(name);
}

std::string show(const Kind& kind, const fs::path& folder) {
    try {
        return "read " + kind.read(folder);
    } catch (const Error& error) {
        return std::string("refused ") + error.what();
    }
}

/// A folder of this process, as long as it runs.
const fs::path& scratch() {
    struct Folder {
        fs::path path;
        Folder() {
            std::string name = (fs::temp_directory_path() / "quest-readers-XXXXXX").string();
            if (mkdtemp(name.data()) == nullptr) std::abort();
            path = name;
        }
        ~Folder() { fs::remove_all(path); }
        Folder(const Folder&) = delete;
        Folder& operator=(const Folder&) = delete;
    };
    static const Folder folder;
    return folder.path;
}

bool read_text(const Kind& kind, const std::string& text) {
    std::ofstream(scratch() / kind.file, std::ios::binary) << text;
    return show(kind, scratch()).rfind("read", 0) == 0;
}

/// The document with its own hash put right, so that what is behind that check is reached.
std::string sealed(const std::string& text) {
    try {
        const Json document = Json::parse(text, "", "");
        if (document.kind() != Json::Kind::object) return text;
        std::string canonical = document.canonical("sha256");
        const std::string digest = sha256(canonical.data(), canonical.size());
        canonical.pop_back();
        return canonical + (canonical.size() > 1 ? "," : "") + "\"sha256\":\"" + digest + "\"}";
    } catch (const Error&) {
        return text;
    }
}

/// Whether the bytes are read, as they are or with their hash put right.
bool read_bytes(const Kind& kind, const std::string& text) {
    const bool read = read_text(kind, text);
    return read_text(kind, sealed(text)) || read;
}

}  // namespace

#ifdef QUEST_LIBFUZZER

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
    static const Kind& kind = kind_of(std::getenv("QUEST_READER"));
    read_bytes(kind, std::string(data, data + size));
    return 0;
}

#else

namespace {

std::string mutated(std::string text, std::mt19937_64& random) {
    static constexpr std::array<const char*, 20> kParts = {"{",
                                                           "}",
                                                           "[",
                                                           "]",
                                                           ",",
                                                           ":",
                                                           "\"",
                                                           "\\",
                                                           "\\u0000",
                                                           "\\ud800",
                                                           "-1",
                                                           "0",
                                                           "1e9",
                                                           "1e-320",
                                                           "null",
                                                           "true",
                                                           "{}",
                                                           "[[[[]]]]",
                                                           "99999999999999999999",
                                                           "\xff"};
    const auto below = [&](std::size_t count) { return static_cast<std::size_t>(random() % count); };
    for (std::size_t left = 1 + below(4); left != 0 && !text.empty(); --left) {
        const std::size_t at = below(text.size()), length = 1 + below(16);
        switch (below(6)) {
            case 0:
                text[at] = static_cast<char>(text[at] ^ 1 << below(8));
                break;
            case 1:
                text.erase(at, length);
                break;
            case 2:
                text.insert(at, text.substr(below(text.size()), length));
                break;
            case 3:
                text.replace(at, 1, kParts[below(kParts.size())]);
                break;
            case 4:
                text.insert(at, kParts[below(kParts.size())]);
                break;
            default:  // a number's digit, which leaves the document one
                for (std::size_t i = at; i < text.size(); ++i)
                    if (text[i] >= '0' && text[i] <= '9') {
                        text[i] = static_cast<char>('0' + below(10));
                        break;
                    }
        }
    }
    return text;
}

void mutate(const Kind& kind, std::uint64_t seed, int runs, const std::vector<std::string>& files) {
    std::mt19937_64 random(seed);
    std::vector<std::string> corpus;
    for (const std::string& file : files) corpus.push_back(text_of(file));
    int read = 0;
    for (int i = 0; i < runs; ++i) read += read_bytes(kind, mutated(corpus[random() % corpus.size()], random)) ? 1 : 0;
    std::cout << runs << " mutations, " << read << " read\n";
}

int run(const std::vector<std::string>& words) {
    const Kind& kind = kind_of(words.at(0));
    const std::string& command = words.at(1);
    if (command == "mutate") {
        mutate(kind, std::stoull(words.at(2)), std::stoi(words.at(3)), {words.begin() + 4, words.end()});
        return 0;
    }
    const std::vector<std::string> folders(words.begin() + 2, words.end());
    std::vector<std::vector<std::string> > found(command == "threads" ? kThreads : 1);
    std::vector<std::thread> threads;
    for (auto& lines : found)
        threads.emplace_back([&] {
            for (const std::string& folder : folders) lines.push_back(show(kind, folder));
        });
    for (std::thread& thread : threads) thread.join();
    for (const std::string& line : found[0]) std::cout << line << "\n";
    for (const auto& lines : found)
        if (lines != found[0]) throw std::logic_error("one thread read something else than another");
    return 0;
}

}  // namespace

int main(int count, char** words) {
    try {
        return run({words + 1, words + count});
    } catch (const std::exception& error) {  // none may reach a caller but Error
        std::cerr << "an exception that is no Error: " << error.what() << "\n";
        return 3;
    }
}

#endif
