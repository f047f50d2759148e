#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "quest_deploy/error.h"

namespace quest_deploy {

/// What an engine's `engine.json` says, and where its files are. It needs neither CUDA nor TensorRT.
struct EngineRecord {
    std::filesystem::path folder;
    std::string backend;                            ///< "tensorrt" or "tensorrt-rtx"
    std::string runtime_version;                    ///< of the TensorRT that built it, such as "10.16.1"
    std::string graph_sha256;                       ///< of the portable graph that it was built from
    std::vector<std::string> compute_capabilities;  ///< of the GPUs that it was built for, such as "89"
    std::string hardware_compatibility_level;       ///< "none", "ampere_plus" or "same_compute_capability"
    bool version_compatible = false;
    bool weight_streaming = false;
    std::optional<std::int64_t> weight_streaming_budget;  ///< bytes
    std::string plugin_library;                           ///< the plugin library's file name; empty where it needs none
    std::string plugin_sha256;
    std::string plan_sha256;  ///< of model.engine

    /// Read an engine's folder, such as engines/tensorrt of a workspace. Throws Error where it is missing, damaged, of another version,
    /// or for a runtime that is not TensorRT.
    static EngineRecord open(const std::filesystem::path& folder);

    /// The engine itself, its hash checked. Throws Error where the file is missing or was changed.
    std::vector<char> read_plan() const;

    /// Throws Error where `library` is not the plugin library that the engine was built with.
    void check_plugin(const std::filesystem::path& library) const;
};

/// Throws Error where a TensorRT does not run the engine: another flavour ("tensorrt" or "tensorrt-rtx"), or another version, such as
/// "10.16.1.11", which runs none but its own engines and those that are version compatible.
void check_runtime(const EngineRecord& record, const std::string& backend, const std::string& version);

/// Throws Error where a GPU does not run the engine. `compute_capability` is such as 89.
void check_gpu(const EngineRecord& record, int compute_capability);

/// A workspace as quest-deploy leaves it. Opening one checks its manifest; opening its engine, that the two fit each other.
class Workspace {
public:
    /// Throws Error where there is none, or one that is damaged, was edited, or is of another version.
    static Workspace open(const std::filesystem::path& root);

    const std::filesystem::path& root() const { return root_; }
    /// The model's name.
    const std::string& model() const { return model_; }
    /// The record of an engine that this workspace's manifest lists. Throws Error where there is none, it was changed, or the graph is
    /// newer.
    EngineRecord engine(const std::string& backend) const;

private:
    struct File {
        std::string stage, path, sha256;
    };
    const File* find(const std::string& stage, const std::string& path) const;

    std::filesystem::path root_;
    std::string model_;
    std::vector<File> files_;
};

}  // namespace quest_deploy
