// Runs Denoiser on the CPU, for tests/trt_plugins/test_cpp_runtime.py: the few CUDA functions that it calls, on the host's memory, and a
// small model in the engine's place. Work put on a stream is done when something waits for it, as late as CUDA may do it, or kept while a
// graph is recorded; so what does not wait for another stream's work comes before it.
//
//   emulated SCHEDULE SAMPLE RESULT GUIDANCE GRAPH IMAGE_GUIDANCE IMAGE VARIANCE CONTROL SCALE EMBEDS [NOISE]
//
// Two samples of 5 x 4; GRAPH is 0 or 1; IMAGE and VARIANCE are the channels that the engine reads and predicts beside the sample's.
// CONTROL is what the sample's first value, with the timestep's thousandth, is multiplied by in the residual of each step; 0 for no such
// work. SCALE is an IP-Adapter's, whose tokens are row r's tenth; 0 for none. EMBEDS is 1 for an engine that embeds the guidance and reads
// a vector of three values for each row besides, 0.01 r + 0.02 i.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "../src/files.h"
#include "../src/kernels.h"
#include "quest_deploy/denoiser.h"

namespace {

using Work = std::function<void()>;

thread_local std::vector<Work>* recording = nullptr;
std::map<cudaStream_t, std::vector<Work>> streams;
std::mutex streams_mutex;
std::atomic<int> launches = 0, recordings = 0;
std::int64_t image_channels = 0, variance_channels = 0;
bool embeds = false;
constexpr char kPooled[] = "pooled_projections";
constexpr char kMiddle[] = "mid_block_additional_residual", kTokens[] = "ip_adapter_tokens", kScale[] = "ip_adapter_scale";
std::atomic<int> steps_until_failure = -1;  // where not negative, so many steps are launched before one fails

cudaError_t submit(cudaStream_t stream, const Work& work) {
    const std::scoped_lock lock(streams_mutex);
    (recording == nullptr ? streams[stream] : *recording).push_back(work);
    return cudaSuccess;
}

void finish(cudaStream_t stream) {
    std::vector<Work> all;
    {
        const std::scoped_lock lock(streams_mutex);
        all = std::exchange(streams[stream], {});
    }
    for (const Work& work : all) work();
}

std::vector<Work>* works(void* handle) { return static_cast<std::vector<Work>*>(handle); }

}  // namespace

extern "C" {

const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
    if (recording != nullptr) return cudaErrorStreamCaptureUnsupported;
    *memory = std::malloc(bytes);
    std::memset(*memory, 0x7F, bytes);  // large numbers: what is not written must not be read
    return cudaSuccess;
}
cudaError_t cudaFree(void* memory) { return std::free(memory), cudaSuccess; }
cudaError_t cudaMemset(void* memory, int value, std::size_t bytes) { return std::memset(memory, value, bytes), cudaSuccess; }
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream) {
    return submit(stream, [=] { std::memset(memory, value, bytes); });
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    return submit(stream, [=] { std::memcpy(to, from, bytes); });
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    *stream = static_cast<cudaStream_t>(std::malloc(1));
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (recording != nullptr) return cudaErrorStreamCaptureUnsupported;
    return finish(stream), cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = reinterpret_cast<cudaEvent_t>(new cudaStream_t{});
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return *reinterpret_cast<cudaStream_t*>(event) = stream, cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    const cudaStream_t other = *reinterpret_cast<cudaStream_t*>(event);
    if (other != nullptr && other != stream) finish(other);  // with nullptr it was not recorded, and nothing is waited for
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete reinterpret_cast<cudaStream_t*>(event), cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return std::free(stream), cudaSuccess; }
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    recording = new std::vector<Work>;
    ++recordings;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
    *graph = reinterpret_cast<cudaGraph_t>(recording);
    recording = nullptr;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
    *exec = reinterpret_cast<cudaGraphExec_t>(new std::vector<Work>(*works(graph)));
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    if (steps_until_failure == 0) return cudaErrorLaunchFailure;
    --steps_until_failure;
    ++launches;
    return submit(stream, [all = *works(exec)] {
        for (const Work& work : all) work();
    });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete works(graph), cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete works(exec), cudaSuccess; }

}  // extern "C"

namespace quest_deploy {

cudaError_t launch_prepare(const StepBuffers& buffers, cudaStream_t stream) {
    if (recording == nullptr && steps_until_failure-- == 0) return cudaErrorLaunchFailure;
    return submit(stream, [=] {
        const std::size_t values = std::max(buffers.count(), static_cast<std::size_t>(buffers.rows) * buffers.batch);
        for (std::size_t i = 0; i < values; ++i) prepare_value(buffers, *buffers.step, i);
    });
}

cudaError_t launch_update(const StepBuffers& buffers, cudaStream_t stream) {
    return submit(stream, [=] {
        for (std::size_t i = 0; i < buffers.count(); ++i) update_value(buffers, *buffers.step, i);
        ++*buffers.step;
    });
}

// The engine: tests/host_program.cpp's model, whose condition is an input here, and to which an image adds its first channel.
struct Engine::Impl {
    std::vector<Tensor> tensors{{"sample", true, {-1, 5 + image_channels, 4}},
                                {"timestep", true, {-1}},
                                {"condition", true, {-1, 1}},
                                {kMiddle, true, {-1, 1, -1}},
                                {kTokens, true, {-1, 1, 1}},
                                {kScale, true, {-1}},
                                {"out", false, {-1, 5 + variance_channels, 4}}};
    Impl() {
        if (embeds) tensors.insert(tensors.end(), {{kGuidance, true, {-1}}, {kPooled, true, {-1, 3}}});
    }
};
struct Context::Impl {
    std::map<std::string, Shape> shapes;
    std::map<std::string, float*> places;
};

Engine::Engine(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine Engine::open(const EngineRecord&, const EngineOptions&) { return Engine(std::make_shared<Impl>()); }
const std::vector<Tensor>& Engine::tensors() const { return impl_->tensors; }
const Tensor& Engine::tensor(const std::string& name) const {
    return *std::find_if(impl_->tensors.begin(), impl_->tensors.end(), [&](const Tensor& tensor) { return tensor.name == name; });
}
int Engine::device() const { return 0; }
Context Engine::create_context() const { return Context(std::make_unique<Context::Impl>()); }

Context::Context(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Context::Context(Context&&) noexcept = default;
Context& Context::operator=(Context&&) noexcept = default;
Context::~Context() = default;
void Context::set_shapes(const std::map<std::string, Shape>& inputs, cudaStream_t) { impl_->shapes = inputs; }
Shape Context::shape(const std::string& name) const {
    return name == "out" ? Shape{impl_->shapes.at("sample")[0], 5 + variance_channels, 4} : impl_->shapes.at(name);
}
void Context::bind(const std::string& name, void* device_memory) { impl_->places[name] = static_cast<float*>(device_memory); }
void Context::enqueue(cudaStream_t stream) {
    const std::size_t inputs = embeds ? 8 : 6;
    if (impl_->places.size() != inputs + 1 || impl_->shapes.size() != inputs) throw Error("something is not bound");
    const std::size_t rows = static_cast<std::size_t>(impl_->shapes["sample"][0]), each = 20;
    const std::size_t input_row = each + 4 * static_cast<std::size_t>(image_channels);
    const std::size_t output_row = each + 4 * static_cast<std::size_t>(variance_channels);
    submit(stream, [=, places = impl_->places] {
        std::fill_n(places.at("out"), rows * output_row, 1e6F);  // a variance must not be taken for a prediction
        for (std::size_t i = 0; i < rows * each; ++i) {
            const std::size_t row = i / each, at = i % each;
            const float* input = places.at("sample") + row * input_row;
            const float condition = places.at("condition")[row] + places.at(kMiddle)[row * 3 + 2] +
                                    places.at(kTokens)[row] * places.at(kScale)[row],
                        image = image_channels > 0 ? input[each + at % 4] : 0.0F,
                        told = embeds ? 0.1F * places.at(kGuidance)[row] + places.at(kPooled)[row * 3 + at % 3] : 0.0F;
            places.at("out")[row * output_row + at] =
                input[at] / (1 + std::fabs(input[at])) + 0.0005F * places.at("timestep")[row] + condition + image + told;
        }
    });
}

}  // namespace quest_deploy

int main(int count, char** words) {
    using namespace quest_deploy;
    const auto read_floats = [](const char* path) {
        const std::vector<char> bytes = read_file(path, "write it");
        std::vector<float> values(bytes.size() / sizeof(float));
        std::memcpy(values.data(), bytes.data(), bytes.size());
        return values;
    };
    try {
        const Schedule schedule = Schedule::load(words[1]);
        std::vector<float> sample = read_floats(words[2]);
        for (float& value : sample) value *= schedule.init_noise_sigma;
        DenoiserOptions options;
        options.batch = 2;
        options.guidance = std::stof(words[4]);
        options.cuda_graph = std::stoi(words[5]) != 0;
        options.image_guidance = std::stof(words[6]);
        image_channels = std::stoi(words[7]);
        variance_channels = std::stoi(words[8]);
        embeds = std::stoi(words[11]) != 0;
        const Engine engine = Engine::open({});
        const auto refused = [&](const char* problem) {
            try {
                Denoiser(engine, schedule, options);
            } catch (const Error& error) {
                std::cerr << error.what() << "\n";
                return;
            }
            throw std::logic_error(problem);
        };
        refused("an input of open sizes got none");
        options.condition_shapes["middle"] = {1, 3};
        options.condition_shapes[kMiddle] = {1, 3};
        refused("an input that is none got a shape");
        options.condition_shapes.erase("middle");
        if (embeds) {
            for (const std::optional<float> wrong : {std::optional<float>(), std::optional<float>(-1.0F), std::optional<float>(NAN)}) {
                options.guidance = wrong;
                refused("an embedded guidance was none, negative or no number");
            }
            options.guidance = std::stof(words[4]);
        }
        const float control = std::stof(words[9]), scale = std::stof(words[10]);
        const std::size_t input_row = 20 + 4 * static_cast<std::size_t>(image_channels);
        if (control != 0)
            options.before_engine = [=](const StepInputs& inputs, cudaStream_t stream) {
                submit(stream, [=] {
                    for (std::int64_t row = 0; row < inputs.rows; ++row)
                        inputs.conditions.at(kMiddle)[row * 3 + 2] =
                            control * (inputs.sample[static_cast<std::size_t>(row) * input_row] + 0.001F * inputs.timestep[row]);
                });
            };
        Denoiser denoiser(engine, schedule, options);
        const std::vector<float> noise = count > 12 ? read_floats(words[12]) : std::vector<float>();
        try {
            denoiser.run(sample, noise);
            throw std::logic_error("it ran without its condition");
        } catch (const Error& error) {
            std::cerr << error.what() << "\n";
        }
        // The condition of row r of n is 0 in the first half and 0.25 in the second; the image of row r has its number's tenth everywhere.
        std::vector<float> condition, image, tokens, scales, pooled;
        for (const Tensor& tensor : denoiser.conditions()) {
            const std::size_t rows = static_cast<std::size_t>(tensor.shape[0]);
            for (std::size_t row = 0; row < rows; ++row)
                if (tensor.name == kImageCondition) image.insert(image.end(), 4 * static_cast<std::size_t>(image_channels), 0.1F * row);
                else if (tensor.name == kTokens) tokens.push_back(0.1F * row);
                else if (tensor.name == kScale) scales.push_back(scale);
                else if (tensor.name == kPooled)
                    for (std::size_t i = 0; i < 3; ++i) pooled.push_back(0.01F * row + 0.02F * i);
                else if (tensor.name == kGuidance) throw std::logic_error("the embedded guidance is to be set by hand");
                else if (tensor.name == "condition") condition.push_back(row < rows / 2 ? 0.0F : 0.25F);
        }
        const auto set_conditions = [&](Denoiser& to) {
            to.set_condition("condition", condition);
            if (embeds) to.set_condition(kPooled, pooled);
            if (image_channels > 0) to.set_condition(kImageCondition, image);
            if (scale == 0) return;
            to.set_condition(kTokens, tokens);
            try {
                to.run(sample, noise);
                throw std::logic_error("it ran with an image's tokens and no scale");
            } catch (const Error& error) {
                std::cerr << error.what() << "\n";
            }
            to.set_condition(kScale, scales);
        };
        set_conditions(denoiser);
        const std::vector<float> start = sample;
        std::vector<float> again = sample;
        denoiser.run(sample, noise);
        denoiser.run(again, noise);  // from the first step, whatever the run before left
        if (again != sample) throw std::logic_error("a second run differs from the first");
        cudaStream_t mine = nullptr;
        cudaStreamCreateWithFlags(&mine, cudaStreamNonBlocking);
        const auto enqueue = [&] {
            cudaMemcpyAsync(denoiser.sample(), start.data(), start.size() * sizeof(float), cudaMemcpyHostToDevice, mine);
            denoiser.enqueue(mine);
        };
        const auto check = [&](const std::vector<float>& expected, const char* problem) {
            cudaStreamSynchronize(mine);
            if (!std::equal(expected.begin(), expected.end(), denoiser.result())) throw std::logic_error(problem);
        };
        enqueue();
        denoiser.set_condition("condition", std::vector<float>(condition.size(), 1.0F));
        check(sample, "a loop on another stream read the condition that was set after it");
        denoiser.set_condition("condition", condition);
        enqueue();
        std::vector<float> other(start.size(), 0.5F);
        denoiser.run(other, noise);
        check(other, "a loop on another stream was still running in the next one's samples");
        steps_until_failure = 1;
        const int launched = launches;
        try {
            enqueue();
            throw std::logic_error("a step failed and nothing was said");
        } catch (const Error&) {
            steps_until_failure = -1;
            launches = launched;
        }
        again = start;
        denoiser.run(again, noise);
        check(again, "steps of a loop that failed were still running in the next one's samples");
        cudaStreamDestroy(mine);
        std::ofstream(words[3], std::ios::binary)
            .write(reinterpret_cast<const char*>(sample.data()), static_cast<std::streamsize>(sample.size() * sizeof(float)));
        std::cout << schedule.steps.size() << " steps, " << recordings << " recordings, " << launches << " launches\n";
        std::vector<std::thread> threads;
        std::atomic<int> wrong = 0;
        for (int i = 0; i < 4; ++i)
            threads.emplace_back([&] {  // a denoiser each, of the same engine
                Denoiser own(engine, schedule, options);
                set_conditions(own);
                std::vector<float> mine_too = start;
                own.run(mine_too, noise);
                if (mine_too != sample) ++wrong;
            });
        for (std::thread& thread : threads) thread.join();
        if (wrong != 0) throw std::logic_error("a thread drew something else than the others");
        return 0;
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
}
