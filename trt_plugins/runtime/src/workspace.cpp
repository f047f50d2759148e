#include "quest_deploy/workspace.h"

#include <algorithm>
#include <charconv>
#include <sstream>

#include "files.h"
#include "sha256.h"

namespace quest_deploy {

namespace fs = std::filesystem;

namespace {

// The formats are those of quest_deploy/artifacts/workspace.py and quest_deploy/backends/base.py.
constexpr char kWorkspaceFormat[] = "quest-deploy workspace", kEngineFormat[] = "quest-deploy engine";
constexpr std::int64_t kWorkspaceVersion = 1, kEngineVersion = 2;
constexpr char kManifest[] = "manifest.json", kEngineFile[] = "engine.json", kPlan[] = "model.engine";
constexpr char kRebuild[] = "run `quest-deploy build-engine` again";
constexpr char kRestore[] = "use the quest-deploy that wrote it, restore it from a copy, or start a new workspace";

bool flag(const Json& options, const char* name) {
    const Json* found = options.find(name);
    return found != nullptr && found->as_bool();
}

/// The numbers of a version such as "10.16.1" or "10.16.1.11".
std::vector<int> numbers(const std::string& version) {
    std::vector<int> found;
    std::istringstream stream(version);
    for (std::string part; std::getline(stream, part, '.');) {
        const char* const last = part.data() + part.size();
        const bool digits = !part.empty() && part.front() != '-';
        const auto [end, error] = std::from_chars(part.data(), last, found.emplace_back());
        if (!digits || error != std::errc() || end != last) {
            found.clear();
            break;
        }
    }
    if (found.size() < 3 || version.back() == '.')
        throw Error("expected TensorRT's version as three numbers or more, such as 10.16.1, found \"" + version + "\"; " + kRebuild);
    return found;
}

/// Whether TensorRT `here` runs what `built` made: its own engines, and earlier ones' that are version compatible.
bool runs_engines_of(const std::string& here, const std::string& built, bool version_compatible) {
    std::vector<int> mine = numbers(here), theirs = numbers(built);
    const std::size_t parts = std::min(mine.size(), theirs.size());  // some of its names leave the build's number out
    mine.resize(parts);
    theirs.resize(parts);
    return mine == theirs || (version_compatible && mine > theirs);
}

std::string join(const std::vector<std::string>& words) {
    std::string joined;
    for (const std::string& word : words) joined += (joined.empty() ? "" : ", ") + word;
    return joined;
}

}  // namespace

namespace {

EngineRecord parse_record(const fs::path& folder, const std::vector<char>& bytes) {
    const fs::path path = folder / kEngineFile;
    const Json content = parse_document(path, bytes, kEngineFormat, kEngineVersion, kRebuild);
    EngineRecord record;
    record.folder = folder;
    record.backend = content.at("backend").as_string();
    if (record.backend != "tensorrt" && record.backend != "tensorrt-rtx")
        throw Error(path.string() + ": expected an engine of tensorrt or tensorrt-rtx, found one of " + record.backend);
    record.graph_sha256 = content.at("graph_sha256").as_string();
    record.runtime_version = content.at("runtime").at("version").as_string();
    for (const Json& name : content.at("hardware").at("compute_capabilities").as_array())
        record.compute_capabilities.push_back(name.as_string());
    const Json& options = content.at("options");
    if (flag(options, "strip_plan")) {
        throw Error(path.string() +
                    ": an engine without its weights (--strip-plan), which this runtime cannot give it; build it with them");
    }
    const Json* level = options.find("hardware_compatibility_level");
    record.hardware_compatibility_level = level == nullptr ? "none" : level->as_string();
    record.version_compatible = flag(options, "version_compatible");
    record.weight_streaming = flag(options, "weight_streaming");
    if (const Json* budget = options.find("weight_streaming_budget")) record.weight_streaming_budget = budget->as_integer();
    if (const Json* plugin = content.find("plugin"); plugin != nullptr && !flag(*plugin, "serialized")) {
        record.plugin_library = plugin->at("library").as_string();
        record.plugin_sha256 = plugin->at("sha256").as_string();
    }
    record.plan_sha256 = content.at("files").at(kPlan).as_string();
    return record;
}

}  // namespace

EngineRecord EngineRecord::open(const fs::path& folder) {
    return parse_record(folder, read_file(folder / kEngineFile, kRebuild, kMaxJsonBytes));
}

std::vector<char> EngineRecord::read_plan() const {
    std::vector<char> plan = read_file(folder / kPlan, kRebuild);
    if (sha256(plan.data(), plan.size()) != plan_sha256)
        throw Error((folder / kPlan).string() + " was changed since it was built (its SHA-256 is not the record's); " + kRebuild);
    return plan;
}

void EngineRecord::check_plugin(const fs::path& library) const {
    if (plugin_library.empty()) return;
    if (library.empty()) throw Error(folder.string() + ": the engine needs the plugin library " + plugin_library + "; give its path");
    const std::vector<char> content = read_file(library, "give the path of the plugin library that the engine was built with");
    if (sha256(content.data(), content.size()) != plugin_sha256) {
        throw Error(library.string() + " is not the plugin library that the engine was built with (SHA-256 " + plugin_sha256 +
                    "); give that one, or " + kRebuild);
    }
}

void check_runtime(const EngineRecord& record, const std::string& backend, const std::string& version) {
    const std::string engine = record.folder.string() + ": the engine ";
    if (record.backend != backend) throw Error(engine + "is of " + record.backend + ", and this program was built with " + backend);
    if (!runs_engines_of(version, record.runtime_version, record.version_compatible)) {
        throw Error(engine + "was built by " + backend + " " + record.runtime_version + ", and " + version +
                    ", which is here, does not run it; " + kRebuild);
    }
}

void check_gpu(const EngineRecord& record, int compute_capability) {
    const auto& built = record.compute_capabilities;
    const bool anywhere = record.hardware_compatibility_level == "ampere_plus" && compute_capability >= 80;
    const std::string here = std::to_string(compute_capability);
    if (std::find(built.begin(), built.end(), here) == built.end() && !anywhere) {
        throw Error(record.folder.string() + ": the engine was built for compute capabilities " + join(built) + ", and this GPU has " +
                    here + "; " + kRebuild);
    }
}

Workspace Workspace::open(const fs::path& root) {
    const fs::path path = root / kManifest;
    const Json content = parse_document(path, read_file(path, kRestore, kMaxJsonBytes), kWorkspaceFormat, kWorkspaceVersion, kRestore);
    Workspace opened;
    opened.root_ = root;
    opened.model_ = content.at("model").as_string();
    for (const auto& [stage, record] : content.at("stages").as_object())
        for (const auto& [name, file] : record.at("files").as_object())
            opened.files_.push_back({stage, name, file.at("sha256").as_string()});
    return opened;
}

const Workspace::File* Workspace::find(const std::string& stage, const std::string& path) const {
    const auto found = std::find_if(files_.begin(), files_.end(), [&](const File& f) { return f.stage == stage && f.path == path; });
    return found == files_.end() ? nullptr : &*found;
}

EngineRecord Workspace::engine(const std::string& backend) const {
    const std::string stage = "build-engine/" + backend, folder = "engines/" + backend;
    const File *described = find(stage, folder + "/" + kEngineFile), *plan = find(stage, folder + "/" + kPlan);
    if (described == nullptr || plan == nullptr) {
        throw Error(root_.string() + " has no engine of " + backend + "; run `quest-deploy build-engine --backend " + backend + " -w " +
                    root_.string() + "`");
    }
    const std::vector<char> content = read_file(root_ / described->path, kRebuild, kMaxJsonBytes);
    if (sha256(content.data(), content.size()) != described->sha256) {
        throw Error((root_ / described->path).string() + " was changed since it was written (its SHA-256 is not the manifest's); " +
                    kRebuild);
    }
    EngineRecord record = parse_record(root_ / folder, content);
    if (record.plan_sha256 != plan->sha256) throw Error((root_ / plan->path).string() + " is not the manifest's; " + kRebuild);
    const File* graph = find("export", "unet.onnx");
    if (graph == nullptr || graph->sha256 != record.graph_sha256)
        throw Error((root_ / folder).string() + " was built from another graph than the workspace's unet.onnx; " + kRebuild);
    return record;
}

}  // namespace quest_deploy
