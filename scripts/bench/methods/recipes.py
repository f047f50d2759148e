"""How a cell's model is made, and everything that its figures depend on."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from quest_deploy.artifacts.scheme import DEFAULT_BUCKETS, Scheme, quantile_edges
from quest_deploy.calibration.ptq import CalibrationOptions, RangeMethod, calibrate
from quest_deploy.calibration.reconstruction import ReconstructOptions, reconstruct
from quest_deploy.calibration.sensitivity import error_shares, measure_sensitivity, select_sensitive
from quest_deploy.calibration.trajectories import record_trajectories
from quest_deploy.evaluation.quality import HELD_OUT_SAMPLES, HELD_OUT_SEED
from quest_deploy.evaluation.sampling import float_denoiser
from quest_deploy.finetuning.layer_sets import layer_sets
from quest_deploy.finetuning.train import FinetuneOptions, finetune
from quest_deploy.quantization.layer_kinds import group_of, matches
from quest_deploy.quantization.model import QuantizedModel
from scripts.bench.methods.cells import (
    PAPER_SENSITIVE,
    PAPER_TEMPORAL,
    ROWS,
    SENSITIVITY,
    Cell,
    Float,
    Nncf,
    Pipeline,
)
from scripts.bench.methods.outside import modelopt, nncf
from scripts.bench.methods.rotation import rotate_attention
from scripts.bench.methods.shared import CHECKPOINT, TRAJECTORIES, T, shared
from scripts.bench.methods.shared import SENSITIVITY as SENSITIVITY_FILE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from quest_deploy.artifacts.checkpoint import Checkpoint
    from quest_deploy.calibration.sensitivity import Sensitivity
    from quest_deploy.calibration.trajectories import Trajectories
    from quest_deploy.evaluation.sampling import Denoiser
    from quest_deploy.progress import Progress
    from scripts.bench.methods.cells import Schedule
    from scripts.bench.methods.model import ComparedModel
    from scripts.bench.methods.shared import Kind


REVISION = 2
"""Part of every cell's definition. Raise it when a change of code, not of options, changes what
cells measure.
"""
JUDGED_SCHEME = Scheme.parse("w4a4", buckets=20)
"""Its buckets are those of every cell's epsilon-MSE, whatever the cell's own are."""


@dataclass(frozen=True)
class Made:
    """A model ready to be judged.

    Attributes:
        payload_bytes: what its parameters take: packed codes, scales, biases, and what stays in
            float.
        seconds: CPU seconds of each stage of making it.
        notes: what else its method reports.
    """

    denoise: Denoiser
    payload_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def definition_of(cell: Cell, model: ComparedModel) -> dict[str, Any]:
    """Everything that ``cell``'s figures depend on but the code, as a JSON value: two cells that
    agree in it are one cell.
    """
    judged = model.on(ROWS[cell.row].judged_on)
    definition = {
        **_basis(cell, model),
        "recipe": _recipe_of(cell, model),
        "judged": {
            "schedule": dataclasses.asdict(judged.schedule),
            "sampling": dataclasses.asdict(judged.sampling),
            "held_out": {"seed": HELD_OUT_SEED, "samples": HELD_OUT_SAMPLES},
            "bucket_edges": JUDGED_SCHEME.bucket_edges,
        },
    }
    return plain(definition)


def plain(value: dict[str, Any]) -> dict[str, Any]:
    """The value as it reads back from a file: lists for tuples, plain strings for names."""
    result: dict[str, Any] = json.loads(json.dumps(value))
    return result


def _basis(cell: Cell, model: ComparedModel) -> dict[str, Any]:
    return {
        "revision": REVISION,
        "model": model.name,
        "parts": dict(model.parts),
        "seed": cell.seed,
    }


def _recipe_of(cell: Cell, model: ComparedModel) -> dict[str, Any]:
    recipe, judged_on = ROWS[cell.row].recipe, ROWS[cell.row].judged_on
    if isinstance(recipe, Float):
        return {"method": "float", **dataclasses.asdict(recipe)}
    if isinstance(recipe, Pipeline):
        return _options(cell, recipe, model)
    return {
        "method": "nncf" if isinstance(recipe, Nncf) else "modelopt",
        "bits": cell.bits,
        **dataclasses.asdict(recipe),
        "trajectories": _recorded(model, judged_on),
    }


def _options(cell: Cell, recipe: Pipeline, model: ComparedModel) -> dict[str, Any]:
    """The options of all stages, defaults and all."""
    reconstruction, finetuning = _reconstruction(cell, recipe), _finetuning(cell, recipe, model)
    return {
        "method": "quest-deploy",
        "trajectories": _recorded(model, recipe.recorded_on),
        "scheme": _scheme(cell, recipe, model).to_json(),
        "calibration": dataclasses.asdict(_calibration(cell, recipe)),
        "rotated": recipe.rotated,
        "low_rank": recipe.low_rank,
        "reconstruction": reconstruction and dataclasses.asdict(reconstruction),
        "reported_layers": recipe.reported_layers,
        "sensitivity": SENSITIVITY if recipe.reported_layers or recipe.low_rank else None,
        "finetuning": finetuning and dataclasses.asdict(finetuning),
    }


def _recorded(model: ComparedModel, schedule: Schedule) -> dict[str, Any]:
    """The schedule and the samplings: as much data, however few the steps."""
    samples = model.calibration_samples * model.calibration_steps // schedule.steps
    return {"schedule": dataclasses.asdict(schedule), "samples": samples}


def _scheme(cell: Cell, recipe: Pipeline, model: ComparedModel) -> Scheme:
    options = {
        "buckets": DEFAULT_BUCKETS,
        "eight_bit_layers": model.eight_bit_layers,
        "float_layers": model.float_layers,
        **recipe.scheme,
    }
    of_flow = model.bucket_steps is not None
    if of_flow if recipe.quantiles is None else recipe.quantiles:
        timesteps = model.on(recipe.recorded_on).timesteps
        options["edges"] = quantile_edges(timesteps, options["buckets"])
    return Scheme.parse(cell.bits, **options)


def _calibration(cell: Cell, recipe: Pipeline) -> CalibrationOptions:
    options = dict(recipe.calibration)
    return CalibrationOptions(
        RangeMethod(options.pop("method", RangeMethod.MSE)), seed=cell.seed, **options
    )


def _reconstruction(cell: Cell, recipe: Pipeline) -> ReconstructOptions | None:
    if recipe.reconstruction is None:
        return None
    return ReconstructOptions(seed=cell.seed, **recipe.reconstruction)


def _finetuning(cell: Cell, recipe: Pipeline, model: ComparedModel) -> FinetuneOptions | None:
    if recipe.finetuning is None:
        return None
    options = {**model.finetuning, **recipe.finetuning}
    return FinetuneOptions(family=model.layer_set_name, seed=cell.seed, **options)


def make(cell: Cell, model: ComparedModel, store: Path, report: Progress) -> Made:
    """Make ``cell``'s model of the float ``model``, of what ``store`` has, and keep there what
    other cells need too.

    Raises:
        InputError: a package that the method needs is missing.
    """
    recipe, judged_on = ROWS[cell.row].recipe, ROWS[cell.row].judged_on
    maker = _Maker(cell, model, store, report)
    if isinstance(recipe, Pipeline):
        return maker.make(recipe)
    unet = model.load_unet()
    if isinstance(recipe, Float):
        return Made(float_denoiser(unet), 4 * sum(p.numel() for p in unet.parameters()))
    trajectories = maker.trajectories(judged_on).first(recipe.rows)
    started = time.process_time()
    denoise, payload, notes = (
        nncf(unet, trajectories)
        if isinstance(recipe, Nncf)
        else modelopt(recipe.config, cell.bits, unet, trajectories, report)
    )
    maker.seconds["calibration"] = time.process_time() - started
    return Made(denoise, payload, maker.seconds, notes)


class _Maker:
    """Makes the stages of one cell, or reads what another cell has made.

    Attributes:
        seconds: CPU seconds of the stages that are done.
        rotated: whether the float model has rotations, with which it computes the same.
        low_rank: of the scheme, what :func:`_scheme` cannot know: branches beside the layers that a
            first calibration finds sensitive.
    """

    def __init__(self, cell: Cell, model: ComparedModel, store: Path, report: Progress) -> None:
        self.cell, self.model, self.store, self.report = cell, model, store, report
        self.seconds: dict[str, float] = {}
        self.rotated = False
        self.low_rank: dict[str, Any] = {}
        self._basis = _basis(cell, model)

    def make(self, recipe: Pipeline) -> Made:
        notes: dict[str, Any] = {}
        trajectories = self.trajectories(recipe.recorded_on)
        self.rotated, layers = recipe.rotated, None
        start = dataclasses.replace(
            recipe, low_rank=None, reconstruction=None, reported_layers=False, finetuning=None
        )
        checkpoint = self.calibrated(start, trajectories)
        if recipe.reported_layers or recipe.low_rank is not None:
            report = self.sensitivity(start, checkpoint, trajectories).to_json()
            layers = select_sensitive(report)
            shares = paper_shares(error_shares(report), self.model.layer_set_name)
            notes = {"sensitive_layers": list(layers), "error_shares": shares}
        if recipe.low_rank is not None:
            assert layers is not None
            self.low_rank = {"low_rank": recipe.low_rank, "low_rank_layers": layers}
            start = dataclasses.replace(start, low_rank=recipe.low_rank)
            checkpoint = self.calibrated(start, trajectories, "calibration beside the branches")
        if recipe.reconstruction is not None:
            checkpoint = self.reconstructed(recipe, checkpoint, trajectories)
        if recipe.finetuning is not None:
            checkpoint = self.finetuned(recipe, checkpoint, trajectories, layers)
        model = QuantizedModel.from_checkpoint(checkpoint).eval()
        for layer in model.quantized_layers().values():
            layer.freeze()
        return Made(model, payload_of(checkpoint), self.seconds, notes)

    def load_unet(self) -> nn.Module:
        """The float model, changed."""
        unet = self.model.load_unet()
        if self.rotated:
            rotate_attention(unet)
        return unet

    def trajectories(self, schedule: Schedule) -> Trajectories:
        recorded = _recorded(self.model, schedule)
        model = self.model.on(schedule)
        return self._shared(
            "trajectories",
            TRAJECTORIES,
            {"trajectories": recorded},
            lambda: record_trajectories(
                model,
                model.load_unet(),
                steps=schedule.steps,
                samples=recorded["samples"],
                seed=self.cell.seed,
                rows=model.forward_rows,
                progress=self.report,
            ),
        )

    def calibrated(
        self, recipe: Pipeline, trajectories: Trajectories, stage: str = "calibration"
    ) -> Checkpoint:
        return self._shared(
            stage,
            CHECKPOINT,
            {"recipe": _options(self.cell, recipe, self.model)},
            lambda: calibrate(
                self.model.name,
                self.load_unet(),
                trajectories,
                dataclasses.replace(_scheme(self.cell, recipe, self.model), **self.low_rank),
                _calibration(self.cell, recipe),
                self.report,
            ),
        )

    def sensitivity(
        self, recipe: Pipeline, calibrated: Checkpoint, trajectories: Trajectories
    ) -> Sensitivity:
        return self._shared(
            "sensitivity",
            SENSITIVITY_FILE,
            {"recipe": _options(self.cell, recipe, self.model), "sensitivity": SENSITIVITY},
            lambda: measure_sensitivity(
                self.load_unet(), calibrated, trajectories, **SENSITIVITY, progress=self.report
            ),
        )

    def reconstructed(
        self, recipe: Pipeline, calibrated: Checkpoint, trajectories: Trajectories
    ) -> Checkpoint:
        options = _reconstruction(self.cell, recipe)
        assert options is not None
        without = dataclasses.replace(recipe, finetuning=None)
        return self._shared(
            "reconstruction",
            CHECKPOINT,
            {"recipe": _options(self.cell, without, self.model)},
            lambda: reconstruct(self.load_unet(), calibrated, trajectories, options, self.report),
        )

    def finetuned(
        self,
        recipe: Pipeline,
        start: Checkpoint,
        trajectories: Trajectories,
        reported: tuple[str, ...] | None,
    ) -> Checkpoint:
        options = _finetuning(self.cell, recipe, self.model)
        assert options is not None
        if recipe.reported_layers:
            options = dataclasses.replace(options, sensitive_layers=reported)
        return self._shared(
            "finetuning",
            CHECKPOINT,
            {"recipe": _options(self.cell, recipe, self.model)},
            lambda: finetune(
                self.load_unet,
                start,
                trajectories,
                options,
                on_step=lambda step: self.report(
                    f"{step.stage} layers, loss {step.loss:.3f}", step.step, step.steps
                ),
            ),
        )

    def _shared(
        self, stage: str, kind: Kind[T], made_from: dict[str, Any], compute: Callable[[], T]
    ) -> T:
        basis = {**self._basis, **made_from, **self.low_rank}
        found, seconds = shared(self.store, kind, plain(basis), compute)
        self.seconds[stage] = seconds
        return found


def payload_of(checkpoint: Checkpoint) -> int:
    """The bytes of a quantized model's parameters: packed codes, scales and biases, the tables of
    its activation quantizers, and all that stays in float.
    """
    layers = sum(
        layer.codes.size * layer.weight_bits // 8
        + layer.weight_scale.nbytes
        + (0 if layer.bias is None else layer.bias.nbytes)
        for layer in checkpoint.layers.values()
    )
    tables = sum(
        value.nbytes
        for quantizer in checkpoint.quantizers.values()
        for value in vars(quantizer).values()
        if isinstance(value, np.ndarray)
    )
    return layers + tables + sum(value.nbytes for value in checkpoint.floats.values())


def paper_shares(of_layer: dict[str, float], layer_set_name: str) -> dict[str, float]:
    """The shares of the layers' error that QuEST's two sets make, and each of the other kinds of
    layers. A transformer's temporal layers stay in float.
    """
    sets = layer_sets(layer_set_name)
    shares = {PAPER_TEMPORAL: 0.0, PAPER_SENSITIVE: 0.0}
    temporal, sensitive = (
        {name for name in of_layer if any(matches(name, pattern) for pattern in patterns)}
        for patterns in (sets.temporal, sets.sensitive)
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
