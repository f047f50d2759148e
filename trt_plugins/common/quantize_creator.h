/// What the creators of the library share.
#pragma once

#include "common/definition.h"
#include "common/log.h"

#include <NvInferRuntime.h>

#include <cstdint>

namespace quest {

/// A creator of plugins that are made from named fields.
class QuantizeCreator : public nvinfer1::IPluginCreatorV3One {
public:
    const nvinfer1::AsciiChar* getPluginName() const noexcept final { return mName; }

    const nvinfer1::AsciiChar* getPluginVersion() const noexcept final { return kVersion; }

    const nvinfer1::AsciiChar* getPluginNamespace() const noexcept final { return kNamespace; }

    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept final { return &mCollection; }

    /// Null, with the reason logged, where the fields are not what getFieldNames tells.
    nvinfer1::IPluginV3* createPlugin(const nvinfer1::AsciiChar* /*name*/, const nvinfer1::PluginFieldCollection* fields,
                                      nvinfer1::TensorRTPhase /*phase*/) noexcept final {
        return guarded<nvinfer1::IPluginV3*>(mName, nullptr, [&] { return create(fields); });
    }

protected:
    /// \param fields \p count of them, which outlive the creator.
    QuantizeCreator(const char* name, const nvinfer1::PluginField* fields, int32_t count) noexcept
        : mName(name), mCollection{count, fields} {}

    /// \throw std::invalid_argument for fields that are not the op's.
    virtual nvinfer1::IPluginV3* create(const nvinfer1::PluginFieldCollection* fields) const = 0;

private:
    const char* mName;
    nvinfer1::PluginFieldCollection mCollection;
};

}  // namespace quest
