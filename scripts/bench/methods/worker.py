"""One cell in a process of its own, so that its time is its own, and a crash loses nothing else.

    python -m scripts.bench.methods.worker MODEL ROW BITS SEED STORE THREADS

writes JSON values to standard output, one a line: {"phase", "done", "total"} while it works, and at
the end the cell's result (see :func:`measure`) or {"error", "exit_code"}.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quest_deploy.artifacts.workspace import versions
from quest_deploy.backends.base import processor_name
from quest_deploy.calibration.trajectories import record_trajectories
from quest_deploy.errors import QuestDeployError
from quest_deploy.evaluation.quality import (
    HELD_OUT_SAMPLES,
    HELD_OUT_SEED,
    draw,
    epsilon_mse,
    evaluate_images,
)
from quest_deploy.evaluation.retrieval import Judge
from quest_deploy.evaluation.sampling import float_denoiser
from quest_deploy.progress import named
from scripts.bench.methods.cells import ROWS, Cell, Float
from scripts.bench.methods.model import ComparedModel
from scripts.bench.methods.recipes import JUDGED_SCHEME, definition_of, make, plain
from scripts.bench.methods.shared import IMAGES, TRAJECTORIES, shared

if TYPE_CHECKING:
    from quest_deploy.progress import Progress


def measure(model: ComparedModel, cell: Cell, store: Path, report: Progress) -> dict[str, Any]:
    """Make and judge ``cell``.

    Args:
        store: a folder in which cells share what they make.

    Returns:
        A JSON value, see :class:`scripts.bench.methods.results.Result`.
    """
    started = time.monotonic()
    row = ROWS[cell.row]
    made = make(cell, model, store, report)
    model = model.on(row.judged_on)
    sampling = model.sampling
    judged = definition_of(cell, model)
    reference = {key: judged[key] for key in ("revision", "parts", "judged")}
    held_out, _ = shared(
        store,
        TRAJECTORIES,
        reference,
        lambda: record_trajectories(
            model,
            model.load_unet(),
            steps=sampling.steps,
            samples=HELD_OUT_SAMPLES,
            seed=HELD_OUT_SEED,
            rows=model.forward_rows,
        ),
    )
    fp32 = float_denoiser(model.load_unet())
    fp32_images, _ = shared(
        store,
        IMAGES,
        reference,
        lambda: draw(model, fp32, sampling, named(report, "FP32 draws"))[0],
    )
    if isinstance(row.recipe, Float) and row.recipe.other_noise:
        sampling = dataclasses.replace(sampling, seed=sampling.seed + 1 + cell.seed)
    images, labels = draw(model, made.denoise, sampling, named(report, "drawing"))
    errors = epsilon_mse(made.denoise, held_out, JUDGED_SCHEME, model.forward_rows)
    assert model.judge_folder is not None
    quality = evaluate_images(images, labels, fp32_images, errors, Judge(model.judge_folder))
    return plain(
        {
            "quality": quality.to_json(),
            "payload_bytes": made.payload_bytes,
            "cpu_seconds": made.seconds,
            "wall_seconds": time.monotonic() - started,
            "process_seconds": time.process_time(),
            "notes": made.notes,
        }
    )


def main(arguments: list[str]) -> None:
    """Measure the cell that ``arguments`` name; see the module."""
    protocol = sys.stdout

    def send(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=protocol, flush=True)

    model, row, bits, seed, store, threads = arguments
    # What packages print (modelopt does) is no part of the protocol.
    with redirect_stdout(sys.stderr):
        try:
            torch.set_num_threads(int(threads))
            result = measure(
                ComparedModel.load(model),
                Cell(row, bits, int(seed)),
                Path(store),
                lambda phase, done, total, detail="": send(
                    {"phase": phase, "done": done, "total": total}
                ),
            )
            result["environment"] = {
                "threads": int(threads),
                "processor": processor_name(),
                **versions(),
            }
            send(result)
        except QuestDeployError as e:
            send({"error": str(e), "exit_code": e.exit_code})


if __name__ == "__main__":
    main(sys.argv[1:])
