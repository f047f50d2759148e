"""What `quest-deploy package --triton` writes, refuses, and takes from the workspace; no server is
needed.
"""

from __future__ import annotations

import copy
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from exporters.graph_info import load_graph, save_graph
from exporters.lowering.tensorrt import lower as lower_for_tensorrt
from quest_deploy.artifacts.workspace import ENGINES, Workspace
from quest_deploy.backends.base import ENGINE_FILE, Backend, EngineRecord
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import BACKENDS, get_backend
from quest_deploy.backends.tensorrt.base import ENGINE
from quest_deploy.errors import InputError
from quest_deploy.files import sealed, sha256_of
from quest_deploy.serving import client
from quest_deploy.serving.triton.layout import MODELS
from quest_deploy.serving.triton.pbtxt import Word, pbtxt
from tests.helpers import assert_holds, refused
from tests.quest_deploy.serving.local import LocalPipeline
from tests.quest_deploy.support import Chain, cli, flip_byte

text_format = pytest.importorskip("google.protobuf.text_format")
model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")


def packaged(workspace: Path, folder: Path, *options: str) -> dict[str, Any]:
    """What the command says of the package that it writes into ``folder``."""
    ended = cli("package", "--triton", folder, "-w", workspace, *options, "--json")
    assert ended.code == 0, ended.err
    found: dict[str, Any] = ended.json
    return found


def config(folder: Path, model: str) -> Any:
    """A model's configuration, read as Triton reads it; raises for an unknown field or a wrong
    type.
    """
    return text_format.Parse(
        (folder / MODELS / model / "config.pbtxt").read_text(), model_config.ModelConfig()
    )


@pytest.fixture(scope="module")
def package(label_chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of a class-conditional model on pixels; not to be changed."""
    folder = tmp_path_factory.mktemp("package") / "triton"
    packaged(label_chain.root, folder)
    return folder


@pytest.fixture
def workspace(label_chain: Chain, tmp_path: Path) -> Path:
    """A copy of the workspace that is packaged, to be changed."""
    return shutil.copytree(label_chain.root, tmp_path / "workspace")


def test_the_configurations_are_triton_s_and_agree_with_the_graphs(package: Path) -> None:
    unet = config(package, "unet")
    assert (unet.platform, unet.max_batch_size) == ("tensorrt_plan", 16)
    assert unet.HasField("dynamic_batching")
    assert [warm.batch_size for warm in unet.model_warmup] == [1, 16]
    graph = ort.InferenceSession(package / MODELS / "unet" / "1" / "model.onnx")
    assert [entry.name for entry in unet.input] == [value.name for value in graph.get_inputs()]
    assert [entry.name for entry in unet.output] == [value.name for value in graph.get_outputs()]
    for entry, value in zip(unet.input, graph.get_inputs(), strict=True):
        dims = list(entry.reshape.shape) if entry.HasField("reshape") else list(entry.dims)
        assert dims == [size if isinstance(size, int) else -1 for size in value.shape[1:]]
    assert not config(package, "pipeline").model_transaction_policy.decoupled
    assert config(package, "pipeline_stream").model_transaction_policy.decoupled


def test_limits_types_and_delay_are_those_that_were_asked_for(
    label_chain: Chain, tmp_path: Path
) -> None:
    limits = {"max_steps": 30, "max_size": 32, "max_in_flight": 5}
    options = [
        text
        for name, value in limits.items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    queue = [
        *("--max-queue", "7", "--max-images", "3", "--max-batch", "8", "--queue-delay", "500"),
        *("--io-dtype", "fp16"),
    ]
    packaged(label_chain.root, tmp_path / "out", *options, *queue)
    for name in ("pipeline", "pipeline_stream"):
        found = config(tmp_path / "out", name)
        assert {key: int(value.string_value) for key, value in found.parameters.items()} == {
            **limits,
            "model_timeout": 600,
        }
        assert found.dynamic_batching.default_queue_policy.max_queue_size == 7
    assert config(tmp_path / "out", "pipeline").max_batch_size == 3
    unet = config(tmp_path / "out", "unet")
    assert unet.max_batch_size == 8
    assert unet.dynamic_batching.max_queue_delay_microseconds == 500
    types = {entry.name: entry.data_type for entry in (*unet.input, *unet.output)}
    assert (
        types.pop("timestep") == model_config.TYPE_FP32
    )  # rounded, it could land in another bucket
    assert set(types.values()) == {model_config.TYPE_FP16}


def with_plan(
    workspace: Path, source: Path, *, plugin: dict[str, Any] | None = None, **options: Any
) -> bytes:
    """Give a workspace what `build-engine --backend tensorrt` leaves behind, but for the plan,
    which only a GPU can build.

    Args:
        source: an engine of another backend, whose record it resembles.
        plugin: what the record says of the plugin library.
        options: what it was built with, unlike here.
    """
    folder = workspace / ENGINES / "tensorrt"
    folder.mkdir()
    (folder / ENGINE).write_bytes(b"a plan")
    content = json.loads((source / ENGINE_FILE).read_text())
    del content["sha256"]
    content["options"] |= {
        "max_batch": 6,
        "version_compatible": True,
        "sample_sizes": [[8, 8], [16, 8]],
        **options,
    }
    content |= {
        "backend": "tensorrt",
        "built_by": {"tensorrt": "10.9.0"},
        "files": {ENGINE: sha256_of(folder / ENGINE)},
    }
    content |= {} if plugin is None else {"plugin": plugin}
    (folder / ENGINE_FILE).write_text(json.dumps(sealed(content)))
    opened = Workspace.open(workspace)
    opened.record(
        "build-engine/tensorrt",
        inputs=("export",),
        options={},
        files=sorted(folder.iterdir()),
        details={},
    )
    return b"a plan"


def test_a_plan_of_the_workspace_is_packaged_with_its_own_limits(
    workspace: Path, tmp_path: Path
) -> None:
    plan = with_plan(workspace, workspace / ENGINES / "tensorrt-rtx")
    plugin = tmp_path / "libplugins.so"
    plugin.write_bytes(b"a library")
    found = packaged(workspace, tmp_path / "out", "--plugin-library", str(plugin))
    assert found["plan"]
    assert (tmp_path / "out" / MODELS / "unet" / "1" / "model.plan").read_bytes() == plan
    assert (tmp_path / "out" / MODELS / "unet" / "1" / "model.onnx").exists()
    assert config(tmp_path / "out", "unet").max_batch_size == 6
    assert config(tmp_path / "out", "pipeline").parameters["max_size"].string_value == "16"
    readme = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "TensorRT 10.9.0",
        "--backend-config=tensorrt,version-compatible=true",
        "plugins=/package/plugins/libplugins.so",
    ):
        assert words in readme


def test_the_plugin_library_that_a_plan_was_built_with_is_needed_and_packaged(
    workspace: Path, tmp_path: Path
) -> None:
    right, wrong = tmp_path / "libquest_plugins.so", tmp_path / "libother.so"
    right.write_bytes(b"a library")
    wrong.write_bytes(b"another")
    plugin = {"library": right.name, "sha256": sha256_of(right), "serialized": False}
    with_plan(workspace, workspace / ENGINES / "tensorrt-rtx", plugin=plugin)
    ended = cli("package", "--triton", tmp_path / "out", "-w", workspace, "--plugin-library", wrong)
    ended.assert_refused(plugin["sha256"])
    packaged(workspace, tmp_path / "out", "--plugin-library", str(right))
    assert [path.name for path in (tmp_path / "out" / "plugins").iterdir()] == [right.name]


@pytest.mark.parametrize(
    ("built", "options", "facts"),
    [
        ({"strip_plan": True}, [], "--strip-plan"),
        ({"quantize": "gathered"}, [], "--quantize native"),
        ({}, ["--io-dtype", "fp16"], "--io-dtype fp16"),
        ({}, ["--max-batch", "8"], "--max-batch 8"),
        ({"max_batch": 1}, [], "build-engine` --max-batch 2"),
        ({}, ["--max-size", "48"], "--max-size 48 16"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    workspace: Path, tmp_path: Path, built: dict[str, Any], options: list[str], facts: str
) -> None:
    with_plan(workspace, workspace / ENGINES / "tensorrt-rtx", **built)
    ended = cli("package", "--triton", tmp_path / "out", "-w", workspace, *options)
    ended.assert_refused(*facts.split())
    assert not (tmp_path / "out").exists()


def test_two_plugin_libraries_of_one_name_are_refused(workspace: Path, tmp_path: Path) -> None:
    with_plan(workspace, workspace / ENGINES / "tensorrt-rtx")
    options = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "libplugins.so").write_text(name)
        options += ["--plugin-library", tmp_path / name / "libplugins.so"]
    ended = cli("package", "--triton", tmp_path / "out", "-w", workspace, *options)
    ended.assert_refused("--plugin-library", "libplugins.so")


@pytest.mark.parametrize(
    ("sizes", "default", "profiles", "other"),
    [
        ([[8, 8], [16, 8]], (8, 8), ["0", "1"], (16, 16)),
        ([[16, 8], [8, 16]], (16, 8), ["0", "1"], (8, 8)),
        ([], (8, 8), [], (16, 8)),
    ],
)
def test_triton_is_told_of_every_profile_of_a_plan_and_the_pipeline_of_every_size(
    workspace: Path,
    tmp_path: Path,
    sizes: list[list[int]],
    default: tuple[int, int],
    profiles: list[str],
    other: tuple[int, int],
) -> None:
    with_plan(workspace, workspace / ENGINES / "tensorrt-rtx", sample_sizes=sizes)
    packaged(workspace, tmp_path / "out")
    unet = config(tmp_path / "out", "unet")
    assert [profile for group in unet.instance_group for profile in group.profile] == profiles
    assert all(tuple(warm.inputs["sample"].dims[1:]) == default for warm in unet.model_warmup)
    pipeline = LocalPipeline(tmp_path / "out")
    assert pipeline.draw(label=1, steps=1).shape[:2] == default
    for height, width in sizes:
        drawn = pipeline.draw(label=1, steps=1, height=height, width=width)
        assert drawn.shape[:2] == (height, width)
    with refused(
        "height",
        "width",
        f"{other[0]}x{other[1]}",
        error=pipeline.generation.InvalidRequestError,
    ):
        pipeline.draw(label=1, steps=1, height=other[0], width=other[1])


def rtx_for_tensorrt(asked: list[EngineOptions]) -> Backend:
    """TensorRT's builder where there is no GPU: that of TensorRT for RTX, for one GPU, which is
    quicker; ``asked`` gets the options.
    """
    builder, backend = get_backend("tensorrt-rtx"), copy.copy(get_backend("tensorrt-rtx"))

    def compile_(lowered: Path, folder: Path, options: EngineOptions, progress: Any) -> None:
        asked.append(options)
        plain = replace(
            options,
            version_compatible=False,
            builder_optimization_level=None,
            compute_capability=("89",),
        )
        builder.compile(lowered, folder, plain, progress)

    backend.check_build = lambda options: None  # type: ignore[method-assign]
    backend.check_engine = lambda record: record.options  # type: ignore[method-assign]
    backend.compile = compile_  # type: ignore[method-assign]
    return backend


@pytest.mark.slow
def test_where_there_is_a_plan_of_the_unet_the_other_models_plans_are_built_too_and_its_own_for_low_precision_ends(
    text_chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = tmp_path / "workspace"
    shutil.copytree(text_chain.root, workspace)
    with_plan(
        workspace, workspace / ENGINES / "onnxruntime", builder_optimization_level=1, dtype="fp16"
    )
    lowered = lower_for_tensorrt(load_graph(workspace / "unet.onnx"))
    save_graph(lowered, workspace / ENGINES / "tensorrt" / "lowered.onnx")
    asked: list[EngineOptions] = []
    monkeypatch.setitem(BACKENDS, "tensorrt", rtx_for_tensorrt(asked))
    found = packaged(workspace, tmp_path / "out", "--io-dtype", "fp16")
    assert found["models"] == ["text_encoder", "unet", "vae_decoder"]
    sizes = {
        name: (tmp_path / "out" / MODELS / name / "1" / "model.plan").stat().st_size
        for name in found["models"]
    }
    assert min(sizes.values()) > 1000, sizes
    assert [(each.dtype, each.max_batch, len(each.sample_size)) for each in asked] == [
        ("fp16", 6, 2),
        ("fp32", 6, 0),
        ("fp32", 4, 2),
    ]
    assert all(each.builder_optimization_level == 1 and each.version_compatible for each in asked)
    assert [
        len(config(tmp_path / "out", name).instance_group)
        for name in ("unet", "text_encoder", "vae_decoder")
    ] == [1, 0, 1]
    assert not list((tmp_path / "out").rglob(".tmp-*"))


def test_a_plan_that_does_not_run_here_gets_no_plans_from_here_beside_it(
    text_chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = tmp_path / "workspace"
    shutil.copytree(text_chain.root, workspace)
    with_plan(workspace, workspace / ENGINES / "onnxruntime")

    def elsewhere(record: EngineRecord) -> EngineOptions:
        raise InputError(f"built by {record.built_by['tensorrt']} for another GPU")

    backend = rtx_for_tensorrt([])
    backend.check_engine = elsewhere  # type: ignore[method-assign]
    monkeypatch.setitem(BACKENDS, "tensorrt", backend)
    ended = cli("package", "--triton", tmp_path / "out", "-w", workspace)
    ended.assert_refused("need plans too", "10.9.0", "another GPU")
    assert not (tmp_path / "out").exists()


def test_an_rtx_engine_is_not_packaged_as_a_plan_and_the_command_says_so(
    label_chain: Chain, tmp_path: Path
) -> None:
    ended = cli("package", "--triton", tmp_path / "out", "-w", label_chain.root)
    assert ended.code == 0
    assert_holds(ended.err, "tensorrt-rtx", "plan")
    assert list((tmp_path / "out").rglob("*.plan")) == []


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ([], "--triton"),
        (["--triton", "{}", "--io-dtype", "int8"], "'int8'"),
        (["--triton", "{}", "--max-batch", "1"], "--max-batch 2"),
        (["--triton", "{}", "--max-size", "4"], "--max-size 4 8x8"),
        (
            ["--triton", "{}", "--max-images", "20"],
            "--max-images 20 --max-in-flight",
        ),
        (["--triton", "{}", "--plugin-library", "none.so"], "--plugin-library none.so"),
    ],
)
def test_options_that_cannot_work_are_refused(
    label_chain: Chain, tmp_path: Path, options: list[str], facts: str
) -> None:
    ended = cli(
        "package", "-w", label_chain.root, *(option.format(tmp_path / "out") for option in options)
    )
    ended.assert_refused(*facts.split())
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_left_alone_and_an_earlier_package_is_replaced(
    label_chain: Chain, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    ended = cli("package", "--triton", tmp_path, "-w", label_chain.root)
    ended.assert_refused(tmp_path, "--triton")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    packaged(label_chain.root, tmp_path / "out")
    (tmp_path / "out" / "left").write_text("left")
    packaged(label_chain.root, tmp_path / "out")
    assert not (tmp_path / "out" / "left").exists()


def test_a_graph_that_was_changed_is_not_packaged(workspace: Path, tmp_path: Path) -> None:
    flip_byte(workspace / "unet.onnx")
    ended = cli("package", "--triton", tmp_path / "out", "-w", workspace)
    ended.assert_refused(workspace / "unet.onnx", "quest-deploy export")


@pytest.fixture
def tritonserver(tmp_path: Path) -> Path:
    """A program in the place of the server, which says that it was started."""
    program = tmp_path / "server" / "bin" / "tritonserver"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho started\n")
    program.chmod(0o755)
    return program


def serve(package: Path, program: Path) -> subprocess.CompletedProcess[str]:
    """The package's serve.py with ``program`` as the server, until it ends."""
    line = [sys.executable, package / "serve.py", "--tritonserver", program]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["models/unet/1/model.onnx.data", "models/pipeline/1/model.py"])
def test_a_package_that_was_changed_is_not_served(
    package: Path, tmp_path: Path, tritonserver: Path, name: str
) -> None:
    changed = tmp_path / "copy"
    shutil.copytree(package, changed)
    flip_byte(changed / name)
    assert serve(package, tritonserver).stdout == "started\n"
    ended = serve(changed, tritonserver)
    assert ended.returncode == 1
    assert_holds(ended.stderr, name)
    assert "started" not in ended.stdout


@pytest.mark.parametrize(
    "name",
    [
        "plugins/libother.so",
        "models/pipeline/1/torch.py",
        "models/other/1/model.py",
        "backends_cpu/tensorrt/numpy.py",
        "torch.py",
    ],
)
def test_a_package_to_which_a_file_was_added_is_not_served_nor_a_plugin_loaded(
    package: Path, tmp_path: Path, tritonserver: Path, name: str
) -> None:
    changed = tmp_path / "copy"
    shutil.copytree(package, changed)
    (changed / name).parent.mkdir(parents=True, exist_ok=True)
    (changed / name).write_text("")
    ended = serve(changed, tritonserver)
    assert ended.returncode == 1
    assert_holds(ended.stderr, name)
    assert "started" not in ended.stdout
    printed = subprocess.run(
        [sys.executable, changed / "serve.py", "--print"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "libother" not in printed
    (changed / name).unlink()
    (changed / "backends_cpu" / "more").symlink_to(tmp_path)
    assert serve(changed, tritonserver).returncode == 1


def test_what_a_killed_serve_py_left_is_cleared_away_but_nothing_that_is_in_use(
    package: Path, tritonserver: Path
) -> None:
    stale, used, unknown = (
        f"quest-deploy-triton-999999999-{os.getpid()}{kind}-"
        for kind in ("stale", "used", "unknown")
    )
    shared = Path("/dev/shm")
    files = [
        shared / f"{prefix}{part}" for prefix in (stale, used) for part in ("lock", "region")
    ] + [shared / f"{unknown}region"]
    folder = Path(tempfile.gettempdir()) / f"{stale}folder"
    folder.mkdir()
    try:
        for path in files:
            path.touch()
        with (shared / f"{used}lock").open() as held:
            fcntl.flock(held, fcntl.LOCK_EX)  # as a server in another container would
            assert serve(package, tritonserver).stdout == "started\n"
            assert [path for path in files if path.exists()] == files[2:]
            assert not folder.exists()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in files:
            path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("status", "said", "code"),
    [
        (200, "\x89PNG\r\n\x1a\n", 0),
        (200, "nothing", 1),
        (503, '{"error":"[request id: <id_unknown>] Exceeds maximum queue size"}', 0),
        (503, '{"error":"no such model"}', 1),
        (500, '{"error":"unet: the stub process is not healthy"}', 1),
    ],
)
def test_the_probe_tells_a_server_with_a_full_queue_from_one_that_fails_and_uses_no_proxy(
    package: Path, status: int, said: str, code: int
) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(said.encode("latin-1"))

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        line = [
            sys.executable,
            package / "health.py",
            f"http://127.0.0.1:{server.server_port}",
            "--timeout",
            "20",
        ]
        ended = subprocess.run(
            line, env={**os.environ, "http_proxy": "http://127.0.0.1:9"}, check=False
        )
        assert ended.returncode == code
        thread.join(20)


def test_configurations_may_be_edited_and_the_package_is_served(
    package: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "copy"
    shutil.copytree(package, changed)
    path = changed / MODELS / "pipeline" / "config.pbtxt"
    path.write_text(path.read_text().replace('"100"', '"50"'))
    line = [sys.executable, "serve.py", "--tritonserver", "/bin/true"]
    assert subprocess.run(line, cwd=changed, check=False).returncode == 0


def test_the_server_binds_to_this_machine_alone_unless_told_otherwise(package: Path) -> None:
    line = [sys.executable, package / "serve.py", "--print"]
    printed = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert printed.count("address=127.0.0.1") == 3
    printed = subprocess.run(
        [*line, "--host", "0.0.0.0"], capture_output=True, text=True, check=True
    ).stdout
    assert printed.count("address=0.0.0.0") == 3


def test_beyond_this_machine_images_are_drawn_over_http_for_who_has_the_key_alone(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def restricted(*options: str) -> list[str]:
        line = [sys.executable, package / "serve.py", "--print", *options]
        printed = subprocess.run(line, capture_output=True, text=True, check=True).stdout
        return re.findall(r"--http-restricted-api=inference:quest-deploy-key=(\S+)", printed)

    monkeypatch.delenv("QUEST_DEPLOY_HTTP_KEY", raising=False)
    for _ in ("unset", "empty"):
        assert restricted() == []
        (first,), (second,) = restricted("--host", "0.0.0.0"), restricted("--host", "0.0.0.0")
        assert first != second  # which nobody knows
        monkeypatch.setenv("QUEST_DEPLOY_HTTP_KEY", "")
    monkeypatch.setenv("QUEST_DEPLOY_HTTP_KEY", "abc")
    assert restricted() == restricted("--host", "0.0.0.0") == ["abc"]


def test_a_package_does_not_tell_the_key_of_who_made_it(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUEST_DEPLOY_HTTP_KEY", "the makers key")
    packaged(workspace, tmp_path / "out")
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or b"makers key" not in path.read_bytes(), path


def test_text_format_quotes_strings_escapes_them_and_writes_words_and_truth_values_bare() -> None:
    message = {
        "name": 'a "b"',
        "kind": Word("KIND_CPU"),
        "on": True,
        "dims": [1, -1],
        "part": [{"x": 1}, {}],
        "empty": {"shape": []},
    }
    assert pbtxt(message) == (
        'name: "a \\"b\\""\nkind: KIND_CPU\non: true\ndims: [1, -1]\npart {\n  x: 1\n}\npart '
        "{\n}\nempty {\n  shape: []\n}\n"
    )


def test_without_a_server_the_client_says_so(tmp_path: Path) -> None:
    ended = cli("client", "127.0.0.1:9", "--label", "1", "-o", tmp_path / "none.png")
    ended.assert_refused("127.0.0.1:9", code=1)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "localhost"])
def test_the_client_wants_a_host_and_a_port(tmp_path: Path, url: str) -> None:
    ended = cli("client", url, "--label", "1", "-o", tmp_path / "none.png")
    ended.assert_refused("HOST:PORT", repr(url))


def test_the_client_sends_what_is_in_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, Any]] = []

    def answer(url: str, request: dict[str, Any], *_: object) -> client.Drawn:
        sent.append(request)
        return client.Drawn(b"a picture", 7)

    monkeypatch.setattr(client, "request_image", answer)
    (tmp_path / "image.png").write_bytes(b"an image\0")
    options = ["--init-image", tmp_path / "image.png", "-o", tmp_path / "out.png"]
    ended = cli("client", "127.0.0.1:9", "--prompt", "a cat", "--image-guidance", "2", *options)
    assert ended.code == 0, ended.err
    assert sent == [{"prompt": "a cat", "image_guidance": 2.0, "init_image": b"an image\0"}]
    assert (tmp_path / "out.png").read_bytes() == b"a picture"
    options[1] = tmp_path / "none.png"
    cli("client", "127.0.0.1:9", *options).assert_refused(tmp_path / "none.png")


def test_the_client_refuses_text_that_is_no_text() -> None:
    with refused("--prompt", "UTF-8"):
        client._inputs({"prompt": "a \udcff cat"}, {"prompt": "BYTES"})
