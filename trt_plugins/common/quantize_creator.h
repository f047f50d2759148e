//! What the creators of the library share.
#pragma once

#include "common/definition.h"
#include "common/log.h"

#include <NvInferRuntime.h>

#include <cstdint>

namespace quest
{

//! A creator of plugins that are made from named fields.
class QuantizeCreator : public nvinfer1::IPluginCreatorV3One
{
public:
    nvinfer1::AsciiChar const* getPluginName() const noexcept final
    {
        return mName;
    }

    nvinfer1::AsciiChar const* getPluginVersion() const noexcept final
    {
        return kVersion;
    }

    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept final
    {
        return kNamespace;
    }

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept final
    {
        return &mCollection;
    }

    //! Null, with the reason logged, where the fields are not what getFieldNames tells.
    nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* /*name*/, nvinfer1::PluginFieldCollection const* fields,
        nvinfer1::TensorRTPhase /*phase*/) noexcept final
    {
        return guarded<nvinfer1::IPluginV3*>(mName, nullptr, [&] { return create(fields); });
    }

protected:
    //! \param fields \p count of them, which outlive the creator.
    QuantizeCreator(char const* name, nvinfer1::PluginField const* fields, int32_t count) noexcept
        : mName(name)
        , mCollection{count, fields}
    {
    }

    //! \throw std::invalid_argument for fields that are not the op's.
    virtual nvinfer1::IPluginV3* create(nvinfer1::PluginFieldCollection const* fields) const = 0;

private:
    char const* mName;
    nvinfer1::PluginFieldCollection mCollection;
};

} // namespace quest
