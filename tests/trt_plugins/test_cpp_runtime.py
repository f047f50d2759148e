"""The C++ runtime: what it reads of workspaces and schedules with no GPU, and that all of it
compiles, links and starts.

Its host parts are built with g++ and nlohmann's headers; the rest where TENSORRT_INCLUDE_DIR names
TensorRT's headers and nvcc and cmake are there.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from quest_deploy.artifacts.workspace import GRAPH, MANIFEST
from quest_deploy.backends.base import ENGINE_FILE
from quest_deploy.backends.cuda import gpu_count
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import get_backend
from quest_deploy.backends.tensorrt import base as shared
from quest_deploy.errors import InputError
from quest_deploy.files import read_json, sha256_of, sha256_of_json, write_json
from quest_deploy.models.channels import Guidance
from quest_deploy.models.schedulers import (
    FLOW,
    FLOW_SCHEDULERS,
    SCHEDULERS,
    first_scale,
    make_scheduler,
    scaled_input,
)
from quest_deploy.serving.schedule import Schedule, ScheduleStep, schedule_from_scheduler
from tests.helpers import assert_holds, refused, reseal
from tests.trt_plugins.conftest import INCLUDES, JSON_HEADERS, PLUGINS, RTX, RUNTIME

if TYPE_CHECKING:
    from collections.abc import Callable

    Host = Callable[..., subprocess.CompletedProcess[str]]

NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "skip_prk_steps": True,
}
"""Stable Diffusion's."""
FLOW_SCHEDULE = {"num_train_timesteps": 1000, "prediction_type": FLOW, "shift": 3.0}
"""Stable Diffusion 3's."""
OF_FLOW = "flow: "


def _compiled(program: Path, compiler: str, flags: str, *parts: str) -> Host:
    """A program of ``tests/`` with ``parts`` of ``src/``, ready to run."""
    sources = [RUNTIME / "tests" / program.with_suffix(".cpp").name]
    sources += [RUNTIME / "src" / f"{part}.cpp" for part in parts]
    line = [compiler, "-std=c++17", *flags.split(), *INCLUDES, *sources, "-o", program]
    subprocess.run(line, check=True)
    return lambda *words: subprocess.run(
        [program, *map(str, words)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The host's parts as a program."""
    program = tmp_path_factory.mktemp("host") / "host_program"
    flags = "-O1 -Wall -Wextra -Wconversion -Wshadow -Wpedantic -Werror"
    return _compiled(program, "g++", flags, "json", "sha256", "files", "workspace", "schedule")


@pytest.fixture
def workspace(built: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(built, tmp_path / "workspace"))


@pytest.mark.parametrize("size", [0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 1_000_003])
def test_hashes_are_sha_256(host: Host, tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(content)
    assert host("sha256", tmp_path / "file").stdout.strip() == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "value",
    [
        {
            "b": [1, -2.5, 1e-7, 1e300, 0.1, 123456789012345678],
            "a": {"z": None, "": True, "y": False},
            "ä": [],
            "Z": {},
            "🙂": "x",
        },
        ['"\\/\b\f\n\r\t\x00\x1f\x7f\x80 é € 🙂 \u2028'],
        [[[[[]]]], {"a": {"a": {"a": [{}]}}}],
        "text",
        -0.0,
        None,
    ],
)
def test_json_is_hashed_in_the_form_that_python_hashes(
    host: Host, tmp_path: Path, value: Any
) -> None:
    write_json(tmp_path / "value.json", value)
    canonical = host("canonical", tmp_path / "value.json").stdout[:-1]
    assert hashlib.sha256(canonical.encode()).hexdigest() == sha256_of_json(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1,]",
        '{"a":1,}',
        '{"a":1 "b":2}',
        "{a:1}",
        "[01]",
        "[1.]",
        "[.5]",
        "[+1]",
        "[1e]",
        "[NaN]",
        "[Infinity]",
        "[tru]",
        "[1] 2",
        '["\\x"]',
        '["\\u12"]',
        '["\\ud800"]',
        '["\\udc00"]',
        '["\\ud800\\u0041"]',
        '["a\nb"]',
        '["a',
        b'["\xff"]',
        b'["\xc0\x80"]',
        b'["\xed\xa0\x80"]',
        b'["\xf5\x80\x80\x80"]',
        b'["\xe2\x82"]',
    ],
)
def test_what_is_no_json_in_utf_8_is_refused_with_its_place(
    host: Host, tmp_path: Path, text: str | bytes
) -> None:
    (tmp_path / "value.json").write_bytes(text.encode() if isinstance(text, str) else text)
    ended = host("canonical", tmp_path / "value.json")
    assert ended.returncode == 1
    assert re.search(r"value\.json.* byte \d+", ended.stderr, re.DOTALL), ended.stderr


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"b":{"a":1,"a":2}}', ": b: a"),
        ("[" * 100 + "]" * 100, r"(\[0\]){64}"),
        (f"[{'0,' * 2_000_000}0]", r"\[\d+\]"),
    ],
    ids=["a name twice", "deep", "large"],
)
def test_json_that_no_file_of_ours_holds_is_refused_with_its_place(
    host: Host, tmp_path: Path, text: str, place: str
) -> None:
    (tmp_path / "value.json").write_text(text)
    ended = host("canonical", tmp_path / "value.json")
    assert ended.returncode == 1
    assert re.search(rf"value\.json{place}: ", ended.stderr), ended.stderr


def test_a_workspace_that_quest_deploy_wrote_is_opened_and_its_engine_is_read(
    host: Host, built: Path
) -> None:
    record = read_json(built / "engines" / RTX / ENGINE_FILE)
    size = (built / "engines" / RTX / shared.ENGINE).stat().st_size
    ended = host("engine", built, RTX)
    assert ended.stderr == ""
    assert ended.stdout.split() == ["emoji", RTX, record["runtime"]["version"], "89", str(size)]


def _edit(path: Path, change: Callable[[Any], object]) -> None:
    content = read_json(path)
    change(content)
    write_json(path, content)


def _sign(workspace: Path, change: Callable[[Any], object]) -> None:
    """Change a manifest as if quest-deploy had written it so."""
    reseal(workspace / MANIFEST, change)


def _resign(workspace: Path, change: Callable[[Any], object]) -> None:
    """Change an engine's record as if quest-deploy had written it so."""
    record = workspace / "engines" / RTX / ENGINE_FILE
    reseal(record, change)
    _sign(
        workspace,
        lambda c: c["stages"][f"build-engine/{RTX}"]["files"][
            f"engines/{RTX}/{ENGINE_FILE}"
        ].update(sha256=sha256_of(record)),
    )


def _flip_plan(workspace: Path) -> None:
    path = workspace / "engines" / RTX / shared.ENGINE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda w: (w / MANIFEST).unlink(), "manifest.json"),
    "an edited manifest": (
        lambda w: _edit(w / MANIFEST, lambda c: c.update(model="sd15")),
        "manifest.json edited",
    ),
    "a later version": (
        lambda w: _sign(w, lambda c: c.update(version=2)),
        "manifest.json version 1",
    ),
    "another format": (
        lambda w: _sign(w, lambda c: c.update(format="archive")),
        "manifest.json workspace",
    ),
    "no engine": (
        lambda w: _sign(w, lambda c: c["stages"].pop(f"build-engine/{RTX}")),
        f"{RTX} build-engine",
    ),
    "a changed plan": (_flip_plan, "model.engine changed"),
    "no plan": (
        lambda w: (w / "engines" / RTX / shared.ENGINE).unlink(),
        "model.engine read",
    ),
    "a changed record": (
        lambda w: _edit(
            w / "engines" / RTX / ENGINE_FILE, lambda c: c["options"].update(max_batch=64)
        ),
        "engine.json changed",
    ),
    "an older record": (
        lambda w: _resign(w, lambda c: c.pop("runtime")),
        "engine.json runtime build-engine",
    ),
    "a newer graph": (
        lambda w: _sign(
            w, lambda c: c["stages"]["export"]["files"][GRAPH].update(sha256="ab" * 32)
        ),
        "graph unet.onnx",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_workspace_that_is_damaged_is_refused_with_what_to_do(
    host: Host, workspace: Path, damage: str
) -> None:
    change, facts = DAMAGE[damage]
    change(workspace)
    ended = host("engine", workspace, RTX)
    assert ended.returncode == 1
    assert_holds(ended.stderr, *facts.split())


def test_an_engine_without_weights_or_of_another_runtime_is_refused(
    host: Host, workspace: Path
) -> None:
    folder = workspace / "engines" / RTX
    reseal(folder / ENGINE_FILE, lambda c: c["options"].update(strip_plan=True))
    assert_holds(host("runs", folder, RTX, "1.7.1", "89").stderr, "weights")
    reseal(folder / ENGINE_FILE, lambda c: c.update(backend="openvino"))
    assert_holds(
        host("runs", folder, RTX, "1.7.1", "89").stderr, "tensorrt", "tensorrt-rtx", "openvino"
    )


@pytest.mark.parametrize(
    ("options", "version", "capability"),
    [
        ({}, "10.16.1", "89"),
        ({}, "10.16.2", "89"),
        ({}, "10.9.0", "89"),
        ({"version_compatible": True}, "10.16.2", "89"),
        ({"version_compatible": True}, "11.0.0", "89"),
        ({"version_compatible": True}, "10.9.0", "89"),
        ({}, "10.16.1", "90"),
        ({"hardware_compatibility_level": "ampere_plus"}, "10.16.1", "120"),
        ({"hardware_compatibility_level": "ampere_plus"}, "10.16.1", "75"),
        ({"hardware_compatibility_level": "same_compute_capability"}, "10.16.1", "90"),
    ],
)
def test_what_runs_an_engine_here_is_what_python_says(
    host: Host,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    version: str,
    capability: str,
) -> None:
    folder = workspace / "engines" / RTX

    def of_tensorrt(content: Any) -> None:
        content.update(backend="tensorrt", runtime={"name": "tensorrt", "version": "10.16.1"})
        content["options"].update(options)

    reseal(folder / ENGINE_FILE, of_tensorrt)
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_compute_capability", lambda: capability)
    chosen = EngineOptions(**options)
    expected = shared.runs_engines_of(
        version, "10.16.1", version_compatible=chosen.version_compatible
    )
    try:
        shared.check_compute_capability({"compute_capabilities": ["89"]}, chosen)
    except InputError:
        expected = False
    ended = host(
        "runs", folder, "tensorrt", f"{version}.11", capability
    )  # the library tells its build's number too
    assert (ended.returncode == 0) == expected, ended.stderr
    assert_holds(host("runs", folder, RTX, version, capability).stderr, "tensorrt", RTX)


@pytest.mark.parametrize(
    "version",
    [
        "",
        "10",
        "10.16",
        "10.16.",
        "10..1",
        "10.16.1.",
        "10.16.x",
        "10.16.-1",
        "10.16.+1",
        "10. 16.1",
        "10.16.1,2",
    ],
)
def test_what_is_no_version_is_refused_here_and_in_python(
    host: Host, workspace: Path, version: str
) -> None:
    with refused(repr(version)):
        shared.runs_engines_of("10.16.1", version, version_compatible=True)
    folder = workspace / "engines" / RTX
    reseal(folder / ENGINE_FILE, lambda c: c["runtime"].update(version=version))
    ended = host("runs", folder, RTX, "1.7.1", "89")
    assert_holds(ended.stderr, "TensorRT", f'"{version}"')


def test_an_engine_runs_with_the_very_plugin_library_that_it_was_built_with(
    host: Host, workspace: Path, tmp_path: Path
) -> None:
    folder, library = workspace / "engines" / RTX, tmp_path / "plugins.so"
    library.write_bytes(b"the plugin")
    assert host("plugin", folder, tmp_path / "none.so").returncode == 0  # it needs none
    plugin = {"library": library.name, "sha256": sha256_of(library), "serialized": False}
    reseal(folder / ENGINE_FILE, lambda c: c.update(plugin=plugin))
    assert host("plugin", folder, library).returncode == 0
    assert_holds(host("plugin", folder, "").stderr, "plugins.so")
    library.write_bytes(b"another one")
    assert_holds(host("plugin", folder, library).stderr, library, plugin["sha256"])
    reseal(
        folder / ENGINE_FILE, lambda c: c["plugin"].update(serialized=True)
    )  # the engine holds it
    assert host("plugin", folder, "").returncode == 0


def _scheduler(name: str) -> Any:
    config = FLOW_SCHEDULE if name.startswith(OF_FLOW) else NOISE_SCHEDULE
    scheduler = make_scheduler(name.removeprefix(OF_FLOW), config)
    scheduler.set_timesteps(8)
    return scheduler


def _schedule(name: str) -> Schedule:
    return schedule_from_scheduler(lambda: _scheduler(name))


def _files(folder: Path, result: str = "result") -> list[Path]:
    """The programs' files: the schedule and the sample that they read, and the one they write."""
    return [folder / name for name in ("schedule.json", "sample", result)]


NOTHING_ELSE = (0.0, 0, 0, 0.0, 0.0, 0)
"""What the emulated loop adds: image guidance, image and variance channels, control, adapter, an
embedded guidance.
"""


def fake_model(sample: torch.Tensor, timestep: float) -> torch.Tensor:
    """The host program's model, of samples [rows, ...]."""
    condition = torch.zeros_like(sample)
    condition.view(-1)[sample.numel() // 2 :] = 0.25
    return sample / (1 + sample.abs()) + 0.0005 * timestep + condition


@pytest.mark.parametrize("guidance", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("name", [*SCHEDULERS, *(f"{OF_FLOW}{name}" for name in FLOW_SCHEDULERS)])
def test_the_loop_with_a_schedulers_table_draws_what_diffusers_draws(
    host: Host, tmp_path: Path, name: str, guidance: float
) -> None:
    schedule = _schedule(name)
    schedule.save(tmp_path / "schedule.json")
    scheduler, generator = _scheduler(name), torch.Generator().manual_seed(3)
    drawn = torch.randn(2, 5, 4, generator=generator)
    sample, noise = drawn * first_scale(scheduler), []
    for timestep in scheduler.timesteps:
        scaled = scaled_input(scheduler, sample, timestep)
        if guidance <= 1:
            prediction = fake_model(scaled, float(timestep))
        else:
            without, with_condition = fake_model(
                torch.cat([scaled, scaled]), float(timestep)
            ).chunk(2)
            prediction = without + guidance * (with_condition - without)
        before = torch.Generator()
        before.set_state(generator.get_state())
        extra = {"generator": generator} if name in ("ddpm", "lcm") else {}
        sample = scheduler.step(prediction, timestep, sample, **extra).prev_sample
        fresh = not torch.equal(before.get_state(), generator.get_state())
        noise.append(
            torch.randn(drawn.shape, generator=before) if fresh else torch.zeros_like(drawn)
        )
    drawn.numpy().tofile(tmp_path / "sample")
    given = []
    if any(step.noise_scale for step in schedule.steps):
        torch.stack(noise).numpy().tofile(tmp_path / "noise")
        given = [tmp_path / "noise"]
    ended = host("denoise", *_files(tmp_path), guidance, *given)
    assert ended.stderr == ""
    result = np.fromfile(tmp_path / "result", np.float32).reshape(drawn.shape)
    np.testing.assert_allclose(
        result, sample.numpy(), rtol=0, atol=2e-5 * float(sample.abs().max())
    )


EMULATED = ("denoiser", "schedule", "json", "files", "workspace", "sha256")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The GPU's loop on the CPU, CUDA's functions and the engine emulated."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs CUDA's headers, which come with nvcc")
    program = tmp_path_factory.mktemp("emulated") / "emulated"
    return _compiled(program, "nvcc", "--cudart none -x c++", *EMULATED)


@pytest.mark.parametrize("graph", [0, 1])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", ["euler", "unipc", "ddpm"])
def test_the_gpus_loop_gives_what_the_hosts_does_bit_for_bit_recorded_or_not(
    host: Host, emulated: Host, tmp_path: Path, name: str, guidance: float, graph: int
) -> None:
    schedule = _schedule(name)
    schedule.save(tmp_path / "schedule.json")
    rng = np.random.default_rng(0)
    rng.standard_normal((2, 5, 4)).astype(np.float32).tofile(tmp_path / "sample")
    noise = [tmp_path / "noise"] * any(step.noise_scale for step in schedule.steps)
    rng.standard_normal((len(schedule.steps), 2, 5, 4)).astype(np.float32).tofile(
        tmp_path / "noise"
    )
    expected = host("denoise", *_files(tmp_path, "expected"), guidance, *noise)
    ended = emulated(*_files(tmp_path), guidance, graph, *NOTHING_ELSE, *noise)
    assert expected.returncode == 0
    assert_holds(
        ended.stderr, "condition", "mid_block_additional_residual", "condition_shapes", "middle"
    )
    counts = [int(x) for x in re.findall(r"\d+", ended.stdout)]
    assert counts == [len(schedule.steps), graph, 6 * graph * len(schedule.steps)]
    assert (tmp_path / "result").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize("graph", [0, 1])
@pytest.mark.parametrize(
    ("guidance", "image_guidance", "image", "variance", "control", "scale"),
    [
        (1.0, 0.0, 3, 0, 0.0, 0.0),
        (4.0, 0.0, 3, 0, 0.0, 0.0),
        (4.0, 2.0, 5, 0, 0.0, 0.0),
        (1.0, 2.0, 5, 0, 0.0, 0.0),
        (1.0, 0.0, 0, 5, 0.0, 0.0),
        (4.0, 0.0, 0, 5, 0.0, 0.0),
        (1.0, 0.0, 0, 0, 0.3, 0.0),
        (4.0, 0.0, 3, 0, 0.3, 0.0),
        (1.0, 0.0, 0, 0, 0.0, 0.7),
        (4.0, 0.0, 3, 0, 0.0, 0.7),
    ],
)
def test_the_gpus_loop_joins_an_image_leaves_a_variance_out_and_adds_what_it_is_given_at_each_step(
    emulated: Host,
    tmp_path: Path,
    guidance: float,
    image_guidance: float,
    image: int,
    variance: int,
    control: float,
    scale: float,
    graph: int,
) -> None:
    _schedule("euler").save(tmp_path / "schedule.json")
    scheduler = _scheduler("euler")
    drawn = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(3))
    drawn.numpy().tofile(tmp_path / "sample")
    given = (guidance, graph, image_guidance, image, variance, control, scale, 0)
    ended = emulated(*_files(tmp_path), *given)
    assert ended.returncode == 0, ended.stderr

    guide = Guidance(guidance, image_guidance or None)
    parts = 1 if not guide.guided else 3 if image_guidance else 2
    rows = torch.arange(2 * parts)
    beside = torch.where(rows < parts, 0.0, 0.25) + (0.1 * rows if image else 0.0)
    beside = beside + 0.1 * scale * rows
    sample = drawn * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, timestep).repeat(parts, 1, 1)
        added = beside + control * (scaled[:, 0, 0] + 0.001 * timestep)
        answer = scaled / (1 + scaled.abs()) + 0.0005 * timestep + added[:, None, None]
        prediction = guide.combine(list(answer.chunk(parts)), 5)
        sample = scheduler.step(prediction, timestep, sample).prev_sample
    result = np.fromfile(tmp_path / "result", np.float32).reshape(drawn.shape)
    np.testing.assert_allclose(
        result, sample.numpy(), rtol=0, atol=2e-5 * float(sample.abs().max())
    )


@pytest.mark.parametrize("graph", [0, 1])
def test_the_gpus_loop_gives_an_engine_that_embeds_guidance_its_weight_and_predicts_once(
    emulated: Host, tmp_path: Path, graph: int
) -> None:
    name, weight = f"{OF_FLOW}euler", 3.5
    _schedule(name).save(tmp_path / "schedule.json")
    scheduler = _scheduler(name)
    drawn = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(3))
    drawn.numpy().tofile(tmp_path / "sample")
    ended = emulated(*_files(tmp_path), weight, graph, 0.0, 0, 0, 0.0, 0.0, 1)
    assert ended.returncode == 0, ended.stderr

    rows, vector = torch.arange(2), 0.02 * (torch.arange(20) % 3).reshape(5, 4)
    beside = torch.tensor([0.0, 0.25]) + 0.01 * rows + 0.1 * weight
    sample = drawn
    for timestep in scheduler.timesteps:
        answer = sample / (1 + sample.abs()) + 0.0005 * timestep + beside[:, None, None] + vector
        sample = scheduler.step(answer, timestep, sample).prev_sample
    result = np.fromfile(tmp_path / "result", np.float32).reshape(drawn.shape)
    np.testing.assert_allclose(
        result, sample.numpy(), rtol=0, atol=2e-5 * float(sample.abs().max())
    )


@pytest.mark.slow
def test_threads_with_a_denoiser_each_of_one_engine_share_nothing_that_they_write(
    tmp_path: Path,
) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs CUDA's headers, which come with nvcc")
    flags = "--cudart none -x c++ -O1 -Xcompiler=-fsanitize=thread,-g1"
    raced = _compiled(tmp_path / "emulated", "nvcc", flags, *EMULATED)
    _schedule("ddpm").save(tmp_path / "schedule.json")
    rng = np.random.default_rng(0)
    rng.standard_normal((2, 5, 4)).astype(np.float32).tofile(tmp_path / "sample")
    rng.standard_normal((8, 2, 5, 4)).astype(np.float32).tofile(tmp_path / "noise")
    for graph in (0, 1):
        ended = raced(*_files(tmp_path), 4.0, graph, *NOTHING_ELSE, tmp_path / "noise")
        assert ended.returncode == 0, ended.stderr[-4000:]


STEP = ScheduleStep(10.0, 1.0, (1.0,), (-0.1,), 0.0)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"version": 1}, "schedule version 2"),
        ({"steps": []}, "schedule steps"),
        ({"steps": [{"timestep": 1.0}]}, "input_scale"),
        (
            {"steps": [{**vars(STEP), "sample_scales": [1.0, 0.5]}]},
            "step 0 1 2",
        ),
        ({"steps": [{**vars(STEP), "prediction_scales": []}]}, "step 1 0"),
        ({"steps": [{**vars(STEP), "prediction_scales": [1e60]}]}, "finite"),
        ({"steps": [{**vars(STEP), "timestep": "10"}]}, "number string"),
    ],
)
def test_a_damaged_schedule_is_refused(
    host: Host, tmp_path: Path, change: dict[str, Any], facts: str
) -> None:
    Schedule("Euler", 1.0, (STEP,)).save(tmp_path / "schedule.json")
    reseal(tmp_path / "schedule.json", lambda c: c.update(change))
    np.zeros(4, np.float32).tofile(tmp_path / "sample")
    ended = host("denoise", *_files(tmp_path), 1)
    assert ended.returncode == 1
    assert_holds(ended.stderr, *facts.split())
    assert not (tmp_path / "result").exists()


def test_noise_must_be_given_where_the_schedule_adds_some_and_nowhere_else(
    host: Host, tmp_path: Path
) -> None:
    np.zeros(4, np.float32).tofile(tmp_path / "sample")
    for scale, values in ((0.5, 0), (0.5, 3), (0.0, 4)):
        step = ScheduleStep(10.0, 1.0, (1.0,), (-0.1,), scale)
        Schedule("Ancestral", 1.0, (step,)).save(tmp_path / "schedule.json")
        np.zeros(values, np.float32).tofile(tmp_path / "noise")
        ended = host("denoise", *_files(tmp_path), 1, tmp_path / "noise")
        assert_holds(ended.stderr, "noise", 4 if scale else 0, values)


CONSUMER = """cmake_minimum_required(VERSION 3.24)
project(consumer LANGUAGES CXX)
find_package(quest_deploy 0.1 REQUIRED)
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE quest_deploy::host)
"""
CONSUMER_MAIN = """#include <quest_deploy/workspace.h>
#include <cstdio>
int main(int, char** words) { std::puts(quest_deploy::Workspace::open(words[1]).model().c_str()); }
"""


def _cmake(*arguments: str | Path) -> None:
    ended = subprocess.run(
        ["cmake", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]


def _install(folder: Path, *options: str) -> Path:
    """Build and install the package; where it is."""
    _cmake(
        "-S",
        RUNTIME,
        "-B",
        folder / "build",
        f"-DCMAKE_INSTALL_PREFIX={folder / 'prefix'}",
        f"-DNLOHMANN_JSON_INCLUDE_DIR={JSON_HEADERS}",
        *options,
    )
    _cmake("--build", folder / "build")
    _cmake("--install", folder / "build")
    return folder / "prefix"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_another_project_finds_the_installed_package_and_opens_a_workspace(
    built: Path, tmp_path: Path
) -> None:
    prefix = _install(
        tmp_path / "package",
        "-DCMAKE_CUDA_COMPILER=NOTFOUND",
        "-DTENSORRT_INCLUDE_DIR=TENSORRT_INCLUDE_DIR-NOTFOUND",
    )
    (tmp_path / "CMakeLists.txt").write_text(CONSUMER)
    (tmp_path / "main.cpp").write_text(CONSUMER_MAIN)
    _cmake("-S", tmp_path, "-B", tmp_path / "consumer", f"-DCMAKE_PREFIX_PATH={prefix}")
    _cmake("--build", tmp_path / "consumer")
    ended = subprocess.run(
        [tmp_path / "consumer" / "consumer", built], capture_output=True, text=True, check=True
    )
    assert ended.stdout == "emoji\n"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_without_nlohmanns_headers_the_runtime_says_what_to_install_and_the_rest_is_built(
    tmp_path: Path,
) -> None:
    without = ("-DNLOHMANN_JSON_INCLUDE_DIR=", "-DCMAKE_CUDA_COMPILER=NOTFOUND")
    alone, all_of_it = (
        subprocess.run(
            ["cmake", "-S", source, "-B", tmp_path / source.name, *without],
            capture_output=True,
            text=True,
            check=False,
        )
        for source in (RUNTIME, PLUGINS)
    )
    assert alone.returncode != 0
    assert "nlohmann-json" in alone.stderr
    assert all_of_it.returncode == 0, all_of_it.stderr
    _cmake("--build", tmp_path / PLUGINS.name, "--target", "quest_reference")


EMBEDDING = (Path(__file__).parents[2] / "docs" / "embedding.md").read_text()


def _blocks(language: str) -> list[str]:
    """The blocks of docs/embedding.md in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", EMBEDDING, re.MULTILINE | re.DOTALL)


def test_the_documents_python_makes_the_apps_input_and_reads_its_result(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "workspace").symlink_to(built)
    monkeypatch.chdir(tmp_path)
    first, second = _blocks("python")
    names: dict[str, Any] = {}
    exec(first, names)
    assert {path.name for path in tmp_path.glob("*.f32")} == {
        "noise.f32",
        *(f"{name}.f32" for name in names["model"].conditions(names["labels"])),
    }
    shutil.copy("noise.f32", "result.f32")
    exec(second, names)
    assert Path("result.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="needs CUDA's headers, which come with nvcc"
)
def test_the_documents_c_plus_plus_compiles(tmp_path: Path) -> None:
    (code,) = _blocks("cpp")
    (tmp_path / "draw.cpp").write_text(code)
    line = ["nvcc", "-std=c++17", INCLUDES[0], "-c", tmp_path / "draw.cpp"]
    subprocess.run([*line, "-o", tmp_path / "draw.o"], check=True)


def _rtx_library() -> Path:
    import tensorrt_rtx_libs

    return next(Path(tensorrt_rtx_libs.__file__).parent.glob("libtensorrt_rtx.so*"))


@pytest.fixture(scope="module")
def denoise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """apps/denoise, built against the installed package and linked with TensorRT for RTX's
    library.
    """
    headers = os.environ.get("TENSORRT_INCLUDE_DIR")
    if headers is None or shutil.which("nvcc") is None or shutil.which("cmake") is None:
        pytest.skip("needs TensorRT's headers (TENSORRT_INCLUDE_DIR), nvcc and cmake")
    folder = tmp_path_factory.mktemp("runtime")
    where = [f"-DTENSORRT_INCLUDE_DIR={headers}", f"-DTENSORRT_LIBRARY={_rtx_library()}"]
    prefix = _install(
        folder, *where, "-DQUEST_DEPLOY_TENSORRT_RTX=ON", "-DCMAKE_CUDA_ARCHITECTURES=89"
    )
    source = PLUGINS / "apps" / "denoise"
    _cmake("-S", source, "-B", folder / "denoise", f"-DCMAKE_PREFIX_PATH={prefix}", *where)
    _cmake("--build", folder / "denoise")
    return folder / "denoise" / "denoise"


@pytest.mark.slow
def test_tensorrts_one_logger_outlives_the_runtime_that_brought_it_and_errors_are_told_by_their_own_call(
    tmp_path: Path,
) -> None:
    headers = os.environ.get("TENSORRT_INCLUDE_DIR")
    if headers is None or shutil.which("nvcc") is None:
        pytest.skip("needs TensorRT's headers (TENSORRT_INCLUDE_DIR) and nvcc")
    library = _rtx_library()
    flags = (
        f"-x c++ -DQUEST_DEPLOY_TENSORRT_RTX -Xcompiler=-Wno-subobject-linkage -I{headers} "
        f"-Xlinker={library} -Xlinker=-rpath={library.parent}"
    )
    ended = _compiled(tmp_path / "logger", "nvcc", flags, "json", "files", "workspace", "sha256")()
    assert ended.returncode == 0, ended.stderr
    first, second, reason, silent, elsewhere = ended.stdout.splitlines()
    assert (first, second) == ("the first sink was told while it lived", "the second was told more")
    assert reason.startswith("loading: ")
    assert "Unable to load library: /no/library.so" in reason
    assert silent == elsewhere == "a call: TensorRT gives no reason"


def _denoise(
    program: Path, workspace: Path, folder: Path, backend: str = RTX
) -> subprocess.CompletedProcess[str]:
    Schedule("Euler", 1.0, (STEP,)).save(folder / "schedule.json")
    np.zeros(4, np.float32).tofile(folder / "sample")
    words = [program, workspace, backend, *_files(folder)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_the_app_starts_tensorrt_for_rtx_and_says_that_there_is_no_gpu(
    denoise: Path, built: Path, tmp_path: Path
) -> None:
    if gpu_count():
        pytest.skip("this machine has a GPU")
    ended = _denoise(denoise, built, tmp_path)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert_holds(ended.stderr, "error", "GPU")
    assert not (tmp_path / "result").exists()


def test_the_app_compares_the_engines_version_with_that_of_the_library_it_runs_with(
    denoise: Path, workspace: Path, tmp_path: Path
) -> None:
    _resign(workspace, lambda c: c["runtime"].update(version="1.6.0.5"))
    here = get_backend(RTX).record(EngineOptions())["runtime"]["version"]
    ended = _denoise(denoise, workspace, tmp_path)
    assert_holds(ended.stderr, "tensorrt-rtx 1.6.0.5", here)


def test_the_apps_usage_errors_end_with_exit_code_2(denoise: Path) -> None:
    for words in (
        [],
        ["--batch"],
        ["--unknown"],
        ["a", "b", "c", "d", "e", "--batch", "many"],
        ["--condition", "x"],
        ["--batch", "2x"],
        ["--batch", "99999999999999999999"],
        ["--guidance", "nan"],
        ["--sample-shape", "4x"],
        ["--device", " 0"],
    ):
        ended = subprocess.run([denoise, *words], capture_output=True, text=True, check=False)
        assert (
            ended.returncode,
            ended.stderr.startswith("error: "),
            "usage: denoise" in ended.stderr,
        ) == (2, True, True)


def test_the_apps_bad_input_ends_with_exit_code_2_and_writes_nothing(
    denoise: Path, built: Path, tmp_path: Path
) -> None:
    ended = _denoise(denoise, tmp_path / "none", tmp_path)
    assert ended.returncode == 2
    assert_holds(ended.stderr, tmp_path / "none" / "manifest.json")
    ended = _denoise(denoise, built, tmp_path, "tensorrt")
    assert ended.returncode == 2
    assert_holds(ended.stderr, built, "tensorrt")
    assert {path.name for path in tmp_path.iterdir()} == {"schedule.json", "sample"}
