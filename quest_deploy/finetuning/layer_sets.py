"""Which layers each stage of QuEST trains, by kind of model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quest_deploy.errors import InputError
from quest_deploy.quantization.layer_kinds import matches

if TYPE_CHECKING:
    from collections.abc import Iterable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerSets:
    """Glob patterns over layer names: ``temporal`` for stage 1, ``sensitive`` for stage 2.

    Attributes:
        in_float: patterns of modules and parameters that are trained like layers where they stay in
            float.
    """

    temporal: tuple[str, ...]
    sensitive: tuple[str, ...]
    in_float: tuple[str, ...] = ()


_TEMPORAL = ("*.time_emb_proj",)
LAYER_SETS = {
    "unconditional": LayerSets(_TEMPORAL, ("*.to_q", "*.to_k", "*.to_v")),
    "class-conditional": LayerSets(
        _TEMPORAL, ("*.ff.net.*", "*.attn1.to_q", "*.attn1.to_k", "*.attn1.to_v", "*.attn2.to_q")
    ),
    "text-to-image": LayerSets(_TEMPORAL, ("*.ff.net.*",)),
}
"""QuEST's table (its paper, section 4, and its official code), for UNets."""


def _with_norms(temporal: tuple[str, ...], sensitive: tuple[str, ...]) -> LayerSets:
    """The sets of a transformer, whose temporal layers are trained in float too."""
    return LayerSets(temporal, sensitive, in_float=temporal)


_TABLES = ("*scale_shift_table",)
_BLOCKS = ("*.ff.net.*", "*.attn1.*", "*.attn2.*")
TRANSFORMER_LAYER_SETS = {
    "pixart": _with_norms(("adaln_single.linear", *_TABLES), _BLOCKS),
    "sd3": _with_norms(
        ("*.norm1.linear", "*.norm1_context.linear", "norm_out.linear"),
        ("*.ff.net.*", "*.ff_context.net.*", "*.attn.*", "*.attn2.*"),
    ),
    "flux": _with_norms(
        ("*.norm1.linear", "*.norm1_context.linear", "*.norm.linear", "norm_out.linear"),
        ("*.ff.net.*", "*.ff_context.net.*", "*.attn.*", "*.proj_mlp", "*.proj_out"),
    ),
    "sana": _with_norms(("time_embed.linear", *_TABLES), ("*.ff.conv_*", "*.attn1.*", "*.attn2.*")),
    "dit": _with_norms(("*.norm1.linear", "proj_out_1"), _BLOCKS),
}
"""Ours, for transformers: the timestep enters by the adaptive norms' linears and tables."""


def layer_sets(name: str) -> LayerSets:
    """The row of either table; raise InputError where there is none."""
    rows = LAYER_SETS | TRANSFORMER_LAYER_SETS
    if name not in rows:
        raise InputError(f"unknown model family {name!r}: expected one of {', '.join(rows)}")
    return rows[name]


def select_layers(
    names: Iterable[str], patterns: tuple[str, ...], *, or_all: bool = False
) -> tuple[str, ...]:
    """The ``names`` that match one of the ``patterns``.

    Args:
        or_all: whether they are all of them where none matches, as in a UNet without attention;
            else InputError is raised.
    """
    names = tuple(names)
    chosen = tuple(name for name in names if any(matches(name, pattern) for pattern in patterns))
    if not chosen and or_all:
        logger.warning(
            "no quantized layer matches %s: all %d are trained", ", ".join(patterns), len(names)
        )
        return names
    if not chosen:
        raise InputError(f"no quantized layer matches {', '.join(patterns)}")
    return chosen
