"""Runs the steps that this machine can run, each once, and keeps what they measured."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

from quest_deploy.artifacts.workspace import versions
from quest_deploy.errors import InputError
from quest_deploy.files import atomic_file, read_json, write_json
from scripts.acceptance.programs import answer_of, words_of
from scripts.acceptance.steps import Figure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from scripts.acceptance.machine import Machine, Places
    from scripts.acceptance.programs import Ran, Run
    from scripts.acceptance.steps import Answer, Step

FORMAT, VERSION = "quest-deploy GPU acceptance", 1
MEASURED, FAILED, SKIPPED, TIMEOUT = "measured", "failed", "skipped", "out of time"
RESULTS = "acceptance.json"


@dataclass(frozen=True)
class Result:
    """What became of a step.

    Attributes:
        definition: what it was measured under: its commands, what they name of this machine, the
            version of all that it needs, and when the steps were measured that it comes after.
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


def measure(
    step: Step,
    definition: dict[str, Any],
    run: Run,
    environment: Mapping[str, str],
    places: Places,
) -> Result:
    """Run a step's commands until one fails or the time is over; what was read until then stays,
    and a log of all that they printed.
    """
    begun, figures, peak = time.monotonic(), list[Figure](), None
    answers: dict[str, Answer] = {}
    state, reason, log = MEASURED, "", list[str]()
    names = places.names
    for command in step.commands:
        left = 60 * places.patience * step.minutes - (time.monotonic() - begun)
        reads = Path(command.reads.format(**names)) if command.reads else None
        if reads is not None:
            reads.unlink(missing_ok=True)  # an earlier run's would be taken for this one's
        words = words_of(command.line, names)
        ran = run(words, environment, max(left, 1.0))
        log.append(logged(words, ran))
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
    with atomic_file(places.out / "steps" / f"{step.name}.log") as temporary:
        temporary.write_text("\n".join(log))
    return Result(
        state,
        definition,
        tuple(figures),
        time.monotonic() - begun,
        peak,
        reason,
        datetime.now(UTC).isoformat(),
    )


def logged(words: Sequence[str], ran: Ran) -> str:
    """A command and all that it printed."""
    ended = "out of time" if ran.code is None else f"exit code {ran.code}"
    return f"$ {shlex.join(words)}\n{ran.out}\n{ran.err}\n[{ended}, {ran.seconds:.1f} s]\n"


def definition_of(
    step: Step, machine: Machine, names: Mapping[str, str], results: Mapping[str, Result]
) -> dict[str, Any]:
    """What a step that can run is measured under; where it changes, it is measured again."""
    parsed = (Formatter().parse(command.line) for command in step.commands)
    read = {name for parts in parsed for _, name, _, _ in parts if name is not None}
    return {
        "commands": [command.line for command in step.commands],
        "names": {name: text for name, text in names.items() if name in read - {"out", "root"}},
        "with": {name: machine.found[name] for name in step.needs},
        "after": {name: results[name].date for name in step.after},
    }


def obstacle(step: Step, machine: Machine, results: Mapping[str, Result]) -> str:
    """What a step lacks, by name; empty where it can run."""
    lacks = [f"no {name}" for name in step.needs if name not in machine.found]
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
            *(f"- {line}" for line in machine.lines()),
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
    path, names = places.out / RESULTS, places.names
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
            and kept.definition == definition_of(step, machine, names, results)
            and step.name not in again
        ):
            progress(f"{step.name}: measured {kept.date}")
        else:
            progress(f"{step.name} ...")
            definition = definition_of(step, machine, names, results)
            results[step.name] = result = measure(step, definition, run, environment, places)
            progress(
                f"{step.name}: {result.state} in {result.seconds:.0f} s {result.reason}".strip()
            )
        value = save(path, machine, results)
    return value


def plan(steps: Sequence[Step], machine: Machine, places: Places) -> None:
    """Print what is here and what would run: each step's commands, or why it would be skipped."""
    print(*machine.lines(), "", sep="\n")
    done = dict[str, Result]()
    for step in steps:
        reason = obstacle(step, machine, done)
        print(f"{step.name} (up to {places.patience * step.minutes:g} minutes)")
        if reason:
            print(f"  skipped: {reason}")
        else:
            done[step.name] = Result(MEASURED)
            for command in step.commands:
                print(f"  {shlex.join(words_of(command.line, places.names))}")
