#include "quest_deploy/engine.h"

#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#include <algorithm>
#include <mutex>

#include "cuda.h"

namespace quest_deploy {

namespace {

#ifdef QUEST_DEPLOY_TENSORRT_RTX
constexpr char kBackend[] = "tensorrt-rtx";
#else
constexpr char kBackend[] = "tensorrt";
#endif

/// Keeps what TensorRT complains of for the exceptions that say what failed; TensorRT calls it from any thread.
class Logger final : public nvinfer1::ILogger {
public:
    std::function<void(int, const char*)> sink;

    void log(Severity severity, const char* message) noexcept override {
        try {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (severity <= Severity::kERROR) problems_.emplace_back(message);
            if (sink) sink(static_cast<int>(severity), message);
        } catch (...) {  // TensorRT's code is no place for an exception to pass; what could not be kept is only the reason for an error
        }
    }

    [[noreturn]] void fail(const std::string& what) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const std::string reason = problems_.empty() ? "TensorRT gives no reason" : problems_.front();
        problems_.clear();
        throw Error(what + ": " + reason);
    }

private:
    std::mutex mutex_;
    std::vector<std::string> problems_;
};

Shape shape_of(const nvinfer1::Dims& dims) {
    return Shape(dims.d, dims.d + std::max(dims.nbDims, 0));
}

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
    for (std::size_t i = 0; i < shape.size(); ++i) {
        if (shape[i] < least[i] || shape[i] > largest[i]) return false;
    }
    return true;
}

}  // namespace

// Destroyed from the last member to the first: TensorRT wants its objects gone before what made them.
struct Engine::Impl {
    Logger logger;
    std::unique_ptr<nvinfer1::IRuntime> runtime;
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
    std::vector<Tensor> tensors;
    int device = 0;
    std::mutex making_contexts;

    void check_device(const EngineRecord& record) const {
        int count = 0, major = 0, minor = 0;
        check_cuda(cudaGetDeviceCount(&count), "an engine runs on an NVIDIA GPU, and none can be used here");
        if (device < 0 || device >= count) {
            throw Error("there is no GPU " + std::to_string(device) + ": this machine has " + std::to_string(count));
        }
        check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking for the GPU's compute capability");
        check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "asking for the GPU's compute capability");
        check_gpu(record, 10 * major + minor);
    }

    void load_plugin(const EngineRecord& record, const std::filesystem::path& library) {
        if (record.plugin_library.empty()) return;
        record.check_plugin(library);
        // Into this runtime's own registry, so that nothing of the process changes.
        auto& registry = runtime->getPluginRegistry();
        if (registry.loadLibrary(library.c_str()) == nullptr) logger.fail("TensorRT cannot load the plugin library " + library.string());
    }

    void stream_weights(const EngineRecord& record, [[maybe_unused]] const std::optional<std::int64_t>& chosen) {
        if (!record.weight_streaming) return;
#if defined(QUEST_DEPLOY_TENSORRT_RTX) || NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR > 0
        const auto wanted = chosen ? chosen : record.weight_streaming_budget;
        const std::int64_t budget = wanted ? *wanted : engine->getWeightStreamingAutomaticBudget();
        if (!engine->setWeightStreamingBudgetV2(budget)) logger.fail("keeping " + std::to_string(budget) + " bytes of weights on the GPU");
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

std::string Engine::backend() {
    return kBackend;
}

std::string Engine::version() {
    return std::to_string(getInferLibMajorVersion()) + "." + std::to_string(getInferLibMinorVersion()) + "." +
           std::to_string(getInferLibPatchVersion()) + "." + std::to_string(getInferLibBuildVersion());
}

Engine Engine::open(const EngineRecord& record, const EngineOptions& options) {
    check_runtime(record, backend(), version());
    auto impl = std::make_shared<Impl>();
    impl->logger.sink = options.log;
    impl->device = options.device;
    impl->runtime.reset(nvinfer1::createInferRuntime(impl->logger));
    if (!impl->runtime) impl->logger.fail("TensorRT cannot be started");
    impl->check_device(record);
    const DeviceGuard guard(options.device);
    impl->runtime->setEngineHostCodeAllowed(record.version_compatible);  // such an engine brings the runtime, or the plugin, that it needs
    impl->load_plugin(record, options.plugin_library);
    {
        const std::vector<char> plan = record.read_plan();
        impl->engine.reset(impl->runtime->deserializeCudaEngine(plan.data(), plan.size()));
    }
    if (!impl->engine) impl->logger.fail(record.folder.string() + ": the engine cannot be loaded");
    impl->stream_weights(record, options.weight_streaming_budget);
    impl->list_tensors();
    return Engine(std::move(impl));
}

const std::vector<Tensor>& Engine::tensors() const {
    return impl_->tensors;
}

const Tensor& Engine::tensor(const std::string& name) const {
    const auto& all = impl_->tensors;
    const auto found = std::find_if(all.begin(), all.end(), [&](const Tensor& tensor) { return tensor.name == name; });
    if (found == all.end()) throw Error("the engine has no input or output called " + name);
    return *found;
}

int Engine::device() const {
    return impl_->device;
}

struct Context::Impl {
    Engine engine;
    std::unique_ptr<nvinfer1::IExecutionContext> context;
};

Context Engine::create_context() const {
    const DeviceGuard guard(impl_->device);
    const std::lock_guard<std::mutex> lock(impl_->making_contexts);
    std::unique_ptr<nvinfer1::IExecutionContext> made(impl_->engine->createExecutionContext());
    if (!made) impl_->logger.fail("no context to run the engine in");
    return Context(std::unique_ptr<Context::Impl>(new Context::Impl{*this, std::move(made)}));
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
    if (fitting == profiles) throw Error("the engine was built for other inputs than " + asked + "; build it with their --sample-size or --max-batch");
    const DeviceGuard guard(impl_->engine.device());
    auto& context = *impl_->context;
    Logger& logger = impl_->engine.impl_->logger;
    if (context.getOptimizationProfile() != fitting && !context.setOptimizationProfileAsync(fitting, stream)) {
        logger.fail("choosing an optimization profile");
    }
    for (const auto& [name, shape] : inputs) {
        if (!context.setInputShape(name.c_str(), dims_of(name, shape))) logger.fail(name + ": the shape " + text(shape));
    }
}

Shape Context::shape(const std::string& name) const {
    return shape_of(impl_->context->getTensorShape(impl_->engine.tensor(name).name.c_str()));
}

void Context::bind(const std::string& name, void* device_memory) {
    if (!impl_->context->setTensorAddress(impl_->engine.tensor(name).name.c_str(), device_memory)) {
        impl_->engine.impl_->logger.fail(name + ": its place in memory");
    }
}

void Context::enqueue(cudaStream_t stream) {
    const DeviceGuard guard(impl_->engine.device());
    if (!impl_->context->enqueueV3(stream)) impl_->engine.impl_->logger.fail("running the engine");
}

}  // namespace quest_deploy
