/// The kernels against the scalar references, code for code, on a GPU; needs no TensorRT. Without a GPU it says so and passes.

#include "geglu_timestep_quantize/kernel.h"
#include "common/reference.h"
#include "geglu_timestep_quantize/reference.h"
#include "tests/check.h"
#include "tests/operands.h"
#include "timestep_quantize/kernel.h"
#include "timestep_quantize/reference.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <exception>
#include <utility>

namespace quest::test {
namespace {

constexpr int8_t kUntouched = 99;
constexpr int64_t kLargeForEmulation = 1000000;  ///< elements that take the CPU a while
constexpr std::size_t kMargin = 64;              ///< bytes behind the codes that must stay as they were

struct Shape {
    int32_t samples, outer, channels;
    int64_t inner;
};

/// Run the kernel as \p problem says and compare; \p problem lacks its pointers.
bool agrees(TimestepQuantizeProblem problem, int32_t buckets, bool oneChannel, bool bucketIsInt64, std::size_t shift,
            std::mt19937& random) {
    const HostTables tables(buckets, problem.samples, problem.channels, oneChannel, bucketIsInt64, random);
    const std::vector<uint8_t> x = randomFloats(problem.type, problem.samples * problem.xLayout.sample, tables, random);
    std::vector<int8_t> expected(static_cast<std::size_t>(problem.samples * problem.codesLayout.sample) + kMargin, kUntouched);
    const std::vector<int8_t> untouched = expected;
    problem.x = x.data();
    problem.codes = expected.data();
    problem.tables = tables.view();
    referenceTimestepQuantize(problem);

    const DeviceTables onDevice(tables);
    const DeviceArray<uint8_t> xOnDevice(x, shift * static_cast<std::size_t>(sizeOf(problem.type)));
    const DeviceArray<int8_t> codesOnDevice(untouched, shift);
    problem.x = xOnDevice.data();
    problem.codes = codesOnDevice.data();
    problem.tables = onDevice.view();
    requireSuccess(launchTimestepQuantize(problem, nullptr));
    requireSuccess(cudaDeviceSynchronize());
    return codesOnDevice.toHost() == expected;
}

std::string describe(FloatType type, const Shape& s) {
    return std::string(nameOf(type)) + " [" + std::to_string(s.samples) + ", " + std::to_string(s.outer) + " x " +
           std::to_string(s.channels) + ", " + std::to_string(s.inner) + "]";
}

void checkLinear(Checks& checks, FloatType type, bool emulated, std::mt19937& random) {
    // Planes, rows, single elements; few vectors and many; attention's operands with the channels last.
    std::vector<Shape> shapes{{3, 1, 32, 64}, {9, 1, 40, 16}, {2, 7, 768, 1},  {2, 40, 40, 1},    {2, 8, 77, 20},
                              {3, 1, 5, 7},   {1, 1, 3, 1},   {2, 1, 4, 4096}, {1, 1, 512, 4096}, {1, 4099, 512, 1}};
    if (!emulated) shapes.insert(shapes.end(), {{2, 1, 320, 4096}, {2, 4096, 320, 1}, {70000, 1, 8, 1}});
    for (const Shape& s : shapes) {
        const Layout layout = linear(s.outer * s.channels, s.inner);
        for (const bool one : {false, true}) {
            if (emulated && one && layout.sample > kLargeForEmulation) continue;
            const TimestepQuantizeProblem problem{nullptr, type, layout, nullptr, layout, s.samples, s.outer, s.channels, s.inner, {}};
            checks.check(agrees(problem, one ? 5 : 40, one, !one, 0, random), describe(type, s) + (one ? ", one channel" : ""));
        }
    }
    const Layout layout = linear(32, 64);
    const TimestepQuantizeProblem problem{nullptr, type, layout, nullptr, layout, 3, 1, 32, 64, {}};
    checks.check(agrees(problem, 8, false, true, 1, random), std::string(nameOf(type)) + " at an address that is not aligned");
}

/// So many pixels that a thread takes several.
void checkManyPixels(Checks& checks, FloatType type, bool emulated, std::mt19937& random) {
    constexpr int32_t kChannels = 72;
    constexpr int64_t kPixels = 32773;
    const Layout x = type == FloatType::kFloat32 ? vectorMajor(32, kChannels, kPixels) : vectorMinor(8, kChannels, kPixels);
    const Layout plain = linear(kChannels, kPixels);
    std::vector<std::pair<Layout, Layout>> pairs{{x, vectorMajor(32, kChannels, kPixels)}};
    if (!emulated)
        pairs.insert(pairs.end(), {{plain, vectorMinor(16, kChannels, kPixels)}, {plain, vectorMajor(4, kChannels, kPixels)}, {x, plain}});
    bool passed = true;
    for (const auto& [input, output] : pairs) {
        const TimestepQuantizeProblem problem{nullptr, type, input, nullptr, output, 1, 1, kChannels, kPixels, {}};
        passed = agrees(problem, 8, false, true, 0, random) && passed;
    }
    checks.check(passed, std::string(nameOf(type)) + " of many pixels, between layouts");
}

void checkLayouts(Checks& checks, FloatType type, bool emulated, std::mt19937& random) {
    checkManyPixels(checks, type, emulated, random);
    for (const int32_t channels : {1, 3, 4, 16, 31, 32, 33, 48, 72, 320}) {
        for (const int64_t pixels : {int64_t{1}, int64_t{5}, int64_t{70}, int64_t{1000}}) {
            if (emulated && channels * pixels > int64_t{33} * 70) continue;
            std::vector<Layout> inputs{linear(channels, pixels)};
            if (type == FloatType::kFloat32) {
                inputs.insert(inputs.end(), {vectorMinor(1, channels, pixels), vectorMajor(32, channels, pixels)});
            } else {
                inputs.insert(inputs.end(), {vectorMajor(2, channels, pixels), vectorMinor(8, channels, pixels),
                                             vectorMinor(16, channels, pixels), vectorMajor(32, channels, pixels)});
            }
            const Layout outputs[] = {linear(channels, pixels), vectorMajor(4, channels, pixels), vectorMajor(32, channels, pixels),
                                      vectorMinor(16, channels, pixels)};
            bool passed = true;
            for (const Layout& input : inputs) {
                for (const Layout& output : outputs) {
                    for (const bool one : {false, true}) {
                        const TimestepQuantizeProblem problem{nullptr, type, input, nullptr, output, 3, 1, channels, pixels, {}};
                        passed = agrees(problem, 8, one, one, 0, random) && passed;
                    }
                }
            }
            checks.check(passed, std::string(nameOf(type)) + " " + std::to_string(channels) + " channels, " + std::to_string(pixels) +
                                     " pixels, between all layouts");
        }
    }
}

/// How far 1 + erff(x) may lie apart on CPU and GPU: two units in the last place of 1 each (CUDA's manual, glibc's less). For negative
/// gates it is all that is left of the sum, so that many of the activation's digits may differ.
constexpr float kErrorOfErf = 2.4e-7F;

/// Whether the codes agree but where the activation may lie on the other side of a tie on the GPU, for what erff differs.
bool gegluAgrees(GegluTimestepQuantizeProblem problem, bool oneChannel, std::size_t shift, std::mt19937& random) {
    constexpr int32_t kBuckets = 4;  // integer bounds, ordinary scales
    const HostTables tables(kBuckets, problem.samples, problem.channels, oneChannel, oneChannel, random);
    const auto perSample = static_cast<std::size_t>(problem.rows) * static_cast<std::size_t>(problem.channels);
    const std::size_t count = static_cast<std::size_t>(problem.samples) * perSample;
    const std::vector<uint8_t> x = randomFloats(problem.type, static_cast<int64_t>(2 * count), tables, random);
    std::vector<int8_t> expected(count + kMargin, kUntouched);
    const std::vector<int8_t> untouched = expected;
    std::vector<float> activations(count);
    problem.x = x.data();
    problem.codes = expected.data();
    problem.tables = tables.view();
    referenceGegluTimestepQuantize(problem, activations.data());

    const DeviceTables onDevice(tables);
    const DeviceArray<uint8_t> xOnDevice(x, shift * static_cast<std::size_t>(sizeOf(problem.type)));
    const DeviceArray<int8_t> codesOnDevice(untouched, shift);
    problem.x = xOnDevice.data();
    problem.codes = codesOnDevice.data();
    problem.tables = onDevice.view();
    requireSuccess(launchGegluTimestepQuantize(problem, nullptr));
    requireSuccess(cudaDeviceSynchronize());
    const std::vector<int8_t> found = codesOnDevice.toHost();
    for (std::size_t i = 0; i < found.size(); ++i) {
        if (found[i] == expected[i]) continue;
        if (i >= count || std::abs(found[i] - expected[i]) > 1) return false;
        const auto bucket = std::clamp<int64_t>(tables.bucket64[i / perSample], 0, kBuckets - 1);
        const auto channels = static_cast<std::size_t>(problem.channels);
        const float step = tables.scale[static_cast<std::size_t>(bucket)] * tables.channel[oneChannel ? 0 : i % channels];
        const float ratio = activations[i] / step;
        const float fromTie = std::fabs(std::fabs(ratio - std::nearbyint(ratio)) - 0.5F);
        const auto place = static_cast<int64_t>(2 * i - i % channels);
        const float product = elementOf(x.data(), problem.type, place) * elementOf(x.data(), problem.type, place + problem.channels);
        if (fromTie > 1e-6F * std::fmax(1.F, std::fabs(ratio)) + std::fabs(product / step) * kErrorOfErf) return false;
    }
    return true;
}

void checkGeglu(Checks& checks, FloatType type, bool emulated, std::mt19937& random) {
    std::vector<Shape> shapes{{2, 4, 1280, 1}, {3, 5, 40, 1}, {3, 7, 5, 1}, {1, 8193, 256, 1}};
    if (!emulated) shapes.push_back({2, 4096, 1280, 1});
    for (const Shape& s : shapes) {
        for (const bool one : {false, true}) {
            if (emulated && one && int64_t{s.outer} * s.channels > kLargeForEmulation) continue;
            const GegluTimestepQuantizeProblem problem{nullptr, type, nullptr, s.samples, s.outer, s.channels, {}};
            checks.check(gegluAgrees(problem, one, 0, random), "GEGLU " + describe(type, s) + (one ? ", one channel" : ""));
        }
    }
    const GegluTimestepQuantizeProblem problem{nullptr, type, nullptr, 2, 16, 64, {}};
    checks.check(gegluAgrees(problem, false, 1, random), std::string("GEGLU ") + nameOf(type) + " at an address that is not aligned");
}

/// A graph captured around the kernels replays them: they neither allocate nor wait.
void checkCapture(Checks& checks, std::mt19937& random) {
    constexpr int32_t kChannels = 64;
    constexpr int64_t kPixels = 256;
    const HostTables tables(5, 2, kChannels, false, true, random);
    const Layout layout = linear(kChannels, kPixels);
    const std::vector<uint8_t> x = randomFloats(FloatType::kFloat16, 2 * layout.sample, tables, random);
    std::vector<int8_t> expected(static_cast<std::size_t>(2 * layout.sample));
    TimestepQuantizeProblem problem{x.data(), FloatType::kFloat16, layout,  expected.data(), layout, 2,
                                    1,        kChannels,           kPixels, tables.view()};
    referenceTimestepQuantize(problem);

    const DeviceTables onDevice(tables);
    const DeviceArray<uint8_t> xOnDevice(x);
    const DeviceArray<int8_t> codesOnDevice(std::vector<int8_t>(expected.size(), kUntouched));
    problem.x = xOnDevice.data();
    problem.codes = codesOnDevice.data();
    problem.tables = onDevice.view();
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    requireSuccess(cudaStreamCreate(&stream));
    requireSuccess(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    const cudaError_t captured = launchTimestepQuantize(problem, stream);
    requireSuccess(cudaStreamEndCapture(stream, &graph));
    requireSuccess(cudaGraphInstantiate(&executable, graph, 0));
    const bool notYet = codesOnDevice.toHost() == std::vector<int8_t>(expected.size(), kUntouched);
    requireSuccess(cudaGraphLaunch(executable, stream));
    requireSuccess(cudaStreamSynchronize(stream));
    checks.check(captured == cudaSuccess && notYet && codesOnDevice.toHost() == expected, "captured in a CUDA graph and replayed");
    static_cast<void>(cudaGraphExecDestroy(executable));
    static_cast<void>(cudaGraphDestroy(graph));
    static_cast<void>(cudaStreamDestroy(stream));
}

/// What needs no GPU: problems that are refused before anything is launched.
void checkRefusals(Checks& checks) {
    const Layout layout = linear(32, 64);
    Tables tables{};
    tables.buckets = 1;
    const TimestepQuantizeProblem good{nullptr, FloatType::kFloat32, layout, nullptr, layout, 0, 1, 32, 64, tables};
    checks.check(launchTimestepQuantize(good, nullptr) == cudaSuccess, "an empty batch is nothing to do");
    TimestepQuantizeProblem problem = good;
    problem.samples = 1;
    problem.inner = int64_t{1} << 31;
    checks.check(launchTimestepQuantize(problem, nullptr) == cudaErrorInvalidValue, "2^31 elements a sample are refused");
    problem = good;
    problem.samples = 1;
    problem.outer = 2;
    problem.codesLayout = vectorMajor(32, 64, 64);
    checks.check(launchTimestepQuantize(problem, nullptr) == cudaErrorInvalidValue,
                 "a vectorized layout with channels not second is refused");
    problem = good;
    problem.tables.buckets = 0;
    checks.check(launchTimestepQuantize(problem, nullptr) == cudaErrorInvalidValue, "tables without a row are refused");
}

/// \param emulated whether what runs the kernels is not a GPU (tests/emulated/), and has no CUDA graphs.
int run(bool emulated) {
    Checks checks;
    checkRefusals(checks);
    if (countGpus() > 0) {
        std::mt19937 random(20251121);
        for (const FloatType type : {FloatType::kFloat32, FloatType::kFloat16, FloatType::kBfloat16}) {
            checkLinear(checks, type, emulated, random);
            checkLayouts(checks, type, emulated, random);
            checkGeglu(checks, type, emulated, random);
        }
        if (!emulated) checkCapture(checks, random);
    }
    return checks.report();
}

}  // namespace
}  // namespace quest::test

int main(int argc, char** argv) {
    try {
        return quest::test::run(argc == 2 && std::string(argv[1]) == "--emulated");
    } catch (const std::exception& e) {
        std::printf("FAILED %s\n", e.what());
        return 1;
    }
}
