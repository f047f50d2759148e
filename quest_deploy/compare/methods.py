"""How a cell's model is made, and everything that its figures depend on."""

from __future__ import annotations

import dataclasses
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quest_deploy.compare.cells import ROWS, Cell, Float, ModelOpt, Pipeline
from quest_deploy.errors import InputError
from quest_deploy.evaluate import HELD_OUT_SAMPLES, HELD_OUT_SEED, SamplingOptions
from quest_deploy.files import sha256_of
from quest_deploy.finetune.train import FinetuneOptions, Progress, finetune
from quest_deploy.models.tiny import ASSETS
from quest_deploy.quant.calibrate import CalibrationOptions, RangeMethod, calibrate
from quest_deploy.quant.model import QuantizedModel
from quest_deploy.sampling import float_denoiser
from quest_deploy.scheme import Scheme
from quest_deploy.trajectories import Trajectories, record_trajectories

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from quest_deploy.models.registry import DiffusionModel
    from quest_deploy.sampling import Denoiser

    Report = Callable[[str, int, int], None]

REVISION = 1
"""Part of every cell's definition. Raise it when a change of code, not of options, changes what cells measure."""
JUDGED_SCHEME = Scheme.parse("w4a4", buckets=20)
"""Its buckets are those of every cell's epsilon-MSE, whatever the cell's own are."""
MODELOPT_SAMPLES, MODELOPT_BATCH = 256, 64


@dataclass
class Made:
    """A model ready to be judged, and the seconds that each stage of making it took."""

    denoise: Denoiser
    seconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def definition_of(cell: Cell, model: DiffusionModel) -> dict[str, Any]:
    """Everything that ``cell``'s figures depend on but the code, as a JSON value: two cells that agree in it are one cell."""
    assets = sorted(path for path in ASSETS.rglob("*") if path.suffix in (".safetensors", ".json"))
    return {
        "revision": REVISION,
        "model": model.name,
        "assets": {str(path.relative_to(ASSETS)): sha256_of(path) for path in assets},
        "seed": cell.seed,
        "recipe": _recipe_of(cell, model),
        "judged": {
            "sampling": dataclasses.asdict(SamplingOptions()),
            "held_out": {"seed": HELD_OUT_SEED, "samples": HELD_OUT_SAMPLES, "steps": model.calibration_steps},
            "bucket_edges": list(JUDGED_SCHEME.bucket_edges),
        },
    }


def _recipe_of(cell: Cell, model: DiffusionModel) -> dict[str, Any]:
    recipe = ROWS[cell.row].recipe
    recorded = {"steps": model.calibration_steps, "samples": model.calibration_samples}
    if isinstance(recipe, Float):
        return {"method": "float"}
    if isinstance(recipe, ModelOpt):
        calibration = {"samples": MODELOPT_SAMPLES, "batch": MODELOPT_BATCH}
        return {"method": "modelopt", "config": recipe.config, "trajectories": recorded, "calibration": calibration}
    finetuning = _finetuning(cell, recipe, model)
    return {
        "method": "quest-deploy",
        "trajectories": recorded,
        "scheme": _scheme(cell, recipe).to_json(),
        "calibration": dataclasses.asdict(_calibration(cell, recipe)),
        "finetuning": finetuning and dataclasses.asdict(finetuning),
    }


def make(cell: Cell, model: DiffusionModel, unet: nn.Module, report: Report) -> Made:
    """Make ``cell``'s model of the float ``unet``, which may be changed by it.

    Raises:
        InputError: a package that the method needs is missing.
    """
    recipe = ROWS[cell.row].recipe
    if isinstance(recipe, Float):
        return Made(float_denoiser(unet))
    if isinstance(recipe, ModelOpt):
        return _make_modelopt(recipe, cell, model, unet, report)
    return _make_pipeline(recipe, cell, model, unet, report)


def _scheme(cell: Cell, recipe: Pipeline) -> Scheme:
    return Scheme.parse(cell.bits, **recipe.scheme)


def _calibration(cell: Cell, recipe: Pipeline) -> CalibrationOptions:
    given = dict(recipe.calibration)
    return CalibrationOptions(RangeMethod(given.pop("method", RangeMethod.MSE)), seed=cell.seed, **given)


def _finetuning(cell: Cell, recipe: Pipeline, model: DiffusionModel) -> FinetuneOptions | None:
    if recipe.finetuning is None:
        return None
    return FinetuneOptions(family=model.family, seed=cell.seed, **recipe.finetuning)


def _make_pipeline(recipe: Pipeline, cell: Cell, model: DiffusionModel, unet: nn.Module, report: Report) -> Made:
    seconds: dict[str, float] = {}
    scheme = _scheme(cell, recipe)
    with _timed(seconds, "trajectories"):
        trajectories = _record(cell, model, unet, scheme, report)
    with _timed(seconds, "calibration"):
        checkpoint = calibrate(model.name, unet, trajectories, scheme, _calibration(cell, recipe), report)
    if (options := _finetuning(cell, recipe, model)) is not None:

        def on_progress(progress: Progress) -> None:
            report(f"{progress.stage}, loss {progress.loss:.3f}", progress.step, progress.steps)

        with _timed(seconds, "finetuning"):
            checkpoint = finetune(unet, checkpoint, trajectories, options, on_progress=on_progress)
    return Made(QuantizedModel.from_checkpoint(checkpoint).eval(), seconds)


def _make_modelopt(recipe: ModelOpt, cell: Cell, model: DiffusionModel, unet: nn.Module, report: Report) -> Made:
    try:
        import modelopt.torch.quantization as mtq
    except ImportError as e:
        raise InputError(
            f"{cell.name} needs nvidia-modelopt ({e}): install it with `pip install -c constraints.txt '.[modelopt]'`"
        ) from e
    seconds: dict[str, float] = {}
    with _timed(seconds, "trajectories"):
        trajectories = _record(cell, model, unet, None, report).first(MODELOPT_SAMPLES)

    def forward(quantized: nn.Module) -> None:
        batches = list(trajectories.batches(MODELOPT_BATCH))
        for i, inputs in enumerate(batches):
            quantized(**inputs)
            report("modelopt calibrates", i + 1, len(batches))

    with _timed(seconds, "calibration"):
        quantized = mtq.quantize(unet, getattr(mtq, recipe.config), forward)
    weights = [name for name, m in quantized.named_modules() if name.endswith("weight_quantizer")]
    enabled = [name for name in weights if quantized.get_submodule(name).is_enabled]
    return Made(float_denoiser(quantized), seconds, {"layers": len(weights), "quantized_layers": len(enabled)})


def _record(cell: Cell, model: DiffusionModel, unet: nn.Module, scheme: Scheme | None, report: Report) -> Trajectories:
    return record_trajectories(
        model,
        unet,
        steps=model.calibration_steps,
        samples=model.calibration_samples,
        seed=cell.seed,
        scheme=scheme,
        on_progress=lambda done, total: report("recording trajectories", done, total),
    )


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - started
