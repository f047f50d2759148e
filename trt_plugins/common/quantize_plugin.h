//! What the plugins of the library share: operands, types, and the boundary to TensorRT.
#pragma once

#include "common/definition.h"
#include "common/tables.h"

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>

namespace quest
{

//! A plugin with the operands of definition.h and INT8 codes as its one output.
//!
//! A derived class says what x and the codes look like and launches its kernel; it may throw, and this class logs and returns an error.
class QuantizePlugin : public nvinfer1::IPluginV3,
                       public nvinfer1::IPluginV3OneCore,
                       public nvinfer1::IPluginV3OneBuild,
                       public nvinfer1::IPluginV3OneRuntime
{
public:
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept final;

    nvinfer1::AsciiChar const* getPluginName() const noexcept final;
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept final;
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept final;

    int32_t getNbOutputs() const noexcept final;
    int32_t getOutputDataTypes(
        nvinfer1::DataType* outputTypes, int32_t nbOutputs, nvinfer1::DataType const* inputTypes, int32_t nbInputs) const noexcept final;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const* shapeInputs,
        int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs, nvinfer1::IExprBuilder& exprBuilder) noexcept final;
    bool supportsFormatCombination(
        int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept final;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs, nvinfer1::DynamicPluginTensorDesc const* out,
        int32_t nbOutputs) noexcept final;
    char const* getTimingCacheID() noexcept final;
    char const* getMetadataString() noexcept final;

    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs, nvinfer1::PluginTensorDesc const* out,
        int32_t nbOutputs) noexcept final;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc, void const* const* inputs,
        void* const* outputs, void* workspace, cudaStream_t stream) noexcept final;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept final;

protected:
    //! \param name the op's.
    //! \param state what distinguishes this instance from others, such as "axis=1".
    QuantizePlugin(char const* name, std::string state);

    //! Throw std::invalid_argument where x, which has at least two dimensions, is not what the op takes; -1 is a dimension not known yet.
    virtual void checkX(nvinfer1::Dims const& x) const = 0;
    //! The length of the channel vector, if not 1; -1 where it is not known yet.
    virtual int64_t channelsOf(nvinfer1::Dims const& x) const = 0;
    //! The shape of the codes, from that of x.
    virtual nvinfer1::DimsExprs codesShape(nvinfer1::DimsExprs const& x, nvinfer1::IExprBuilder& exprBuilder) const = 0;
    //! Whether formats other than the linear one will do for tensors shaped like \p x.
    virtual bool takesVectorizedFormats(nvinfer1::Dims const& x) const = 0;
    //! Put the kernel on the stream; must neither allocate nor wait.
    virtual cudaError_t launch(nvinfer1::PluginTensorDesc const& x, nvinfer1::PluginTensorDesc const& codes, void const* xData,
        int8_t* codesData, Tables const& tables, cudaStream_t stream) const = 0;

private:
    void checkShapes(nvinfer1::Dims const* inputs, int32_t nbInputs, int32_t nbOutputs) const;

    char const* mName;
    std::string mState;
};

} // namespace quest
