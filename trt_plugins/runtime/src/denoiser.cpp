#include "quest_deploy/denoiser.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <numeric>

#include "cuda.h"
#include "kernels.h"

namespace quest_deploy {

namespace {

constexpr char kSample[] = "sample", kTimestep[] = "timestep";  // as the exporter names them

std::size_t volume(const Shape& shape) {
    return std::accumulate(shape.begin(), shape.end(), std::size_t{1},
                           [](std::size_t all, std::int64_t size) { return all * static_cast<std::size_t>(size); });
}

/// `shape`, its sizes after the first filled in from `sizes`, which `option` gave, and `rows` before them.
Shape with_rows(const Tensor& tensor, std::int64_t rows, const Shape& sizes, const std::string& option) {
    Shape shape = tensor.shape;
    if (shape.empty() || (!sizes.empty() && sizes.size() + 1 != shape.size()))
        throw Error(tensor.name + ": expected a shape of " + std::to_string(shape.size()) + " sizes with the batch");
    shape[0] = rows;
    for (std::size_t i = 1; i < shape.size(); ++i) {
        if (!sizes.empty()) shape[i] = sizes[i - 1];
        if (shape[i] < 0) throw Error(tensor.name + ": the engine takes several sizes; say which (DenoiserOptions::" + option + ")");
    }
    return shape;
}

bool is_image_prompt(const std::string& name) { return name.find(kIpAdapter) != std::string::npos; }

bool is_added(const std::string& name) { return name.find(kResidual) != std::string::npos || is_image_prompt(name); }

/// Of a shape [rows, channels, ...].
std::size_t channels(const Shape& shape) { return static_cast<std::size_t>(shape[1]); }

/// Records what is put on a stream; ends the recording also where that fails, or the stream would be of no use.
OwnedGraphExec record(cudaStream_t stream, const std::function<void()>& enqueue) {
    const std::string advice = "recording a step as a CUDA graph (without: DenoiserOptions::cuda_graph = false)";
    OwnedGraph graph;
    check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), advice);
    try {
        enqueue();
    } catch (const std::exception& error) {
        cudaStreamEndCapture(stream, graph.out());
        cudaGetLastError();  // that the recording failed is told by the exception
        throw Error(advice + ": " + error.what());
    }
    check_cuda(cudaStreamEndCapture(stream, graph.out()), advice);
    OwnedGraphExec exec;
    check_cuda(cudaGraphInstantiateWithFlags(exec.out(), graph.get(), 0), advice);
    return exec;
}

}  // namespace

struct Denoiser::Impl {
    Engine engine;
    Context context;
    std::size_t steps;
    OwnedStream stream;   ///< of run(), and of the recording
    OwnedEvent finished;  ///< the end of the loop that was enqueued last, on whatever stream
    DeviceArray<StepScales> table;
    DeviceArray<int> step;
    DeviceArray<float> samples, predictions, noise, input, timestep, guidance, output;
    std::map<std::string, DeviceArray<float>> condition_values;
    std::map<std::string, bool> condition_given;
    std::vector<Tensor> conditions;
    std::function<void(const StepInputs&, cudaStream_t)> before_engine;
    StepInputs step_inputs{};
    StepBuffers buffers{};
    OwnedGraphExec graph;

    Impl(const Engine& of, const Schedule& schedule, const DenoiserOptions& options)
        : engine(of), context(of.create_context()), steps(schedule.steps.size()), before_engine(options.before_engine) {
        check_cuda(cudaStreamCreateWithFlags(stream.out(), cudaStreamNonBlocking), "making a stream");
        check_cuda(cudaEventCreateWithFlags(finished.out(), cudaEventDisableTiming), "making an event");
        if (options.batch < 1 || options.batch > INT32_MAX)
            throw Error("expected a batch of 1 or more, found " + std::to_string(options.batch));
        if (options.image_guidance != 0 && !(options.image_guidance >= 1))
            throw Error("expected an image guidance of 1 or more, or of 0 for none, found " + std::to_string(options.image_guidance));
        const auto& all = engine.tensors();
        const bool embeds =
            std::any_of(all.begin(), all.end(), [](const Tensor& tensor) { return tensor.is_input && tensor.name == kGuidance; });
        if (embeds && !(options.guidance && *options.guidance >= 0 && std::isfinite(*options.guidance)))
            throw Error("DenoiserOptions::guidance: the engine embeds it; expected a number of 0 or more");
        const float weight = options.guidance.value_or(1), classifier_free = embeds ? 1 : weight;
        const int rows_each = rows_of_sample(classifier_free, options.image_guidance);
        const std::int64_t rows = options.batch * rows_each;
        const std::size_t length = schedule.history();
        const Shape sample_shape = with_rows(engine.tensor(kSample), rows, options.sample_shape, "sample_shape");
        std::map<std::string, Shape> shapes{{kSample, sample_shape},
                                            {kTimestep, with_rows(engine.tensor(kTimestep), rows, {}, "condition_shapes")}};
        if (embeds) shapes[kGuidance] = with_rows(engine.tensor(kGuidance), rows, {}, "condition_shapes");
        for (const Tensor& tensor : all) {
            if (!tensor.is_input || shapes.count(tensor.name) != 0) continue;
            const auto given = options.condition_shapes.find(tensor.name);
            const Shape sizes = given == options.condition_shapes.end() ? Shape{} : given->second;
            shapes[tensor.name] = with_rows(tensor, rows, sizes, "condition_shapes");
            conditions.push_back({tensor.name, true, shapes[tensor.name]});
        }
        for (const auto& [name, shape] : options.condition_shapes)
            if (name == kSample || name == kTimestep || name == kGuidance || shapes.count(name) == 0)
                throw Error("DenoiserOptions::condition_shapes: the engine has no condition called " + name);
        context.set_shapes(shapes, stream.get());
        const std::string output_name = only_output();
        const Shape output_shape = context.shape(output_name);
        const std::size_t batch = static_cast<std::size_t>(options.batch),
                          input_row = volume(sample_shape) / static_cast<std::size_t>(rows);
        const std::size_t each = input_row / channels(sample_shape) * std::min(channels(sample_shape), channels(output_shape));
        const std::size_t count = batch * each;
        Shape rest = output_shape;
        rest[1] = sample_shape[1];
        if (rest != sample_shape) throw Error("expected an output of the sample's batch, height and width");
        if (sample_shape[1] > output_shape[1]) {
            rest[1] = sample_shape[1] - output_shape[1];
            conditions.push_back({kImageCondition, true, rest});
        }
        const std::vector<StepScales> scales = step_scales(schedule);
        table = DeviceArray<StepScales>(scales.size());
        table.copy_from(scales.data(), scales.size(), stream.get());
        step = DeviceArray<int>(1);
        samples = DeviceArray<float>(length * count);
        predictions = DeviceArray<float>(length * count);
        noise = DeviceArray<float>(schedule.noisy() ? steps * count : 0);
        input = DeviceArray<float>(volume(sample_shape));
        timestep = DeviceArray<float>(static_cast<std::size_t>(rows));
        output = DeviceArray<float>(volume(output_shape));
        if (embeds) {
            const std::vector<float> weights(static_cast<std::size_t>(rows), weight);
            guidance = DeviceArray<float>(weights.size());
            guidance.copy_from(weights.data(), weights.size(), stream.get());
            check_cuda(cudaStreamSynchronize(stream.get()), "copying the guidance");  // before what is copied goes
            context.bind(kGuidance, guidance.data());
        }
        bind(output_name, rows);
        buffers = {table.data(),
                   step.data(),
                   static_cast<int>(length),
                   batch,
                   each,
                   input_row,
                   volume(output_shape) / static_cast<std::size_t>(rows),
                   rows_each,
                   classifier_free,
                   options.image_guidance,
                   samples.data(),
                   predictions.data(),
                   input.data(),
                   timestep.data(),
                   output.data(),
                   noise.data()};
        // Once before the recording: TensorRT sets up what a new shape needs, which no recording may hold.
        if (before_engine) before_engine(step_inputs, stream.get());
        context.enqueue(stream.get());
        check_cuda(cudaStreamSynchronize(stream.get()), "running the engine");
        zero_added();  // which may have been written
        if (options.cuda_graph) graph = record(stream.get(), [this] { enqueue_step(stream.get()); });
    }

    std::string only_output() const {
        const auto& all = engine.tensors();
        const auto outputs = std::count_if(all.begin(), all.end(), [](const Tensor& tensor) { return !tensor.is_input; });
        const auto first = std::find_if(all.begin(), all.end(), [](const Tensor& tensor) { return !tensor.is_input; });
        const std::size_t dimensions = engine.tensor(kSample).shape.size();
        if (outputs != 1 || dimensions < 2 || context.shape(first->name).size() != dimensions)
            throw Error("expected an engine with one output, of as many dimensions as the sample");
        return first->name;
    }

    void bind(const std::string& output_name, std::int64_t rows) {
        context.bind(kSample, input.data());
        context.bind(kTimestep, timestep.data());
        for (const Tensor& condition : conditions) {
            condition_given[condition.name] = false;
            if (condition.name == kImageCondition) continue;  // a part of the sample
            const auto made = condition_values.emplace(condition.name, DeviceArray<float>(volume(condition.shape))).first;
            context.bind(condition.name, made->second.data());
            step_inputs.conditions[condition.name] = made->second.data();
        }
        step_inputs.rows = rows;
        step_inputs.sample = input.data();
        step_inputs.timestep = timestep.data();
        context.bind(output_name, output.data());
    }

    /// Copy a condition to its place; an image's rows go behind the sample's.
    void copy_condition(const Tensor& condition, const std::vector<float>& values) {
        if (condition.name != kImageCondition) {
            condition_values.at(condition.name).copy_from(values.data(), values.size(), stream.get());
            return;
        }
        const std::size_t rows = static_cast<std::size_t>(condition.shape[0]), row = values.size() / rows;
        for (std::size_t i = 0; i < rows; ++i)
            check_cuda(cudaMemcpyAsync(input.data() + i * buffers.input_row + buffers.each, values.data() + i * row, row * sizeof(float),
                                       cudaMemcpyHostToDevice, stream.get()),
                       "copying an image to the GPU");
    }

    void zero_added() {
        for (const Tensor& condition : conditions)
            if (is_added(condition.name))
                check_cuda(
                    cudaMemsetAsync(condition_values.at(condition.name).data(), 0, volume(condition.shape) * sizeof(float), stream.get()),
                    "clearing " + condition.name);
        check_cuda(cudaStreamSynchronize(stream.get()), "clearing what is added");
    }

    void enqueue_step(cudaStream_t on) {
        check_cuda(launch_prepare(buffers, on), "preparing a step");
        if (before_engine) before_engine(step_inputs, on);
        context.enqueue(on);
        check_cuda(launch_update(buffers, on), "ending a step");
    }

    void enqueue(cudaStream_t on) {
        bool has_prompt = false, lacks_prompt = false;
        for (const auto& [name, given] : condition_given) {
            if (!given && !is_added(name)) throw Error("the condition " + name + " was not set");
            if (is_image_prompt(name)) (given ? has_prompt : lacks_prompt) = true;
        }
        if (has_prompt && lacks_prompt && !before_engine)  // which may write the other one
            throw Error("expected both the tokens and the scale of an IP-Adapter, or neither: one alone adds nothing");
        const DeviceGuard guard(engine.device());
        try {
            check_cuda(cudaMemsetAsync(step.data(), 0, sizeof(int), on), "going back to the first step");
            for (std::size_t i = 0; i < steps; ++i)
                if (graph.get() == nullptr) enqueue_step(on);
                else check_cuda(cudaGraphLaunch(graph.get(), on), "launching a step");
        } catch (...) {
            cudaEventRecord(finished.get(), on);  // the steps before still run, and the next loop has to wait for them
            throw;
        }
        check_cuda(cudaEventRecord(finished.get(), on), "ending the loop");
    }

    /// Has the own stream wait for the loop that was enqueued last, which reads the conditions and writes the samples.
    void wait_for_loop() { check_cuda(cudaStreamWaitEvent(stream.get(), finished.get(), 0), "waiting for the loop before"); }

    float* result() const { return samples.data() + steps % static_cast<std::size_t>(buffers.length) * buffers.count(); }
};

Denoiser::Denoiser(const Engine& engine, const Schedule& schedule, const DenoiserOptions& options) {
    schedule.check();
    const DeviceGuard guard(engine.device());
    impl_ = std::make_unique<Impl>(engine, schedule, options);
}

Denoiser::Denoiser(Denoiser&&) noexcept = default;
Denoiser& Denoiser::operator=(Denoiser&&) noexcept = default;
Denoiser::~Denoiser() = default;

const std::vector<Tensor>& Denoiser::conditions() const { return impl_->conditions; }

void Denoiser::set_condition(const std::string& name, const std::vector<float>& values) {
    const auto& all = impl_->conditions;
    const auto found = std::find_if(all.begin(), all.end(), [&](const Tensor& condition) { return condition.name == name; });
    if (found == all.end()) throw Error("the engine has no condition called " + name);
    if (const std::size_t expected = volume(found->shape); values.size() != expected)
        throw Error(name + ": expected " + std::to_string(expected) + " values, found " + std::to_string(values.size()));
    const DeviceGuard guard(impl_->engine.device());
    impl_->wait_for_loop();
    impl_->copy_condition(*found, values);
    check_cuda(cudaStreamSynchronize(impl_->stream.get()), "copying " + name);
    impl_->condition_given[name] = true;
}

void Denoiser::run(std::vector<float>& sample, const std::vector<float>& noise) {
    if (sample.size() != impl_->buffers.count() || noise.size() != impl_->noise.size()) {
        throw Error("expected " + std::to_string(impl_->buffers.count()) + " values of the sample and " +
                    std::to_string(impl_->noise.size()) + " of noise, found " + std::to_string(sample.size()) + " and " +
                    std::to_string(noise.size()));
    }
    const DeviceGuard guard(impl_->engine.device());
    cudaStream_t stream = impl_->stream.get();
    impl_->wait_for_loop();
    impl_->samples.copy_from(sample.data(), sample.size(), stream);
    if (!noise.empty()) impl_->noise.copy_from(noise.data(), noise.size(), stream);
    impl_->enqueue(stream);
    check_cuda(cudaMemcpyAsync(sample.data(), impl_->result(), sample.size() * sizeof(float), cudaMemcpyDeviceToHost, stream),
               "copying back");
    check_cuda(cudaStreamSynchronize(stream), "denoising");
}

void Denoiser::enqueue(cudaStream_t stream) { impl_->enqueue(stream); }

float* Denoiser::sample() const { return impl_->samples.data(); }

float* Denoiser::noise() const { return impl_->noise.data(); }

const float* Denoiser::result() const { return impl_->result(); }

std::size_t Denoiser::sample_size() const { return impl_->buffers.count(); }

}  // namespace quest_deploy
