"""The kinds of layers of diffusers' networks, by the names of their modules."""

from __future__ import annotations

from fnmatch import fnmatchcase

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
    "ff.net": ("*.ff.net.*", "*.ff_context.net.*"),
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
        (
            group
            for group, patterns in _GROUPS.items()
            if any(fnmatchcase(layer, p) for p in patterns)
        ),
        OTHER,
    )
