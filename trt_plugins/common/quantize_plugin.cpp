#include "common/quantize_plugin.h"

#include "common/formats.h"
#include "common/log.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

namespace quest {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

namespace {

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

std::string text(const Dims& dims) {
    std::string result = "[";
    for (int32_t i = 0; i < dims.nbDims; ++i) result += (i == 0 ? "" : ", ") + std::to_string(dims.d[i]);
    return result + "]";
}

/// The kernels count samples, and a sample's codes, in 31 bits; their numbers are narrowed to that behind this check.
void requireCountable(const Dims& codes) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    int64_t ofSample = 1;
    for (int32_t i = 0; i < codes.nbDims; ++i) {
        require(codes.d[i] >= 0 && codes.d[i] <= kMost, "the codes have shape " + text(codes) + ", expected dimensions below 2^31");
        ofSample *= i == 0 ? 1 : codes.d[i];
        require(ofSample <= kMost, "the codes have shape " + text(codes) + ", expected fewer than 2^31 in a sample");
    }
}

/// Whether the two may be the same; -1 is a dimension not known yet.
bool mayEqual(int64_t a, int64_t b) { return a < 0 || b < 0 || a == b; }

/// The shapes of all inputs; \p dimsOf takes one's from its description.
template <typename Description, typename DimsOf>
std::vector<Dims> shapesOf(const Description* inputs, int32_t nbInputs, const DimsOf& dimsOf) {
    require(inputs != nullptr && nbInputs == kInputs, "expected " + std::to_string(kInputs) + " inputs, got " + std::to_string(nbInputs));
    std::vector<Dims> shapes;
    std::transform(inputs, inputs + nbInputs, std::back_inserter(shapes), dimsOf);
    return shapes;
}

}  // namespace

QuantizePlugin::QuantizePlugin(const char* name, std::string state) : mName(name), mState(std::move(state)) {}

nvinfer1::IPluginCapability* QuantizePlugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
        case PluginCapabilityType::kCORE:
            return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD:
            return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME:
            return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

const nvinfer1::AsciiChar* QuantizePlugin::getPluginName() const noexcept { return mName; }

const nvinfer1::AsciiChar* QuantizePlugin::getPluginVersion() const noexcept { return kVersion; }

const nvinfer1::AsciiChar* QuantizePlugin::getPluginNamespace() const noexcept { return kNamespace; }

int32_t QuantizePlugin::getNbOutputs() const noexcept { return 1; }

int32_t QuantizePlugin::getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs, const DataType* inputTypes,
                                           int32_t nbInputs) const noexcept {
    return guarded(mName, -1, [&] {
        require(nbInputs == kInputs && nbOutputs == 1 && outputTypes != nullptr && inputTypes != nullptr,
                "expected " + std::to_string(kInputs) + " inputs and 1 output, got " + std::to_string(nbInputs) + " and " +
                    std::to_string(nbOutputs));
        static_cast<void>(floatTypeOf(inputTypes[kX]));
        outputTypes[0] = DataType::kINT8;
        return 0;
    });
}

int32_t QuantizePlugin::getOutputShapes(const DimsExprs* inputs, int32_t nbInputs, const DimsExprs* /*shapeInputs*/, int32_t nbShapeInputs,
                                        DimsExprs* outputs, int32_t nbOutputs, nvinfer1::IExprBuilder& exprBuilder) noexcept {
    return guarded(mName, -1, [&] {
        require(nbInputs == kInputs && nbShapeInputs == 0 && inputs != nullptr && outputs != nullptr,
                "expected " + std::to_string(kInputs) + " inputs, none of them a shape, got " + std::to_string(nbInputs) + " and " +
                    std::to_string(nbShapeInputs) + " shapes");
        std::array<Dims, kInputs> shapes{};
        for (int32_t i = 0; i < kInputs; ++i) {
            shapes[i].nbDims = inputs[i].nbDims;
            for (int32_t j = 0; j < inputs[i].nbDims; ++j) {
                const bool known = inputs[i].d[j] != nullptr && inputs[i].d[j]->isConstant();
                shapes[i].d[j] = known ? inputs[i].d[j]->getConstantValue() : -1;
            }
        }
        checkShapes(shapes.data(), nbInputs, nbOutputs);
        outputs[0] = codesShape(inputs[kX], exprBuilder);
        return 0;
    });
}

bool QuantizePlugin::supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* inOut, int32_t nbInputs,
                                               int32_t nbOutputs) noexcept {
    return guarded(mName, false, [&] {
        if (nbInputs != kInputs || nbOutputs != 1 || inOut == nullptr || pos < 0 || pos > kInputs) return false;
        const PluginTensorDesc& asked = inOut[pos].desc;
        const bool isLinear = asked.format == TensorFormat::kLINEAR;
        // Each format of x goes with each of the codes: a pass over both costs the same bytes, and saves a reformat on either side.
        const bool formatWillDo = isLinear || takesVectorizedFormats(inOut[kX].desc.dims);
        switch (pos) {
            case kX:
                return formatWillDo && isInputFormat(asked.type, asked.format);
            case kBucket:
                return isLinear && (asked.type == DataType::kINT32 || asked.type == DataType::kINT64);
            case kInputs:
                return formatWillDo && asked.type == DataType::kINT8 && isCodesFormat(asked.format);
            default:
                return isLinear && asked.type == DataType::kFLOAT;
        }
    });
}

int32_t QuantizePlugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t nbInputs, const DynamicPluginTensorDesc* /*out*/,
                                        int32_t nbOutputs) noexcept {
    return guarded(mName, -1, [&] {
        const std::vector<Dims> shapes = shapesOf(in, nbInputs, [](const auto& tensor) { return tensor.desc.dims; });
        checkShapes(shapes.data(), nbInputs, nbOutputs);
        return 0;
    });
}

const char* QuantizePlugin::getTimingCacheID() noexcept { return mState.c_str(); }

const char* QuantizePlugin::getMetadataString() noexcept { return mState.c_str(); }

int32_t QuantizePlugin::onShapeChange(const PluginTensorDesc* in, int32_t nbInputs, const PluginTensorDesc* /*out*/,
                                      int32_t nbOutputs) noexcept {
    return guarded(mName, -1, [&] {
        const std::vector<Dims> shapes = shapesOf(in, nbInputs, [](const auto& tensor) { return tensor.dims; });
        checkShapes(shapes.data(), nbInputs, nbOutputs);
        return 0;
    });
}

int32_t QuantizePlugin::enqueue(const PluginTensorDesc* inputDesc, const PluginTensorDesc* outputDesc, const void* const* inputs,
                                void* const* outputs, void* /*workspace*/, cudaStream_t stream) noexcept {
    return guarded(mName, -1, [&] {
        requireCountable(outputDesc[0].dims);
        const auto floats = [inputs](Input input) { return static_cast<const float*>(inputs[input]); };
        const Tables tables{inputs[kBucket],
                            inputDesc[kBucket].type == DataType::kINT64,
                            floats(kScale),
                            floats(kLow),
                            floats(kHigh),
                            floats(kOffset),
                            static_cast<int32_t>(inputDesc[kScale].dims.d[0]),
                            floats(kChannel),
                            static_cast<int32_t>(inputDesc[kChannel].dims.d[0])};
        const cudaError_t status = launch(inputDesc[kX], outputDesc[0], inputs[kX], static_cast<int8_t*>(outputs[0]), tables, stream);
        if (status != cudaSuccess) {
            logError(mName, cudaGetErrorString(status));
            return -1;
        }
        return 0;
    });
}

nvinfer1::IPluginV3* QuantizePlugin::attachToContext(nvinfer1::IPluginResourceContext* /*context*/) noexcept { return clone(); }

void QuantizePlugin::checkShapes(const Dims* inputs, int32_t nbInputs, int32_t nbOutputs) const {
    require(nbInputs == kInputs && nbOutputs == 1, "expected " + std::to_string(kInputs) + " inputs and 1 output, got " +
                                                       std::to_string(nbInputs) + " and " + std::to_string(nbOutputs));
    const Dims& x = inputs[kX];
    require(x.nbDims >= 2, "x has shape " + text(x) + ", expected samples and at least one more dimension");
    checkX(x);
    for (int32_t i = kBucket; i < kInputs; ++i)
        require(inputs[i].nbDims == 1, std::string(kInputNames[i]) + " has shape " + text(inputs[i]) + ", expected one dimension");
    require(mayEqual(inputs[kBucket].d[0], x.d[0]),
            "bucket has shape " + text(inputs[kBucket]) + ", expected one for each of the samples of x, " + text(x));
    const int64_t buckets = inputs[kScale].d[0];
    for (const int32_t i : {kScale, kLow, kHigh, kOffset}) {
        require(inputs[i].d[0] != 0 && mayEqual(inputs[i].d[0], buckets), std::string(kInputNames[i]) + " has shape " + text(inputs[i]) +
                                                                              ", expected one number for each bucket, as scale has, " +
                                                                              text(inputs[kScale]));
    }
    const int64_t channels = inputs[kChannel].d[0];
    require(channels == 1 || mayEqual(channels, channelsOf(x)),
            "channel has shape " + text(inputs[kChannel]) + ", expected [1] or [" + std::to_string(channelsOf(x)) + "] for x " + text(x));
}

}  // namespace quest
