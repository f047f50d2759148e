"""The plugin library: the host programs, the registry and the parser of TensorRT for RTX, and one
definition in two languages.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from exporters.ops import geglu_timestep_quantize, timestep_quantize
from quest_deploy.backends.tensorrt.plugin import built_for
from tests.helpers import assert_holds
from tests.trt_plugins.conftest import HEADERS, PLUGINS, configure, require_compilers


def run(*command: str | Path) -> str:
    """What the program prints, errors included; it must succeed."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def library(build: Path) -> Path:
    """The plugins; ``build`` has them and the programs that load them only where TensorRT's headers
    are.
    """
    if HEADERS not in os.environ:
        pytest.skip(f"{HEADERS}, the folder of TensorRT's headers, is not set")
    return build / "libquest_trt_plugins.so"


def test_the_kernels_own_source_run_on_the_cpu_gives_the_references_codes_between_all_layouts_and_touches_nothing_else(
    build: Path,
) -> None:
    told = run(build / "tests" / "kernel_test_emulated", "--emulated")
    for kernel in (
        "FP32 33 channels, 70 pixels, between all layouts",
        "bf16 [1, 1 x 512, 4096]",
        "GEGLU FP16 [3, 5 x 40, 1]",
    ):
        assert f"ok     {kernel}\n" in told


@pytest.mark.slow
def test_a_debug_build_tells_a_bucket_out_of_range(tmp_path: Path) -> None:
    require_compilers()
    configured = configure(tmp_path, "-DCMAKE_BUILD_TYPE=Debug")
    assert configured.returncode == 0, configured.stderr
    run("cmake", "--build", tmp_path, "--target", "kernel_test_emulated")
    told = run(tmp_path / "tests" / "kernel_test_emulated", "--emulated")
    assert_holds(told, "sample 0", "bucket -1")


def test_on_a_gpu_the_kernels_give_the_references_codes_and_without_one_that_is_said(
    build: Path,
) -> None:
    told = run(build / "tests" / "kernel_test")
    assert ("no GPU is here" in told) != ("captured in a CUDA graph and replayed" in told)


def test_loaded_as_tensorrt_loads_it_the_library_makes_plugins_that_keep_the_rules(
    build: Path, library: Path
) -> None:
    told = run(build / "tests" / "plugin_test", library)
    for claim in (
        "registers each creator once",
        "those are taken that TensorRT documents, 88",
        "a copy outlives the plugin",
        "is refused and logged",
    ):
        assert claim in told


def test_enqueue_gives_the_references_codes_in_every_combination_of_formats_on_the_cpu(
    build: Path, library: Path
) -> None:
    told = run(
        build / "tests" / "plugin_test_emulated",
        build / "tests" / "libquest_trt_plugins_emulated.so",
    )
    assert told.count("ok     enqueue gives the reference's codes in every combination") == 12
    assert told.count("ok     GEGLU's enqueue gives the reference's codes") == 2


def test_beside_another_major_version_of_tensorrt_the_library_registers_nothing_and_says_so(
    build: Path, library: Path
) -> None:
    told = run(build / "tests" / "plugin_test", library, "--other-version")
    assert_holds(told, "headers")


def test_a_creator_that_the_registry_refuses_is_told_and_the_library_goes_on(
    build: Path, library: Path
) -> None:
    told = run(build / "tests" / "plugin_test", library, "--refusing")
    assert told.count("creator") == 2


def configured_for(folder: Path, minor: int) -> Path:
    """Where the plugins are configured with TensorRT's headers, which say that they are 11.x's."""
    headers = os.environ.get(HEADERS)
    if headers is None:
        pytest.skip(f"{HEADERS}, the folder of TensorRT's headers, is not set")
    require_compilers()
    include, build = folder / f"include-{minor}", folder / f"build-{minor}"
    shutil.copytree(headers, include)
    version = include / "NvInferVersion.h"
    text = re.sub(r"(MAJOR(?:_ENTERPRISE)? +)\d+", r"\g<1>11", version.read_text())
    version.write_text(re.sub(r"(MINOR(?:_ENTERPRISE)? +)\d+", rf"\g<1>{minor}", text))
    configured = configure(build, headers=str(include))
    assert configured.returncode == 0, configured.stderr
    return build


@pytest.mark.slow
def test_plugins_compile_as_cpp20_from_11_5_on_and_implement_v3_interfaces_alone(
    tmp_path: Path,
) -> None:
    for minor, standard in ((4, "c++17"), (5, "c++20")):
        build = configured_for(tmp_path, minor)
        commands = json.loads((build / "compile_commands.json").read_text())
        ours = [x["command"] for x in commands if "quest_plugin_objects" in x["command"]]
        assert len(ours) == 8
        assert all(f"-std={standard} " in command for command in ours)
    run("cmake", "--build", build, "--target", "quest_plugin_objects", "-j", "2")
    symbols = run("nm", "-C", *(build / "CMakeFiles/quest_plugin_objects.dir").rglob("*.o"))
    assert re.search(r"nvinfer1::\S*IPluginV3OneRuntime", symbols)
    assert not re.search(r"nvinfer1::\S*(IPluginV2|IPluginCreator\b)", symbols)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("include", "lib"), [("targets/{}/include", "targets/{}/lib"), ("include/{}", "lib/{}")]
)
def test_tensorrt_is_found_where_its_archive_and_debians_packages_have_it(
    include: str, lib: str, tmp_path: Path
) -> None:
    require_compilers()
    headers, libraries = (
        tmp_path / "root" / folder.format(f"{platform.machine()}-linux-gnu")
        for folder in (include, lib)
    )
    for folder in (headers, libraries):
        folder.mkdir(parents=True)
    (headers / "NvInferRuntime.h").touch()
    (headers / "NvInferVersion.h").write_text(
        "#define NV_TENSORRT_MAJOR 11\n#define NV_TENSORRT_MINOR 4\n"
    )
    (libraries / "libnvinfer.so").touch()
    configured = configure(tmp_path / "build", f"-DTENSORRT_ROOT={tmp_path / 'root'}")
    assert_holds(configured.stdout, f"headers {headers}", f"library {libraries}")


def test_name_version_namespace_inputs_and_fields_are_the_exporters(
    build: Path, library: Path
) -> None:
    described = json.loads(run(build / "tests" / "plugin_test", library, "--describe"))
    shared = {
        "version": str(timestep_quantize.VERSION),
        "namespace": timestep_quantize.DOMAIN,
        "inputs": list(timestep_quantize.INPUTS),
    }
    assert described == [
        {"name": timestep_quantize.OP_TYPE, **shared, "fields": [timestep_quantize.AXIS]},
        {"name": geglu_timestep_quantize.OP_TYPE, **shared, "fields": []},
    ]


def test_the_library_says_which_major_version_of_tensorrt_it_was_built_for(library: Path) -> None:
    version = (Path(os.environ[HEADERS]) / "NvInferVersion.h").read_text()
    major = re.search(r"define (?:NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) +(\d+)", version)
    assert major is not None
    assert built_for(library) == int(major[1])


def test_without_tensorrt_in_the_process_the_library_can_still_be_opened(library: Path) -> None:
    count = ctypes.c_int32()
    creators = ctypes.CDLL(str(library)).getCreators
    creators.restype = ctypes.c_void_p
    assert creators(ctypes.byref(count))
    assert count.value == 2


PARSE = """
import sys
import onnx_ir as ir
import tensorrt_rtx as trt
from tests.helpers import hand_checkpoint, hand_graph

registry, logger = trt.get_plugin_registry(), trt.Logger(trt.Logger.VERBOSE)
builder = trt.Builder(logger)
library = registry.load_library(sys.argv[1])
assert library is not None
assert registry.get_creator("TimestepQuantize", "1", "quest").plugin_namespace == "quest"
assert registry.get_creator("GegluTimestepQuantize", "1", "quest").name == "GegluTimestepQuantize"
registry.deregister_library(library)
assert registry.get_creator("TimestepQuantize", "1", "quest") is None
assert registry.load_library(sys.argv[1]) is not None
print("LOADED", flush=True)
if len(sys.argv) > 2:
    from exporters.lowering.tensorrt import lower
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    model = lower(hand_graph(hand_checkpoint()), quantize="plugin")
    print("PARSED", trt.OnnxParser(network, logger).parse(ir.to_proto(model).SerializeToString()), flush=True)
"""


def in_tensorrt_rtx(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: the parser of TensorRT for RTX ends it."""
    pytest.importorskip("tensorrt_rtx", reason="the Python package tensorrt-rtx is not installed")
    environment = {**os.environ, "PYTHONPATH": str(PLUGINS.parent)}
    command = [sys.executable, "-c", PARSE, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=PLUGINS.parent
    )


def test_the_registry_of_tensorrt_for_rtx_loads_finds_unloads_and_loads_again_the_library(
    library: Path,
) -> None:
    done = in_tensorrt_rtx(str(library))
    assert done.returncode == 0, done.stderr
    assert "LOADED" in done.stdout


def test_the_parser_of_tensorrt_for_rtx_has_our_creator_make_the_plugin_and_then_refuses_plugins(
    library: Path,
) -> None:
    done = in_tensorrt_rtx(str(library), "parse")
    told = done.stdout + done.stderr
    assert (
        "Searching for plugin: TimestepQuantize, plugin_version: 1, plugin_namespace: quest" in told
    )
    assert "Successfully created plugin: TimestepQuantize" in told
    # Release 1.7 ends the process where TensorRT adds the plugin to the network, whoever wrote the
    # plugin.
    assert done.returncode == -signal.SIGABRT or "PARSED False" in told


@pytest.fixture(scope="module")
def without_headers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder that was configured without TensorRT's headers, and what cmake said."""
    require_compilers()
    folder = tmp_path_factory.mktemp("without_headers")
    configured = configure(folder)
    assert configured.returncode == 0, configured.stderr
    return folder, configured.stdout


def test_without_tensorrts_headers_the_kernels_and_their_tests_are_built_and_the_plugins_are_not(
    without_headers: tuple[Path, str],
) -> None:
    folder, told = without_headers
    assert_holds(told, "TENSORRT_INCLUDE_DIR", "plugins")
    targets = run("cmake", "--build", folder, "--target", "help")
    assert "kernel_test_emulated" in targets
    assert "quest_trt_plugins" not in targets


def test_a_folder_without_headers_is_refused_and_named(
    without_headers: tuple[Path, str], tmp_path: Path
) -> None:
    configured = configure(without_headers[0], headers=str(tmp_path))
    assert configured.returncode != 0
    assert_holds(configured.stderr, "TENSORRT_INCLUDE_DIR", tmp_path, "NvInferRuntime.h")


def test_headers_of_a_tensorrt_without_iplugin_v3_are_refused(
    without_headers: tuple[Path, str], tmp_path: Path
) -> None:
    (tmp_path / "NvInferRuntime.h").touch()
    (tmp_path / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 8\n")
    configured = configure(without_headers[0], headers=str(tmp_path))
    assert configured.returncode != 0
    assert_holds(configured.stderr, tmp_path, "TensorRT 8", 10)


@pytest.mark.slow
def test_plugins_for_tensorrt_for_rtx_are_refused(tmp_path: Path) -> None:
    require_compilers()
    configured = configure(tmp_path, "-DQUEST_DEPLOY_TENSORRT_RTX=ON")
    assert configured.returncode != 0
    assert_holds(configured.stderr, "QUEST_DEPLOY_TENSORRT_RTX", "trt_plugins/runtime")
