"""The acceptance of the GPU half, without the hardware: its steps with recorded answers, its
machinery with real programs, and the steps that need no GPU for real.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from quest_deploy.backends.options import ENGINE_OPTIONS, EngineOptions
from quest_deploy.cli.main import app
from quest_deploy.files import write_json
from scripts import gpu_acceptance
from scripts.acceptance import machine as machines
from scripts.acceptance.machine import (
    HEADERS,
    LIBRARIES,
    Machine,
    Places,
    TensorRtFiles,
    environment_of,
    find,
    find_tensorrt,
)
from scripts.acceptance.programs import Ran, answer_of, run_program, words_of
from scripts.acceptance.runner import FAILED, MEASURED, RESULTS, SKIPPED, TIMEOUT, accept, chosen
from scripts.acceptance.steps import STEPS, Command, Engine, Figure, Model, Step
from tests.helpers import assert_holds, refused
from tests.quest_deploy.support import Chain
from tests.scripts.bench.test_measure_plugin import RESULTS as MEASURED_KERNELS

ROOT = Path(__file__).parents[2]
NEEDS = {name for step in STEPS for name in step.needs}
EVERYTHING = Machine({name: f"{name} 1.0" for name in NEEDS}, {})
NOTHING = Machine({}, {name: f"there is no {name}" for name in NEEDS})
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
TIMING = {"median_s": 0.002, "p90_s": 0.003, "samples_per_s": 1000.0}
ANSWERS: dict[str, Any] = {
    "build-engine": {
        "backend": "tensorrt",
        "seconds": 61.5,
        "files": {"model.engine": 892_000_000},
    },
    "--refit-from": {
        "backend": "tensorrt",
        "quantize": "native",
        "refit": {"workspace": "base", "seconds": 61.5, "weights": 320},
        "seconds": 2.25,
        "files": {"model.engine": 892_000_000},
    },
    "lora": {"changed_layers": 160},
    "verify": {"passed": True, "buckets": [{"codes": 100, "mismatches": 2}] * 2, "problems": []},
    "benchmark": {
        "timings": [{"engine": name, "batch": 2, **TIMING} for name in ("quantized", "fp16")],
        "footprints": [
            {
                "engine": name,
                "file_bytes": 5_000_000,
                "peak_memory_bytes": 2**30,
                "gpu_bytes": 900 << 20,
            }
            for name in ("quantized", "fp16")
        ],
        "precision": {
            "int8_share": 0.75,
            "asked_int8_share": 0.9,
            "shares": {"int8": 0.75, "fp16": 0.25},
            "unavailable": "",
        },
    },
    "measure": MEASURED_KERNELS,
    "measure_finetune_cost": {
        "steps": [
            {"stage": s, "seconds": 1.5, "peak_gib": 20.25} for s in ("temporal", "sensitive")
        ],
        "peak_gib": 20.25,
        "limit_gb": 23,
    },
    "compare_denoise": {"equal_pixels": 0.999, "largest_difference": 1, "said": "20 steps in 9 ms"},
    "draw_served": {"seconds": 0.5, "together": 8, "together_seconds": 1.5, "equal": 8},
}
"""What each command answers on a GPU, as far as the steps read it."""


class Recorded:
    """Answers every command, in the place of a machine with a GPU; ``lines`` are those it was
    given.
    """

    def __init__(self, **changed: Any) -> None:
        self.lines: list[str] = []
        self.answers = {**ANSWERS, **changed}

    def __call__(self, words: Sequence[str], environment: Mapping[str, str], seconds: float) -> Ran:
        line = shlex.join(words)
        self.lines.append(line)
        names = [word.rpartition("/")[2].rpartition(".")[2] for word in words]
        # An option tells more than the command that it is of.
        found = [self.answers[name] for name in names if name in self.answers]
        answer = found[-1] if found else None
        if isinstance(answer, Ran):
            return answer
        if "scripts.bench." in line:
            write_json(Path(words[words.index("--json") + 1]), answer)
            return Ran(0, "progress that is no JSON", "", 2.0, 4000)
        return Ran(0, "all passed" if answer is None else json.dumps(answer), "", 2.0, 3000)


def invoke(*arguments: str | Path) -> Any:
    command = typer.Typer()
    command.command()(gpu_acceptance.main)
    return CliRunner().invoke(command, [str(word) for word in arguments])


def states(value: dict[str, Any]) -> dict[str, str]:
    return {name: step["state"] for name, step in value["steps"].items()}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_every_command_of_a_step_is_one_that_its_program_takes(step: Step) -> None:
    names = Places(Path("out")).names
    targets = set(
        re.findall(
            r"(?:add_executable|quest_test_program)\((\w+)",
            "".join(path.read_text() for path in (ROOT / "trt_plugins").rglob("CMakeLists.txt")),
        )
    )
    for command in step.commands:
        program = shlex.split(command.line)[0]
        words = words_of(command.line, names)
        if program == "quest-deploy":
            name, *options = words[3:]
            group = typer.main.get_command(app)
            parsed = group.commands[name].make_context(name, options)  # type: ignore[attr-defined]
            if name == "build-engine":
                assert_taken(parsed.params)
        elif program == "python":
            script = typer.Typer()
            script.command()(importlib.import_module(words[2]).main)
            typer.main.get_command(script).make_context(words[2], words[3:])
        elif "--target" in words:
            wanted = words[words.index("--target") + 1 :]
            assert {name.removesuffix("_emulated") for name in wanted} <= targets
        else:
            assert program in ("cmake", "cp", "ctest", "compute-sanitizer") or "{out}" in program


def assert_taken(given: dict[str, Any]) -> None:
    """The backend takes all options that were given."""
    options = {}
    for name, each in ENGINE_OPTIONS.items():
        if given[name]:
            parse = each.option.parse or (lambda value: value)
            options[name] = parse(given[name])
    EngineOptions(**options).check_taken(given["backend"])


def test_engines_have_room_for_what_they_are_timed_and_verified_with() -> None:
    for step in STEPS:
        built = next((c.line for c in step.commands if " build-engine " in c.line), "")
        if "--refit-from" in built or "--backend onnxruntime" in built or not built:
            continue
        sizes, most = (
            re.findall(r"--sample-size (\d+)", built),
            re.findall(r"--max-batch (\d+)", built),
        )
        name = step.name.removesuffix("-build")
        (timed,) = (each for each in STEPS if each.name == f"{name}-benchmark")
        batches = re.findall(r"--batch (\d+)", timed.commands[0].line)
        assert max(map(int, batches)) <= int(*(most or ("16",)))
        (reference,) = (
            each for each in STEPS if each.name == f"{name.partition('-')[0]}-reference"
        )
        for size in re.findall(r"--sample-size (\d+)", reference.commands[0].line):
            assert size in sizes
            assert sizes[0] != size  # the first is what it is tuned for and timed with


def test_a_step_comes_after_steps_of_the_list_that_are_before_it() -> None:
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names)
    for i, step in enumerate(STEPS):
        assert set(step.after) <= set(names[:i]), step.name


def test_on_a_machine_that_has_everything_each_step_is_measured_and_has_its_rows(
    tmp_path: Path,
) -> None:
    value = accept(STEPS, EVERYTHING, Places(tmp_path), Recorded(), ENVIRONMENT)
    assert set(states(value).values()) == {MEASURED}
    assert value == json.loads((tmp_path / RESULTS).read_text())
    table = (tmp_path / "table.md").read_text()
    for step in STEPS:
        assert f"| {step.name} | measured" in table
        if not step.name.endswith(("-calibrate", "-export", "-reference")):
            assert value["steps"][step.name]["figures"], step.name
    assert_holds(table, "- gpu: gpu 1.0", "892.0 MB in 61.5 s", "PASSED; 200 codes, 4 differ")
    assert_holds(
        table, "| fp16, batch 2 | 2.000 ms (p90 3.000), files 5.0 MB, GPU 900 MiB, host 1024"
    )
    assert_holds(table, "75.0%, int8 75.0%, fp16 25.0% | 90.0% |", "in use 4000 MiB")
    assert_holds(
        table,
        "20.2 GiB, where torch may hold 23 GB | a GPU of 24 GB |",
        "99.90% of pixels equal",
        "8 of them equal it",
    )
    refit = "engine, native, by refit | 892.0 MB in 2.2 s, 320 weights changed | less than the "
    assert_holds(table, f"{refit}build's 61.5 s |", "layers that the LoRA changes | 160")


def test_on_a_machine_that_has_nothing_every_step_that_needs_something_is_skipped_by_name(
    tmp_path: Path,
) -> None:
    run = Recorded()
    value = accept(STEPS, NOTHING, Places(tmp_path), run, ENVIRONMENT)
    able = {step.name for step in STEPS if not step.needs}
    assert {name for name, state in states(value).items() if state == MEASURED} == able
    assert {name for name, state in states(value).items() if state == SKIPPED} == {
        step.name for step in STEPS if step.needs
    }
    for step in STEPS:
        for name in step.needs:
            assert f"no {name}" in value["steps"][step.name]["reason"]
            assert f"- no {name}: there is no {name}" in (tmp_path / "table.md").read_text()
    assert not any("build-engine" in line for line in run.lines)


def test_what_was_measured_is_kept_until_its_commands_or_what_it_needs_change(
    tmp_path: Path,
) -> None:
    places = Places(tmp_path)

    def lines(machine: Machine, steps: Sequence[Step] = STEPS, **options: Any) -> list[str]:
        run = Recorded()
        accept(steps, machine, places, run, ENVIRONMENT, **options)
        return run.lines

    assert len(lines(EVERYTHING)) == sum(len(step.commands) for step in STEPS)
    assert lines(EVERYTHING) == []
    assert len(lines(EVERYTHING, again=["bandwidth"])) == 1
    other = Machine({**EVERYTHING.found, "tritonserver": "another"}, {})
    assert len(lines(other)) == 2  # the package and the drawing
    changed = [
        replace(step, commands=step.commands[:1]) if step.name == "kernels" else step
        for step in STEPS
    ]
    read = [step for step in STEPS if "kernels" in step.after]
    assert len(read) == 5
    assert len(lines(other, changed)) == 1 + sum(len(step.commands) for step in read)
    graphs = [step for step in STEPS if step.name.startswith("emoji-")][
        1:
    ]  # all but its checkpoint
    graphs += [step for step in STEPS if step.name in ("cpp-runtime", "triton")]
    again = lines(other, changed, again=["emoji-export"])
    assert len(again) == sum(len(step.commands) for step in graphs)
    found = TensorRtFiles(library=Path("another/libnvinfer.so"))
    run = Recorded()
    accept(changed, other, Places(tmp_path, tensorrt=found), run, ENVIRONMENT)
    assert any("another/libnvinfer.so" in line for line in run.lines)
    accept(changed, other, places, Recorded(), ENVIRONMENT)
    # A machine without the hardware takes nothing away.
    assert lines(NOTHING) == []
    assert set(states(json.loads((tmp_path / RESULTS).read_text())).values()) == {MEASURED}


def test_an_interrupted_run_goes_on_with_the_step_that_it_was_at(tmp_path: Path) -> None:
    class Interrupted(Recorded):
        def __call__(self, words: Sequence[str], *rest: Any) -> Ran:
            if "calibrate" in words:
                raise KeyboardInterrupt
            return super().__call__(words, *rest)

    first, second = Interrupted(), Recorded()
    places = Places(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        accept(STEPS, EVERYTHING, places, first, ENVIRONMENT)
    accept(STEPS, EVERYTHING, places, second, ENVIRONMENT)
    assert first.lines
    assert len(first.lines) + len(second.lines) == sum(len(step.commands) for step in STEPS)


def test_an_engine_that_fails_its_verification_is_told_and_timed_all_the_same(
    tmp_path: Path,
) -> None:
    differs = {**ANSWERS["verify"], "passed": False, "problems": ["layer a differs"]}
    run = Recorded(verify=Ran(1, json.dumps(differs), "", 1.0))
    steps = chosen(
        STEPS, ["emoji-tensorrt-rtx-native-verify", "emoji-tensorrt-rtx-native-benchmark"]
    )
    value = accept(steps, EVERYTHING, Places(tmp_path), run, ENVIRONMENT)
    failed = value["steps"]["emoji-tensorrt-rtx-native-verify"]
    assert failed["state"] == FAILED
    assert_holds(failed["reason"], "verify", "layer a differs")
    assert_holds(failed["figures"][0]["value"], "FAILED", "layer a differs", "4 differ")
    assert states(value)["emoji-tensorrt-rtx-native-benchmark"] == MEASURED


def test_a_step_whose_command_fails_is_tried_again_and_what_comes_after_it_is_skipped(
    tmp_path: Path,
) -> None:
    error = json.dumps({"error": "no space left"})
    for run, state, after in (
        (Recorded(calibrate=Ran(1, error, "", 1.0)), FAILED, SKIPPED),
        (Recorded(), MEASURED, MEASURED),
    ):
        steps = chosen(STEPS, ["emoji-export"])
        value = accept(steps, EVERYTHING, Places(tmp_path), run, ENVIRONMENT)
        assert states(value) == {"emoji-calibrate": state, "emoji-export": after}
        if state == FAILED:
            assert_holds(value["steps"]["emoji-calibrate"]["reason"], "calibrate", "no space left")
            assert_holds(value["steps"]["emoji-export"]["reason"], "emoji-calibrate", FAILED)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("measure", {"lines": []}),
        ("benchmark", {"timings": "none"}),
        ("kernel_test", Ran(0, "no GPU is here (insufficient driver): not run", "", 1.0)),
    ],
)
def test_an_answer_that_is_not_what_a_step_reads_fails_that_step(
    name: str, answer: Any, tmp_path: Path
) -> None:
    value = accept(STEPS, EVERYTHING, Places(tmp_path), Recorded(**{name: answer}), ENVIRONMENT)
    failed = [step for step, state in states(value).items() if state == FAILED]
    assert failed
    for step in failed:
        commands = next(each.commands for each in STEPS if each.name == step)
        assert any(name in command.line for command in commands)


def test_the_figures_of_an_earlier_run_are_not_read_where_a_script_writes_none(
    tmp_path: Path,
) -> None:
    (tmp_path / "found.json").write_text('{"value": "old"}')
    step = Step(
        "silent",
        (
            Command(
                "python -c pass",
                lambda answer: [Figure("value", answer["value"])],
                reads="{out}/found.json",
            ),
        ),
    )
    value = accept([step], EVERYTHING, Places(tmp_path), run_program, ENVIRONMENT)
    assert states(value) == {"silent": FAILED}


def test_a_step_that_is_out_of_time_ends_with_all_that_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time; "
        f"p = subprocess.Popen(['sleep', '600']); open({str(child)!r}, 'w').write(str(p.pid)); "
        "print('begun', flush=True); time.sleep(600)"
    )
    step = Step("slow", (Command(f"python -c {shlex.quote(code)}"),), minutes=4 / 60)
    value = accept([step], EVERYTHING, Places(tmp_path), run_program, ENVIRONMENT)
    assert states(value) == {"slow": TIMEOUT}
    assert_holds(value["steps"]["slow"]["reason"], "--patience")
    assert_ends(child.read_text())


def _state(process: str) -> str:
    return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0]


def test_patience_multiplies_what_a_command_may_take(tmp_path: Path) -> None:
    given: list[float] = []

    def run(words: Sequence[str], environment: Mapping[str, str], seconds: float) -> Ran:
        given.append(seconds)
        return Ran(0, "", "", 0.0)

    step = Step("a", (Command("true"),), minutes=10)
    for patience in (1.0, 3.0):
        accept([step], EVERYTHING, Places(tmp_path / f"{patience}", patience), run, {})
    assert given == pytest.approx([600, 1800], rel=0.01)


def test_the_gpus_memory_is_the_most_that_is_told_while_a_command_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = [300 << 20, 900 << 20, 200 << 20]
    tell = "scripts.acceptance.programs.gpu_memory_in_use"
    monkeypatch.setattr(tell, lambda: told.pop(0) if told else 0)
    assert run_program(["sleep", "3"], dict(os.environ), 60).gpu_mib == 900
    monkeypatch.setattr(tell, lambda: None)
    assert run_program(["sleep", "1"], dict(os.environ), 60).gpu_mib is None


def test_what_runs_ends_with_a_script_that_is_killed(tmp_path: Path) -> None:
    code = f"""
import os
from scripts.acceptance.programs import run_program
child = "echo $$ > {tmp_path}/child; exec sleep 600"
run_program(["sh", "-c", child], dict(os.environ), 600)
"""
    script = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT)
    child = tmp_path / "child"
    for _ in range(600):
        if child.exists() and child.read_text().strip():
            break
        time.sleep(0.1)
    script.kill()
    script.wait()
    assert_ends(child.read_text().strip())


def assert_ends(process: str) -> None:
    """It does, in seconds."""
    for _ in range(50):
        if not Path("/proc", process).exists() or "Z" in _state(process):
            return
        time.sleep(0.1)
    pytest.fail("the child process is still there")


def test_a_command_that_fails_is_told_by_what_it_wrote_last_as_errors_and_all_is_in_a_log(
    tmp_path: Path,
) -> None:
    code = "import sys; print('-- Configuring incomplete'); sys.exit('CMake Error: no compiler')"
    step = Step("a", (Command(f"python -c {shlex.quote(code)}"),))
    value = accept([step], EVERYTHING, Places(tmp_path), run_program, ENVIRONMENT)
    assert_holds(value["steps"]["a"]["reason"], "CMake Error: no compiler")
    log = (tmp_path / "steps" / "a.log").read_text()
    assert_holds(log, "-- Configuring incomplete", "CMake Error: no compiler", "exit code 1")
    assert answer_of(Ran(0, "done", "a warning", 1.0)) == {"output": "done"}
    told = "warning\nCMake Error in CMakeLists.txt:\n  no GPU\nCMake Error again\nstep failed\n"
    expected = "CMake Error in CMakeLists.txt:; no GPU; step failed"
    assert answer_of(Ran(1, "-- done", told, 1.0)) == {"output": expected}
    assert answer_of(Ran(1, "the only text", "", 1.0)) == {"output": "the only text"}


def test_a_program_that_is_not_here_is_a_failure_and_no_traceback(tmp_path: Path) -> None:
    step = Step("a", (Command("no-such-program --fast"),))
    value = accept([step], EVERYTHING, Places(tmp_path), run_program, ENVIRONMENT)
    assert states(value) == {"a": FAILED}
    assert_holds(value["steps"]["a"]["reason"], "no-such-program")


def test_asking_for_a_step_asks_for_what_it_comes_after() -> None:
    names = [step.name for step in chosen(STEPS, ["triton"])]
    before = ["emoji-calibrate", "emoji-export", "emoji-reference", "emoji-tensorrt-native-build"]
    assert names == [*before, "triton"]
    with refused("no-such-step", "bandwidth"):
        chosen(STEPS, ["no-such-step"])


def test_what_the_user_got_wrong_ends_with_one_message_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "sdk").mkdir()
    for wrong in (["--only", "x"], ["--again", "x"], ["--sdk", tmp_path / "sdk"]):
        done = invoke("--out", tmp_path / "out", *wrong)
        assert done.exit_code == 2
        (line,) = done.stderr.splitlines()
        assert_holds(line, str(wrong[-1]))
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_to_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(gpu_acceptance, "find", lambda *arguments: NOTHING)
    done = invoke("--out", tmp_path / "file" / "out", "--only", "emulated")
    assert done.exit_code == 1
    *machine, line = done.stderr.splitlines()
    assert machine == list(NOTHING.lines())
    assert_holds(line, "error", tmp_path / "file")


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other", "version": 1}'])
def test_a_record_that_is_none_of_this_script_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / RESULTS).write_text(content)
    with refused(tmp_path / RESULTS):
        accept(STEPS, EVERYTHING, Places(tmp_path), Recorded(), ENVIRONMENT)
    assert (tmp_path / RESULTS).read_text() == content


def headers(folder: Path, version: str) -> Path:
    """TensorRT's headers, as far as they tell their version."""
    folder.mkdir(parents=True)
    (folder / "NvInferRuntime.h").touch()
    lines = zip(("MAJOR", "MINOR"), version.split("."), strict=True)
    text = "\n".join(f"#define TRT_{part}_ENTERPRISE {number}" for part, number in lines)
    (folder / "NvInferVersion.h").write_text(text)
    return folder


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with one, and its driver."""
    driver = tmp_path / "driver"
    driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release")
    monkeypatch.setattr(machines, "KERNEL_DRIVER", driver)
    found = {
        "gpu_count": 1,
        "gpu_name": "NVIDIA L40S",
        "gpu_compute_capability": "89",
        "driver_version": "13.0",
    }
    for name, value in found.items():
        monkeypatch.setattr(f"quest_deploy.backends.cuda.{name}", lambda value=value: value)


def found_with(
    tensorrt: str, files: TensorRtFiles, folder: Path, torch: Ran | None = None
) -> Machine:
    """What ``find`` says where doctor tells that version."""
    doctor = {
        "machine": {"versions": {"tensorrt": tensorrt, "onnxruntime-gpu": "1.31.1"}},
        "backends": {
            "openvino": {"build": None, "run": None},
            "tensorrt": {"build": None, "run": None},
            "tensorrt-rtx": {"build": None, "run": "its driver is too old"},
            "onnxruntime --provider cuda": {"build": None, "run": None},
        },
    }
    answers = [Ran(0, json.dumps(doctor), "", 1.0), torch or Ran(0, "2.13.0 13.0\n", "", 1.0)]
    return find(
        lambda words, environment, seconds: answers.pop(0),
        {"PATH": str(folder / "bin")},
        Places(folder / "out", tensorrt=files),
    )


@pytest.mark.usefixtures("gpu")
def test_the_machine_is_told_from_what_doctor_says_and_what_is_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for program in ("nvcc", "tritonserver"):
        (tmp_path / "bin" / program).touch(mode=0o755)
    files = TensorRtFiles(headers(tmp_path / "h", "11.4"), tmp_path / "libnvinfer.so", "11.4")
    machine = found_with("11.4.0.106", files, tmp_path)
    space = machine.found["free disk"]
    assert dict(machine.found) == {
        "gpu": "NVIDIA L40S, compute capability 89",
        "driver": "580.82.07, CUDA 13.0",
        "tensorrt": "11.4.0.106",
        "onnxruntime --provider cuda": "onnxruntime-gpu 1.31.1",
        "tensorrt 10.13": "11.4.0.106",
        "tensorrt 10.14": "11.4.0.106",
        "torch with CUDA": "2.13.0 13.0",
        "tensorrt-headers": f"11.4 in {tmp_path / 'h'}",
        "headers of this tensorrt": "11.4",
        "libnvinfer of this tensorrt": str(tmp_path / "libnvinfer.so"),
        "nlohmann-json": "here",
        "nvcc": str(tmp_path / "bin" / "nvcc"),
        "tritonserver": str(tmp_path / "bin" / "tritonserver"),
        "free disk": space,
    }
    assert "GB" in space
    assert machine.missing.keys() == {"tensorrt-rtx", "cmake", "compute-sanitizer"}
    assert machine.missing["tensorrt-rtx"] == "its driver is too old"
    assert (
        machine.found.keys()
        | machine.missing.keys()
        | {
            "onnxruntime --provider tensorrt"  # which doctor tells of too
        }
        >= NEEDS
    )


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("tensorrt", "version", "bundled", "lacks"),
    [
        ("10.16.1", "10.16", False, set()),
        ("10.12.0", "10.12", False, {"tensorrt 10.13", "tensorrt 10.14"}),
        ("11.4.0", "11.1", False, {"libnvinfer of this tensorrt"}),
        ("11.4.0", "11.1", True, set()),  # of the Python package
        ("11.4.0", "10.16", False, {"headers of this tensorrt", "libnvinfer of this tensorrt"}),
    ],
)
def test_a_tensorrt_that_lacks_something_or_is_not_the_headers_is_named(
    tensorrt: str, version: str, bundled: bool, lacks: set[str], tmp_path: Path
) -> None:
    files = TensorRtFiles(tmp_path, tmp_path / "libnvinfer.so", version, bundled)
    machine = found_with(tensorrt, files, tmp_path)
    of_tensorrt = {name for name in machine.missing if "tensorrt" in name} - {"tensorrt-rtx"}
    assert of_tensorrt == lacks
    for name in lacks:
        assert_holds(machine.missing[name], tensorrt)


@pytest.mark.usefixtures("gpu")
def test_where_doctor_fails_its_reason_is_told_and_no_engine_is_tried(tmp_path: Path) -> None:
    failed = Ran(1, "", "Traceback\n  File\nOSError: libcuda.so.1: invalid ELF header\n", 1.0)
    answers = [failed, Ran(1, "", "no torch", 1.0)]
    machine = find(lambda *arguments: answers.pop(0), {"PATH": ""}, Places(tmp_path))
    assert_holds(machine.missing["doctor"], "OSError: libcuda.so.1: invalid ELF header")
    run = Recorded()
    value = accept(STEPS, machine, Places(tmp_path), run, ENVIRONMENT)
    assert FAILED not in states(value).values()
    assert not any("build-engine" in line for line in run.lines)


@pytest.mark.usefixtures("gpu")
def test_why_torch_has_no_cuda_is_what_torch_says(tmp_path: Path) -> None:
    told = "RuntimeError: The NVIDIA driver on your system is too old (found version 12040)"
    torch = Ran(1, "", f"Traceback\n  File\n{told}\n", 1.0)
    machine = found_with("11.4.0", TensorRtFiles(), tmp_path, torch)
    assert machine.missing["torch with CUDA"] == told


@pytest.mark.parametrize(
    ("include", "lib"),
    [*zip(HEADERS, LIBRARIES[:3], strict=True), ("include", "lib64")],
)
def test_an_sdk_is_taken_as_its_archive_debian_and_containers_have_it(
    include: str, lib: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers(tmp_path / include, "11.1")
    (tmp_path / lib).mkdir(parents=True, exist_ok=True)
    (tmp_path / lib / "libnvinfer.so.11").touch()
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    environment = environment_of(tmp_path)
    assert find_tensorrt(tmp_path, environment) == TensorRtFiles(
        tmp_path / include, tmp_path / lib / "libnvinfer.so.11", "11.1"
    )
    assert str(tmp_path / lib) in environment["LD_LIBRARY_PATH"].split(os.pathsep)


def test_without_an_sdk_headers_are_those_of_the_environment_and_the_library_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "SYSTEM", ())
    assert find_tensorrt(None, {}) == TensorRtFiles()
    headers(tmp_path / "h", "11.1")
    (tmp_path / "tensorrt_libs").mkdir()
    for name in ("__init__.py", "libnvinfer.so.11", "libnvinfer_plugin.so.11"):
        (tmp_path / "tensorrt_libs" / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    library = tmp_path / "tensorrt_libs" / "libnvinfer.so.11"
    found = find_tensorrt(None, {"TENSORRT_INCLUDE_DIR": str(tmp_path / "h")})
    assert found == TensorRtFiles(tmp_path / "h", library, "11.1", bundled=True)


def test_cudas_programs_are_found_where_its_installer_leaves_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "compute-sanitizer").mkdir()
    (tmp_path / "compute-sanitizer" / "compute-sanitizer").touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    place = shutil.which("compute-sanitizer", path=environment_of(None)["PATH"])
    assert place == str(tmp_path / "compute-sanitizer" / "compute-sanitizer")


def test_the_plugins_are_configured_with_the_headers_library_and_json_that_were_found(
    tmp_path: Path,
) -> None:
    given = os.environ.get("TENSORRT_INCLUDE_DIR")
    if given is None or shutil.which("nvcc") is None or shutil.which("cmake") is None:
        pytest.skip("it takes TENSORRT_INCLUDE_DIR, nvcc and cmake")
    library = tmp_path / "libnvinfer.so.11"
    subprocess.run(["gcc", "-shared", "-x", "c", "/dev/null", "-o", library], check=True)
    places = Places(tmp_path, tensorrt=TensorRtFiles(Path(given), library))
    (step,) = (each for each in STEPS if each.name == "plugins")
    words = words_of(step.commands[0].line, {**places.names, "capability": "90"})
    configured = run_program(words, environment_of(None), 300)
    assert configured.code == 0, configured.err
    assert_holds(configured.out, f"headers {given}", f"library {library}")
    words = words_of("cmake --build {out}/plugins --target help", places.names)
    targets = run_program(words, environment_of(None), 60).out
    for target in ("denoise", "quest_trt_plugins", "plugin_test", "kernel_test"):
        assert f"... {target}\n" in targets


class DryRun(Recorded):
    """Compiles the kernels' own source for the CPU and runs it; a GPU's answers are recorded, and
    those of what asks whether there is one.
    """

    def __call__(self, words: Sequence[str], environment: Mapping[str, str], seconds: float) -> Ran:
        if any("/emulated" in word for word in words):
            return run_program(words, environment, seconds)
        if "doctor" in words:
            providers = (f"onnxruntime --provider {name}" for name in ("cuda", "tensorrt"))
            names, here = ("tensorrt", "tensorrt-rtx", *providers), {"build": None, "run": None}
            return Ran(
                0,
                json.dumps(
                    {
                        "machine": {"versions": {"tensorrt": "11.4.0", "tensorrt-rtx": "1.7.1"}},
                        "backends": dict.fromkeys(names, here),
                    }
                ),
                "",
                1.0,
            )
        if "-c" in words:
            return Ran(0, "2.13.0 13.0\n", "", 1.0)
        return super().__call__(words, environment, seconds)


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
def test_a_dry_run_goes_from_what_is_found_to_the_table_and_the_script_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("nvcc") is None or shutil.which("cmake") is None:
        pytest.skip("the kernels need nvcc's headers and cmake")
    (tmp_path / "bin").mkdir()
    for program in ("compute-sanitizer", "tritonserver"):
        (tmp_path / "bin" / program).touch(mode=0o755)
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{path}{os.pathsep}{tmp_path / 'bin'}")
    sdk = tmp_path / "sdk"
    headers(sdk / "include", "11.4")
    (sdk / "lib").mkdir()
    (sdk / "lib" / "libnvinfer.so").touch()
    monkeypatch.setattr(gpu_acceptance, "run_program", run := DryRun())
    out = tmp_path / "out"
    done = invoke("--out", out, "--sdk", sdk, "--json")
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    assert {name: state for name, state in states(value).items() if state != MEASURED} == {}
    assert value["steps"].keys() == {step.name for step in STEPS}
    assert_holds(done.stderr, "gpu: NVIDIA L40S", "tensorrt: 11.4.0")
    table = (out / "table.md").read_text()
    assert_holds(table, "| emulated | measured", "- driver: 580.82.07, CUDA 13.0")
    assert (out / "emulated" / "tests" / "kernel_test_emulated").is_file()
    assert any("ARCHITECTURES=89" in line for line in run.lines)
    assert any("--compute-capability 89" in line for line in run.lines)
    # The script itself, on a machine without the GPU.
    monkeypatch.setenv("PATH", path)
    line = [sys.executable, "scripts/gpu_acceptance.py", "--only", "emulated", "--json"]
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    again = subprocess.run(
        [*line, "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["steps"] == value["steps"]


def test_an_engines_steps_read_what_the_commands_really_answer(
    chain: Chain, tmp_path: Path
) -> None:
    shutil.copytree(chain.root, tmp_path / "emoji")
    engine = Engine("onnxruntime-cpu", "onnxruntime", "--threads 1", ())
    steps = Model("emoji", "").engine_steps(engine, ())
    value = accept(list(steps), EVERYTHING, Places(tmp_path), run_program, ENVIRONMENT)
    assert states(value) == {
        f"emoji-onnxruntime-cpu-{stage}": MEASURED for stage in ("build", "verify", "benchmark")
    }, value
    table = (tmp_path / "table.md").read_text()
    assert_holds(table, "engine, onnxruntime", "PASSED", "quantized, batch 16", "fp32, batch 2")
    assert_holds(table, "multiply-adds in INT8")
    # The workspace that all engines begin with is as it was.
    assert (tmp_path / "emoji" / "manifest.json").read_bytes() == (
        chain.root / "manifest.json"
    ).read_bytes()
