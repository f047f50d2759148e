"""The options that commands share, and how they find their workspace."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from quest_deploy.engine.backends import BACKENDS
from quest_deploy.errors import InputError
from quest_deploy.models.registry import MODEL_NAMES, check_model_name
from quest_deploy.scheme import DEFAULT_BUCKETS, SUPPORTED_BITS, Granularity, Scheme
from quest_deploy.workspace import MANIFEST, Workspace

DEFAULT_MODEL, DEFAULT_BITS, DEFAULT_BACKEND = "tiny", "w4a4", "openvino"
FLOAT = "float"

WorkspaceOption = Annotated[
    Path | None, typer.Option("--workspace", "-w", help="The workspace folder.", show_default="quest-out/<model>-<bits>")
]
ModelOption = Annotated[
    str | None, typer.Option(help=f"The model: {', '.join(MODEL_NAMES)}.", show_default=f"the workspace's, or {DEFAULT_MODEL}")
]
BitsOption = Annotated[
    str | None,
    typer.Option(
        help=f"Bits of weights and activations: {', '.join(SUPPORTED_BITS)}.", show_default=f"the workspace's, or {DEFAULT_BITS}"
    ),
]
BucketsOption = Annotated[
    int | None,
    typer.Option(
        help="Timestep buckets, from 1 to the number of training steps.", show_default=f"the workspace's, or {DEFAULT_BUCKETS}"
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
    typer.Option(help="Bits of attention's q, k and v: 4, 8 or float.", show_default="the workspace's, or float"),
]
SoftmaxBitsOption = Annotated[
    str | None,
    typer.Option(help="Bits of attention's softmax, unsigned: 4, 8 or float.", show_default="the workspace's, or float"),
]
SplitShortcutsOption = Annotated[
    bool | None,
    typer.Option(
        "--split-shortcuts/--whole-shortcuts",
        help="Quantize the two halves of what a shortcut convolution reads, h and the skip connection, each by itself.",
        show_default="the workspace's, or whole",
    ),
]
BackendOption = Annotated[str, typer.Option(help=f"The backend: {', '.join(BACKENDS)}.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


@dataclass(frozen=True)
class SchemeChoices:
    """What the user chose of the scheme; None for what is the workspace's, or the default."""

    bits: str | None = None
    buckets: int | None = None
    granularity: Granularity | None = None
    attention_bits: str | None = None
    softmax_bits: str | None = None
    split_shortcuts: bool | None = None

    def scheme(self, *, split_shortcuts: bool = False) -> Scheme:
        """The scheme of a new workspace; raise InputError for what is unknown.

        Args:
            split_shortcuts: where the user chose neither.
        """
        return Scheme.parse(
            self.bits or DEFAULT_BITS,
            buckets=DEFAULT_BUCKETS if self.buckets is None else self.buckets,
            granularity=self.granularity or Granularity.FOLDED_CHANNEL,
            attention_bits=_operand_bits("--attention-bits", self.attention_bits),
            softmax_bits=_operand_bits("--softmax-bits", self.softmax_bits),
            split_shortcuts=split_shortcuts if self.split_shortcuts is None else self.split_shortcuts,
        )

    def check(self, workspace: Workspace) -> None:
        """Raise InputError where the workspace's scheme is another one."""
        scheme = workspace.scheme
        found = {
            "bits": scheme.name,
            "buckets": scheme.buckets,
            "granularity": scheme.granularity,
            "attention_bits": str(scheme.attention_bits or FLOAT),
            "softmax_bits": str(scheme.softmax_bits or FLOAT),
            "split_shortcuts": scheme.split_shortcuts,
        }
        for name, value in found.items():
            _check(workspace, name.replace("_", " "), getattr(self, name), value)


def open_workspace(workspace: Path | None, model: str | None, bits: str | None) -> Workspace:
    """Open an existing workspace; raise InputError where it is not of the given model or bits."""
    opened = Workspace.open(_root(workspace, model, bits))
    _check(opened, "model", model, opened.model)
    SchemeChoices(bits).check(opened)
    return opened


def create_workspace(workspace: Path | None, model: str | None, choices: SchemeChoices, *, split_shortcuts: bool = False) -> Workspace:
    """Open a workspace, or make it; what is not given is taken from it, or else the default (``split_shortcuts`` is that default)."""
    check_model_name(model or DEFAULT_MODEL)
    scheme = choices.scheme(split_shortcuts=split_shortcuts)
    root = _root(workspace, model, choices.bits)
    if not (root / MANIFEST).exists():
        return Workspace.create(root, model or DEFAULT_MODEL, scheme)
    opened = Workspace.open(root)
    _check(opened, "model", model, opened.model)
    choices.check(opened)
    return opened


def _root(workspace: Path | None, model: str | None, bits: str | None) -> Path:
    return workspace or Path("quest-out") / f"{model or DEFAULT_MODEL}-{bits or DEFAULT_BITS}"


def _operand_bits(option: str, value: str | None) -> int | None:
    if value not in (None, "4", "8", FLOAT):
        raise InputError(f"{option}: expected 4, 8 or {FLOAT}, not {value!r}")
    return None if value in (None, FLOAT) else int(value)


def _check(workspace: Workspace, name: str, wanted: object, found: object) -> None:
    if wanted is not None and wanted != found:
        raise InputError(f"{workspace.root} holds {name} {found}, not {wanted}; give another folder with -w")
