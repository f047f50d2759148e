"""Prove the GPU half of the project on this machine: one command, one table, one JSON file.

    python scripts/gpu_acceptance.py [--sdk DIR] [--only STEP] [--again STEP] [--dry-run] [--json]

Says what the machine has, runs each step that it can run and names the others with the reason. The
steps are the list in scripts/acceptance/steps.py: the commands of each, what they need, and the
minutes that they may take together. What a step measured is kept at once in OUT/acceptance.json, so
that an interrupted run goes on with the next; it is measured again by `--again`, or where its
commands or what it needs have changed, such as the GPU, or a step that it comes after was. `--only`
runs one step, and what that comes after, in a piece of its own. OUT/steps/ has all that each
command answered, OUT/table.md the table.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # a script finds what is in its own folder alone

from quest_deploy.errors import QuestDeployError  # noqa: E402
from scripts.acceptance.machine import (  # noqa: E402
    Places,
    environment_of,
    find,
    find_tensorrt,
)
from scripts.acceptance.programs import run_program  # noqa: E402
from scripts.acceptance.runner import FAILED, TIMEOUT, accept, chosen, plan  # noqa: E402
from scripts.acceptance.steps import STEPS  # noqa: E402


def main(
    sdk: Annotated[
        Path | None,
        typer.Option(
            help="TensorRT's folder; else the headers of TENSORRT_INCLUDE_DIR, pip's lib."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = ROOT
    / "quest-out"
    / "gpu-acceptance",
    only: Annotated[
        list[str] | None,
        typer.Option(help="Run this step, and what it comes after, alone; may be repeated."),
    ] = None,
    again: Annotated[
        list[str] | None, typer.Option(help="Measure this step again; may be repeated.")
    ] = None,
    patience: Annotated[
        float, typer.Option(min=0.01, help="Multiplies the steps' time limits.")
    ] = 1.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, and run nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the JSON on standard output, nothing else.")
    ] = False,
) -> None:
    """Find out what this machine has, run what it can run, and write the table and the JSON."""
    try:
        sdk = None if sdk is None else sdk.resolve()
        environment = environment_of(sdk)
        tensorrt = find_tensorrt(sdk, environment)
        steps = chosen(STEPS, [*(only or ()), *((again or ()) if only else ())])
        chosen(STEPS, again or ())
        places = Places(out.resolve(), patience, tensorrt)
        machine = find(run_program, environment, places)
        if dry_run:
            plan(steps, machine, places)
            return
        print(*machine.lines(), sep="\n", file=sys.stderr, flush=True)
        value = accept(
            steps,
            machine,
            places,
            run_program,
            environment,
            again=again or (),
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except (QuestDeployError, OSError) as e:  # such as a disk that is full
        print(f"error: {e}", file=sys.stderr)
        raise typer.Exit(getattr(e, "exit_code", 1)) from e
    print(json.dumps(value, indent=1) if as_json else (places.out / "table.md").read_text())
    asked = {step.name for step in steps}
    bad = [n for n, each in value["steps"].items() if each["state"] in (FAILED, TIMEOUT)]
    raise typer.Exit(1 if asked.intersection(bad) else 0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what runs ends with this process
    typer.run(main)
