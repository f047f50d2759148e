#include "geglu_timestep_quantize/creator.h"

#include "geglu_timestep_quantize/definition.h"
#include "geglu_timestep_quantize/plugin.h"

#include <memory>
#include <stdexcept>

namespace quest {

GegluTimestepQuantizeCreator::GegluTimestepQuantizeCreator() noexcept : QuantizeCreator(kGegluTimestepQuantizeName, nullptr, 0) {}

nvinfer1::IPluginV3* GegluTimestepQuantizeCreator::create(const nvinfer1::PluginFieldCollection* fields) const {
    if (fields != nullptr && fields->nbFields != 0) throw std::invalid_argument("expected no fields");
    return std::make_unique<GegluTimestepQuantizePlugin>().release();
}

}  // namespace quest
