#pragma once

#include "common/quantize_creator.h"

namespace quest {

/// Makes TimestepQuantizePlugin from its field "axis", one INT32 or INT64.
class TimestepQuantizeCreator final : public QuantizeCreator {
public:
    TimestepQuantizeCreator() noexcept;

protected:
    nvinfer1::IPluginV3* create(const nvinfer1::PluginFieldCollection* fields) const override;

private:
    nvinfer1::PluginField mAxisField;
};

}  // namespace quest
