"""Runs the steps that this machine can run, each once, and keeps what they measured."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quest_deploy.artifacts.workspace import versions
from quest_deploy.backends.cuda import (
    driver_version,
    gpu_compute_capability,
    gpu_count,
    gpu_name,
)
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import atomic_file, read_json, write_json
from scripts.acceptance.steps import Figure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from scripts.acceptance.steps import Answer, Step

ROOT = Path(__file__).parents[2]
FORMAT, VERSION = "quest-deploy GPU acceptance", 1
MEASURED, FAILED, SKIPPED, TIMEOUT = "measured", "failed", "skipped", "out of time"
RESULTS = "acceptance.json"
TRITON = Path("/opt/tritonserver/bin")
"""Where NVIDIA's containers have the server."""


@dataclass(frozen=True)
class Machine:
    """What was found here: by name its version, or why it is missing."""

    found: Mapping[str, str]
    missing: Mapping[str, str]


@dataclass(frozen=True)
class Ran:
    """How a command ended. ``code`` is None where it was out of time; ``gpu_mib`` is the most of
    the GPU's memory that was in use meanwhile, by all processes, None where nothing tells.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    gpu_mib: int | None = None


class Run(Protocol):
    """Runs a program; tests give another."""

    def __call__(
        self, words: Sequence[str], environment: Mapping[str, str], seconds: float
    ) -> Ran: ...


@dataclass(frozen=True)
class Result:
    """What became of a step.

    Attributes:
        definition: what it was measured under: its commands, the version of all that it needs, and
            when the steps were measured that it comes after.
        reason: why it has no figures, or not all.
        date: when it ended, in UTC.
    """

    state: str
    definition: dict[str, Any] = field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    seconds: float = 0.0
    gpu_mib: int | None = None
    reason: str = ""
    date: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a JSON value; :meth:`from_json` is the inverse."""
        return {**vars(self), "figures": [vars(figure) for figure in self.figures]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Result:
        """Raise KeyError or TypeError for anything that :meth:`to_json` does not give."""
        return cls(**{**value, "figures": tuple(Figure(**each) for each in value["figures"])})


@dataclass(frozen=True)
class Places:
    """Where things are, and how many times the steps' minutes they may take."""

    out: Path
    sdk: Path | None = None
    patience: float = 1.0

    @property
    def paths(self) -> dict[str, Path | None]:
        """What commands' lines name."""
        return {"out": self.out, "sdk": self.sdk, "root": ROOT}


def find(run: Run, environment: Mapping[str, str], sdk: Path | None) -> Machine:
    """Say what is here."""
    found, missing = dict[str, str](), dict[str, str]()

    def note(name: str, version: str | None, reason: str) -> None:
        if version is None:
            missing[name] = reason
        else:
            found[name] = version

    gpu = gpu_count() > 0
    name = f"{gpu_name()}, compute capability {gpu_compute_capability()}" if gpu else None
    note("gpu", name, "the driver shows no NVIDIA GPU, or there is no driver")
    note("driver", f"CUDA {driver_version()}" if gpu else None, "there is no driver")
    doctor = answer_of(run(words_of("quest-deploy doctor --json", {}), environment, 300.0))
    packages = doctor.get("machine", {}).get("versions", {})
    for backend, problems in doctor.get("backends", {}).items():
        if backend.startswith(("tensorrt", "onnxruntime --provider")):
            problem = problems["build"] or problems["run"]
            version = packages.get(backend.partition(" ")[0], "here")
            note(backend, None if problem else version, problem)
    probe = "import torch as t; print(t.__version__, t.version.cuda or exit(1)); t.cuda.init()"
    torch = run([sys.executable, "-c", probe], environment, 300.0)
    there = torch.code == 0 and gpu
    note("torch with CUDA", torch.out.strip() if there else None, "torch has no CUDA, or no GPU")
    header = None if sdk is None else sdk / "include" / "NvInfer.h"
    note(
        "sdk", str(sdk) if header is not None and header.is_file() else None, "--sdk was not given"
    )
    for program in ("cmake", "nvcc", "compute-sanitizer", "tritonserver"):
        place = shutil.which(program, path=environment.get("PATH"))
        note(program, place, f"{program} is not on the path")
    return Machine(found, missing)


def words_of(line: str, places: Mapping[str, Path | None]) -> list[str]:
    """The words of a command line, with its program where it is here."""
    program, *rest = (word.format(**places) for word in shlex.split(line))
    programs = {"quest-deploy": ["-m", "quest_deploy"], "python": []}
    return [sys.executable, *programs[program], *rest] if program in programs else [program, *rest]


def answer_of(ran: Ran, reads: Path | None = None) -> Answer:
    """What a command answered; its last lines where that is no JSON object."""
    try:
        value = json.loads(ran.out) if reads is None else read_json(reads)
        if isinstance(value, dict):
            return value
    except (ValueError, QuestDeployError):
        pass
    lines = [line.strip() for line in (ran.out.strip() or ran.err.strip()).splitlines()]
    return {"output": "; ".join(line for line in lines[-3:] if line)}


def run_program(words: Sequence[str], environment: Mapping[str, str], seconds: float) -> Ran:
    """Run a program in the checkout; where it is out of time it ends, with all that it started."""
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            list(words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environment),
            cwd=ROOT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as e:
        return Ran(127, "", str(e), 0.0)
    with GpuMemory() as memory:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            out, err = process.communicate()
            return Ran(None, out, err, time.monotonic() - started, memory.peak)
        except BaseException:  # Ctrl-C, which reaches this process alone
            _end(process)
            raise
    return Ran(process.returncode, out, err, time.monotonic() - started, memory.peak)


def _end(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class GpuMemory:
    """A context manager: the most of the first GPU's memory that is in use meanwhile, in MiB, as
    nvidia-smi tells; ``peak`` is None where there is none.
    """

    QUERY = ("nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits")

    def __init__(self) -> None:
        self.peak: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> GpuMemory:
        if shutil.which(self.QUERY[0]) is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            said = subprocess.run(self.QUERY, capture_output=True, text=True, check=False).stdout
            if said.strip().isdigit():
                self.peak = max(self.peak or 0, int(said))


def measure(
    step: Step,
    definition: dict[str, Any],
    run: Run,
    environment: Mapping[str, str],
    places: Places,
) -> Result:
    """Run a step's commands until one fails or the time is over; what was read until then stays."""
    begun, figures, peak = time.monotonic(), list[Figure](), None
    answers: dict[str, Answer] = {}
    state, reason = MEASURED, ""
    for command in step.commands:
        left = 60 * places.patience * step.minutes - (time.monotonic() - begun)
        reads = Path(command.reads.format(**places.paths)) if command.reads else None
        if reads is not None:
            reads.unlink(missing_ok=True)  # an earlier run's would be taken for this one's
        ran = run(words_of(command.line, places.paths), environment, max(left, 1.0))
        peak = max((mib for mib in (peak, ran.gpu_mib) if mib is not None), default=None)
        answer = answers[command.line] = answer_of(ran, reads)
        if ran.code == 0 or "passed" in answer:  # `verify` has answered, though it ends with 1
            try:
                figures += command.figures(answer)
            except (KeyError, TypeError, ValueError) as e:
                state, reason = FAILED, f"{command.line}: an unexpected answer ({e!r})"
        if ran.code != 0:
            state = TIMEOUT if ran.code is None else FAILED
            limit = f"{places.patience * step.minutes:g} minutes are over; --patience gives more"
            told = answer.get("error") or answer.get("output") or answer.get("problems", [])[:3]
            reason = f"{command.line}: {limit if ran.code is None else told}"
        if state != MEASURED:
            break
    write_json(places.out / "steps" / f"{step.name}.json", answers)
    return Result(
        state,
        definition,
        tuple(figures),
        time.monotonic() - begun,
        peak,
        reason,
        datetime.now(UTC).isoformat(),
    )


def definition_of(step: Step, machine: Machine, results: Mapping[str, Result]) -> dict[str, Any]:
    """What a step that can run is measured under; where it changes, it is measured again."""
    return {
        "commands": [command.line for command in step.commands],
        "with": {name: machine.found[name] for name in step.needs},
        "after": {name: results[name].date for name in step.after},
    }


def obstacle(step: Step, machine: Machine, results: Mapping[str, Result]) -> str:
    """What a step lacks, by name; empty where it can run."""
    lacks = [f"no {name}" for name in step.needs if name in machine.missing]
    before = [
        f"{name} is {results[name].state if name in results else 'not measured'}"
        for name in step.after
        if name not in results or results[name].state != MEASURED
    ]
    return ", ".join([*lacks, *before])


def chosen(steps: Sequence[Step], only: Sequence[str]) -> list[Step]:
    """The steps that were asked for and what they come after, in order; all where none was.

    Raises:
        InputError: there is no such step.
    """
    by_name = {step.name: step for step in steps}
    if unknown := [name for name in only if name not in by_name]:
        raise InputError(f"unknown step {unknown[0]!r}: expected one of {', '.join(by_name)}")
    wanted, left = set[str](), list(only or by_name)
    while left:
        name = left.pop()
        if name not in wanted:
            wanted.add(name)
            left += by_name[name].after
    return [step for step in steps if step.name in wanted]


def load(path: Path) -> dict[str, Result]:
    """What was measured before; raise InputError where the file is another."""
    if not path.exists():
        return {}
    value = read_json(path, repair="delete it and measure again")
    try:
        if (value["format"], value["version"]) != (FORMAT, VERSION):
            raise ValueError(f"its format is {value['format']} {value['version']}")
        return {name: Result.from_json(each) for name, each in value["steps"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path}: not a record of this script ({e}); delete it") from e


def save(path: Path, machine: Machine, results: Mapping[str, Result]) -> dict[str, Any]:
    """Write what was found and measured, and the table beside it; return the JSON value."""
    value = {
        "format": FORMAT,
        "version": VERSION,
        "machine": {"found": dict(machine.found), "missing": dict(machine.missing)},
        "versions": versions(),
        "steps": {name: result.to_json() for name, result in results.items()},
    }
    write_json(path, value)
    with atomic_file(path.with_name("table.md")) as temporary:
        temporary.write_text(table(machine, results))
    return value


def table(machine: Machine, results: Mapping[str, Result]) -> str:
    """The page: the machine, a row a figure, and every step that has none."""
    rows = []
    for name, result in results.items():
        memory = "" if result.gpu_mib is None else f", GPU memory in use {result.gpu_mib} MiB"
        state = (
            result.state if result.state == SKIPPED else f"{result.state}, {result.seconds:.0f} s"
        )
        rows.append((name, f"{state}{memory}", result.reason, ""))
        rows += [("", figure.what, figure.value, figure.aim) for figure in result.figures]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(
        [
            "# The GPU half",
            "",
            "Written by `scripts/gpu_acceptance.py`.",
            "",
            *(f"- {name}: {version}" for name, version in machine.found.items()),
            *(f"- no {name}: {reason}" for name, reason in machine.missing.items()),
            "",
            "| step | what | measured | aim |",
            "|---|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in cells),
            "",
        ]
    )


def accept(
    steps: Sequence[Step],
    machine: Machine,
    places: Places,
    run: Run,
    environment: Mapping[str, str],
    *,
    again: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run what can run and was not measured yet, and keep each step as soon as it is over; return
    what was written.
    """
    path = places.out / RESULTS
    results = load(path)
    value = save(path, machine, results)
    for step in steps:
        kept = results.get(step.name)
        if reason := obstacle(step, machine, results):
            if kept is None or kept.state != MEASURED:
                results[step.name] = Result(SKIPPED, reason=reason)
            progress(f"{step.name}: skipped ({reason})")
        elif (
            kept is not None
            and kept.state == MEASURED
            and kept.definition == definition_of(step, machine, results)
            and step.name not in again
        ):
            progress(f"{step.name}: measured {kept.date}")
        else:
            progress(f"{step.name} ...")
            definition = definition_of(step, machine, results)
            results[step.name] = result = measure(step, definition, run, environment, places)
            progress(
                f"{step.name}: {result.state} in {result.seconds:.0f} s {result.reason}".strip()
            )
        value = save(path, machine, results)
    return value


def environment_of(sdk: Path | None) -> dict[str, str]:
    """This process's environment, in which programs find the SDK's libraries and the checkout."""
    found = {**os.environ, "PYTHONPATH": str(ROOT)}
    if sdk is not None:
        before = os.environ.get("LD_LIBRARY_PATH", "")
        found["LD_LIBRARY_PATH"] = f"{sdk / 'lib'}{os.pathsep * bool(before)}{before}"
    found["PATH"] = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{TRITON}"
    return found


def plan(steps: Sequence[Step], machine: Machine, places: Places) -> None:
    """Print what would run: each step's commands, or why it would be skipped."""
    done = dict[str, Result]()
    for step in steps:
        reason = obstacle(step, machine, done)
        print(f"{step.name} (up to {places.patience * step.minutes:g} minutes)")
        if reason:
            print(f"  skipped: {reason}")
        else:
            done[step.name] = Result(MEASURED)
            for command in step.commands:
                print(f"  {shlex.join(words_of(command.line, places.paths))}")
