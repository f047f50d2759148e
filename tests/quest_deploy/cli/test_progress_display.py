"""What is shown of long work while it runs: phase, count and time left, on standard error alone."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from quest_deploy.cli import console as console_module
from quest_deploy.cli.console import SECONDS_BETWEEN_LINES, Console, time_left
from tests.helpers import assert_holds
from tests.quest_deploy.support import cli

STABLE_DIFFUSION_STEP = 476.0
HOUR = 3600.0


class Clock:
    """Stands still but where a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def console(clock: Clock) -> Console:
    return Console(as_json=False, clock=clock)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The piped lines between the first and the last, which tell that the work starts and ends."""
    out, err = capsys.readouterr()
    assert out == ""
    first, *between, last = err.splitlines()
    assert_holds(first, "work")
    assert_holds(last, "work", "done")
    return between


def tells_time_left(line: str) -> bool:
    return re.search(r"\d (h|min)\b", line) is not None


def test_piped_steps_of_476_s_show_phase_detail_count_and_time_left(
    console: Console, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.progress("work") as update:
        for step in (1, 2, 3):
            clock.now += STABLE_DIFFUSION_STEP
            update("sensitive layers", step, 18, f"buckets 3-4, loss -5.{step}")
    found = lines(capsys)
    assert [tells_time_left(line) for line in found] == [False, True, True]
    for step, (line, left) in enumerate(zip(found, ("", "2 h", "119 min"), strict=True), 1):
        assert_holds(line, "sensitive layers", f"buckets 3-4, loss -5.{step}", f"{step} of 18")
        assert left in line


def test_the_bar_shows_steps_of_476_s_with_their_time_left_in_80_columns(
    console: Console,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for name, value in {"TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    with console.progress("work") as update:
        for step in (101, 102):
            clock.now += STABLE_DIFFUSION_STEP
            update("sensitive layers", step, 700, "buckets 3-4, loss -5.4321")
    shown = terminal.getvalue()
    for part in ("work: sensitive layers", "loss -5.4321", "102/700", "79 h"):
        assert part in shown, shown
    assert capsys.readouterr().out == ""


def test_a_resumed_phase_counts_only_steps_of_this_process(
    console: Console, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.progress("work") as update:
        for step in (391, 392):
            clock.now += HOUR
            update("training", step, 400)
    assert_holds(lines(capsys)[-1], "training", "392 of 400", "8 h")


def test_a_phase_is_not_measured_by_the_one_before(
    console: Console, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.progress("work") as update:
        for step in range(1, 101):
            clock.now += 1
            update("temporal layers", step, 110)
        for step in (101, 102):  # finetuning counts on over its stages
            clock.now += HOUR
            update("sensitive layers", step, 110)
    first, second = lines(capsys)[-2:]
    assert_holds(first, "sensitive layers", "101 of 110")
    assert not tells_time_left(first)
    assert_holds(second, "sensitive layers", "102 of 110", "8 h")


def test_each_of_two_alternating_phases_tells_when_it_ends_with_the_turns_of_the_other(
    console: Console, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.progress("work") as update:
        for step in range(1, 6):
            clock.now += HOUR / 6
            update("targets", step, 10)
            clock.now += HOUR * 5 / 6
            update("training", step, 10)
    for line, phase in zip(lines(capsys)[-2:], ("targets", "training"), strict=True):
        assert_holds(line, phase, "5 of 10", "5 h")


def test_a_phase_that_starts_over_is_measured_anew(
    console: Console, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.progress("work") as update:
        for pace in (1, HOUR):
            for step in range(5):
                update("building", step, 10)
                clock.now += pace
    assert_holds(lines(capsys)[-1], "building", "4 of 10", "6 h")


def test_fast_steps_print_a_line_every_30_s_at_most(
    console: Console, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.progress("work") as update:
        for step in range(1, 1001):
            clock.now += 0.125
            update(f"phase {step % 2}", step, 1000)
    assert SECONDS_BETWEEN_LINES == 30
    assert [re.findall(r"\d+ of", line) for line in lines(capsys)] == [
        ["240 of"],
        ["480 of"],
        ["720 of"],
        ["960 of"],
    ]


def test_finetune_and_a_reconstruction_print_stage_bucket_loss_and_time_left(
    mini_emoji: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_module, "SECONDS_BETWEEN_LINES", 0.0)
    few = (
        *("--samples", "2", "--steps", "2", "--buckets", "2", "--rounding-steps", "1"),
        *("--scale-steps", "1"),
    )
    calibrated = cli(
        "calibrate", "-w", tmp_path, "--method", "qdiff", *few, "--reconstruction-samples", "1"
    )
    assert re.search(
        r"^calibrate: reconstruction, conv_out, (\d+) of \1$", calibrated.err, re.MULTILINE
    ), calibrated.err
    assert re.search(
        r"^calibrate: reconstruction, .*, 2 of \d+, .* left$", calibrated.err, re.MULTILINE
    ), calibrated.err
    tuned = cli(
        *("finetune", "-w", tmp_path, "--temporal-steps", "3", "--sensitive-steps", "3"),
        *("--batch", "2", "--json"),
    )
    assert tuned.json["steps"] == 6
    for stage, step in (("temporal", 2), ("sensitive", 5)):
        line = (
            rf"^finetune: {stage} layers, buckets \d-\d, loss -?\d+\.\d+, {step} of 6, less "
            r"than a minute left$"
        )
        assert re.search(line, tuned.err, re.MULTILINE), tuned.err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "less than a minute left"),
        (59.9, "less than a minute left"),
        (60, "about 1 min left"),
        (7140, "about 119 min left"),
        (7200, "about 2 h left"),
        (332_000, "about 92 h left"),
    ],
)
def test_times_left_are_minutes_then_hours(seconds: float, text: str) -> None:
    assert time_left(seconds) == text
