/// Random and adversarial operands for the test programs.
#pragma once

#include "common/layout.h"
#include "common/tables.h"
#include "tests/gpu.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace quest::test {

/// Tables of \p buckets rows of every kind: signed and unsigned codes, an offset, one code, tiny and huge scales, bounds that are no
/// integers; and buckets of which some lie outside.
class HostTables {
public:
    HostTables(int32_t buckets, int32_t samples, int32_t channels, bool oneChannel, bool bucketIsInt64, std::mt19937& random)
        : mBucketIsInt64(bucketIsInt64) {
        struct Kind {
            float low, high, offset, scale;
        };
        constexpr float kTiny = 1e-39F;
        const Kind kinds[] = {{-3, 12, 0, 0.11F}, {-8, 7, 0, 0.25F},   {-127, 127, 0, 0.013F}, {0, 255, -128, 0.0039F},
                              {0, 0, 5, 1.F},     {-15, 15, 0, kTiny}, {-15, 15, 0, 6e37F},    {-3.5F, 2.25F, 0.5F, 0.3F}};
        for (int32_t k = 0; k < buckets; ++k) {
            const Kind& kind = kinds[static_cast<std::size_t>(k) % std::size(kinds)];
            scale.push_back(kind.scale);
            low.push_back(kind.low);
            high.push_back(kind.high);
            offset.push_back(kind.offset);
        }
        std::uniform_real_distribution<float> factor(0.25F, 4.F);
        for (int32_t c = 0; c < (oneChannel ? 1 : channels); ++c) channel.push_back(oneChannel ? 1.F : factor(random));
        std::uniform_int_distribution<int32_t> bucket(-1, buckets);  // the ends lie outside the tables
        for (int32_t n = 0; n < samples; ++n) {
            const int32_t k = bucket(random);
            bucket64.push_back(k);
            bucket32.push_back(k);
        }
    }

    Tables view() const {
        return {mBucketIsInt64 ? static_cast<const void*>(bucket64.data()) : bucket32.data(),
                mBucketIsInt64,
                scale.data(),
                low.data(),
                high.data(),
                offset.data(),
                static_cast<int32_t>(scale.size()),
                channel.data(),
                static_cast<int32_t>(channel.size())};
    }

    std::vector<int64_t> bucket64;
    std::vector<int32_t> bucket32;
    std::vector<float> scale, low, high, offset, channel;

private:
    bool mBucketIsInt64;
};

/// The same on the device.
class DeviceTables {
public:
    explicit DeviceTables(const HostTables& host)
        : mView(host.view()),
          mBucket64(host.bucket64),
          mBucket32(host.bucket32),
          mScale(host.scale),
          mLow(host.low),
          mHigh(host.high),
          mOffset(host.offset),
          mChannel(host.channel) {
        mView.bucket = mView.bucketIsInt64 ? static_cast<const void*>(mBucket64.data()) : mBucket32.data();
        mView.scale = mScale.data();
        mView.low = mLow.data();
        mView.high = mHigh.data();
        mView.offset = mOffset.data();
        mView.channel = mChannel.data();
    }

    Tables view() const { return mView; }

private:
    Tables mView;
    DeviceArray<int64_t> mBucket64;
    DeviceArray<int32_t> mBucket32;
    DeviceArray<float> mScale, mLow, mHigh, mOffset, mChannel;
};

/// The bytes of \p count numbers: most within the codes' range of some row, some on a tie of it, some any bits at all.
inline std::vector<uint8_t> randomFloats(FloatType type, int64_t count, const HostTables& tables, std::mt19937& random) {
    const auto size = static_cast<std::size_t>(sizeOf(type));
    std::vector<uint8_t> bytes(static_cast<std::size_t>(count) * size);
    std::uniform_int_distribution<uint32_t> bits;
    std::uniform_real_distribution<float> ratio(-140.F, 140.F);
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t kind = bits(random) % 16;
        const float step = tables.scale[bits(random) % tables.scale.size()] * tables.channel[bits(random) % tables.channel.size()];
        float value = ratio(random) * step * (kind % 2 == 0 ? 0.1F : 1.F);
        if (kind == 13) value = 0.F;
        if (kind == 14) value = (std::nearbyint(ratio(random)) + 0.5F) * step;
        uint32_t raw = bits(random);
        if (kind != 15 && type == FloatType::kFloat32) std::memcpy(&raw, &value, sizeof(raw));
        else if (kind != 15)
            raw = type == FloatType::kFloat16 ? __half_as_ushort(__float2half(value)) : __bfloat16_as_ushort(__float2bfloat16(value));
        std::memcpy(bytes.data() + static_cast<std::size_t>(i) * size, &raw, size);
    }
    return bytes;
}

inline const char* nameOf(FloatType type) { return type == FloatType::kFloat32 ? "FP32" : (type == FloatType::kFloat16 ? "FP16" : "bf16"); }

}  // namespace quest::test
