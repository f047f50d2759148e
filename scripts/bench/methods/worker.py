"""One cell in a process of its own, so that its time and its peak memory are its own, and a crash
loses nothing else.

    python -m scripts.bench.methods.worker ROW BITS SEED SCRATCH THREADS

writes JSON values to standard output, one a line: {"phase", "done", "total"} while it works, and at
the end the cell's result (see :func:`measure`) or {"error", "exit_code"}.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
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
)
from quest_deploy.evaluation.sampling import float_denoiser
from quest_deploy.files import atomic_file
from quest_deploy.progress import named
from scripts.bench.methods.cells import Cell
from scripts.bench.methods.digits.model import DigitsModel
from scripts.bench.methods.digits.quality import judge
from scripts.bench.methods.recipes import JUDGED_SAMPLING, JUDGED_SCHEME, make

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quest_deploy.models.registry import DiffusionModel
    from quest_deploy.progress import Progress


def measure(model: DiffusionModel, cell: Cell, scratch: Path, report: Progress) -> dict[str, Any]:
    """Make and judge ``cell``.

    Args:
        scratch: a folder in which cells of one run share the float model's images.

    Returns:
        A JSON value: "quality" (as :class:`scripts.bench.methods.digits.quality.DigitQuality` has
        it),
        "seconds" and "peak_memory_bytes" by stage of making the model, "wall_seconds" with judging,
        "notes".
    """
    started = time.monotonic()
    made = make(cell, model, model.load_unet(), report)
    held_out = record_trajectories(
        model,
        model.load_unet(),
        steps=model.calibration_steps,
        samples=HELD_OUT_SAMPLES,
        seed=HELD_OUT_SEED,
    )
    fp32_images = _float_images(model, scratch, report)
    images, labels = draw(model, made.denoise, JUDGED_SAMPLING, named(report, "drawing"))
    errors = epsilon_mse(made.denoise, held_out, JUDGED_SCHEME)
    quality = judge(images, labels, fp32_images, errors)
    return {
        "quality": quality.to_json(),
        "seconds": made.costs.seconds,
        "peak_memory_bytes": made.costs.peak_memory,
        "wall_seconds": time.monotonic() - started,
        "notes": made.notes,
    }


def _float_images(model: DiffusionModel, scratch: Path, report: Progress) -> NDArray[np.float32]:
    path = scratch / "float-images.npy"
    if not path.exists():
        denoise = float_denoiser(model.load_unet())
        images, _ = draw(model, denoise, JUDGED_SAMPLING, named(report, "FP32 draws"))
        with atomic_file(path) as temporary, temporary.open("wb") as stream:
            np.save(stream, images)
    loaded: NDArray[np.float32] = np.load(path, allow_pickle=False)
    return loaded


def main(arguments: list[str]) -> None:
    """Measure the cell that ``arguments`` name; see the module."""
    protocol = sys.stdout

    def send(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=protocol, flush=True)

    row, bits, seed, scratch, threads = arguments
    # What packages print (modelopt does) is no part of the protocol.
    with redirect_stdout(sys.stderr):
        try:
            torch.set_num_threads(int(threads))
            result = measure(
                DigitsModel(),
                Cell(row, bits, int(seed)),
                Path(scratch),
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
