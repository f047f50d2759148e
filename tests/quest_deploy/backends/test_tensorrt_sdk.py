"""TensorRT proper: its checks, and its whole path to an engine, on the builder of TensorRT for RTX
in its place.

The SDK cannot be installed everywhere. Its Python module has the names of TensorRT for RTX's, so
that module, under the SDK's name and version, builds real engines here; what it cannot do is listed
in docs/tensorrt.md.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import tensorrt_rtx

from exporters.graph_info import load_graph
from exporters.ops import geglu_timestep_quantize, timestep_quantize
from quest_deploy.backends.base import (
    LOWERED,
    PluginRecord,
    Runtime,
    build_engine,
    engine_info,
    engine_options,
)
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import get_backend
from quest_deploy.backends.tensorrt import plugin as tensorrt_plugin
from quest_deploy.backends.tensorrt.base import (
    ENGINE,
    check_compute_capability,
    make_logger,
    read_timing_cache,
    runs_engines_of,
)
from quest_deploy.backends.tensorrt.plugin import load_plugin, plugin_library, recorded_library
from quest_deploy.errors import QuestDeployError
from quest_deploy.files import sha256_of
from tests.helpers import assert_holds, refused, reseal

SDK = get_backend("tensorrt")
SHARED = "quest_deploy.backends.tensorrt.base"


class _Builder(tensorrt_rtx.Builder):
    """Builds for a GPU that is not there: TensorRT proper would take the machine's."""

    def create_builder_config(self) -> Any:
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM89, 0)
        return config


@pytest.fixture
def sdk(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A machine with TensorRT 10.16 and a GPU of compute capability 8.9."""
    module = ModuleType("tensorrt")
    module.__dict__.update(
        {name: value for name, value in vars(tensorrt_rtx).items() if not name.startswith("__")}
    )
    module.__dict__.update(__version__="10.16.1", Builder=_Builder)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_count", lambda: 1)
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_compute_capability", lambda: "89")
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_name", lambda: "NVIDIA L40S")
    monkeypatch.setattr("quest_deploy.backends.cuda.driver_version", lambda: "13.0")
    monkeypatch.delenv(tensorrt_plugin.ENVIRONMENT, raising=False)
    monkeypatch.setattr(tensorrt_plugin, "BUILT", Path("/nowhere"))
    return module


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files that are given as the plugin's library, and are none."""
    folder = tmp_path_factory.mktemp("libraries")
    (folder / "text.so").write_text("no library")
    sources = {
        "other": "int answer() { return 42; }",
        "empty": "#include <cstdint>\n"
        'extern "C" void* getCreators(int32_t& count) { count = 0; return nullptr; }\n'
        'extern "C" void setLoggerFinder(void*) {}',
    }
    for name, source in sources.items():
        (folder / f"{name}.cpp").write_text(source)
        subprocess.run(
            ["g++", "-shared", "-fPIC", folder / f"{name}.cpp", "-o", folder / f"{name}.so"],
            check=True,
        )
    return {path.stem: path for path in folder.glob("*.so")}


class _Registry:
    """A plugin registry that loads everything; ``offered`` is what its libraries offer."""

    def __init__(self, *offered: tuple[str, str, str]) -> None:
        self.offered = offered
        self.loaded: list[str] = []

    def load_library(self, path: str) -> object:
        self.loaded.append(path)
        return object()

    def get_creator(self, *name: str) -> object | None:
        return object() if name in self.offered else None


QUEST = tuple(
    (op.OP_TYPE, str(timestep_quantize.VERSION), timestep_quantize.DOMAIN)
    for op in (timestep_quantize, geglu_timestep_quantize)
)


def test_versions_that_it_is_not_written_for_are_refused(sdk: ModuleType) -> None:
    for version in ("8.6.1", "9.3.0", "12.0.1"):
        sdk.__dict__["__version__"] = version
        for check in (SDK.check_build, SDK.check_run):
            with refused("10.x", "11.x", version, "pip install"):
                check(EngineOptions())
    for version in ("10.0.0", "11.1.0.106"):
        sdk.__dict__["__version__"] = version
        SDK.check_build(EngineOptions())
        SDK.check_run(EngineOptions())


def test_a_driver_that_is_too_old_for_the_packages_cuda_is_refused_before_anything_is_built(
    sdk: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quest_deploy.backends.cuda.major_of", lambda package: 13)
    SDK.check_build(EngineOptions())
    monkeypatch.setattr("quest_deploy.backends.cuda.driver_version", lambda: "12.8")
    for check in (SDK.check_build, SDK.check_run):
        with refused("tensorrt_cu13", "CUDA 13", "12.8"):
            check(EngineOptions())


@pytest.mark.parametrize(("capability", "slow"), [("89", False), ("100", False), ("103", True)])
def test_a_gpu_whose_integer_products_are_slow_is_told_of_once(
    sdk: ModuleType,
    hand_model: ir.Model,
    capability: str,
    slow: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_compute_capability", lambda: capability)
    SDK.check_build(EngineOptions())
    SDK.check_graph(hand_model, EngineOptions())
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == slow
    for message in told:
        assert_holds(message, "10.3", "INT8", "FP16", "benchmark")


@pytest.mark.parametrize(
    ("version", "refittable", "told"),
    [("11.3.0", True, 1), ("11.3.0", False, 0), ("11.4.0", True, 0), ("10.16.1", True, 0)],
)
def test_the_version_that_drops_biases_of_refittable_engines_is_named(
    sdk: ModuleType,
    hand_model: ir.Model,
    version: str,
    refittable: bool,
    told: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sdk.__dict__["__version__"] = version
    SDK.check_graph(hand_model, EngineOptions(refittable=refittable))
    assert len(caplog.records) == told
    for record in caplog.records:
        assert_holds(record.getMessage(), "--refittable", "11.3", "verify")


def test_gathered_scales_are_refused_before_the_version_that_takes_them(sdk: ModuleType) -> None:
    options = EngineOptions(quantize="gathered")
    for version in ("10.0.1", "10.12.0"):
        sdk.__dict__["__version__"] = version
        with refused("--quantize gathered", version, "10.13", "--quantize native"):
            SDK.check_build(options)
    for version in ("10.13.0", "10.16.1", "11.1.0.106"):
        sdk.__dict__["__version__"] = version
        SDK.check_build(options)
    assert SDK.resolve(options) == options
    with refused("--plugins", "gathered"):
        EngineOptions(quantize="gathered", plugins="a.so")


def test_fused_attention_is_refused_before_the_version_whose_parser_takes_it(
    sdk: ModuleType,
) -> None:
    options = EngineOptions(fused_attention=True, dtype="fp16")
    for version in ("10.0.1", "10.13.3"):
        sdk.__dict__["__version__"] = version
        with refused("--fused-attention", version, "10.14"):
            SDK.check_build(options)
    for version in ("10.14.1", "11.1.0.106"):
        sdk.__dict__["__version__"] = version
        SDK.check_build(options)
    with refused("--fused-attention", "fp16", "bf16"):
        EngineOptions(fused_attention=True)


def test_what_a_version_lacks_is_refused_before_anything_is_built(sdk: ModuleType) -> None:
    sdk.__dict__["IBuilderConfig"] = object
    with refused("--max-num-tactics", "10.16.1"):
        SDK.check_build(EngineOptions(max_num_tactics=1))
    with refused(
        "--tactic-sources", "10.16.1", "'cublas'", "edge_mask_convolutions", "jit_convolutions"
    ):
        SDK.check_build(EngineOptions(tactic_sources=("cublas",)))
    sdk.__dict__["HardwareCompatibilityLevel"] = SimpleNamespace(
        __members__={"NONE": 0, "AMPERE_PLUS": 1}
    )
    with refused("10.16.1", "'same_compute_capability'", "none", "ampere_plus"):
        SDK.check_build(EngineOptions(hardware_compatibility_level="same_compute_capability"))


@pytest.mark.parametrize("place", ["folder", "unwritable/cache"])
def test_a_timing_cache_that_cannot_be_used_is_refused_before_anything_is_built(
    place: str, tmp_path: Path, sdk: ModuleType
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "unwritable").write_text("a file")
    with refused(tmp_path / place):
        SDK.check_build(EngineOptions(timing_cache=str(tmp_path / place)))
    SDK.check_build(EngineOptions(timing_cache=str(tmp_path / "new" / "cache.bin")))
    assert not (tmp_path / "new").exists()  # what checks leaves nothing behind


@pytest.mark.parametrize("refused", ["by the builder", "when it is read"])
def test_a_timing_cache_of_another_version_is_written_anew_and_that_is_said(
    refused: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Config:
        taken: object = None

        def create_timing_cache(self, content: bytes) -> object | None:
            return (
                None
                if content and refused == "when it is read"
                else SimpleNamespace(content=content)
            )

        def set_timing_cache(self, cache: Any, *, ignore_mismatch: bool) -> bool:
            if cache.content in (b"", b"mine"):
                self.taken = cache
            return self.taken is cache

    config, options = Config(), EngineOptions(timing_cache=str(tmp_path / "cache.bin"))
    for content, kept in ((None, b""), (b"mine", b"mine"), (b"another's", b"")):
        if content is not None:
            (tmp_path / "cache.bin").write_bytes(content)
        if content == b"mine" and refused == "when it is read":
            continue
        caplog.clear()
        cache = read_timing_cache(config, options)
        assert (cache.content, config.taken) == (kept, cache)
        assert [x.levelname for x in caplog.records] == ["WARNING"] * (content == b"another's")


def test_a_plugin_that_is_asked_for_and_not_there_is_refused_with_where_to_get_it(
    sdk: ModuleType, tmp_path: Path
) -> None:
    with refused("--quantize plugin", "--quantize native"):
        SDK.check_build(EngineOptions(quantize="plugin"))
    with refused("--plugins", tmp_path / "none.so"):
        SDK.check_build(EngineOptions(plugins=str(tmp_path / "none.so")))
    with refused("--serialize-plugins"):
        SDK.check_build(EngineOptions(serialize_plugins=True, version_compatible=True))


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        ("text", "file too short|invalid ELF header"),
        ("other", "SymbolAddress for getCreators"),
        ("empty", "No creator returned"),
    ],
)
def test_a_library_that_tensorrt_refuses_is_refused_before_anything_is_built_with_its_reason(
    library: str, reason: str, sdk: ModuleType, libraries: dict[str, Path]
) -> None:
    with refused(libraries[library]) as caught:
        SDK.check_build(EngineOptions(plugins=str(libraries[library])))
    assert re.search(reason, str(caught.value))
    assert "CUDA driver version" not in str(caught.value)


def test_a_library_for_another_major_version_is_refused_before_it_is_loaded(
    sdk: ModuleType, tmp_path: Path
) -> None:
    library = tmp_path / "plugins.so"
    library.write_bytes(b"\0quest plugins for TensorRT 11;\0")
    with refused(library, "TensorRT 11", "10.16.1"):
        SDK.check_build(EngineOptions(plugins=str(library)))
    library.write_bytes(b"\0quest plugins for TensorRT 10;\0")
    with refused(library):
        SDK.check_build(EngineOptions(plugins=str(library)))


def test_a_library_that_offers_other_plugins_is_refused() -> None:
    registry = _Registry(("TimestepQuantize", "2", "quest"), ("TimestepQuantize", "1", ""))
    with refused("a.so", "quest::TimestepQuantize", 1, error=QuestDeployError):
        load_plugin(registry, "a.so", SimpleNamespace(problems=[]))
    with refused("a.so", "quest::GegluTimestepQuantize", 1, error=QuestDeployError):
        load_plugin(_Registry(QUEST[0]), "a.so", SimpleNamespace(problems=[]))
    load_plugin(_Registry(*QUEST), "a.so", SimpleNamespace(problems=[]))


def test_the_plugins_library_is_found_where_it_is_given_in_the_environment_or_where_it_was_built(
    sdk: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("given.so", "environment.so", "built.so"):
        (tmp_path / name).write_bytes(name.encode())
    # A library where the dynamic linker looks is no file that could be hashed.
    monkeypatch.setattr("ctypes.util.find_library", lambda name: "libquest_trt_plugins.so")
    assert plugin_library(None) is None
    assert SDK.resolve(EngineOptions()).quantize == "native"
    monkeypatch.setattr(tensorrt_plugin, "BUILT", tmp_path / "built.so")
    assert plugin_library(None) == tmp_path / "built.so"
    monkeypatch.setenv(tensorrt_plugin.ENVIRONMENT, str(tmp_path / "environment.so"))
    assert plugin_library(None) == tmp_path / "environment.so"
    assert plugin_library(tmp_path / "given.so") == tmp_path / "given.so"
    found = SDK.resolve(EngineOptions())
    assert (found.quantize, found.plugins) == ("plugin", tmp_path / "environment.so")
    assert SDK.resolve(EngineOptions(quantize="native")) == EngineOptions(quantize="native")
    monkeypatch.setenv(tensorrt_plugin.ENVIRONMENT, str(tmp_path / "none.so"))
    with refused("QUEST_DEPLOY_PLUGINS", tmp_path / "none.so"):
        plugin_library(None)


def test_an_engine_runs_with_the_very_library_that_it_was_built_with(
    tmp_path: Path, sdk: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.so").write_bytes(b"a")
    (tmp_path / "b.so").write_bytes(b"b")
    digest = sha256_of(tmp_path / "a.so")
    assert recorded_library(tmp_path / "a.so", digest) == tmp_path / "a.so"
    with refused(digest, "QUEST_DEPLOY_PLUGINS"):
        recorded_library(Path("/another/machine/a.so"), digest)
    monkeypatch.setenv(tensorrt_plugin.ENVIRONMENT, str(tmp_path / "b.so"))
    with refused(tmp_path / "b.so", digest):
        recorded_library(Path("/another/machine/a.so"), digest)
    monkeypatch.setenv(tensorrt_plugin.ENVIRONMENT, str(tmp_path / "a.so"))
    assert recorded_library(Path("/another/machine/a.so"), digest) == tmp_path / "a.so"
    monkeypatch.setenv(tensorrt_plugin.ENVIRONMENT, str(tmp_path / "none.so"))
    assert (
        recorded_library(tmp_path / "a.so", digest) == tmp_path / "a.so"
    )  # the rest is not looked at


def test_the_plugins_nodes_stay_in_the_graph_only_where_the_plugin_quantizes(
    mini_proto: onnx.ModelProto,
) -> None:
    plugin = EngineOptions(quantize="plugin")
    kept = SDK.lower(ir.from_proto(mini_proto), plugin)
    assert sum(node.op_type == "TimestepQuantize" for node in kept.graph) == 22
    for options, bucket in ((EngineOptions(quantize="native"), None), (plugin, 1)):
        native = SDK.lower(ir.from_proto(mini_proto), options, frozen_bucket=bucket)
        assert not any(node.domain for node in native.graph)


def test_with_the_plugin_its_library_is_loaded_before_the_graph_is_parsed_and_the_record_holds_its_hash(
    mini_proto: onnx.ModelProto, tmp_path: Path, sdk: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "plugins.so"
    library.write_bytes(b"the plugin")
    registry, parsed = _Registry(*QUEST), []

    class Parser:
        num_errors = 0

        def __init__(self, network: Any, logger: Any) -> None:
            """Nothing to keep."""

        def parse_from_file(self, path: str) -> bool:
            assert registry.loaded[-1] == str(library)
            parsed.append({node.op_type for node in load_graph(Path(path)).graph})
            return False

    monkeypatch.setattr(_Builder, "get_plugin_registry", lambda self: registry)
    sdk.__dict__["OnnxParser"] = Parser
    options = EngineOptions(plugins=str(library))
    with refused("tensorrt", LOWERED, error=QuestDeployError):
        build_engine(SDK, ir.from_proto(mini_proto), tmp_path, options, "cd" * 32)
    assert {"TimestepQuantize", "GegluTimestepQuantize"} <= parsed[0]
    kept = {
        node.op_type for node in load_graph(tmp_path / LOWERED).graph
    }  # verify cuts it at GEGLU's output
    assert "TimestepQuantize" in kept
    assert "GegluTimestepQuantize" not in kept
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    record = SDK.record(SDK.resolve(options))
    assert record["plugin"] == PluginRecord("plugins.so", sha256_of(library), serialized=False)


@pytest.fixture
def engine(mini_proto: onnx.ModelProto, tmp_path: Path, sdk: ModuleType) -> Path:
    """An engine, really built, with most options; its timing cache lies beside it."""
    options = EngineOptions(
        timing_cache=str(tmp_path / "cache.bin"),
        hardware_compatibility_level="same_compute_capability",
        builder_optimization_level=1,
        weight_streaming=True,
        tactic_sources=(),
        max_num_tactics=2,
        profiling_verbosity="layer_names_only",
        pool_limit=2**30,
    )
    (tmp_path / "engine").mkdir()
    build_engine(SDK, ir.from_proto(mini_proto), tmp_path / "engine", options, "cd" * 32)
    return tmp_path / "engine"


def test_the_builder_makes_an_engine_whose_record_says_what_built_it_and_for_what(
    engine: Path,
) -> None:
    assert (engine / ENGINE).stat().st_size > 100_000
    assert (engine.parent / "cache.bin").stat().st_size > 0
    record = engine_info(engine)
    assert record.runtime == Runtime("tensorrt", "10.16.1")
    assert record.hardware == {
        "device": "NVIDIA L40S",
        "compute_capabilities": ["89"],
        "driver": "CUDA 13.0",
    }
    assert record.options.quantize == "native"
    assert record.plugin is None
    assert record.files.keys() == {ENGINE, LOWERED, f"{LOWERED}.data"}
    options = engine_options(SDK, engine)
    assert (options.tactic_sources, options.weight_streaming, options.profiling_verbosity) == (
        (),
        True,
        "layer_names_only",
    )


def test_an_engine_of_another_version_or_gpu_is_refused_before_it_is_loaded(
    engine: Path, sdk: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdk.__dict__["__version__"] = "10.17.0"
    with refused("10.16.1", "10.17.0", "quest-deploy build-engine"):
        engine_options(SDK, engine)
    sdk.__dict__["__version__"] = "10.16.1.post1"  # as some of its packages are called
    engine_options(SDK, engine)
    assert SDK.record(EngineOptions())["runtime"] == Runtime("tensorrt", "10.16.1")
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_compute_capability", lambda: "90")
    with refused("89", "90", "quest-deploy build-engine"):
        engine_options(SDK, engine)


def test_a_record_without_the_plugins_hash_is_refused(engine: Path) -> None:
    reseal(engine / "engine.json", lambda content: content["options"].update(quantize="plugin"))
    with refused("plugin", "quest-deploy build-engine"):
        engine_options(SDK, engine)


def test_version_compatible_engines_run_on_later_versions_and_others_on_their_own() -> None:
    assert runs_engines_of("10.16.1", "10.16.1", version_compatible=False)
    assert not runs_engines_of("10.16.2", "10.16.1", version_compatible=False)
    assert runs_engines_of("11.0.0", "10.16.1", version_compatible=True)
    assert not runs_engines_of("10.9.0", "10.16.1", version_compatible=True)


def test_engines_run_on_the_compute_capability_that_they_were_built_for_or_where_they_are_compatible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ampere_plus = EngineOptions(hardware_compatibility_level="ampere_plus")
    built = {"compute_capabilities": ["86"]}
    for here, options, runs in (
        ("86", EngineOptions(), True),
        ("89", EngineOptions(), False),
        ("120", ampere_plus, True),
        ("75", ampere_plus, False),
        ("89", replace(ampere_plus, hardware_compatibility_level="same_compute_capability"), False),
    ):
        monkeypatch.setattr(
            "quest_deploy.backends.cuda.gpu_compute_capability", lambda here=here: here
        )
        if runs:
            check_compute_capability(built, options)
        else:
            with refused("86", here, "quest-deploy build-engine"):
                check_compute_capability(built, options)


def test_verbose_builds_print_what_tensorrt_logs_and_others_keep_its_errors_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    severity = tensorrt_rtx.ILogger.Severity
    for verbose in (False, True):
        logger = make_logger(tensorrt_rtx, verbose=verbose)
        logger.log(severity.VERBOSE, "a detail")
        logger.log(severity.ERROR, "a problem")
        assert logger.problems == ["a problem"]
        assert caplog.messages == (["[VERBOSE] a detail", "[ERROR] a problem"] if verbose else [])


OUTLIVED = """
import gc
import tensorrt_rtx as trt
from quest_deploy.backends.tensorrt.base import make_logger

first = trt.Builder(make_logger(trt))
second = trt.Builder(make_logger(trt))
del first
gc.collect()
second.get_plugin_registry().load_library("/no/library.so")  # logged on the process's first logger
assert make_logger(trt).problems == []
second.get_plugin_registry().load_library("/no/library.so")
assert make_logger(trt) is make_logger(trt, verbose=True)
print("alive")
"""


def test_the_logger_that_tensorrt_keeps_for_the_process_outlives_the_build_that_gave_it() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", OUTLIVED], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "alive\n"), ended.stderr
