"""Read an official checkpoint and check that it holds exactly what its UNet and its settings
promise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quest_deploy.errors import InputError
from quest_deploy.files import check_archive
from quest_deploy.importers.architecture import Layout
from quest_deploy.importers.settings import ImportSettings, Source

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from quest_deploy.importers.architecture import Names, OfficialLayer, UNetConfig

PREFIX = "model."
IGNORED = ".current_delta"
"""The scales of the timestep that was set last; only files of finetuned models have it."""
DTYPES = frozenset(
    {
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
    }
)
_SHARED = 4
"""How many times its bytes the tensors of a file may have, which may share some."""
LISTED = 8
"""How many keys of a kind a message names."""


@dataclass(frozen=True)
class OfficialCheckpoint:
    """A checkpoint whose keys and shapes are all as expected.

    Attributes:
        path: its file.
        tensors: float32, by name without the prefix.
        split: whether shortcut convolutions that read a concatenation have quantizers for each
            half.
        context_tokens: the length of the condition; None for a UNet that has none.
    """

    path: Path
    config: UNetConfig
    settings: ImportSettings
    names: Names
    tensors: dict[str, Tensor]
    split: bool
    context_tokens: int | None


def read(path: Path, config: UNetConfig, settings: ImportSettings) -> OfficialCheckpoint:
    """Read the file at ``path``, tensors only.

    Raises:
        InputError: a timestep lies beyond the training's; the file cannot be read; it holds
            anything but dense tensors of real numbers; keys are missing or unexpected (they are
            listed); shapes do not fit (they are named); a value is not finite; a zero-point is no
            integer; a weight's scale is not positive.
    """
    last = config.train_timesteps - 1
    if settings.timesteps and not 0 <= settings.timesteps[-1] <= settings.timesteps[0] <= last:
        raise InputError(
            f"timesteps: expected them from {last} down to 0, as the UNet was trained, found "
            f"{settings.timesteps}"
        )
    tensors = _load(path)
    names = config.names()
    split = any(key.endswith(".weight_quantizer_0.delta") for key in tensors)
    context = _context_tokens(tensors, names, settings)
    expected = _expected(names, settings, split, context)
    problems = []
    for kind, keys in (
        ("missing", expected.keys() - tensors.keys()),
        ("unexpected", tensors.keys() - expected.keys()),
    ):
        if keys:
            problems.append(
                f"{len(keys)} {kind} keys: {_listed(f'{PREFIX}{key}' for key in sorted(keys))}"
            )
    wrong = [
        key
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    if wrong:
        shapes = (
            f"{PREFIX}{key} is {list(tensors[key].shape)}, expected {list(expected[key])}"
            for key in wrong
        )
        problems.append(f"{len(wrong)} shapes do not fit: {_listed(shapes)}")
    if not problems:
        promised = sum(value.numel() * value.element_size() for value in tensors.values())
        if promised > _SHARED * (size := path.stat().st_size):
            raise InputError(
                f"{path}: expected tensors that are in the file, found {promised} bytes of them in "
                f"a file of {size}"
            )
        # Only now: a few bytes can describe a tensor of any shape, which takes no memory before it
        # is copied.
        tensors = {key: value.detach().float() for key, value in tensors.items()}
        problems = _bad_values(tensors)
    if problems:
        raise InputError(
            f"{path} does not fit the given UNet and settings (from {settings.source.value}): "
            f"{'; '.join(problems)}"
        )
    return OfficialCheckpoint(path, config, settings, names, tensors, split, context)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except FileNotFoundError as e:
        raise InputError(f"{path} does not exist") from e
    except (
        Exception
    ) as e:  # a malformed file makes torch and pickle raise anything, MemoryError too
        # torch's own words advise loading with weights_only=False, which would run the file's code.
        reason = e if isinstance(e, OSError) else type(e).__name__
        raise InputError(
            f"{path}: expected a file of tensors as torch.save writes it ({reason})"
        ) from e
    if not isinstance(content, dict) or not all(
        isinstance(value, Tensor) for value in content.values()
    ):
        raise InputError(
            f"{path}: expected a state dict of tensors, found {type(content).__name__} of "
            "something else"
        )
    others = [str(key) for key in content if not str(key).startswith(PREFIX)]
    if others:
        raise InputError(
            f"{path}: expected keys that begin with {PREFIX!r}, found {_listed(others)}"
        )
    if strange := [key for key, value in content.items() if not _is_plain(value)]:
        raise InputError(
            f"{path}: expected dense tensors of real numbers, found others: {_listed(strange)}"
        )
    return {
        key.removeprefix(PREFIX): value
        for key, value in content.items()
        if not key.endswith(IGNORED)
    }


def _is_plain(value: Tensor) -> bool:
    dense = (
        value.layout is torch.strided
        and not value.is_nested
        and value.device.type == "cpu"
        and not value.is_neg()
    )
    return dense and value.dtype in DTYPES


def _context_tokens(
    tensors: dict[str, Tensor], names: Names, settings: ImportSettings
) -> int | None:
    """The length of the context: the tables of the softmax over it show it, but for a Q-Diffusion
    file, which has scalars.
    """
    over_context = [operand.name for operand in names.operands if operand.size is None]
    given = settings.context_tokens
    if not over_context:
        if given is not None:
            raise InputError("--context-tokens: the UNet reads no context")
        return None
    for name in over_context:
        table = tensors.get(f"{name}.delta_list")
        if table is not None and table.dim() == 3:
            shown = table.shape[2]
            if shown < 1:
                raise InputError(
                    f"{PREFIX}{name}.delta_list: expected a context of 1 token or more"
                )
            if given not in (None, shown):
                raise InputError(f"--context-tokens: the checkpoint shows {shown}, not {given}")
            return shown
    if given is None:
        raise InputError(
            "the checkpoint does not say how long the model's context is; give --context-tokens "
            "(77 for Stable Diffusion)"
        )
    return given


def _expected(
    names: Names, settings: ImportSettings, split: bool, context: int | None
) -> dict[str, tuple[int, ...]]:
    """Every key's shape."""
    shapes: dict[str, tuple[int, ...]] = {}

    def activation(quantizer: str, table: tuple[int, ...]) -> None:
        if settings.source is Source.QDIFF:
            shapes[f"{quantizer}.delta"] = shapes[f"{quantizer}.zero_point"] = ()
        else:
            whole = (len(settings.timesteps), *table)
            shapes[f"{quantizer}.delta_list"] = shapes[f"{quantizer}.zero_point_list"] = whole

    for layer in names.layers:
        shapes[f"{layer.name}.weight"] = layer.shape
        if layer.bias:
            shapes[f"{layer.name}.bias"] = layer.shape[:1]
        for suffix, channels in parts_of(layer, split):
            rest = layer.shape[2:]
            shapes[f"{layer.name}.weight_quantizer{suffix}.alpha"] = (
                layer.shape[0],
                channels,
                *rest,
            )
            for table in ("delta", "zero_point"):
                shapes[f"{layer.name}.weight_quantizer{suffix}.{table}"] = (
                    layer.shape[0],
                    *[1] * (len(layer.shape) - 1),
                )
            activation(f"{layer.name}.act_quantizer{suffix}", _table(layer, channels))
    for operand in names.operands:
        activation(operand.name, (1, operand.size or context or 0))
    for name, (_, channels) in names.floats.items():
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (channels,)
    return shapes


def parts_of(layer: OfficialLayer, split: bool) -> list[tuple[str, int]]:
    """The suffixes of a layer's quantizers, each with the input channels that it covers."""
    if split and layer.halves is not None:
        return [("", layer.halves[0]), ("_0", layer.halves[1])]
    return [("", layer.shape[1])]


def _table(layer: OfficialLayer, channels: int) -> tuple[int, ...]:
    if layer.layout is Layout.IMAGE:
        return (channels, 1, 1)
    if layer.layout is Layout.VECTOR:
        return (channels,)
    return (1, layer.tokens if layer.layout is Layout.TOKENS else channels)


def _bad_values(tensors: dict[str, Tensor]) -> list[str]:
    problems = []
    for key, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            problems.append(f"{PREFIX}{key} holds values that are not finite")
        elif "zero_point" in key and bool((value != value.round()).any()):
            problems.append(f"{PREFIX}{key} holds zero-points that are not integers")
        elif "weight_quantizer" in key and key.endswith(".delta") and bool((value <= 0).any()):
            problems.append(f"{PREFIX}{key} holds scales that are not positive")
        elif "act_quantizer" in key and ".delta" in key and bool((value == 0).any()):
            problems.append(f"{PREFIX}{key} holds scales of zero")
    return [_listed(problems)] if problems else []


def _listed(entries: Iterable[str]) -> str:
    found = list(entries)
    rest = len(found) - LISTED
    return ", ".join(found[:LISTED]) + (f" and {rest} more" if rest > 0 else "")
