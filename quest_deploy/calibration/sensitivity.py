"""Which layers hurt most when they are quantized: the model's output error with one quantized layer
at a time, bucket by bucket.

This is how QuEST (arXiv 2402.03666, section 4) finds what is worth finetuning: the time-embedding
projections, which its stage 1 trains, and the few other layers that make most of the error, which
are left to stage 2.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from quest_deploy.artifacts.schema import parse_document, validated
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.progress import no_progress
from quest_deploy.quantization.affine import bucket_of
from quest_deploy.quantization.layer_kinds import PRODUCTS, TEMPORAL, group_of
from quest_deploy.quantization.model import QuantizedModel, prepared

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from quest_deploy.artifacts.checkpoint import Checkpoint
    from quest_deploy.calibration.trajectories import Trajectories
    from quest_deploy.progress import Progress

FORMAT = "quest-deploy sensitivity"
VERSION = 1
_Error = Annotated[float, Field(ge=0, allow_inf_nan=False)]
SENSITIVE_SHARE = 0.8
"""How much of the layers' error :func:`select_sensitive` wants to be trained away."""


@validated("a layer's sensitivity")
@dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one layer alone, or one product of attention, does to the model's output.

    Attributes:
        layer: its module path.
        mse: the mean over the visited buckets of ``bucket_mse``: a bucket with more recorded steps
            counts no more than another.
        relative_mse: the same of ``bucket_relative_mse``.
        bucket_mse: the mean squared difference from the float model's output, [K]; None for a
            bucket never visited.
        bucket_relative_mse: the same divided by the mean square of the float model's output in that
            bucket.
    """

    layer: str
    mse: _Error
    relative_mse: _Error
    bucket_mse: tuple[_Error | None, ...]
    bucket_relative_mse: tuple[_Error | None, ...]

    @property
    def group(self) -> str:
        """Its kind, one of ``GROUPS``."""
        return group_of(self.layer)


@validated("sensitivity report")
@dataclass(frozen=True)
class Sensitivity:
    """The layers of a quantized model in execution order, measured one at a time.

    Attributes:
        model: the registry's name of the model.
        scheme: the scheme's name, such as "w4a4".
        samples: how many samplings were run through.
    """

    model: str
    scheme: str
    samples: int
    layers: tuple[LayerSensitivity, ...]

    def to_json(self) -> dict[str, Any]:
        """The measurement as a JSON value; each layer's group is given for readers, and not read
        back.
        """
        layers = [
            {"layer": layer.layer, "group": layer.group, **asdict(layer)} for layer in self.layers
        ]
        return {"format": FORMAT, "version": VERSION, **asdict(self), "layers": layers}

    @classmethod
    def from_json(cls, value: Any) -> Sensitivity:
        """Read :meth:`to_json`'s value; raise InputError where it is anything else."""
        if isinstance(value, dict) and isinstance(value.get("layers"), list):
            layers = [
                {key: x for key, x in layer.items() if key != "group"}
                if isinstance(layer, dict)
                else layer
                for layer in value["layers"]
            ]
            value = {**value, "layers": layers}
        repair = "run `quest-deploy sensitivity` again"
        return parse_document(cls, value, FORMAT, VERSION, "sensitivity report", repair)


def select_sensitive(report_json: dict[str, Any]) -> tuple[str, ...]:
    """The layers for stage 2 of QuEST, in execution order, from a report as
    :meth:`Sensitivity.to_json` writes it.

    The rule: leave out the time-embedding projections, since stage 1 trains them, and attention's
    products, which have no weights to train. A layer's score is its share of the rest's summed
    error, bucket by bucket, averaged over the buckets: every timestep counts the same, as it does
    in the finetuning's loss (in a plain sum the last step, t = 1, would outweigh all others). The
    layers with the largest scores are taken until they make ``SENSITIVE_SHARE`` of the sum: the
    smallest such set. Of equal layers the earlier one is taken; where no layer makes any error,
    none is.

    Raises:
        InputError: the report is damaged, or of another kind or version.
    """
    rest = [
        layer
        for layer in Sensitivity.from_json(report_json).layers
        if layer.group not in (TEMPORAL, PRODUCTS)
    ]
    scores = _scores(rest)
    order = np.argsort(-scores, kind="stable")
    reached = np.cumsum(scores[order]) >= SENSITIVE_SHARE * scores.sum() * (1 - 1e-12)
    count = int(reached.argmax()) + 1 if scores.any() else 0
    chosen = set(order[:count].tolist())
    return tuple(layer.layer for i, layer in enumerate(rest) if i in chosen)


def error_shares(report_json: dict[str, Any]) -> dict[str, float]:
    """Each layer's share of the error, in execution order: scored as in :func:`select_sensitive`,
    but no layer left out.

    Raises:
        InputError: the report is damaged, or of another kind or version.
    """
    layers = Sensitivity.from_json(report_json).layers
    scores = _scores(layers)
    return {
        layer.layer: float(score)
        for layer, score in zip(layers, scores / max(scores.sum(), 1e-300), strict=True)
    }


def _scores(layers: Sequence[LayerSensitivity]) -> NDArray[np.float64]:
    """The sum over the visited buckets of each layer's share of the error there."""
    errors = np.asarray(
        [[math.nan if e is None else e for e in layer.bucket_mse] for layer in layers], np.float64
    )
    visited = errors[:, ~np.isnan(errors).any(0)] if layers else errors
    totals = visited.sum(0)
    scores: NDArray[np.float64] = np.zeros(len(layers))
    if (totals > 0).any():
        scores = (visited[:, totals > 0] / totals[totals > 0]).sum(1)
    return scores


@torch.no_grad()
def measure_sensitivity(
    unet: nn.Module,
    calibrated: Checkpoint,
    trajectories: Trajectories,
    samples: int,
    batch: int,
    progress: Progress = no_progress,
) -> Sensitivity:
    """Quantize one layer at a time, its weight and its input, and compare the model's output with
    the float one's.

    A product inside attention counts as a layer: its operands are quantized. Every layer costs one
    pass over ``samples`` samplings; nothing of one pass is used in the next.

    Args:
        unet: the float model that ``calibrated`` was made from; not changed.
        trajectories: recorded on ``unet``; their inputs are used.
        samples: how many of the recorded rows are run, the first ones, at all their steps; see
            :meth:`quest_deploy.calibration.trajectories.Trajectories.first`.
        batch: rows that run at once; they may be of different steps.
        progress: called with a phase's name, the layers done and their number.

    Raises:
        InputError: ``samples`` or ``batch`` below 1, or a checkpoint that does not fit its
            architecture.
        QuestDeployError: an output that is not finite.
    """
    if samples < 1 or batch < 1:
        raise InputError(f"expected samples and a batch of 1 or more, not {samples} and {batch}")
    recorded = trajectories.first(samples)
    inputs = list(_batches(recorded, batch))
    buckets = bucket_of(
        torch.cat([x["timestep"] for x in inputs]), torch.tensor(calibrated.scheme.bucket_edges)
    ).numpy()
    count = calibrated.scheme.buckets
    float_model = prepared(copy.deepcopy(unet), calibrated)
    expected = [float_model(**x, return_dict=False)[0] for x in inputs]
    power = _mean_by_bucket([_mean_square(y) for y in expected], buckets, count)
    model = QuantizedModel.from_checkpoint(calibrated).eval()
    quantized = {**model.quantized_layers(), **model.quantized_matmuls()}
    for name in quantized:
        model.model.set_submodule(name, float_model.get_submodule(name))
    layers = []
    for i, name in enumerate(_in_execution_order(float_model, quantized, inputs[0])):
        model.model.set_submodule(name, quantized[name])
        errors = [_mean_square(model(**x) - y) for x, y in zip(inputs, expected, strict=True)]
        model.model.set_submodule(name, float_model.get_submodule(name))
        layers.append(_layer_sensitivity(name, _mean_by_bucket(errors, buckets, count), power))
        progress("layers", i + 1, len(quantized))
    return Sensitivity(
        calibrated.model, calibrated.scheme.name, recorded.sample.shape[1], tuple(layers)
    )


def _batches(trajectories: Trajectories, size: int) -> Iterator[dict[str, Tensor]]:
    """The model's inputs, up to ``size`` rows at a time across steps: few samples a step would make
    small, slow batches.
    """
    steps, samples = trajectories.sample.shape[:2]
    rows = torch.arange(steps * samples)
    for part in rows.split(size):
        yield trajectories.inputs(part // samples, part % samples)


def _in_execution_order(
    model: nn.Module, names: Iterable[str], inputs: dict[str, Tensor]
) -> list[str]:
    order: dict[str, None] = {}  # a layer may run again on an equal input
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda *_, name=name: order.update({name: None})
        )
        for name in names
    ]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def _mean_square(x: Tensor) -> NDArray[np.float64]:
    """The mean square of each row of x [B, ...], [B]; raise QuestDeployError where one is not
    finite.
    """
    result: NDArray[np.float64] = x.double().square().flatten(1).mean(1).numpy()
    if not np.isfinite(result).all():
        raise QuestDeployError("the model's output is not finite; check its weights")
    return result


def _mean_by_bucket(
    values: list[NDArray[np.float64]], buckets: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """The mean over each bucket's rows, [K]; NaN for a bucket without any."""
    rows = np.concatenate(values)
    return np.asarray(
        [rows[buckets == b].mean() if (buckets == b).any() else np.nan for b in range(count)]
    )


def _layer_sensitivity(
    name: str, mse: NDArray[np.float64], power: NDArray[np.float64]
) -> LayerSensitivity:
    # An output of zeros has no relative error: the smallest float keeps the quotient defined where
    # the error is zero too.
    relative = mse / np.maximum(power, np.finfo(np.float64).tiny)

    def column(values: NDArray[np.float64]) -> tuple[float | None, ...]:
        return tuple(None if np.isnan(value) else float(value) for value in values)

    return LayerSensitivity(
        name, float(np.nanmean(mse)), float(np.nanmean(relative)), column(mse), column(relative)
    )
