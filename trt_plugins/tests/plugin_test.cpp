/// Loads the plugin library as TensorRT does and checks its plugins, with this program in TensorRT's place; enqueue runs where a GPU is.
///
///     plugin_test LIBRARY [--describe | --other-version | --refusing]
///
/// --describe prints, as JSON, what the library registers; --other-version pretends to be a TensorRT of another major version, --refusing
/// one whose registry has such creators already.

#include "common/definition.h"
#include "common/formats.h"
#include "geglu_timestep_quantize/definition.h"
#include "geglu_timestep_quantize/reference.h"
#include "tests/check.h"
#include "tests/fakes.h"
#include "tests/operands.h"
#include "timestep_quantize/definition.h"
#include "timestep_quantize/reference.h"

#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <initializer_list>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

quest::test::Registry registry;
int32_t majorVersion = NV_TENSORRT_MAJOR;

}  // namespace

extern "C" nvinfer1::IPluginRegistry* getPluginRegistry() noexcept { return &registry; }

extern "C" int32_t getInferLibMajorVersion() noexcept { return majorVersion; }

namespace quest::test {
namespace {

using namespace nvinfer1;

using Shape = std::vector<int64_t>;

/// The library, opened as IPluginRegistry::loadLibrary and Triton open one.
class Library {
public:
    explicit Library(const char* path) : mHandle(dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
        if (mHandle == nullptr) throw std::runtime_error(dlerror());
    }

    ~Library() { static_cast<void>(dlclose(mHandle)); }

    Library(const Library&) = delete;
    Library& operator=(const Library&) = delete;

    std::vector<IPluginCreatorV3One*> creators() const {
        int32_t count = 0;  // NOLINT(misc-const-correctness): getCreators sets it
        auto* const all = symbol<IPluginCreatorInterface* const* (*)(int32_t&)>("getCreators")(count);
        std::vector<IPluginCreatorV3One*> result;
        result.reserve(static_cast<std::size_t>(count));
        for (int32_t i = 0; i < count; ++i) result.push_back(static_cast<IPluginCreatorV3One*>(all[i]));
        return result;
    }

    void setLoggerFinder(ILoggerFinder* finder) const { symbol<void (*)(ILoggerFinder*)>("setLoggerFinder")(finder); }

private:
    template <typename Function>
    Function symbol(const char* name) const {
        void* const found = dlsym(mHandle, name);
        if (found == nullptr) throw std::runtime_error(dlerror());
        return reinterpret_cast<Function>(found);
    }

    void* mHandle;
};

IPluginCreatorV3One* creatorOf(const std::vector<IPluginCreatorV3One*>& creators, const std::string& name) {
    for (IPluginCreatorV3One* creator : creators)
        if (creator->getPluginName() == name) return creator;
    throw std::runtime_error("the library has no creator of " + name);
}

std::unique_ptr<IPluginV3> make(IPluginCreatorV3One& creator, const std::vector<PluginField>& fields, TensorRTPhase phase) {
    const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
    return std::unique_ptr<IPluginV3>(creator.createPlugin("layer", &collection, phase));
}

std::unique_ptr<IPluginV3> makeWithAxis(IPluginCreatorV3One& creator, int32_t axis) {
    return make(creator, {PluginField(kAxisField, &axis, PluginFieldType::kINT32, 1)}, TensorRTPhase::kBUILD);
}

template <typename Capability>
Capability& capability(IPluginV3& plugin, PluginCapabilityType type) {
    IPluginCapability* const found = plugin.getCapabilityInterface(type);
    if (found == nullptr) throw std::runtime_error("a capability is missing");
    return *static_cast<Capability*>(found);
}

IPluginV3OneCore& core(IPluginV3& plugin) { return capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE); }

IPluginV3OneBuild& build(IPluginV3& plugin) { return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD); }

IPluginV3OneRuntime& runtime(IPluginV3& plugin) { return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME); }

Dims dims(const Shape& shape) {
    Dims result{};
    result.nbDims = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), result.d);
    return result;
}

/// x, bucket, the tables and the channel vector, in this order.
std::array<Shape, kInputs> inputShapes(const Shape& x, int64_t buckets, int64_t channels) {
    return {x, {x.empty() ? 1 : x[0]}, {buckets}, {buckets}, {buckets}, {buckets}, {channels}};
}

/// The output's shape; empty where the plugin reports an error.
Shape outputShape(IPluginV3& plugin, const std::array<Shape, kInputs>& shapes) {
    ExprBuilder builder;
    std::array<DimsExprs, kInputs> inputs{};
    for (std::size_t i = 0; i < kInputs; ++i) inputs[i] = builder.shape(shapes[i]);
    DimsExprs output{};
    if (build(plugin).getOutputShapes(inputs.data(), kInputs, nullptr, 0, &output, 1, builder) != 0) return {};
    Shape result;
    for (int32_t i = 0; i < output.nbDims; ++i) result.push_back(output.d[i]->isConstant() ? output.d[i]->getConstantValue() : -1);
    return result;
}

/// The seven inputs and the codes, of these types and formats.
std::array<DynamicPluginTensorDesc, kInputs + 1> descriptions(const std::array<Shape, kInputs>& shapes, const Shape& codes, DataType xType,
                                                              TensorFormat xFormat, DataType bucketType, TensorFormat codesFormat) {
    std::array<DynamicPluginTensorDesc, kInputs + 1> result{};
    for (std::size_t i = 0; i <= kInputs; ++i) {
        PluginTensorDesc& desc = result[i].desc;
        desc.dims = dims(i == kInputs ? codes : shapes[i]);
        desc.type = i == kX ? xType : (i == kBucket ? bucketType : (i == kInputs ? DataType::kINT8 : DataType::kFLOAT));
        desc.format = i == kX ? xFormat : (i == kInputs ? codesFormat : TensorFormat::kLINEAR);
        result[i].min = result[i].opt = result[i].max = desc.dims;
    }
    return result;
}

/// Ask as TensorRT does: one position after the other, each with what stands before it.
bool supports(IPluginV3& plugin, const std::array<DynamicPluginTensorDesc, kInputs + 1>& asked) {
    for (int32_t pos = 0; pos <= kInputs; ++pos) {
        std::array<DynamicPluginTensorDesc, kInputs + 1> partial = asked;
        for (int32_t later = pos + 1; later <= kInputs; ++later) {
            // Not yet chosen, and not to be looked at. NOLINTBEGIN(clang-analyzer-optin.core.EnumCastOutOfRange)
            partial[static_cast<std::size_t>(later)].desc.type = static_cast<DataType>(-1);
            partial[static_cast<std::size_t>(later)].desc.format = static_cast<TensorFormat>(-1);
            // NOLINTEND(clang-analyzer-optin.core.EnumCastOutOfRange)
        }
        if (!build(plugin).supportsFormatCombination(pos, partial.data(), kInputs, 1)) return false;
    }
    return true;
}

constexpr DataType kAllTypes[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16,  DataType::kINT8, DataType::kINT32,
                                  DataType::kINT64, DataType::kBOOL, DataType::kUINT8, DataType::kFP8,  DataType::kINT4};
constexpr int32_t kFormats = 13;  ///< TensorFormat's values are 0 to 12

struct Combination {
    DataType x;
    TensorFormat xFormat;
    DataType bucket;
    TensorFormat codesFormat;
};

/// Every combination that the plugin takes for these shapes.
std::vector<Combination> combinations(IPluginV3& plugin, const std::array<Shape, kInputs>& shapes, const Shape& codes) {
    std::vector<Combination> result;
    for (const DataType x : kAllTypes) {
        for (const DataType bucket : kAllTypes) {
            for (int32_t i = 0; i < kFormats; ++i) {
                for (int32_t j = 0; j < kFormats; ++j) {
                    const Combination c{x, static_cast<TensorFormat>(i), bucket, static_cast<TensorFormat>(j)};
                    if (supports(plugin, descriptions(shapes, codes, c.x, c.xFormat, c.bucket, c.codesFormat))) result.push_back(c);
                }
            }
        }
    }
    return result;
}

/// The formats that TensorRT has for a type, says NvInferRuntime.h; those of DLA and those with the vectors fourth to last left out.
std::vector<TensorFormat> documentedFormats(DataType type) {
    switch (type) {
        case DataType::kFLOAT:
            return {TensorFormat::kLINEAR, TensorFormat::kCHW32, TensorFormat::kHWC};
        case DataType::kHALF:
            return {TensorFormat::kLINEAR, TensorFormat::kCHW2, TensorFormat::kHWC8, TensorFormat::kCHW32, TensorFormat::kHWC16};
        case DataType::kBF16:
            return {TensorFormat::kLINEAR, TensorFormat::kCHW2, TensorFormat::kHWC8};
        default:
            return {TensorFormat::kLINEAR, TensorFormat::kCHW4, TensorFormat::kCHW32, TensorFormat::kHWC16};  // INT8
    }
}

bool contains(const std::vector<Combination>& all, const Combination& wanted) {
    return std::any_of(all.begin(), all.end(), [&wanted](const Combination& c) {
        return c.x == wanted.x && c.xFormat == wanted.xFormat && c.bucket == wanted.bucket && c.codesFormat == wanted.codesFormat;
    });
}

void checkRegistration(Checks& checks, const Library& library) {
    checks.check(registry.entries.size() == 2 && registry.entries[0].nameSpace == kNamespace && registry.entries[1].nameSpace == kNamespace,
                 "opened by dlopen alone, the library registers each creator once, under the namespace that it has");
    const std::vector<IPluginCreatorV3One*> creators = library.creators();
    checks.check(creators.size() == 2 && registry.entries.empty(), "getCreators hands over creators that are registered nowhere else");
    checks.check(library.creators() == creators, "getCreators gives the same creators again");
    for (IPluginCreatorV3One* creator : creators) {
        const InterfaceInfo info = creator->getInterfaceInfo();
        checks.check(std::string(info.kind) == "PLUGIN CREATOR_V3ONE" && info.major == 1,
                     std::string(creator->getPluginName()) + " is made by a creator of IPluginV3");
    }
}

void checkFields(Checks& checks, IPluginCreatorV3One& creator, Logger& logger) {
    const int32_t axis = 1;
    const int64_t longAxis = 3;
    const int32_t axes[] = {1, 2};
    const float real = 1.F;
    const PluginField good(kAxisField, &axis, PluginFieldType::kINT32, 1);
    checks.check(make(creator, {good}, TensorRTPhase::kBUILD) != nullptr, "a plugin is made from an INT32 axis");
    checks.check(make(creator, {good}, TensorRTPhase::kRUNTIME) != nullptr, "a plugin is made for the runtime phase");
    const auto fromLong = make(creator, {PluginField(kAxisField, &longAxis, PluginFieldType::kINT64, 1)}, TensorRTPhase::kBUILD);
    checks.check(fromLong != nullptr && std::string(build(*fromLong).getMetadataString()) == "axis=3",
                 "a plugin is made from an INT64 axis");
    checks.check(logger.take().empty(), "nothing is logged for good fields");

    const int32_t zero = 0;
    const int32_t negative = -1;
    const int32_t many = Dims::MAX_DIMS;
    struct Bad {
        const char* what;
        std::vector<PluginField> fields;
    };
    const Bad bad[] = {{"no field", {}},
                       {"two fields", {good, good}},
                       {"an unknown field", {PluginField("axes", &axis, PluginFieldType::kINT32, 1)}},
                       {"a field without a name", {PluginField(nullptr, &axis, PluginFieldType::kINT32, 1)}},
                       {"a FLOAT32 axis", {PluginField(kAxisField, &real, PluginFieldType::kFLOAT32, 1)}},
                       {"two axes", {PluginField(kAxisField, axes, PluginFieldType::kINT32, 2)}},
                       {"an axis without data", {PluginField(kAxisField, nullptr, PluginFieldType::kINT32, 1)}},
                       {"axis 0, the samples'", {PluginField(kAxisField, &zero, PluginFieldType::kINT32, 1)}},
                       {"axis -1", {PluginField(kAxisField, &negative, PluginFieldType::kINT32, 1)}},
                       {"an axis beyond all dimensions", {PluginField(kAxisField, &many, PluginFieldType::kINT32, 1)}}};
    for (const Bad& b : bad) {
        const bool refused = make(creator, b.fields, TensorRTPhase::kBUILD) == nullptr;
        checks.check(refused && logger.take().find("expected") != std::string::npos, std::string(b.what) + " is refused and logged");
    }
    checks.check(creator.createPlugin("layer", nullptr, TensorRTPhase::kBUILD) == nullptr && !logger.take().empty(),
                 "fields that are not given are refused and logged");
}

void checkTypes(Checks& checks, IPluginV3& plugin, Logger& logger) {
    const std::string name = core(plugin).getPluginName();
    for (const DataType x : kAllTypes) {
        std::array<DataType, kInputs> inputs{};
        inputs.fill(DataType::kFLOAT);
        inputs[kX] = x;
        inputs[kBucket] = DataType::kINT64;
        DataType output = DataType::kFLOAT;
        const int32_t status = build(plugin).getOutputDataTypes(&output, 1, inputs.data(), kInputs);
        const bool isFloat = x == DataType::kFLOAT || x == DataType::kHALF || x == DataType::kBF16;
        checks.check(isFloat ? status == 0 && output == DataType::kINT8 : status != 0 && !logger.take().empty(),
                     name + ": from type " + std::to_string(static_cast<int32_t>(x)) + (isFloat ? " come INT8 codes" : " come no codes"));
    }
    DataType output = DataType::kFLOAT;
    const DataType one = DataType::kFLOAT;
    checks.check(build(plugin).getNbOutputs() == 1, name + ": one output");
    checks.check(build(plugin).getOutputDataTypes(&output, 1, &one, 1) != 0 && !logger.take().empty(), name + ": one input is too few");
}

void checkShapes(Checks& checks, IPluginCreatorV3One& creator, Logger& logger) {
    const auto plugin = makeWithAxis(creator, 1);
    for (const Shape& x : std::initializer_list<Shape>{{2, 320, 64, 64}, {-1, 320, -1, -1}, {2, 320}, {-1, -1}, {2, 320, 1, 1, 5}})
        checks.check(outputShape(*plugin, inputShapes(x, 20, 320)) == x, "the codes have the shape of x, rank " + std::to_string(x.size()));
    checks.check(outputShape(*plugin, inputShapes({2, 320, 8, 8}, 20, 1)).size() == 4, "a channel vector of one number is taken");
    checks.check(logger.take().empty(), "nothing is logged for good shapes");

    const std::array<Shape, kInputs> good = inputShapes({2, 320, 8, 8}, 20, 320);
    struct Bad {
        const char* what;
        std::size_t input;
        Shape shape;
    };
    const Bad bad[] = {{"x of rank 1", kX, {2}},
                       {"too few buckets' numbers in low", kLow, {19}},
                       {"an offset of rank 2", kOffset, {20, 1}},
                       {"a bucket for another batch", kBucket, {3}},
                       {"a scalar bucket", kBucket, {}},
                       {"a channel vector of another length", kChannel, {321}},
                       {"tables without a row", kScale, {0}}};
    for (const Bad& b : bad) {
        std::array<Shape, kInputs> shapes = good;
        shapes[b.input] = b.shape;
        const bool refused = outputShape(*plugin, shapes).empty() && logger.take().find("expected") != std::string::npos;
        const auto asked = descriptions(shapes, good[kX], DataType::kHALF, TensorFormat::kLINEAR, DataType::kINT64, TensorFormat::kLINEAR);
        const bool refusedToo = build(*plugin).configurePlugin(asked.data(), kInputs, &asked[kInputs], 1) != 0 && !logger.take().empty();
        std::array<PluginTensorDesc, kInputs> now{};
        for (std::size_t i = 0; i < kInputs; ++i) now[i] = asked[i].desc;
        const bool refusedWhenRunning = runtime(*plugin).onShapeChange(now.data(), kInputs, &asked[kInputs].desc, 1) != 0;
        checks.check(refused && refusedToo && refusedWhenRunning && !logger.take().empty(), std::string(b.what) + " is refused and logged");
    }
    const auto third = makeWithAxis(creator, 3);
    checks.check(outputShape(*third, inputShapes({2, 8, 8}, 20, 8)).empty() && !logger.take().empty(), "an axis that x has not is refused");
    checks.check(outputShape(*third, inputShapes({2, 8, 77, 40}, 20, 40)) == Shape({2, 8, 77, 40}), "the channels may lie last");
}

void checkGegluShapes(Checks& checks, IPluginV3& plugin, Logger& logger) {
    checks.check(outputShape(plugin, inputShapes({-1, 4096, 2560}, 20, 1280)) == Shape({-1, 4096, 1280}),
                 "GEGLU halves the last dimension");
    checks.check(outputShape(plugin, inputShapes({2, -1, -1}, 20, 1280)) == Shape({2, -1, -1}),
                 "GEGLU takes a last dimension not known yet");
    checks.check(outputShape(plugin, inputShapes({2, 77, 81}, 20, 40)).empty() && !logger.take().empty(),
                 "GEGLU refuses an odd last dimension");
    checks.check(outputShape(plugin, inputShapes({2, 77, 80}, 20, 80)).empty() && !logger.take().empty(),
                 "GEGLU refuses a channel vector for values and gates");
}

void checkFormats(Checks& checks, IPluginCreatorV3One& creator, Logger& logger) {
    const auto plugin = makeWithAxis(creator, 1);
    const Shape image{2, 320, 8, 8};
    const std::vector<Combination> found = combinations(*plugin, inputShapes(image, 20, 320), image);
    std::size_t expected = 0;
    bool all = true;
    for (const DataType x : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
        for (const DataType bucket : {DataType::kINT32, DataType::kINT64}) {
            for (const TensorFormat xFormat : documentedFormats(x)) {
                for (const TensorFormat codesFormat : documentedFormats(DataType::kINT8)) {
                    all = contains(found, {x, xFormat, bucket, codesFormat}) && all;
                    ++expected;
                }
            }
        }
    }
    checks.check(all && found.size() == expected, "of all " +
                                                      std::to_string(std::size(kAllTypes) * std::size(kAllTypes) * kFormats * kFormats) +
                                                      " combinations those are taken that TensorRT documents, " + std::to_string(expected));
    checks.check(static_cast<int32_t>(found.size()) <= build(*plugin).getFormatCombinationLimit(), "TensorRT tries that many");
    for (const Shape& x : std::initializer_list<Shape>{{2, 320}, {2, 320, 77}, {2, 320, 4, 8, 8}, {-1, -1, -1, -1}}) {
        checks.check(combinations(*plugin, inputShapes(x, 20, 320), x).size() == 6, "rank " + std::to_string(x.size()) +
                                                                                        (x[0] < 0 ? " with channels not known yet" : "") +
                                                                                        " is linear alone: three types, two of bucket");
    }
    const auto last = makeWithAxis(creator, 3);
    checks.check(combinations(*last, inputShapes(image, 20, 8), image).size() == 6, "channels that lie last are linear alone");
    checks.check(logger.take().empty(), "asking for formats logs nothing");
    const auto asked =
        descriptions(inputShapes(image, 20, 320), image, DataType::kHALF, TensorFormat::kHWC8, DataType::kINT64, TensorFormat::kCHW32);
    checks.check(!build(*plugin).supportsFormatCombination(kInputs + 1, asked.data(), kInputs, 1) &&
                     !build(*plugin).supportsFormatCombination(-1, asked.data(), kInputs, 1) &&
                     !build(*plugin).supportsFormatCombination(0, asked.data(), kInputs - 1, 1),
                 "a position or a number of inputs that cannot be is not supported");
    checks.check(build(*plugin).configurePlugin(asked.data(), kInputs, &asked[kInputs], 1) == 0, "a combination can be configured");
    checks.check(build(*plugin).getWorkspaceSize(asked.data(), kInputs, &asked[kInputs], 1) == 0, "no workspace is asked for");
}

/// Copies of a plugin: by its serialized fields, as an engine is read, by clone, and for an execution context.
void checkCopies(Checks& checks, IPluginCreatorV3One& creator, std::unique_ptr<IPluginV3> plugin) {
    const std::string name = core(*plugin).getPluginName();
    const std::string state = build(*plugin).getMetadataString();
    const PluginFieldCollection* const fields = runtime(*plugin).getFieldsToSerialize();
    const PluginFieldCollection* const named = creator.getFieldNames();
    bool same = fields != nullptr && named != nullptr && fields->nbFields == named->nbFields;
    std::vector<std::vector<unsigned char>> bytes;  // as in the engine's file
    std::vector<PluginField> read;
    for (int32_t i = 0; same && i < fields->nbFields; ++i) {
        const PluginField& field = fields->fields[i];
        same = std::string(field.name) == named->fields[i].name && field.type == named->fields[i].type && field.length == 1;
        const auto* const data = static_cast<const unsigned char*>(field.data);
        bytes.emplace_back(data, data + sizeof(int32_t));
        read.emplace_back(named->fields[i].name, bytes.back().data(), field.type, field.length);
    }
    checks.check(same, name + " serializes the fields that its creator names");
    const auto fromEngine = make(creator, read, TensorRTPhase::kRUNTIME);
    const std::unique_ptr<IPluginV3> clone(plugin->clone());
    const std::unique_ptr<IPluginV3> attached(runtime(*plugin).attachToContext(nullptr));
    plugin.reset();
    for (IPluginV3* const copy : {fromEngine.get(), clone.get(), attached.get()}) {
        const bool equal =
            copy != nullptr && core(*copy).getPluginName() == name && std::string(core(*copy).getPluginVersion()) == kVersion &&
            std::string(core(*copy).getPluginNamespace()) == kNamespace && std::string(build(*copy).getMetadataString()) == state &&
            runtime(*copy).getFieldsToSerialize()->nbFields == static_cast<int32_t>(read.size());
        checks.check(equal, name + ": a copy outlives the plugin and is the same");
    }
}

/// Run enqueue on the GPU; -1 where it reports an error.
std::vector<int8_t> enqueue(IPluginV3& plugin, const std::array<DynamicPluginTensorDesc, kInputs + 1>& asked, const std::vector<uint8_t>& x,
                            const HostTables& tables, const std::vector<int8_t>& untouched) {
    const DeviceTables onDevice(tables);
    const DeviceArray<uint8_t> xOnDevice(x);
    const DeviceArray<int8_t> codes(untouched);
    const Tables view = onDevice.view();
    const void* const inputs[kInputs] = {xOnDevice.data(), view.bucket, view.scale, view.low, view.high, view.offset, view.channel};
    void* const outputs[1] = {codes.data()};
    std::array<PluginTensorDesc, kInputs> now{};
    for (std::size_t i = 0; i < kInputs; ++i) now[i] = asked[i].desc;
    const PluginTensorDesc output = asked[kInputs].desc;
    const std::unique_ptr<IPluginV3> attached(runtime(plugin).attachToContext(nullptr));
    if (runtime(*attached).onShapeChange(now.data(), kInputs, &output, 1) != 0 ||
        runtime(*attached).enqueue(now.data(), &output, inputs, outputs, nullptr, nullptr) != 0) {
        throw std::runtime_error("enqueue reports an error");
    }
    requireSuccess(cudaDeviceSynchronize());
    return codes.toHost();
}

void checkEnqueue(Checks& checks, IPluginCreatorV3One& creator, int32_t axis, const std::vector<Shape>& inputs) {
    std::mt19937 random(6);
    const auto plugin = makeWithAxis(creator, axis);
    for (const Shape& x : inputs) {
        const auto at = x.begin() + axis;
        const auto outer = static_cast<int32_t>(std::accumulate(x.begin() + 1, at, int64_t{1}, std::multiplies<>()));
        const auto ofAxis = static_cast<int32_t>(*at);
        const int64_t inner = std::accumulate(at + 1, x.end(), int64_t{1}, std::multiplies<>());
        for (const int64_t channels : {int64_t{1}, *at}) {
            const std::array<Shape, kInputs> shapes = inputShapes(x, 8, channels);
            bool passed = true;
            for (const Combination& c : combinations(*plugin, shapes, x)) {
                const HostTables tables(8, static_cast<int32_t>(x[0]), ofAxis, channels == 1, c.bucket == DataType::kINT64, random);
                const Layout xLayout = layoutOf(c.xFormat, outer * ofAxis, inner);
                const Layout codesLayout = layoutOf(c.codesFormat, outer * ofAxis, inner);
                const std::vector<uint8_t> values = randomFloats(floatTypeOf(c.x), x[0] * xLayout.sample, tables, random);
                std::vector<int8_t> expected(static_cast<std::size_t>(x[0] * codesLayout.sample));
                referenceTimestepQuantize({values.data(), floatTypeOf(c.x), xLayout, expected.data(), codesLayout,
                                           static_cast<int32_t>(x[0]), outer, ofAxis, inner, tables.view()});
                const auto asked = descriptions(shapes, x, c.x, c.xFormat, c.bucket, c.codesFormat);
                passed = enqueue(*plugin, asked, values, tables, std::vector<int8_t>(expected.size(), 99)) == expected && passed;
            }
            checks.check(passed, "enqueue gives the reference's codes in every combination, " + std::to_string(ofAxis) +
                                     " channels along axis " + std::to_string(axis));
        }
    }
}

/// kernel_test compares code for code; this is that the plugin hands its kernel the right shapes.
void checkGegluEnqueue(Checks& checks, IPluginV3& plugin) {
    std::mt19937 random(7);
    const Shape x{2, 3, 5, 80}, codes{2, 3, 5, 40};
    for (const int64_t channels : {int64_t{1}, codes.back()}) {
        const std::array<Shape, kInputs> shapes = inputShapes(x, 4, channels);
        bool passed = true;
        for (const Combination& c : combinations(plugin, shapes, codes)) {
            const HostTables tables(4, 2, 40, channels == 1, c.bucket == DataType::kINT64, random);
            const std::vector<uint8_t> values = randomFloats(floatTypeOf(c.x), int64_t{2} * 15 * 80, tables, random);
            std::vector<int8_t> expected(std::size_t{2} * 15 * 40);
            referenceGegluTimestepQuantize({values.data(), floatTypeOf(c.x), expected.data(), 2, 15, 40, tables.view()}, nullptr);
            const auto asked = descriptions(shapes, codes, c.x, c.xFormat, c.bucket, c.codesFormat);
            const std::vector<int8_t> found = enqueue(plugin, asked, values, tables, std::vector<int8_t>(expected.size(), 99));
            std::size_t differing = 0;
            for (std::size_t i = 0; i < expected.size(); ++i) {
                differing += found[i] != expected[i] ? 1 : 0;
                passed = passed && std::abs(found[i] - expected[i]) <= 1;
            }
            passed = passed && differing <= expected.size() / 100;  // ties, where the GPU's erff differs in its last bits
        }
        checks.check(passed, "GEGLU's enqueue gives the reference's codes in every combination, channels " + std::to_string(channels));
    }
}

void checkEnqueueError(Checks& checks, IPluginCreatorV3One& creator, Logger& logger) {
    const auto plugin = makeWithAxis(creator, 1);
    const Shape x{2, 32, 8, 8};
    // Not even a GPU could read vectors at odd addresses.
    const auto asked = descriptions(inputShapes(x, 2, 1), x, DataType::kHALF, TensorFormat::kHWC8, DataType::kINT64, TensorFormat::kCHW32);
    std::array<PluginTensorDesc, kInputs> now{};
    for (std::size_t i = 0; i < kInputs; ++i) now[i] = asked[i].desc;
    alignas(16) static char memory[32];
    const void* const inputs[kInputs] = {memory + 1, memory, memory, memory, memory, memory, memory};
    void* const outputs[1] = {memory};
    const int32_t status = runtime(*plugin).enqueue(now.data(), &asked[kInputs].desc, inputs, outputs, nullptr, nullptr);
    checks.check(status != 0 && !logger.take().empty(), "an error of CUDA is logged and returned by enqueue");
}

/// A sample of 2^32 codes, of which 32 bits are zero, as x and as the codes of GEGLU.
void checkTooLarge(Checks& checks, IPluginV3& plugin, const Shape& x, const Shape& codes, int64_t channels, Logger& logger) {
    const auto asked =
        descriptions(inputShapes(x, 2, channels), codes, DataType::kFLOAT, TensorFormat::kLINEAR, DataType::kINT64, TensorFormat::kLINEAR);
    std::array<PluginTensorDesc, kInputs> now{};
    for (std::size_t i = 0; i < kInputs; ++i) now[i] = asked[i].desc;
    const void* const inputs[kInputs] = {};
    void* const outputs[1] = {};
    const int32_t status = runtime(plugin).enqueue(now.data(), &asked[kInputs].desc, inputs, outputs, nullptr, nullptr);
    checks.check(status != 0 && logger.take().find("expected fewer than 2^31") != std::string::npos,
                 "a sample too large to count is refused, its last dimension " + std::to_string(x.back()));
}

void describe(const Library& library) {
    std::printf("[");
    const char* separator = "";
    for (IPluginCreatorV3One* creator : library.creators()) {
        std::printf("%s{\"name\": \"%s\", \"version\": \"%s\", \"namespace\": \"%s\", \"inputs\": [", separator, creator->getPluginName(),
                    creator->getPluginVersion(), creator->getPluginNamespace());
        for (int32_t i = 0; i < kInputs; ++i) std::printf("%s\"%s\"", i == 0 ? "" : ", ", kInputNames[i]);
        std::printf("], \"fields\": [");
        const PluginFieldCollection* const fields = creator->getFieldNames();
        for (int32_t i = 0; i < fields->nbFields; ++i) std::printf("%s\"%s\"", i == 0 ? "" : ", ", fields->fields[i].name);
        std::printf("]}");
        separator = ", ";
    }
    std::printf("]\n");
}

int run(const char* path) {
    Checks checks;
    Logger logger;
    {
        const Library library(path);
        library.setLoggerFinder(&logger);
        checkRegistration(checks, library);
        const std::vector<IPluginCreatorV3One*> creators = library.creators();
        IPluginCreatorV3One& quantize = *creatorOf(creators, kTimestepQuantizeName);
        IPluginCreatorV3One& geglu = *creatorOf(creators, kGegluTimestepQuantizeName);
        checkFields(checks, quantize, logger);
        const auto gegluPlugin = make(geglu, {}, TensorRTPhase::kBUILD);
        const int32_t axis = 2;
        checks.check(make(geglu, {PluginField(kAxisField, &axis, PluginFieldType::kINT32, 1)}, TensorRTPhase::kBUILD) == nullptr &&
                         !logger.take().empty(),
                     "GEGLU has no fields, and refuses one");
        checkTypes(checks, *makeWithAxis(quantize, 1), logger);
        checkTypes(checks, *gegluPlugin, logger);
        checkShapes(checks, quantize, logger);
        checkGegluShapes(checks, *gegluPlugin, logger);
        checkFormats(checks, quantize, logger);
        const Shape rows{2, 77, 80};
        checks.check(combinations(*gegluPlugin, inputShapes(rows, 20, 40), {2, 77, 40}).size() == 6, "GEGLU is linear alone");
        checkCopies(checks, quantize, makeWithAxis(quantize, 2));
        checkCopies(checks, geglu, make(geglu, {}, TensorRTPhase::kBUILD));
        checkEnqueueError(checks, quantize, logger);
        checkTooLarge(checks, *makeWithAxis(quantize, 3), {1, 65536, 65536, 1}, {1, 65536, 65536, 1}, 1, logger);
        checkTooLarge(checks, *gegluPlugin, {1, 65536, 65536, 2}, {1, 65536, 65536, 1}, 1, logger);
        if (countGpus() > 0) {
            checkEnqueue(checks, quantize, 1, {{3, 72, 8, 8}, {2, 33, 5, 7}, {2, 320, 8, 8}});
            checkEnqueue(checks, quantize, 2, {{2, 77, 40}, {2, 3, 8, 5}});
            checkEnqueue(checks, quantize, 3, {{2, 5, 7, 24}});
            checkGegluEnqueue(checks, *gegluPlugin);
        }
        library.setLoggerFinder(nullptr);
    }
    {
        const Library again(path);
        checks.check(registry.entries.size() == 2, "opened again, the library registers its creators again");
    }
    checks.check(registry.entries.empty(), "closed, the library leaves no creator behind");
    return checks.report();
}

/// Beside another major version, whose registry must not be touched, and where the registry refuses.
int runWhereNothingIsRegistered(const char* path) {
    Checks checks;
    const Library library(path);
    checks.check(registry.entries.empty(), "the library registers nothing");
    checks.check(library.creators().size() == 2, "and getCreators still gives its creators");
    return checks.report();
}

}  // namespace
}  // namespace quest::test

int main(int argc, char** argv) {
    const std::string option = argc == 3 ? argv[2] : "";
    if (argc < 2 || argc > 3 || (argc == 3 && option != "--describe" && option != "--other-version" && option != "--refusing")) {
        std::printf("usage: plugin_test LIBRARY [--describe | --other-version | --refusing]\n");
        return 2;
    }
    try {
        if (option == "--describe") {
            quest::test::describe(quest::test::Library(argv[1]));
            return 0;
        }
        if (option == "--other-version") majorVersion = NV_TENSORRT_MAJOR + 1;
        registry.refuses = option == "--refusing";
        return option.empty() ? quest::test::run(argv[1]) : quest::test::runWhereNothingIsRegistered(argv[1]);
    } catch (const std::exception& e) {
        std::printf("FAILED %s\n", e.what());
        return 1;
    }
}
