#include "geglu_timestep_quantize/plugin.h"

#include "common/formats.h"
#include "common/log.h"
#include "geglu_timestep_quantize/definition.h"
#include "geglu_timestep_quantize/kernel.h"

#include <memory>
#include <stdexcept>

namespace quest
{

GegluTimestepQuantizePlugin::GegluTimestepQuantizePlugin()
    : QuantizePlugin(kGegluTimestepQuantizeName, "")
{
}

nvinfer1::IPluginV3* GegluTimestepQuantizePlugin::clone() noexcept
{
    return guarded<nvinfer1::IPluginV3*>(kGegluTimestepQuantizeName, nullptr, [] { return std::make_unique<GegluTimestepQuantizePlugin>().release(); });
}

nvinfer1::PluginFieldCollection const* GegluTimestepQuantizePlugin::getFieldsToSerialize() noexcept
{
    return &mSerialized;
}

void GegluTimestepQuantizePlugin::checkX(nvinfer1::Dims const& x) const
{
    int64_t const last = x.d[x.nbDims - 1];
    if (last >= 0 && last % 2 != 0)
    {
        throw std::invalid_argument("the last dimension of x is " + std::to_string(last) + ", expected values and as many gates");
    }
}

int64_t GegluTimestepQuantizePlugin::channelsOf(nvinfer1::Dims const& x) const
{
    int64_t const last = x.d[x.nbDims - 1];
    return last < 0 ? -1 : last / 2;
}

nvinfer1::DimsExprs GegluTimestepQuantizePlugin::codesShape(nvinfer1::DimsExprs const& x, nvinfer1::IExprBuilder& exprBuilder) const
{
    nvinfer1::DimsExprs codes = x;
    codes.d[x.nbDims - 1]
        = exprBuilder.operation(nvinfer1::DimensionOperation::kFLOOR_DIV, *x.d[x.nbDims - 1], *exprBuilder.constant(2));
    return codes;
}

bool GegluTimestepQuantizePlugin::takesVectorizedFormats(nvinfer1::Dims const& /*x*/) const
{
    return false; // between two matrix products
}

cudaError_t GegluTimestepQuantizePlugin::launch(nvinfer1::PluginTensorDesc const& x, nvinfer1::PluginTensorDesc const& /*codes*/,
    void const* xData, int8_t* codesData, Tables const& tables, cudaStream_t stream) const
{
    int64_t rows = 1;
    for (int32_t i = 1; i < x.dims.nbDims - 1; ++i)
    {
        rows *= x.dims.d[i];
    }
    GegluTimestepQuantizeProblem const problem{xData, floatTypeOf(x.type), codesData, static_cast<int32_t>(x.dims.d[0]),
        static_cast<int32_t>(rows), static_cast<int32_t>(channelsOf(x.dims)), tables};
    return launchGegluTimestepQuantize(problem, stream);
}

} // namespace quest
