/// How TensorRT finds the plugins: by dlopen alone, as Triton does, and by IPluginRegistry::loadLibrary.
///
/// Loaded by dlopen, the library registers its creators itself where TensorRT's registry is among the process's global symbols. That is
/// what REGISTER_TENSORRT_PLUGIN does, except that the macro registers without a namespace, under which no look-up finds a creator that has
/// one, and that it cannot do without the registry's symbol.
/// loadLibrary asks for getCreators, and fails where one of them is registered already or none is given. So getCreators withdraws what was
/// registered on the way: whoever calls it takes over.

#include "common/log.h"
#include "geglu_timestep_quantize/creator.h"
#include "timestep_quantize/creator.h"

#include <array>
#include <cstdio>
#include <mutex>

#define QUEST_EXPORT __attribute__((visibility("default")))

#define QUEST_TEXT_OF(x) #x
#define QUEST_TEXT(x) QUEST_TEXT_OF(x)

/// `quest-deploy` reads it in the file, before it has TensorRT load the library.
extern "C" QUEST_EXPORT const char questPluginsBuiltFor[];
const char questPluginsBuiltFor[] = "quest plugins for TensorRT " QUEST_TEXT(NV_TENSORRT_MAJOR) ";";

// Not defined by this library. Without TensorRT among the global symbols they are null, and the library can still be loaded.
// NOLINTBEGIN(readability-redundant-declaration): declared again to be weak
extern "C" __attribute__((weak)) nvinfer1::IPluginRegistry* getPluginRegistry() noexcept;
extern "C" __attribute__((weak)) int32_t getInferLibMajorVersion() noexcept;
// NOLINTEND(readability-redundant-declaration)

namespace quest {
namespace {

class Library {
public:
    static Library& instance() noexcept {
        static Library library;
        return library;
    }

    Library(const Library&) = delete;
    Library& operator=(const Library&) = delete;

    nvinfer1::IPluginCreatorInterface* const* takeOver(int32_t& count) noexcept {
        withdraw();
        count = static_cast<int32_t>(mCreators.size());
        return mCreators.data();
    }

private:
    Library() noexcept {
        if (getPluginRegistry == nullptr || getInferLibMajorVersion == nullptr) return;
        if (const int32_t major = getInferLibMajorVersion(); major != NV_TENSORRT_MAJOR) {
            // A registry of another major version has another table of virtual functions: calling it would end in a crash.
            char message[256];
            static_cast<void>(std::snprintf(
                message, sizeof(message),
                "built for TensorRT %d, expected that library and found its version %d: the plugins do not register themselves; build them "
                "with that version's headers",
                NV_TENSORRT_MAJOR, major));
            logError("registration", message);
            return;
        }
        nvinfer1::IPluginRegistry& registry = *getPluginRegistry();
        for (nvinfer1::IPluginCreatorInterface* creator : mCreators)
            if (!registry.registerCreator(*creator, kNamespace))
                logError("registration", "TensorRT's registry refuses a creator: one of its name, version and namespace is there already");
        mRegistry = &registry;
    }

    /// Without this a library that is closed would leave the registry with creators that are gone.
    ~Library() { withdraw(); }

    void withdraw() noexcept {
        const std::scoped_lock lock(mMutex);
        if (mRegistry != nullptr) {
            for (const nvinfer1::IPluginCreatorInterface* creator : mCreators) static_cast<void>(mRegistry->deregisterCreator(*creator));
            mRegistry = nullptr;
        }
    }

    TimestepQuantizeCreator mTimestepQuantize;
    GegluTimestepQuantizeCreator mGegluTimestepQuantize;
    std::array<nvinfer1::IPluginCreatorInterface*, 2> mCreators{&mTimestepQuantize, &mGegluTimestepQuantize};
    std::mutex mMutex;
    nvinfer1::IPluginRegistry* mRegistry = nullptr;  ///< where the library registered its creators itself
};

[[maybe_unused]] const Library& registeredWhenLoaded = Library::instance();

}  // namespace
}  // namespace quest

extern "C" QUEST_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators) {
    return quest::Library::instance().takeOver(nbCreators);
}

extern "C" QUEST_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { quest::useLoggerFinder(finder); }
