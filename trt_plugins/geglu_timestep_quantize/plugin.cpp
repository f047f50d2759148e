#include "geglu_timestep_quantize/plugin.h"

#include "common/formats.h"
#include "common/log.h"
#include "geglu_timestep_quantize/definition.h"
#include "geglu_timestep_quantize/kernel.h"

#include <memory>
#include <stdexcept>

namespace quest {

GegluTimestepQuantizePlugin::GegluTimestepQuantizePlugin() : QuantizePlugin(kGegluTimestepQuantizeName, "") {}

nvinfer1::IPluginV3* GegluTimestepQuantizePlugin::clone() noexcept {
    return guarded<nvinfer1::IPluginV3*>(kGegluTimestepQuantizeName, nullptr,
                                         [] { return std::make_unique<GegluTimestepQuantizePlugin>().release(); });
}

const nvinfer1::PluginFieldCollection* GegluTimestepQuantizePlugin::getFieldsToSerialize() noexcept { return &mSerialized; }

void GegluTimestepQuantizePlugin::checkX(const nvinfer1::Dims& x) const {
    const int64_t last = x.d[x.nbDims - 1];
    if (last >= 0 && last % 2 != 0)
        throw std::invalid_argument("the last dimension of x is " + std::to_string(last) + ", expected values and as many gates");
}

int64_t GegluTimestepQuantizePlugin::channelsOf(const nvinfer1::Dims& x) const {
    const int64_t last = x.d[x.nbDims - 1];
    return last < 0 ? -1 : last / 2;
}

nvinfer1::DimsExprs GegluTimestepQuantizePlugin::codesShape(const nvinfer1::DimsExprs& x, nvinfer1::IExprBuilder& exprBuilder) const {
    nvinfer1::DimsExprs codes = x;
    codes.d[x.nbDims - 1] = exprBuilder.operation(nvinfer1::DimensionOperation::kFLOOR_DIV, *x.d[x.nbDims - 1], *exprBuilder.constant(2));
    return codes;
}

bool GegluTimestepQuantizePlugin::takesVectorizedFormats(const nvinfer1::Dims& /*x*/) const {
    return false;  // between two matrix products
}

cudaError_t GegluTimestepQuantizePlugin::launch(const nvinfer1::PluginTensorDesc& x, const nvinfer1::PluginTensorDesc& /*codes*/,
                                                const void* xData, int8_t* codesData, const Tables& tables, cudaStream_t stream) const {
    int64_t rows = 1;
    for (int32_t i = 1; i < x.dims.nbDims - 1; ++i) rows *= x.dims.d[i];
    const GegluTimestepQuantizeProblem problem{xData,
                                               floatTypeOf(x.type),
                                               codesData,
                                               static_cast<int32_t>(x.dims.d[0]),
                                               static_cast<int32_t>(rows),
                                               static_cast<int32_t>(channelsOf(x.dims)),
                                               tables};
    return launchGegluTimestepQuantize(problem, stream);
}

}  // namespace quest
