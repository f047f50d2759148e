#include "common/formats.h"

#include <stdexcept>
#include <string>

namespace quest {

using nvinfer1::DataType;
using nvinfer1::TensorFormat;

bool isInputFormat(DataType type, TensorFormat format) noexcept {
    switch (format) {
        case TensorFormat::kLINEAR:
            return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
        case TensorFormat::kHWC:
            return type == DataType::kFLOAT;
        case TensorFormat::kCHW32:
            return type == DataType::kFLOAT || type == DataType::kHALF;
        case TensorFormat::kCHW2:
        case TensorFormat::kHWC8:
            return type == DataType::kHALF || type == DataType::kBF16;
        case TensorFormat::kHWC16:
            return type == DataType::kHALF;
        default:
            return false;
    }
}

bool isCodesFormat(TensorFormat format) noexcept {
    return format == TensorFormat::kLINEAR || format == TensorFormat::kCHW4 || format == TensorFormat::kCHW32 ||
           format == TensorFormat::kHWC16;
}

Layout layoutOf(TensorFormat format, int32_t channels, int64_t pixels) {
    switch (format) {
        case TensorFormat::kLINEAR:
            return linear(channels, pixels);
        case TensorFormat::kCHW2:
            return vectorMajor(2, channels, pixels);
        case TensorFormat::kCHW4:
            return vectorMajor(4, channels, pixels);
        case TensorFormat::kCHW32:
            return vectorMajor(32, channels, pixels);
        case TensorFormat::kHWC:
            return vectorMinor(1, channels, pixels);
        case TensorFormat::kHWC8:
            return vectorMinor(8, channels, pixels);
        case TensorFormat::kHWC16:
            return vectorMinor(16, channels, pixels);
        default:
            throw std::invalid_argument("unexpected tensor format " + std::to_string(static_cast<int32_t>(format)));
    }
}

FloatType floatTypeOf(DataType type) {
    switch (type) {
        case DataType::kFLOAT:
            return FloatType::kFloat32;
        case DataType::kHALF:
            return FloatType::kFloat16;
        case DataType::kBF16:
            return FloatType::kBfloat16;
        default:
            throw std::invalid_argument("x has type " + std::to_string(static_cast<int32_t>(type)) + ", expected FP32, FP16 or bf16");
    }
}

}  // namespace quest
