"""The options that commands share, and what their texts mean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quest_deploy.artifacts.scheme import DEFAULT_BUCKETS, SUPPORTED_BITS, Granularity
from quest_deploy.backends.registry import BACKENDS
from quest_deploy.errors import InputError
from quest_deploy.models.registry import MODEL_NAMES
from quest_deploy.stages.workspaces import DEFAULT_BITS, DEFAULT_MODEL

if TYPE_CHECKING:
    from collections.abc import Callable

WorkspaceOption = Annotated[
    Path | None,
    typer.Option(
        "--workspace", "-w", help="The workspace folder.", show_default="quest-out/<model>-<bits>"
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help=f"The model: {', '.join(MODEL_NAMES)}; or the path of a diffusers folder or of a "
        "single-file checkpoint.",
        show_default=f"the workspace's, or {DEFAULT_MODEL}",
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option(
        help="Commit, branch or tag of a model on the Hugging Face Hub.",
        show_default="the registry's commit",
    ),
]
RandomWeightsOption = Annotated[
    bool,
    typer.Option(
        "--random-weights",
        help="Build the model's architecture alone, for size and speed; needs no download.",
    ),
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="PATH:WEIGHT",
        help="A LoRA to fuse before quantization, a .safetensors file; may be repeated.",
    ),
]
BitsOption = Annotated[
    str | None,
    typer.Option(
        help=f"Bits of weights and activations: {', '.join(SUPPORTED_BITS)}.",
        show_default=f"the workspace's, or {DEFAULT_BITS}",
    ),
]
BucketsOption = Annotated[
    int | None,
    typer.Option(
        help="Timestep buckets, from 1 to the number of training steps.",
        show_default=f"the workspace's, or {DEFAULT_BUCKETS}",
    ),
]
GranularityOption = Annotated[
    Granularity | None,
    typer.Option(
        help="What one activation scale covers, besides its bucket.",
        show_default=f"the workspace's, or {Granularity.FOLDED_CHANNEL.value}",
    ),
]
AttentionBitsOption = Annotated[
    str | None,
    typer.Option(
        help="Bits of attention's q, k and v: 4, 8 or float.",
        show_default="the workspace's, or float",
    ),
]
SoftmaxBitsOption = Annotated[
    str | None,
    typer.Option(
        help="Bits of attention's softmax, unsigned: 4, 8 or float.",
        show_default="the workspace's, or float",
    ),
]
SplitShortcutsOption = Annotated[
    bool | None,
    typer.Option(
        "--split-shortcuts/--whole-shortcuts",
        help="Quantize the two halves of what a shortcut convolution reads, h and the skip "
        "connection, each by itself.",
        show_default="the workspace's, or whole",
    ),
]
METHOD_HELP = (
    "How clip ranges are chosen: mse, minmax or l2.4; or qdiff: l2.4, then Q-Diffusion's "
    "reconstruction (a new workspace has --split-shortcuts then)."
)
BackendOption = Annotated[str, typer.Option(help=f"The backend: {', '.join(BACKENDS)}.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on standard output.")
]


def given(values: dict[str, Any], **parsers: Callable[[Any], Any]) -> dict[str, Any]:
    """What the user chose, for the function of the command's name: the command's parameters but
    --json, as their ``parsers`` understand them. What is None is the function's to choose.
    """
    return {
        name: parsers[name](value) if name in parsers else value
        for name, value in values.items()
        if name != "as_json" and value is not None
    }


def parse_sample_size(text: str) -> tuple[int, int]:
    """A height and a width from "64" or "64x96"; raise InputError for anything else."""
    found = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text)
    if found is None:
        raise InputError(
            "--sample-size: expected a size, such as 64, or a height and a width, such as 64x96, "
            f"not {text!r}"
        )
    return int(found[1]), int(found[2] or found[1])


def parse_pool_limit(text: str) -> int:
    """Bytes from "workspace:2G" (units of 1024: K, M, G); raise InputError for anything else."""
    pool, _, given = text.partition(":")
    found = _bytes(given) if pool == "workspace" else None
    if found is None:
        raise InputError(
            f"--pool-limit: expected workspace:SIZE, such as workspace:2G, not {text!r}"
        )
    return found


def parse_budget(text: str) -> int:
    """Bytes from "2G"; raise InputError for anything else."""
    found = _bytes(text)
    if found is None:
        raise InputError(f"--weight-streaming-budget: expected a size, such as 2G, not {text!r}")
    return found


def _bytes(text: str) -> int | None:
    found = re.fullmatch(r"(\d{1,15})([KMG]?)", text)
    return (
        None
        if found is None
        else int(found[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[found[2]]
    )


def parse_tactic_sources(names: list[str]) -> tuple[str, ...]:
    """The names; "none", which must be alone, is no source at all."""
    if "none" in names and len(names) > 1:
        raise InputError("--tactic-sources none excludes every other")
    return () if names == ["none"] else tuple(dict.fromkeys(names))


def parse_numbers(text: str) -> list[float]:
    """The numbers of "999, 500"; raise InputError for anything else."""
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError as e:
        raise InputError(
            f"--timesteps: expected numbers separated by commas, found {text!r}"
        ) from e


def parse_list(text: str) -> tuple[str, ...]:
    """The parts of "a, b"."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_patterns(text: str) -> tuple[str, ...]:
    """The patterns of "conv_in, *.ff.*"; "all" is the one that every layer matches."""
    return ("*",) if text == "all" else parse_list(text)
