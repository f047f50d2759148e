/// Times the kernels at Stable Diffusion 1.5's activation shapes, each beside a copy of as many bytes; prints JSON.
///
///     measure [repeats]
///
/// Before each launch the L2 cache is flushed, so that both read from memory; a kernel's and a copy's launches alternate, and the figures
/// are medians. The copy is the faster of cudaMemcpyAsync and a kernel that copies 16 bytes a thread: it reads and writes half the bytes
/// each that the kernel reads and writes in all. scripts/bench/measure_plugin.py builds and runs this and writes the table.

#include "common/device.cuh"
#include "common/layout.h"
#include "geglu_timestep_quantize/kernel.h"
#include "timestep_quantize/kernel.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <exception>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace quest::measure {
namespace {

constexpr int32_t kBuckets = 20;
constexpr int64_t kFlush = int64_t{256} << 20;  ///< bytes; the largest L2 cache, of Blackwell's data center GPUs, has 126 MiB

void require(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

class Memory {
public:
    explicit Memory(std::size_t bytes) { require(cudaMalloc(&mData, bytes), "cudaMalloc"); }

    ~Memory() { static_cast<void>(cudaFree(mData)); }

    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    template <typename T>
    T* as() const {
        return static_cast<T*>(mData);
    }

    template <typename T>
    void fill(const std::vector<T>& values) const {
        require(cudaMemcpy(mData, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    }

private:
    void* mData = nullptr;
};

__global__ void copyKernel(const uint4* from, uint4* to, int64_t count) {
    const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (i < count) to[i] = from[i];
}

/// GEGLU as a pass of its own, as TensorRT runs it before a plugin that does not fuse it.
template <typename T>
__global__ void gegluKernel(const T* x, T* y, int64_t count, int32_t channels) {
    constexpr int kSize = device::kVector<T>;
    const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kSize;
    if (i < count) {
        const int64_t row = i / channels;
        const T* from = x + 2 * row * channels + (i - row * channels);
        const auto value = device::load<kSize>(from);
        const auto gate = device::load<kSize>(from + channels);
        device::Pack<T, kSize> result;
#pragma unroll
        for (int j = 0; j < kSize; ++j)
            result.elements[j] = T(geglu(device::toFloat(value.elements[j]), device::toFloat(gate.elements[j])));
        *reinterpret_cast<device::Pack<T, kSize>*>(y + i) = result;
    }
}

class Clock {
public:
    explicit Clock(int repeats) : mRepeats(repeats), mFlush(kFlush) {
        require(cudaEventCreate(&mBegin), "cudaEventCreate");
        require(cudaEventCreate(&mEnd), "cudaEventCreate");
    }

    ~Clock() {
        static_cast<void>(cudaEventDestroy(mBegin));
        static_cast<void>(cudaEventDestroy(mEnd));
    }

    Clock(const Clock&) = delete;
    Clock& operator=(const Clock&) = delete;

    /// The median of each work's microseconds; the works take turns.
    std::vector<double> medians(const std::vector<std::function<void()>>& works) {
        std::vector<std::vector<double>> times(works.size());
        for (int repeat = -3; repeat < mRepeats; ++repeat)  // the first three are not counted
        {
            for (std::size_t i = 0; i < works.size(); ++i) {
                const double microseconds = time(works[i]);
                if (repeat >= 0) times[i].push_back(microseconds);
            }
        }
        std::vector<double> result;
        for (std::vector<double>& all : times) {
            std::nth_element(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(all.size() / 2), all.end());
            result.push_back(all[all.size() / 2]);
        }
        return result;
    }

private:
    double time(const std::function<void()>& work) {
        require(cudaMemsetAsync(mFlush.as<char>(), 1, kFlush, nullptr), "cudaMemsetAsync");
        require(cudaEventRecord(mBegin, nullptr), "cudaEventRecord");
        work();
        require(cudaEventRecord(mEnd, nullptr), "cudaEventRecord");
        require(cudaEventSynchronize(mEnd), "cudaEventSynchronize");
        float milliseconds = 0.F;
        require(cudaEventElapsedTime(&milliseconds, mBegin, mEnd), "cudaEventElapsedTime");
        return 1e3 * static_cast<double>(milliseconds);
    }

    int mRepeats;
    Memory mFlush;
    cudaEvent_t mBegin = nullptr;
    cudaEvent_t mEnd = nullptr;
};

/// Random activations within a 4-bit code's range and tables of 20 buckets; what is measured depends on neither, but for rare ties.
class Operands {
public:
    Operands(FloatType type, int64_t elements, int32_t samples, int32_t channels)
        : x(static_cast<std::size_t>(elements) * static_cast<std::size_t>(sizeOf(type))),
          mBucket(static_cast<std::size_t>(samples) * sizeof(int64_t)),
          mTables(4 * kBuckets * sizeof(float)),
          mChannel(static_cast<std::size_t>(channels) * sizeof(float)),
          mChannels(channels) {
        std::mt19937 random(1);
        std::uniform_real_distribution<float> value(-1.F, 1.F);
        std::vector<float> some(4096);
        std::generate(some.begin(), some.end(), [&] { return value(random); });
        std::vector<uint8_t> bytes(static_cast<std::size_t>(elements) * static_cast<std::size_t>(sizeOf(type)));
        for (int64_t i = 0; i < elements; ++i) {
            const float number = some[static_cast<std::size_t>(i * 31 + (i >> 12)) % some.size()];
            if (type == FloatType::kFloat32) reinterpret_cast<float*>(bytes.data())[i] = number;
            else reinterpret_cast<__half*>(bytes.data())[i] = __float2half(number);
        }
        x.fill(bytes);
        std::vector<int64_t> bucket(static_cast<std::size_t>(samples));
        std::generate(bucket.begin(), bucket.end(), [n = int64_t{0}]() mutable { return n++ % kBuckets; });
        mBucket.fill(bucket);
        std::vector<float> tables;
        for (const float number : {0.0613F, -7.F, 8.F, 0.F})  // scale, low, high, offset
            tables.insert(tables.end(), kBuckets, number);
        mTables.fill(tables);
        std::vector<float> channel(static_cast<std::size_t>(channels));
        std::generate(channel.begin(), channel.end(), [&] { return 1.5F + value(random); });
        mChannel.fill(channel);
    }

    Tables tables() const {
        const float* const t = mTables.as<float>();
        return {mBucket.as<void>(), true, t, t + kBuckets, t + 2 * kBuckets, t + 3 * kBuckets, kBuckets, mChannel.as<float>(), mChannels};
    }

    Memory x;

private:
    Memory mBucket;
    Memory mTables;
    Memory mChannel;
    int32_t mChannels;
};

/// A tensor that is quantized: [batch, outer * channels, inner] with the channel vector along the channels.
struct Site {
    const char* name;
    int32_t outer, channels;
    int64_t inner;
};

constexpr Site kImages[] = {{"conv 64x64", 1, 320, 4096},  {"conv 64x64", 1, 640, 4096},  {"conv 64x64", 1, 960, 4096},
                            {"conv 32x32", 1, 320, 1024},  {"conv 32x32", 1, 640, 1024},  {"conv 32x32", 1, 960, 1024},
                            {"conv 32x32", 1, 1280, 1024}, {"conv 32x32", 1, 1920, 1024}, {"conv 16x16", 1, 640, 256},
                            {"conv 16x16", 1, 1280, 256},  {"conv 16x16", 1, 1920, 256},  {"conv 16x16", 1, 2560, 256},
                            {"conv 8x8", 1, 1280, 64},     {"conv 8x8", 1, 2560, 64}};
constexpr Site kRows[] = {{"tokens", 4096, 320, 1}, {"tokens", 1024, 640, 1}, {"tokens", 256, 1280, 1},
                          {"tokens", 64, 1280, 1},  {"text", 77, 768, 1},     {"time embedding", 1, 1280, 1}};
constexpr Site kGates[] = {{"GEGLU", 4096, 1280, 1}, {"GEGLU", 1024, 2560, 1}, {"GEGLU", 256, 5120, 1}, {"GEGLU", 64, 5120, 1}};

struct Formats {
    const char* name;
    Layout (*x)(int32_t, int64_t);
    Layout (*codes)(int32_t, int64_t);
    bool halfAlone;
};

constexpr Formats kFormats[] = {
    {"linear to linear", [](int32_t c, int64_t p) { return linear(c, p); }, [](int32_t c, int64_t p) { return linear(c, p); }, false},
    {"linear to CHW32", [](int32_t c, int64_t p) { return linear(c, p); }, [](int32_t c, int64_t p) { return vectorMajor(32, c, p); },
     false},
    {"CHW32 to CHW32", [](int32_t c, int64_t p) { return vectorMajor(32, c, p); },
     [](int32_t c, int64_t p) { return vectorMajor(32, c, p); }, false},
    {"HWC8 to CHW32", [](int32_t c, int64_t p) { return vectorMinor(8, c, p); }, [](int32_t c, int64_t p) { return vectorMajor(32, c, p); },
     true},
    {"HWC8 to HWC16", [](int32_t c, int64_t p) { return vectorMinor(8, c, p); }, [](int32_t c, int64_t p) { return vectorMinor(16, c, p); },
     true}};

class Report {
public:
    void line(const char* kernel, const Site& site, FloatType type, const char* formats, int32_t batch, int64_t bytes, double kernelTime,
              double copyTime, double apartTime) {
        std::printf(
            "%s\n  {\"kernel\": \"%s\", \"site\": \"%s\", \"shape\": [%d, %d, %d, %lld], \"type\": \"%s\", \"formats\": \"%s\", "
            "\"bytes\": %lld, \"kernel_us\": %.3f, \"copy_us\": %.3f",
            mSeparator, kernel, site.name, batch, site.outer, site.channels, static_cast<long long>(site.inner),
            type == FloatType::kFloat32 ? "fp32" : "fp16", formats, static_cast<long long>(bytes), kernelTime, copyTime);
        if (apartTime > 0) std::printf(", \"apart_us\": %.3f", apartTime);
        std::printf("}");
        std::fflush(stdout);
        mSeparator = ",";
    }

private:
    const char* mSeparator = "";
};

std::vector<std::function<void()>> copies(const Memory& from, const Memory& to, int64_t bytes) {
    const int64_t half = (bytes / 2 + 15) / 16 * 16;
    return {[&from, &to, half] {
                require(cudaMemcpyAsync(to.as<void>(), from.as<void>(), static_cast<std::size_t>(half), cudaMemcpyDeviceToDevice, nullptr),
                        "copy");
            },
            [&from, &to, half] {
                const int64_t count = half / 16;
                copyKernel<<<static_cast<unsigned>((count + 255) / 256), 256>>>(from.as<uint4>(), to.as<uint4>(), count);
                require(cudaGetLastError(), "copy");
            }};
}

void measureQuantize(Clock& clock, Report& report, const Site& site, FloatType type, const Formats& formats, int32_t batch) {
    const int32_t all = site.outer * site.channels;
    const Layout xLayout = formats.x(all, site.inner);
    const Layout codesLayout = formats.codes(all, site.inner);
    const Operands operands(type, batch * xLayout.sample, batch, site.channels);
    const Memory codes(static_cast<std::size_t>(batch * codesLayout.sample));
    const TimestepQuantizeProblem problem{
        operands.x.as<void>(), type,       xLayout,          codes.as<int8_t>(), codesLayout, batch, site.outer,
        site.channels,         site.inner, operands.tables()};
    const int64_t bytes = batch * (xLayout.sample * sizeOf(type) + codesLayout.sample);
    const Memory from(static_cast<std::size_t>(bytes));
    const Memory to(static_cast<std::size_t>(bytes));
    std::vector<std::function<void()>> works = copies(from, to, bytes);
    works.emplace_back([&problem] { require(launchTimestepQuantize(problem, nullptr), "TimestepQuantize"); });
    const std::vector<double> times = clock.medians(works);
    report.line("TimestepQuantize", site, type, formats.name, batch, bytes, times[2], std::min(times[0], times[1]), 0);
}

template <typename T>
void measureGeglu(Clock& clock, Report& report, const Site& site, FloatType type, int32_t batch) {
    const int64_t count = int64_t{batch} * site.outer * site.channels;
    const Operands operands(type, 2 * count, batch, site.channels);
    const Memory codes(static_cast<std::size_t>(count));
    const Memory product(static_cast<std::size_t>(count) * sizeof(T));
    const GegluTimestepQuantizeProblem fused{operands.x.as<void>(), type, codes.as<int8_t>(), batch, site.outer, site.channels,
                                             operands.tables()};
    const Layout layout = linear(site.outer * site.channels, 1);
    const TimestepQuantizeProblem apart{product.as<void>(), type,          layout, codes.as<int8_t>(), layout, batch,
                                        site.outer,         site.channels, 1,      operands.tables()};
    const int64_t bytes = count * (2 * sizeOf(type) + 1);
    const Memory from(static_cast<std::size_t>(bytes));
    const Memory to(static_cast<std::size_t>(bytes));
    std::vector<std::function<void()>> works = copies(from, to, bytes);
    works.emplace_back([&fused] { require(launchGegluTimestepQuantize(fused, nullptr), "GegluTimestepQuantize"); });
    works.emplace_back([&] {
        const int64_t threads = count / device::kVector<T>;
        gegluKernel<<<static_cast<unsigned>((threads + 255) / 256), 256>>>(operands.x.as<T>(), product.as<T>(), count, site.channels);
        require(cudaGetLastError(), "GEGLU");
        require(launchTimestepQuantize(apart, nullptr), "TimestepQuantize");
    });
    const std::vector<double> times = clock.medians(works);
    report.line("GegluTimestepQuantize", site, type, "linear to linear", batch, bytes, times[2], std::min(times[0], times[1]), times[3]);
}

void run(int repeats) {
    cudaDeviceProp properties{};
    int driver = 0;
    int runtime = 0;
    require(cudaGetDeviceProperties(&properties, 0), "no GPU can be used");
    require(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    require(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
    char date[sizeof "2026-01-01"] = "";
    const std::time_t now = std::time(nullptr);
    std::strftime(date, sizeof date, "%Y-%m-%d", std::gmtime(&now));
    std::printf(
        "{\"date\": \"%s\", \"device\": \"%s\", \"compute_capability\": \"%d.%d\", \"cuda_driver\": %d, \"cuda_runtime\": %d, \"repeats\": "
        "%d,\n"
        " \"lines\": [",
        date, properties.name, properties.major, properties.minor, driver, runtime, repeats);
    Clock clock(repeats);
    Report report;
    for (const int32_t batch : {2, 16}) {
        for (const FloatType type : {FloatType::kFloat16, FloatType::kFloat32}) {
            for (const Site& site : kImages) {
                for (const Formats& formats : kFormats)
                    if (type == FloatType::kFloat16 || !formats.halfAlone) measureQuantize(clock, report, site, type, formats, batch);
            }
            for (const Site& site : kRows) measureQuantize(clock, report, site, type, kFormats[0], batch);
            for (const Site& site : kGates) {
                type == FloatType::kFloat16 ? measureGeglu<__half>(clock, report, site, type, batch)
                                            : measureGeglu<float>(clock, report, site, type, batch);
            }
        }
    }
    std::printf("\n ]}\n");
}

}  // namespace
}  // namespace quest::measure

int main(int argc, char** argv) {
    try {
        quest::measure::run(argc > 1 ? std::max(1, std::atoi(argv[1])) : 51);
        return 0;
    } catch (const std::exception& e) {
        std::fprintf(stderr, "measure: %s\n", e.what());
        return 1;
    }
}
