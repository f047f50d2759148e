#include "timestep_quantize/plugin.h"

#include "common/formats.h"
#include "common/log.h"
#include "timestep_quantize/definition.h"
#include "timestep_quantize/kernel.h"

#include <memory>
#include <stdexcept>

namespace quest {

namespace {

/// The rank and the axis of what convolutions read; the vector dimension of TensorRT's formats is then the channels.
constexpr int32_t kImageRank = 4;
constexpr int32_t kImageAxis = 1;

int64_t product(const nvinfer1::Dims& dims, int32_t begin, int32_t end) {
    int64_t result = 1;
    for (int32_t i = begin; i < end; ++i) result *= dims.d[i];
    return result;
}

}  // namespace

TimestepQuantizePlugin::TimestepQuantizePlugin(int32_t axis)
    : QuantizePlugin(kTimestepQuantizeName, std::string(kAxisField) + "=" + std::to_string(axis)), mAxis(axis) {
    if (axis < 1 || axis >= nvinfer1::Dims::MAX_DIMS)
        throw std::invalid_argument("axis is " + std::to_string(axis) + ", expected 1 to " + std::to_string(nvinfer1::Dims::MAX_DIMS - 1));
}

nvinfer1::IPluginV3* TimestepQuantizePlugin::clone() noexcept {
    return guarded<nvinfer1::IPluginV3*>(kTimestepQuantizeName, nullptr,
                                         [this] { return std::make_unique<TimestepQuantizePlugin>(mAxis).release(); });
}

const nvinfer1::PluginFieldCollection* TimestepQuantizePlugin::getFieldsToSerialize() noexcept {
    mField = {kAxisField, &mAxis, nvinfer1::PluginFieldType::kINT32, 1};
    mSerialized = {1, &mField};
    return &mSerialized;
}

void TimestepQuantizePlugin::checkX(const nvinfer1::Dims& x) const {
    if (mAxis >= x.nbDims)
        throw std::invalid_argument("axis is " + std::to_string(mAxis) + " and x has " + std::to_string(x.nbDims) + " dimensions");
}

int64_t TimestepQuantizePlugin::channelsOf(const nvinfer1::Dims& x) const { return x.d[mAxis]; }

nvinfer1::DimsExprs TimestepQuantizePlugin::codesShape(const nvinfer1::DimsExprs& x, nvinfer1::IExprBuilder& /*exprBuilder*/) const {
    return x;
}

bool TimestepQuantizePlugin::takesVectorizedFormats(const nvinfer1::Dims& x) const {
    // The length of the vector dimension must be known when the engine is built.
    return x.nbDims == kImageRank && mAxis == kImageAxis && x.d[kImageAxis] > 0;
}

cudaError_t TimestepQuantizePlugin::launch(const nvinfer1::PluginTensorDesc& x, const nvinfer1::PluginTensorDesc& codes, const void* xData,
                                           int8_t* codesData, const Tables& tables, cudaStream_t stream) const {
    const nvinfer1::Dims& dims = x.dims;  // few enough for 32 bits, as enqueue has checked
    const auto outer = static_cast<int32_t>(product(dims, 1, mAxis));
    const auto channels = static_cast<int32_t>(dims.d[mAxis]);
    const int64_t inner = product(dims, mAxis + 1, dims.nbDims);
    const TimestepQuantizeProblem problem{xData,
                                          floatTypeOf(x.type),
                                          layoutOf(x.format, outer * channels, inner),
                                          codesData,
                                          layoutOf(codes.format, outer * channels, inner),
                                          static_cast<int32_t>(dims.d[0]),
                                          outer,
                                          channels,
                                          inner,
                                          tables};
    return launchTimestepQuantize(problem, stream);
}

}  // namespace quest
