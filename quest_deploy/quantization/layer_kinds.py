"""The kinds of layers of diffusers' networks, by the names of their modules."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from quest_deploy.artifacts.checkpoint import RESIDUAL
from quest_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

TEMPORAL, PRODUCTS, OTHER = "time_emb_proj", "attention products", "other"
_GROUPS = {
    TEMPORAL: ("*.time_emb_proj",),
    PRODUCTS: ("*.scores", "*.mix"),
    "attn2": ("*.attn2.*",),
    "attn1.to_q/k/v": (
        *(
            f"*.{attention}.to_{x}"
            for attention in ("attn1", "attentions.*", "attn")
            for x in "qkv"
        ),
        "*.attn.add_?_proj",
    ),
    "attn1.to_out": (
        *("*.attn1.to_out.*", "*.attentions.*.to_out.*", "*.attn.to_out.*"),
        "*.attn.to_add_out",
    ),
    "ff.net": ("*.ff.net.*", "*.ff_context.net.*", "*.ff.conv_*", "*.proj_mlp"),
    "resnets.conv1": ("*.resnets.*.conv1",),
    "resnets.conv2": ("*.resnets.*.conv2",),
    "resnets.conv_shortcut": ("*.conv_shortcut", "*.conv_shortcut.*"),
    "proj_in/proj_out": ("*.proj_in", "*.proj_out"),
    "samplers": ("*.downsamplers.*", "*.upsamplers.*"),
    "conv_in/conv_out": ("conv_in", "conv_out"),
    "time_embedding": ("time_embedding.*", "class_embedding.*"),
}
"""Glob patterns of each kind of layer, of a transformer's blocks too; the first match counts."""
GROUPS = (*_GROUPS, OTHER)


def group_of(layer: str) -> str:
    """The kind of layer that a module path names, one of ``GROUPS``."""
    return next(
        (group for group, patterns in _GROUPS.items() if any(matches(layer, p) for p in patterns)),
        OTHER,
    )


def layer_path(layer: str) -> str:
    """The module path of a layer in the float model: of what is left of a layer beside a branch of
    low rank, that of the layer.
    """
    return layer.removesuffix(f".{RESIDUAL}")


def matches(layer: str, pattern: str) -> bool:
    """Whether a glob pattern matches a layer, by its name or by its :func:`layer_path`."""
    return fnmatchcase(layer, pattern) or fnmatchcase(layer_path(layer), pattern)


def layers_matching(names: Iterable[str], patterns: Iterable[str], purpose: str) -> tuple[str, ...]:
    """Those of the ``names`` that match, in their order; raise InputError for a pattern that
    matches none, which is "to have" what the ``purpose`` says.
    """
    names = tuple(names)
    found = {pattern: {name for name in names if matches(name, pattern)} for pattern in patterns}
    for pattern, matched in found.items():
        if not matched:
            raise InputError(f"no layer matches {pattern!r}, which is to have {purpose}")
    return tuple(name for name in names if any(name in matched for matched in found.values()))
