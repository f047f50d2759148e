#pragma once

#include "common/quantize_plugin.h"

namespace quest
{

//! quest::TimestepQuantize for TensorRT; see README.md beside this file.
class TimestepQuantizePlugin final : public QuantizePlugin
{
public:
    //! \param axis the axis of x that the channel vector lies along, at least 1.
    explicit TimestepQuantizePlugin(int32_t axis);

    nvinfer1::IPluginV3* clone() noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

protected:
    void checkX(nvinfer1::Dims const& x) const override;
    int64_t channelsOf(nvinfer1::Dims const& x) const override;
    nvinfer1::DimsExprs codesShape(nvinfer1::DimsExprs const& x, nvinfer1::IExprBuilder& exprBuilder) const override;
    bool takesVectorizedFormats(nvinfer1::Dims const& x) const override;
    cudaError_t launch(nvinfer1::PluginTensorDesc const& x, nvinfer1::PluginTensorDesc const& codes, void const* xData, int8_t* codesData,
        Tables const& tables, cudaStream_t stream) const override;

private:
    int32_t mAxis;
    nvinfer1::PluginField mField;
    nvinfer1::PluginFieldCollection mSerialized{};
};

} // namespace quest
