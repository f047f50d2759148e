#include "quest_deploy/engine.h"

#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#include <algorithm>
#include <cstdio>
#include <mutex>

#include "cuda.h"

namespace quest_deploy {

namespace {

#ifdef QUEST_DEPLOY_TENSORRT_RTX
constexpr char kBackend[] = "tensorrt-rtx";
#else
constexpr char kBackend[] = "tensorrt";
#endif

/// The first error that TensorRT logged on this thread since the last `require`. Plain memory, which is there however late TensorRT logs.
thread_local char problem[1024] = "";

using Sink = std::function<void(int, const char*)>;

/// TensorRT keeps the first logger that a process gives it until all of its objects are gone, whichever made them. So there is one logger,
/// which is never destroyed; it passes what it is told to the sinks of the engines that are there. TensorRT calls it from any thread.
class Logger final : public nvinfer1::ILogger {
public:
    static Logger& instance() {
        static auto* const logger = new Logger;
        return *logger;
    }

    void log(Severity severity, const char* message) noexcept override {
        if (severity <= Severity::kERROR && problem[0] == '\0') static_cast<void>(std::snprintf(problem, sizeof problem, "%s", message));
        try {
            std::vector<std::shared_ptr<const Sink>> told;
            {
                const std::scoped_lock lock(mutex_);
                told = sinks_;
            }
            for (const auto& sink : told) (*sink)(static_cast<int>(severity), message);  // unlocked: it may open or close an engine
        } catch (...) {  // NOLINT(bugprone-empty-catch): TensorRT's code is no place for an exception to pass
        }
    }

    void add(const std::shared_ptr<const Sink>& sink) {
        const std::scoped_lock lock(mutex_);
        sinks_.push_back(sink);
    }

    void remove(const std::shared_ptr<const Sink>& sink) {
        const std::scoped_lock lock(mutex_);
        sinks_.erase(std::remove(sinks_.begin(), sinks_.end(), sink), sinks_.end());
    }

private:
    Logger() = default;
    std::mutex mutex_;
    std::vector<std::shared_ptr<const Sink>> sinks_;
};

/// Has the logger tell a sink, where there is one, as long as this lives.
class SinkGuard {
public:
    explicit SinkGuard(const Sink& sink) : sink_(sink ? std::make_shared<const Sink>(sink) : nullptr) {
        if (sink_) Logger::instance().add(sink_);
    }
    ~SinkGuard() {
        if (sink_) Logger::instance().remove(sink_);
    }
    SinkGuard(const SinkGuard&) = delete;
    SinkGuard& operator=(const SinkGuard&) = delete;

private:
    std::shared_ptr<const Sink> sink_;
};

/// What `call`, of TensorRT's, returns; where that is null or false, throws Error with what it logged meanwhile on this thread.
template <typename Call>
auto require(const Call& call, const std::string& what) {
    problem[0] = '\0';
    const auto result = call();
    if (!result) throw Error(what + ": " + (problem[0] == '\0' ? "TensorRT gives no reason" : problem));
    return result;
}

Shape shape_of(const nvinfer1::Dims& dims) { return {dims.d, dims.d + std::max(dims.nbDims, 0)}; }

nvinfer1::Dims dims_of(const std::string& name, const Shape& shape) {
    nvinfer1::Dims dims{};
    if (shape.size() > static_cast<std::size_t>(nvinfer1::Dims::MAX_DIMS)) throw Error(name + ": too many dimensions");
    dims.nbDims = static_cast<std::int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
}

std::string text(const Shape& shape) {
    std::string joined;
    for (const std::int64_t size : shape) joined += (joined.empty() ? "" : " x ") + std::to_string(size);
    return "[" + joined + "]";
}

bool within(const Shape& least, const Shape& shape, const Shape& largest) {
    if (shape.size() != least.size()) return false;
    for (std::size_t i = 0; i < shape.size(); ++i)
        if (shape[i] < least[i] || shape[i] > largest[i]) return false;
    return true;
}

}  // namespace

// Destroyed from the last member to the first: TensorRT wants its objects gone before what made them.
struct Engine::Impl {
    SinkGuard log;
    std::unique_ptr<nvinfer1::IRuntime> runtime;
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
    std::vector<Tensor> tensors;
    int device = 0;
    std::mutex making_contexts;

    explicit Impl(const Sink& sink) : log(sink) {}

    void check_device(const EngineRecord& record) const {
        int count = 0, major = 0, minor = 0;
        check_cuda(cudaGetDeviceCount(&count), "an engine runs on an NVIDIA GPU, and none can be used here");
        if (device < 0 || device >= count)
            throw Error("there is no GPU " + std::to_string(device) + ": this machine has " + std::to_string(count));
        check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking for the GPU's compute capability");
        check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "asking for the GPU's compute capability");
        check_gpu(record, 10 * major + minor);
    }

    void load_plugin(const EngineRecord& record, const std::filesystem::path& library) {
        if (record.plugin_library.empty()) return;
        record.check_plugin(library);
        // Into this runtime's own registry, so that nothing of the process changes.
        auto& registry = runtime->getPluginRegistry();
        require([&] { return registry.loadLibrary(library.c_str()); }, "TensorRT cannot load the plugin library " + library.string());
    }

    void stream_weights(const EngineRecord& record, [[maybe_unused]] const std::optional<std::int64_t>& chosen) {
        if (!record.weight_streaming) return;
#if defined(QUEST_DEPLOY_TENSORRT_RTX) || NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR > 0
        const auto wanted = chosen ? chosen : record.weight_streaming_budget;
        const std::int64_t budget = wanted ? *wanted : engine->getWeightStreamingAutomaticBudget();
        require([&] { return engine->setWeightStreamingBudgetV2(budget); },
                "keeping " + std::to_string(budget) + " bytes of weights on the GPU");
#else
        throw Error("weight streaming needs TensorRT 10.1 or later");
#endif
    }

    void list_tensors() {
        for (std::int32_t i = 0; i < engine->getNbIOTensors(); ++i) {
            const char* name = engine->getIOTensorName(i);
            if (engine->getTensorDataType(name) != nvinfer1::DataType::kFLOAT) throw Error(std::string(name) + ": expected float32");
            const bool is_input = engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
            tensors.push_back({name, is_input, shape_of(engine->getTensorShape(name))});
        }
    }
};

Engine::Engine(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

std::string Engine::backend() { return kBackend; }

std::string Engine::version() {
    return std::to_string(getInferLibMajorVersion()) + "." + std::to_string(getInferLibMinorVersion()) + "." +
           std::to_string(getInferLibPatchVersion()) + "." + std::to_string(getInferLibBuildVersion());
}

Engine Engine::open(const EngineRecord& record, const EngineOptions& options) {
    check_runtime(record, backend(), version());
    auto impl = std::make_shared<Impl>(options.log);
    impl->device = options.device;
    impl->check_device(record);
    const DeviceGuard guard(options.device);
    impl->runtime.reset(require([] { return nvinfer1::createInferRuntime(Logger::instance()); }, "TensorRT cannot be started"));
    impl->runtime->setEngineHostCodeAllowed(record.version_compatible);  // such an engine brings the runtime, or the plugin, that it needs
    impl->load_plugin(record, options.plugin_library);
    {
        const std::vector<char> plan = record.read_plan();
        const auto load = [&] { return impl->runtime->deserializeCudaEngine(plan.data(), plan.size()); };
        impl->engine.reset(require(load, record.folder.string() + ": the engine cannot be loaded"));
    }
    impl->stream_weights(record, options.weight_streaming_budget);
    impl->list_tensors();
    return Engine(std::move(impl));
}

const std::vector<Tensor>& Engine::tensors() const { return impl_->tensors; }

const Tensor& Engine::tensor(const std::string& name) const {
    const auto& all = impl_->tensors;
    const auto found = std::find_if(all.begin(), all.end(), [&](const Tensor& tensor) { return tensor.name == name; });
    if (found == all.end()) throw Error("the engine has no input or output called " + name);
    return *found;
}

int Engine::device() const { return impl_->device; }

struct Context::Impl {
    Engine engine;
    std::unique_ptr<nvinfer1::IExecutionContext> context;
    Impl(Engine of, std::unique_ptr<nvinfer1::IExecutionContext> made) : engine(std::move(of)), context(std::move(made)) {}
};

Context Engine::create_context() const {
    const DeviceGuard guard(impl_->device);
    const std::scoped_lock lock(impl_->making_contexts);
    std::unique_ptr<nvinfer1::IExecutionContext> made(
        require([&] { return impl_->engine->createExecutionContext(); }, "no context to run the engine in"));
    return Context(std::make_unique<Context::Impl>(*this, std::move(made)));
}

Context::Context(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Context::Context(Context&&) noexcept = default;
Context& Context::operator=(Context&&) noexcept = default;
Context::~Context() = default;

void Context::set_shapes(const std::map<std::string, Shape>& inputs, cudaStream_t stream) {
    auto& engine = *impl_->engine.impl_->engine;
    const auto bound = [&](const std::string& name, std::int32_t profile, nvinfer1::OptProfileSelector end) {
        return shape_of(engine.getProfileShape(name.c_str(), profile, end));
    };
    std::string asked;
    for (const auto& [name, shape] : inputs) asked += (asked.empty() ? "" : ", ") + impl_->engine.tensor(name).name + " " + text(shape);
    const std::int32_t profiles = engine.getNbOptimizationProfiles();
    std::int32_t fitting = 0;
    const auto takes = [&](std::int32_t profile) {
        return std::all_of(inputs.begin(), inputs.end(), [&](const auto& input) {
            return within(bound(input.first, profile, nvinfer1::OptProfileSelector::kMIN), input.second,
                          bound(input.first, profile, nvinfer1::OptProfileSelector::kMAX));
        });
    };
    while (fitting < profiles && !takes(fitting)) ++fitting;
    if (fitting == profiles)
        throw Error("the engine was built for other inputs than " + asked + "; build it with their --sample-size or --max-batch");
    const DeviceGuard guard(impl_->engine.device());
    auto& context = *impl_->context;
    if (context.getOptimizationProfile() != fitting)
        require([&] { return context.setOptimizationProfileAsync(fitting, stream); }, "choosing an optimization profile");
    for (const auto& input : inputs) {
        const nvinfer1::Dims dims = dims_of(input.first, input.second);
        require([&] { return context.setInputShape(input.first.c_str(), dims); }, input.first + ": the shape " + text(input.second));
    }
}

Shape Context::shape(const std::string& name) const {
    return shape_of(impl_->context->getTensorShape(impl_->engine.tensor(name).name.c_str()));
}

void Context::bind(const std::string& name, void* device_memory) {
    const std::string& known = impl_->engine.tensor(name).name;
    require([&] { return impl_->context->setTensorAddress(known.c_str(), device_memory); }, name + ": its place in memory");
}

void Context::enqueue(cudaStream_t stream) {
    const DeviceGuard guard(impl_->engine.device());
    require([&] { return impl_->context->enqueueV3(stream); }, "running the engine");
}

}  // namespace quest_deploy
