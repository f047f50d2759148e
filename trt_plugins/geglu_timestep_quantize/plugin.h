#pragma once

#include "common/quantize_plugin.h"

namespace quest {

/// quest::GegluTimestepQuantize for TensorRT; see README.md beside this file.
class GegluTimestepQuantizePlugin final : public QuantizePlugin {
public:
    GegluTimestepQuantizePlugin();

    nvinfer1::IPluginV3* clone() noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

protected:
    void checkX(const nvinfer1::Dims& x) const override;
    int64_t channelsOf(const nvinfer1::Dims& x) const override;
    nvinfer1::DimsExprs codesShape(const nvinfer1::DimsExprs& x, nvinfer1::IExprBuilder& exprBuilder) const override;
    bool takesVectorizedFormats(const nvinfer1::Dims& x) const override;
    cudaError_t launch(const nvinfer1::PluginTensorDesc& x, const nvinfer1::PluginTensorDesc& codes, const void* xData, int8_t* codesData,
                       const Tables& tables, cudaStream_t stream) const override;

private:
    nvinfer1::PluginFieldCollection mSerialized{};
};

}  // namespace quest
