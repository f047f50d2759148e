#pragma once

#include "common/quantize_creator.h"

namespace quest {

/// Makes GegluTimestepQuantizePlugin, which has no fields.
class GegluTimestepQuantizeCreator final : public QuantizeCreator {
public:
    GegluTimestepQuantizeCreator() noexcept;

protected:
    nvinfer1::IPluginV3* create(const nvinfer1::PluginFieldCollection* fields) const override;
};

}  // namespace quest
