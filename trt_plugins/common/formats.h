/// TensorRT's types and formats in the kernels' words.
#pragma once

#include "common/layout.h"

#include <NvInferRuntime.h>

#include <cstdint>

namespace quest {

/// Whether a tensor of \p type may come as \p x in \p format; for the formats that TensorRT has for that type, but those of DLA.
bool isInputFormat(nvinfer1::DataType type, nvinfer1::TensorFormat format) noexcept;

/// Whether codes may be written in \p format; these are what TensorRT's INT8 layers read.
bool isCodesFormat(nvinfer1::TensorFormat format) noexcept;

/// Where the elements of [samples, channels, pixels] lie in \p format.
///
/// \throw std::invalid_argument for a format of which isInputFormat and isCodesFormat say no.
Layout layoutOf(nvinfer1::TensorFormat format, int32_t channels, int64_t pixels);

/// \throw std::invalid_argument for a type that is none of FP32, FP16 and bf16.
FloatType floatTypeOf(nvinfer1::DataType type);

}  // namespace quest
