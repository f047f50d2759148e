/// What TensorRT would be to a plugin library: a registry, a logger and dimension expressions of its own.
#pragma once

#include <NvInferRuntime.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace quest::test {

/// Keeps what was registered, with the namespace that it was registered under.
class Registry final : public nvinfer1::IPluginRegistry {
public:
    struct Entry {
        const nvinfer1::IPluginCreatorInterface* creator;
        std::string nameSpace;
    };

    std::vector<Entry> entries;
    bool refuses = false;  ///< as where a creator of the same name, version and namespace is registered

    bool registerCreator(nvinfer1::IPluginCreatorInterface& creator, const nvinfer1::AsciiChar* nameSpace) noexcept override {
        if (refuses) return false;
        entries.push_back({&creator, nameSpace});
        return true;
    }

    bool deregisterCreator(const nvinfer1::IPluginCreatorInterface& creator) noexcept override {
        const auto found = std::find_if(entries.begin(), entries.end(), [&creator](const Entry& e) { return e.creator == &creator; });
        if (found == entries.end()) return false;
        entries.erase(found);
        return true;
    }

    // What no plugin library calls.
#if NV_TENSORRT_MAJOR < 11
    bool registerCreator(nvinfer1::IPluginCreator&, const nvinfer1::AsciiChar*) noexcept override { return false; }
    nvinfer1::IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override { return nullptr; }
    nvinfer1::IPluginCreator* getPluginCreator(const nvinfer1::AsciiChar*, const nvinfer1::AsciiChar*,
                                               const nvinfer1::AsciiChar*) noexcept override {
        return nullptr;
    }
    bool deregisterCreator(const nvinfer1::IPluginCreator&) noexcept override { return false; }
#endif
    void setErrorRecorder(nvinfer1::IErrorRecorder*) noexcept override {}
    nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    bool isParentSearchEnabled() const override { return false; }
    void setParentSearchEnabled(bool) override {}
    PluginLibraryHandle loadLibrary(const nvinfer1::AsciiChar*) noexcept override { return nullptr; }
    void deregisterLibrary(PluginLibraryHandle) noexcept override {}
    nvinfer1::IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept override { return nullptr; }
    nvinfer1::IPluginCreatorInterface* getCreator(const nvinfer1::AsciiChar*, const nvinfer1::AsciiChar*,
                                                  const nvinfer1::AsciiChar*) noexcept override {
        return nullptr;
    }
    nvinfer1::IPluginResource* acquirePluginResource(const nvinfer1::AsciiChar*, nvinfer1::IPluginResource*) noexcept override {
        return nullptr;
    }
    int32_t releasePluginResource(const nvinfer1::AsciiChar*) noexcept override { return 0; }
#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 10
    nvinfer1::IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept override { return nullptr; }
#endif
};

/// Keeps the errors that a plugin logs.
class Logger final : public nvinfer1::ILogger, public nvinfer1::ILoggerFinder {
public:
    std::vector<std::string> errors;

    void log(Severity severity, const nvinfer1::AsciiChar* message) noexcept override {
        if (severity == Severity::kERROR) errors.emplace_back(message);
    }

    nvinfer1::ILogger* findLogger() override { return this; }

    /// The last error, which is forgotten.
    std::string take() {
        const std::string last = errors.empty() ? "" : errors.back();
        errors.clear();
        return last;
    }
};

/// A dimension: a number, or -1 for one that is known only when the engine runs.
class Dimension final : public nvinfer1::IDimensionExpr, public nvinfer1::apiv::VDimensionExpr {
public:
    explicit Dimension(int64_t value) : mValue(value) { mImpl = this; }

    bool isConstant() const override { return mValue >= 0; }

    int64_t getConstantValue() const override { return mValue; }

    bool isSizeTensor() const override { return false; }

private:
    int64_t mValue;
};

/// Makes dimensions, and owns them.
class ExprBuilder final : public nvinfer1::IExprBuilder, public nvinfer1::apiv::VExprBuilder {
public:
    ExprBuilder() { mImpl = this; }

    const nvinfer1::IDimensionExpr* constant(int64_t value) override {
        mOwned.push_back(std::make_unique<Dimension>(value));
        return mOwned.back().get();
    }

    const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation operation, const nvinfer1::IDimensionExpr& first,
                                              const nvinfer1::IDimensionExpr& second) override {
        const bool known = operation == nvinfer1::DimensionOperation::kFLOOR_DIV && first.isConstant() && second.isConstant();
        return constant(known ? first.getConstantValue() / second.getConstantValue() : -1);
    }

    const nvinfer1::IDimensionExpr* declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr&, const nvinfer1::IDimensionExpr&) override {
        return nullptr;
    }

    nvinfer1::DimsExprs shape(const std::vector<int64_t>& dims) {
        nvinfer1::DimsExprs result{};
        result.nbDims = static_cast<int32_t>(dims.size());
        for (std::size_t i = 0; i < dims.size(); ++i) result.d[i] = constant(dims[i]);
        return result;
    }

private:
    std::vector<std::unique_ptr<Dimension>> mOwned;
};

}  // namespace quest::test
