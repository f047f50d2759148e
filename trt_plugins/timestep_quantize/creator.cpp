#include "timestep_quantize/creator.h"

#include "timestep_quantize/definition.h"
#include "timestep_quantize/plugin.h"

#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

namespace quest {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

namespace {

int32_t axisFrom(const PluginField& field) {
    const bool isLong = field.type == PluginFieldType::kINT64;  // what the parser makes of an ONNX attribute differs between releases
    if ((field.type != PluginFieldType::kINT32 && !isLong) || field.length != 1 || field.data == nullptr) {
        throw std::invalid_argument("the field axis has type " + std::to_string(static_cast<int32_t>(field.type)) + " and length " +
                                    std::to_string(field.length) + ", expected one INT32 or INT64");
    }
    const int64_t axis = isLong ? *static_cast<const int64_t*>(field.data) : *static_cast<const int32_t*>(field.data);
    if (axis < 1 || axis > std::numeric_limits<int32_t>::max())
        throw std::invalid_argument("axis is " + std::to_string(axis) + ", expected at least 1");
    return static_cast<int32_t>(axis);
}

}  // namespace

TimestepQuantizeCreator::TimestepQuantizeCreator() noexcept
    : QuantizeCreator(kTimestepQuantizeName, &mAxisField, 1), mAxisField(kAxisField, nullptr, PluginFieldType::kINT32, 1) {}

nvinfer1::IPluginV3* TimestepQuantizeCreator::create(const nvinfer1::PluginFieldCollection* fields) const {
    if (fields == nullptr || fields->nbFields != 1 || fields->fields == nullptr || fields->fields[0].name == nullptr ||
        std::strcmp(fields->fields[0].name, kAxisField) != 0) {
        throw std::invalid_argument("expected the field axis and no other");
    }
    return std::make_unique<TimestepQuantizePlugin>(axisFrom(fields->fields[0])).release();
}

}  // namespace quest
