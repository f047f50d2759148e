#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "quest_deploy/workspace.h"

namespace quest_deploy {

using Shape = std::vector<std::int64_t>;

/// An input or output of an engine; all are float32. Sizes that an engine leaves open are -1.
struct Tensor {
    std::string name;
    bool is_input = false;
    Shape shape;
};

struct EngineOptions {
    std::filesystem::path plugin_library;                 ///< the library of quest::TimestepQuantize, where the engine needs it
    int device = 0;                                       ///< the GPU
    std::optional<std::int64_t> weight_streaming_budget;  ///< bytes of weights kept on the GPU, instead of the record's
    /// Gets all that TensorRT logs in this process while the engine lives, whichever engine it is about: TensorRT has one logger for a
    /// process. 0 and 1 are errors. Any thread calls it, and one that does may still be in it when the engine is gone.
    std::function<void(int severity, const char* message)> log;
};

class Context;

/// An engine on the GPU. Copies share it; all its functions may be called from any thread.
class Engine {
public:
    /// Check the record, the library, the GPU and every hash, then load. Throws Error.
    static Engine open(const EngineRecord& record, const EngineOptions& options = {});

    /// "tensorrt" or "tensorrt-rtx": what this library was built with.
    static std::string backend();
    /// The version of the TensorRT library that is loaded, such as "10.16.1.11".
    static std::string version();

    const std::vector<Tensor>& tensors() const;
    /// The tensor called `name`; throws Error where there is none.
    const Tensor& tensor(const std::string& name) const;
    int device() const;

    /// What runs the engine: one for each thread, or each stream, that runs at the same time. Throws Error.
    Context create_context() const;

private:
    friend class Context;
    struct Impl;
    explicit Engine(std::shared_ptr<Impl> impl);
    std::shared_ptr<Impl> impl_;
};

/// One thread at a time uses a context. It keeps its engine.
class Context {
public:
    Context(Context&&) noexcept;
    Context& operator=(Context&&) noexcept;
    ~Context();

    /// Choose the inputs' shapes, and the optimization profile that takes them. Throws Error where none does.
    void set_shapes(const std::map<std::string, Shape>& inputs, cudaStream_t stream);
    /// An input's or output's shape, once all inputs' are known.
    Shape shape(const std::string& name) const;
    /// Where a tensor lies in the GPU's memory; it must stay there as long as the context may run.
    void bind(const std::string& name, void* device_memory);
    /// Run once, after what is on the stream; returns at once. Throws Error where TensorRT refuses.
    void enqueue(cudaStream_t stream);

private:
    friend class Engine;
    struct Impl;
    explicit Context(std::unique_ptr<Impl> impl);
    std::unique_ptr<Impl> impl_;
};

}  // namespace quest_deploy
