//! The kernels against the scalar references, code for code, on a GPU; needs no TensorRT. Without a GPU it says so and passes.

#include "geglu_timestep_quantize/kernel.h"
#include "geglu_timestep_quantize/reference.h"
#include "tests/check.h"
#include "tests/operands.h"
#include "timestep_quantize/kernel.h"
#include "timestep_quantize/reference.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <exception>

namespace quest::test
{
namespace
{

constexpr int8_t kUntouched = 99;
constexpr std::size_t kMargin = 64; //!< bytes behind the codes that must stay as they were

struct Shape
{
    int32_t samples, outer, channels;
    int64_t inner;
};

//! Run the kernel as \p problem says and compare; \p problem lacks its pointers.
bool agrees(TimestepQuantizeProblem problem, int32_t buckets, bool oneChannel, bool bucketIsInt64, std::size_t shift, std::mt19937& random)
{
    HostTables const tables(buckets, problem.samples, problem.channels, oneChannel, bucketIsInt64, random);
    std::vector<uint8_t> const x = randomFloats(problem.type, problem.samples * problem.xLayout.sample, tables, random);
    std::vector<int8_t> expected(static_cast<std::size_t>(problem.samples * problem.codesLayout.sample) + kMargin, kUntouched);
    std::vector<int8_t> const untouched = expected;
    problem.x = x.data();
    problem.codes = expected.data();
    problem.tables = tables.view();
    referenceTimestepQuantize(problem);

    DeviceTables const onDevice(tables);
    DeviceArray<uint8_t> const xOnDevice(x, shift * static_cast<std::size_t>(sizeOf(problem.type)));
    DeviceArray<int8_t> const codesOnDevice(untouched, shift);
    problem.x = xOnDevice.data();
    problem.codes = codesOnDevice.data();
    problem.tables = onDevice.view();
    requireSuccess(launchTimestepQuantize(problem, nullptr));
    requireSuccess(cudaDeviceSynchronize());
    return codesOnDevice.toHost() == expected;
}

std::string describe(FloatType type, Shape const& s)
{
    return std::string(nameOf(type)) + " [" + std::to_string(s.samples) + ", " + std::to_string(s.outer) + " x "
        + std::to_string(s.channels) + ", " + std::to_string(s.inner) + "]";
}

void checkLinear(Checks& checks, FloatType type, bool emulated, std::mt19937& random)
{
    // Planes, rows, single elements; few vectors and many; attention's operands with the channels last.
    std::vector<Shape> shapes{{3, 1, 32, 64}, {9, 1, 40, 16}, {2, 7, 768, 1}, {2, 40, 40, 1}, {2, 8, 77, 20}, {3, 1, 5, 7}, {1, 1, 3, 1},
        {2, 1, 4, 4096}, {1, 1, 512, 4096}};
    if (!emulated)
    {
        shapes.insert(shapes.end(), {{2, 1, 320, 4096}, {2, 4096, 320, 1}, {70000, 1, 8, 1}});
    }
    for (Shape const& s : shapes)
    {
        Layout const layout = linear(s.outer * s.channels, s.inner);
        for (bool const one : {false, true})
        {
            TimestepQuantizeProblem const problem{
                nullptr, type, layout, nullptr, layout, s.samples, s.outer, s.channels, s.inner, {}};
            checks.check(agrees(problem, one ? 5 : 40, one, !one, 0, random), describe(type, s) + (one ? ", one channel" : ""));
        }
    }
    Layout const layout = linear(32, 64);
    TimestepQuantizeProblem const problem{nullptr, type, layout, nullptr, layout, 3, 1, 32, 64, {}};
    checks.check(agrees(problem, 8, false, true, 1, random), std::string(nameOf(type)) + " at an address that is not aligned");
}

void checkLayouts(Checks& checks, FloatType type, bool emulated, std::mt19937& random)
{
    for (int32_t const channels : {1, 3, 4, 16, 31, 32, 33, 48, 72, 320})
    {
        for (int64_t const pixels : {int64_t{1}, int64_t{5}, int64_t{70}, int64_t{1000}})
        {
            if (emulated && channels * pixels > int64_t{33} * 70)
            {
                continue;
            }
            std::vector<Layout> inputs{linear(channels, pixels)};
            if (type == FloatType::kFloat32)
            {
                inputs.insert(inputs.end(), {vectorMinor(1, channels, pixels), vectorMajor(32, channels, pixels)});
            }
            else
            {
                inputs.insert(inputs.end(), {vectorMajor(2, channels, pixels), vectorMinor(8, channels, pixels),
                                                vectorMinor(16, channels, pixels), vectorMajor(32, channels, pixels)});
            }
            Layout const outputs[] = {linear(channels, pixels), vectorMajor(4, channels, pixels), vectorMajor(32, channels, pixels),
                vectorMinor(16, channels, pixels)};
            bool passed = true;
            for (Layout const& input : inputs)
            {
                for (Layout const& output : outputs)
                {
                    for (bool const one : {false, true})
                    {
                        TimestepQuantizeProblem const problem{nullptr, type, input, nullptr, output, 3, 1, channels, pixels, {}};
                        passed = agrees(problem, 8, one, one, 0, random) && passed;
                    }
                }
            }
            checks.check(passed, std::string(nameOf(type)) + " " + std::to_string(channels) + " channels, " + std::to_string(pixels)
                    + " pixels, between all layouts");
        }
    }
}

//! Whether the codes agree but where the activation lies on a tie but for the last bits: erff differs there between CPU and GPU.
bool gegluAgrees(GegluTimestepQuantizeProblem problem, bool oneChannel, std::size_t shift, std::mt19937& random)
{
    constexpr int32_t kBuckets = 4; // integer bounds, ordinary scales
    HostTables const tables(kBuckets, problem.samples, problem.channels, oneChannel, oneChannel, random);
    auto const perSample = static_cast<std::size_t>(problem.rows) * static_cast<std::size_t>(problem.channels);
    std::size_t const count = static_cast<std::size_t>(problem.samples) * perSample;
    std::vector<uint8_t> const x = randomFloats(problem.type, static_cast<int64_t>(2 * count), tables, random);
    std::vector<int8_t> expected(count + kMargin, kUntouched);
    std::vector<int8_t> const untouched = expected;
    std::vector<float> activations(count);
    problem.x = x.data();
    problem.codes = expected.data();
    problem.tables = tables.view();
    referenceGegluTimestepQuantize(problem, activations.data());

    DeviceTables const onDevice(tables);
    DeviceArray<uint8_t> const xOnDevice(x, shift * static_cast<std::size_t>(sizeOf(problem.type)));
    DeviceArray<int8_t> const codesOnDevice(untouched, shift);
    problem.x = xOnDevice.data();
    problem.codes = codesOnDevice.data();
    problem.tables = onDevice.view();
    requireSuccess(launchGegluTimestepQuantize(problem, nullptr));
    requireSuccess(cudaDeviceSynchronize());
    std::vector<int8_t> const found = codesOnDevice.toHost();
    for (std::size_t i = 0; i < found.size(); ++i)
    {
        if (found[i] == expected[i])
        {
            continue;
        }
        if (i >= count || std::abs(found[i] - expected[i]) > 1)
        {
            return false;
        }
        auto const bucket = std::clamp<int64_t>(tables.bucket64[i / perSample], 0, kBuckets - 1);
        float const ratio = activations[i]
            / (tables.scale[static_cast<std::size_t>(bucket)]
                * tables.channel[oneChannel ? 0 : i % static_cast<std::size_t>(problem.channels)]);
        float const fromTie = std::fabs(std::fabs(ratio - std::nearbyint(ratio)) - 0.5F);
        if (fromTie > 1e-6F * std::fmax(1.F, std::fabs(ratio)))
        {
            return false;
        }
    }
    return true;
}

void checkGeglu(Checks& checks, FloatType type, bool emulated, std::mt19937& random)
{
    std::vector<Shape> shapes{{2, 4, 1280, 1}, {3, 5, 40, 1}, {3, 7, 5, 1}};
    if (!emulated)
    {
        shapes.push_back({2, 4096, 1280, 1});
    }
    for (Shape const& s : shapes)
    {
        for (bool const one : {false, true})
        {
            GegluTimestepQuantizeProblem const problem{nullptr, type, nullptr, s.samples, s.outer, s.channels, {}};
            checks.check(gegluAgrees(problem, one, 0, random), "GEGLU " + describe(type, s) + (one ? ", one channel" : ""));
        }
    }
    GegluTimestepQuantizeProblem const problem{nullptr, type, nullptr, 2, 16, 64, {}};
    checks.check(gegluAgrees(problem, false, 1, random), std::string("GEGLU ") + nameOf(type) + " at an address that is not aligned");
}

//! A graph captured around the kernels replays them: they neither allocate nor wait.
void checkCapture(Checks& checks, std::mt19937& random)
{
    constexpr int32_t kChannels = 64;
    constexpr int64_t kPixels = 256;
    HostTables const tables(5, 2, kChannels, false, true, random);
    Layout const layout = linear(kChannels, kPixels);
    std::vector<uint8_t> const x = randomFloats(FloatType::kFloat16, 2 * layout.sample, tables, random);
    std::vector<int8_t> expected(static_cast<std::size_t>(2 * layout.sample));
    TimestepQuantizeProblem problem{
        x.data(), FloatType::kFloat16, layout, expected.data(), layout, 2, 1, kChannels, kPixels, tables.view()};
    referenceTimestepQuantize(problem);

    DeviceTables const onDevice(tables);
    DeviceArray<uint8_t> const xOnDevice(x);
    DeviceArray<int8_t> const codesOnDevice(std::vector<int8_t>(expected.size(), kUntouched));
    problem.x = xOnDevice.data();
    problem.codes = codesOnDevice.data();
    problem.tables = onDevice.view();
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    requireSuccess(cudaStreamCreate(&stream));
    requireSuccess(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    cudaError_t const captured = launchTimestepQuantize(problem, stream);
    requireSuccess(cudaStreamEndCapture(stream, &graph));
    requireSuccess(cudaGraphInstantiate(&executable, graph, 0));
    bool const notYet = codesOnDevice.toHost() == std::vector<int8_t>(expected.size(), kUntouched);
    requireSuccess(cudaGraphLaunch(executable, stream));
    requireSuccess(cudaStreamSynchronize(stream));
    checks.check(captured == cudaSuccess && notYet && codesOnDevice.toHost() == expected, "captured in a CUDA graph and replayed");
    static_cast<void>(cudaGraphExecDestroy(executable));
    static_cast<void>(cudaGraphDestroy(graph));
    static_cast<void>(cudaStreamDestroy(stream));
}

//! What needs no GPU: problems that are refused before anything is launched.
void checkRefusals(Checks& checks)
{
    Layout const layout = linear(32, 64);
    Tables tables{};
    tables.buckets = 1;
    TimestepQuantizeProblem const good{nullptr, FloatType::kFloat32, layout, nullptr, layout, 0, 1, 32, 64, tables};
    checks.check(launchTimestepQuantize(good, nullptr) == cudaSuccess, "an empty batch is nothing to do");
    TimestepQuantizeProblem problem = good;
    problem.samples = 1;
    problem.inner = int64_t{1} << 31;
    checks.check(launchTimestepQuantize(problem, nullptr) == cudaErrorInvalidValue, "2^31 elements a sample are refused");
    problem = good;
    problem.samples = 1;
    problem.outer = 2;
    problem.codesLayout = vectorMajor(32, 64, 64);
    checks.check(launchTimestepQuantize(problem, nullptr) == cudaErrorInvalidValue, "a vectorized layout with channels not second is refused");
    problem = good;
    problem.tables.buckets = 0;
    checks.check(launchTimestepQuantize(problem, nullptr) == cudaErrorInvalidValue, "tables without a row are refused");
}

//! \param emulated whether what runs the kernels is not a GPU (tests/emulated/), and has no CUDA graphs.
int run(bool emulated)
{
    Checks checks;
    checkRefusals(checks);
    if (countGpus() > 0)
    {
        std::mt19937 random(20251121);
        for (FloatType const type : {FloatType::kFloat32, FloatType::kFloat16, FloatType::kBfloat16})
        {
            checkLinear(checks, type, emulated, random);
            checkLayouts(checks, type, emulated, random);
            checkGeglu(checks, type, emulated, random);
        }
        if (!emulated)
        {
            checkCapture(checks, random);
        }
    }
    return checks.report();
}

} // namespace
} // namespace quest::test

int main(int argc, char** argv)
{
    try
    {
        return quest::test::run(argc == 2 && std::string(argv[1]) == "--emulated");
    }
    catch (std::exception const& e)
    {
        std::printf("FAILED %s\n", e.what());
        return 1;
    }
}
