#pragma once

#include "common/quantize_creator.h"

namespace quest
{

//! Makes TimestepQuantizePlugin from its field "axis", one INT32 or INT64.
class TimestepQuantizeCreator final : public QuantizeCreator
{
public:
    TimestepQuantizeCreator();

protected:
    nvinfer1::IPluginV3* create(nvinfer1::PluginFieldCollection const* fields) const override;
};

} // namespace quest
