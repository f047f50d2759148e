/// What the plugins of the library share: operands, types, and the boundary to TensorRT.
#pragma once

#include "common/definition.h"
#include "common/tables.h"

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>

namespace quest {

/// A plugin with the operands of definition.h and INT8 codes as its one output.
///
/// A derived class says what x and the codes look like and launches its kernel; it may throw, and this class logs and returns an error.
class QuantizePlugin : public nvinfer1::IPluginV3,
                       public nvinfer1::IPluginV3OneCore,
                       public nvinfer1::IPluginV3OneBuild,
                       public nvinfer1::IPluginV3OneRuntime {
public:
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept final;

    const nvinfer1::AsciiChar* getPluginName() const noexcept final;
    const nvinfer1::AsciiChar* getPluginVersion() const noexcept final;
    const nvinfer1::AsciiChar* getPluginNamespace() const noexcept final;

    int32_t getNbOutputs() const noexcept final;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs, const nvinfer1::DataType* inputTypes,
                               int32_t nbInputs) const noexcept final;
    int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t nbInputs, const nvinfer1::DimsExprs* shapeInputs,
                            int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
                            nvinfer1::IExprBuilder& exprBuilder) noexcept final;
    bool supportsFormatCombination(int32_t pos, const nvinfer1::DynamicPluginTensorDesc* inOut, int32_t nbInputs,
                                   int32_t nbOutputs) noexcept final;
    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t nbInputs, const nvinfer1::DynamicPluginTensorDesc* out,
                            int32_t nbOutputs) noexcept final;
    const char* getTimingCacheID() noexcept final;
    const char* getMetadataString() noexcept final;

    int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t nbInputs, const nvinfer1::PluginTensorDesc* out,
                          int32_t nbOutputs) noexcept final;
    int32_t enqueue(const nvinfer1::PluginTensorDesc* inputDesc, const nvinfer1::PluginTensorDesc* outputDesc, const void* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept final;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept final;

protected:
    /// \param name the op's.
    /// \param state what distinguishes this instance from others, such as "axis=1".
    QuantizePlugin(const char* name, std::string state);

    /// Throw std::invalid_argument where x, which has at least two dimensions, is not what the op takes; -1 is a dimension not known yet.
    virtual void checkX(const nvinfer1::Dims& x) const = 0;
    /// The length of the channel vector, if not 1; -1 where it is not known yet.
    virtual int64_t channelsOf(const nvinfer1::Dims& x) const = 0;
    /// The shape of the codes, from that of x.
    virtual nvinfer1::DimsExprs codesShape(const nvinfer1::DimsExprs& x, nvinfer1::IExprBuilder& exprBuilder) const = 0;
    /// Whether formats other than the linear one will do for tensors shaped like \p x.
    virtual bool takesVectorizedFormats(const nvinfer1::Dims& x) const = 0;
    /// Put the kernel on the stream; must neither allocate nor wait.
    virtual cudaError_t launch(const nvinfer1::PluginTensorDesc& x, const nvinfer1::PluginTensorDesc& codes, const void* xData,
                               int8_t* codesData, const Tables& tables, cudaStream_t stream) const = 0;

private:
    void checkShapes(const nvinfer1::Dims* inputs, int32_t nbInputs, int32_t nbOutputs) const;

    const char* mName;
    std::string mState;
};

}  // namespace quest
