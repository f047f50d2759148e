"""How a cell's model is made, and everything that its figures depend on."""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.calibration.ptq import CalibrationOptions, RangeMethod, calibrate
from quest_deploy.calibration.reconstruction import ReconstructOptions, reconstruct
from quest_deploy.calibration.sensitivity import error_shares, measure_sensitivity, select_sensitive
from quest_deploy.calibration.trajectories import Trajectories, record_trajectories
from quest_deploy.errors import InputError
from quest_deploy.evaluation.memory import peak_memory, reset_peak_memory
from quest_deploy.evaluation.quality import HELD_OUT_SAMPLES, HELD_OUT_SEED, SamplingOptions
from quest_deploy.evaluation.sampling import float_denoiser
from quest_deploy.files import sha256_of
from quest_deploy.finetuning.layer_sets import LAYER_SETS, select_layers
from quest_deploy.finetuning.train import FinetuneOptions, finetune
from quest_deploy.quantization.layer_kinds import group_of
from quest_deploy.quantization.model import QuantizedModel
from scripts.bench.methods.cells import (
    PAPER_SENSITIVE,
    PAPER_TEMPORAL,
    ROWS,
    Cell,
    Float,
    ModelOpt,
    Pipeline,
)
from scripts.bench.methods.digits.model import ASSETS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from quest_deploy.evaluation.sampling import Denoiser
    from quest_deploy.models.registry import DiffusionModel
    from quest_deploy.progress import Progress


REVISION = 1
"""Part of every cell's definition. Raise it when a change of code, not of options, changes what
cells measure.
"""
JUDGED_SCHEME = Scheme.parse("w4a4", buckets=20)
"""Its buckets are those of every cell's epsilon-MSE, whatever the cell's own are."""
JUDGED_SAMPLING = SamplingOptions(images=1000)
MODELOPT_SAMPLES, MODELOPT_BATCH = 256, 64
SAMPLES = 1024
"""Samplings that every row starts from; half as many where its buckets need twice the steps.

The comparison's own, whatever `calibrate` records: a change of it makes all cells anew.
"""


@dataclass
class Costs:
    """What making a model takes: each stage's seconds, and this process's peak memory in it, in
    bytes.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Return what happens inside is stage ``name``."""
        reset_peak_memory()
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started
        self.peak_memory[name] = peak_memory()


@dataclass(frozen=True)
class Made:
    """A model ready to be judged, what making it took, and what else its method reports."""

    denoise: Denoiser
    costs: Costs = field(default_factory=Costs)
    notes: dict[str, Any] = field(default_factory=dict)


def definition_of(cell: Cell, model: DiffusionModel) -> dict[str, Any]:
    """Everything that ``cell``'s figures depend on but the code, as a JSON value: two cells that
    agree in it are one cell.
    """
    assets = sorted(path for path in ASSETS.rglob("*") if path.suffix in (".safetensors", ".json"))
    definition = {
        "revision": REVISION,
        "model": model.name,
        "assets": {str(path.relative_to(ASSETS)): sha256_of(path) for path in assets},
        "seed": cell.seed,
        "recipe": _recipe_of(cell, model),
        "judged": {
            "sampling": dataclasses.asdict(JUDGED_SAMPLING),
            "held_out": {
                "seed": HELD_OUT_SEED,
                "samples": HELD_OUT_SAMPLES,
                "steps": model.calibration_steps,
            },
            "bucket_edges": JUDGED_SCHEME.bucket_edges,
        },
    }
    # As it reads back from a file: lists for tuples, plain strings for names.
    result: dict[str, Any] = json.loads(json.dumps(definition))
    return result


def _recipe_of(cell: Cell, model: DiffusionModel) -> dict[str, Any]:
    recipe = ROWS[cell.row].recipe
    if isinstance(recipe, Float):
        return {"method": "float"}
    if isinstance(recipe, ModelOpt):
        calibration = {"samples": MODELOPT_SAMPLES, "batch": MODELOPT_BATCH}
        return {
            "method": "modelopt",
            "config": recipe.config,
            "trajectories": _recorded(model, None),
            "calibration": calibration,
        }
    reconstruction, finetuning = _reconstruction(cell, recipe), _finetuning(cell, recipe, model)
    return {
        "method": "quest-deploy",
        "trajectories": _recorded(model, _scheme(cell, recipe)),
        "scheme": _scheme(cell, recipe).to_json(),
        "calibration": dataclasses.asdict(_calibration(cell, recipe)),
        "reconstruction": reconstruction and dataclasses.asdict(reconstruction),
        "sensitivity": recipe.sensitivity,
        "finetuning": finetuning and dataclasses.asdict(finetuning),
    }


def _recorded(model: DiffusionModel, scheme: Scheme | None) -> dict[str, int]:
    """The steps (more where the buckets need it) and the samplings."""
    steps, buckets = model.calibration_steps, 0 if scheme is None else scheme.buckets
    return {"steps": steps, "samples": SAMPLES * steps // max(steps, buckets)}


def make(cell: Cell, model: DiffusionModel, unet: nn.Module, report: Progress) -> Made:
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
    options = dict(recipe.calibration)
    return CalibrationOptions(
        RangeMethod(options.pop("method", RangeMethod.MSE)), seed=cell.seed, **options
    )


def _reconstruction(cell: Cell, recipe: Pipeline) -> ReconstructOptions | None:
    return (
        None
        if recipe.reconstruction is None
        else ReconstructOptions(seed=cell.seed, **recipe.reconstruction)
    )


def _finetuning(cell: Cell, recipe: Pipeline, model: DiffusionModel) -> FinetuneOptions | None:
    if recipe.finetuning is None:
        return None
    return FinetuneOptions(family=model.family, seed=cell.seed, **recipe.finetuning)


def _make_pipeline(
    recipe: Pipeline, cell: Cell, model: DiffusionModel, unet: nn.Module, report: Progress
) -> Made:
    costs = Costs()
    notes: dict[str, Any] = {}
    scheme = _scheme(cell, recipe)
    with costs.stage("trajectories"):
        trajectories = _record(cell, model, unet, scheme, report)
    with costs.stage("calibration"):
        checkpoint = calibrate(
            model.name, unet, trajectories, scheme, _calibration(cell, recipe), report
        )
    if (reconstruction := _reconstruction(cell, recipe)) is not None:
        with costs.stage("reconstruction"):
            checkpoint = reconstruct(unet, checkpoint, trajectories, reconstruction, report)
    if (finetuning := _finetuning(cell, recipe, model)) is not None:
        if recipe.sensitivity is not None:
            with costs.stage("sensitivity"):
                measured = measure_sensitivity(
                    unet, checkpoint, trajectories, **recipe.sensitivity, progress=report
                )
                notes["sensitive_layers"] = select_sensitive(measured.to_json())
                notes["error_shares"] = paper_shares(error_shares(measured.to_json()), model.family)
            finetuning = dataclasses.replace(finetuning, sensitive_layers=notes["sensitive_layers"])
        with costs.stage("finetuning"):
            checkpoint = finetune(
                model.load_unet,
                checkpoint,
                trajectories,
                finetuning,
                on_step=lambda step: report(
                    f"{step.stage} layers, loss {step.loss:.3f}", step.step, step.steps
                ),
            )
    return Made(QuantizedModel.from_checkpoint(checkpoint).eval(), costs, notes)


def paper_shares(of_layer: dict[str, float], family: str) -> dict[str, float]:
    """The shares of the layers' error that the paper's two sets make, and each of the other kinds
    of layers.
    """
    sets = LAYER_SETS[family]
    shares = {PAPER_TEMPORAL: 0.0, PAPER_SENSITIVE: 0.0}
    temporal, sensitive = (
        set(select_layers(of_layer, patterns)) for patterns in (sets.temporal, sets.sensitive)
    )
    for layer, share in of_layer.items():
        kind = (
            PAPER_TEMPORAL
            if layer in temporal
            else PAPER_SENSITIVE
            if layer in sensitive
            else group_of(layer)
        )
        shares[kind] = shares.get(kind, 0.0) + share
    return shares


def _make_modelopt(
    recipe: ModelOpt, cell: Cell, model: DiffusionModel, unet: nn.Module, report: Progress
) -> Made:
    try:
        import modelopt.torch.quantization as mtq
    except ImportError as e:
        raise InputError(
            f"{cell.name} needs nvidia-modelopt ({e}): install it with `pip install -c "
            "constraints.txt '.[modelopt]'`"
        ) from e
    costs = Costs()
    with costs.stage("trajectories"):
        trajectories = _record(cell, model, unet, None, report).first(MODELOPT_SAMPLES)

    def forward(quantized: nn.Module) -> None:
        batches = list(trajectories.batches(MODELOPT_BATCH))
        for i, inputs in enumerate(batches):
            quantized(**inputs)
            report("modelopt calibrates", i + 1, len(batches))

    with costs.stage("calibration"):
        quantized = mtq.quantize(unet, getattr(mtq, recipe.config), forward)
    weights = [name for name, m in quantized.named_modules() if name.endswith("weight_quantizer")]
    enabled = [name for name in weights if quantized.get_submodule(name).is_enabled]
    return Made(
        float_denoiser(quantized), costs, {"layers": len(weights), "quantized_layers": len(enabled)}
    )


def _record(
    cell: Cell, model: DiffusionModel, unet: nn.Module, scheme: Scheme | None, report: Progress
) -> Trajectories:
    return record_trajectories(
        model,
        unet,
        **_recorded(model, scheme),
        seed=cell.seed,
        scheme=scheme,
        progress=report,
    )
