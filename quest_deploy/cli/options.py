"""The options that commands share, and how they find their workspace."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quest_deploy.artifacts.model_source import Lora
from quest_deploy.artifacts.scheme import DEFAULT_BUCKETS, SUPPORTED_BITS, Granularity, Scheme
from quest_deploy.artifacts.workspace import MANIFEST, Workspace, check_vacant
from quest_deploy.backends.registry import BACKENDS
from quest_deploy.errors import InputError
from quest_deploy.models.loading import resolve_source
from quest_deploy.models.registry import EMBEDDED, MODEL_NAMES, check_model_name

if TYPE_CHECKING:
    from quest_deploy.artifacts.model_source import ModelSource

DEFAULT_MODEL, DEFAULT_BITS, DEFAULT_BACKEND = EMBEDDED, "w4a4", "openvino"
FLOAT = "float"

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
BackendOption = Annotated[str, typer.Option(help=f"The backend: {', '.join(BACKENDS)}.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on standard output.")
]


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
            split_shortcuts=split_shortcuts
            if self.split_shortcuts is None
            else self.split_shortcuts,
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


@dataclass(frozen=True)
class ModelChoices:
    """What the user chose of the model; None, False or nothing for what is the workspace's, or the
    default.
    """

    model: str | None = None
    revision: str | None = None
    random_weights: bool = False
    loras: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the model is called: its name in the registry, or the stem of its path."""
        model = self.model or DEFAULT_MODEL
        if model in MODEL_NAMES:
            return model
        path = Path(model).resolve()
        return path.stem if path.is_file() else path.name

    def source(self) -> ModelSource:
        """Where the model comes from; a model on the hub is fetched. Raise InputError where there
        is none.
        """
        return resolve_source(
            self.model or DEFAULT_MODEL,
            revision=self.revision,
            random_weights=self.random_weights,
            loras=self.loras,
        )

    def check(self, workspace: Workspace) -> None:
        """Raise InputError where the workspace's model is another one."""
        source = workspace.source
        if self.model is not None:
            named = self.model if self.model in MODEL_NAMES else str(Path(self.model).resolve())
            _check(
                workspace, "model", named, source.name if source.path is None else source.location
            )
        if self.revision not in (None, source.requested, source.revision):
            _check(workspace, "revision", self.revision, source.revision)
        if self.random_weights:
            _check(
                workspace,
                "weights",
                "random ones",
                "random ones" if source.random_weights else "trained ones",
            )
        if self.loras:
            _check(
                workspace, "LoRAs", [Lora.parse(text) for text in self.loras], list(source.loras)
            )


def open_workspace(workspace: Path | None, model: str | None, bits: str | None) -> Workspace:
    """Open an existing workspace; raise InputError where it is not of the given model or bits."""
    choices = ModelChoices(model)
    opened = Workspace.open(_root(workspace, choices, bits))
    choices.check(opened)
    SchemeChoices(bits).check(opened)
    return opened


def create_workspace(
    workspace: Path | None,
    model: ModelChoices,
    choices: SchemeChoices,
    *,
    split_shortcuts: bool = False,
) -> Workspace:
    """Open a workspace, or make it; what is not given is taken from it, or else the default
    (``split_shortcuts`` is that default).
    """
    check_model_name(model.model or DEFAULT_MODEL)
    scheme = choices.scheme(split_shortcuts=split_shortcuts)
    root = _root(workspace, model, choices.bits)
    if not (root / MANIFEST).exists():
        check_vacant(root)  # before anything is downloaded
        return Workspace.create(root, model.source(), scheme)
    opened = Workspace.open(root)
    model.check(opened)
    choices.check(opened)
    return opened


def parse_sample_size(text: str) -> tuple[int, int]:
    """A height and a width from "64" or "64x96"; raise InputError for anything else."""
    found = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text)
    if found is None:
        raise InputError(
            "--sample-size: expected a size, such as 64, or a height and a width, such as 64x96, "
            f"not {text!r}"
        )
    return int(found[1]), int(found[2] or found[1])


def _root(workspace: Path | None, model: ModelChoices, bits: str | None) -> Path:
    return workspace or Path("quest-out") / f"{model.name}-{bits or DEFAULT_BITS}"


def _operand_bits(option: str, value: str | None) -> int | None:
    if value not in (None, "4", "8", FLOAT):
        raise InputError(f"{option}: expected 4, 8 or {FLOAT}, not {value!r}")
    return None if value in (None, FLOAT) else int(value)


def _check(workspace: Workspace, name: str, wanted: object, found: object) -> None:
    if wanted is not None and wanted != found:
        raise InputError(
            f"{workspace.root} holds {name} {found}, not {wanted}; give another folder with -w"
        )
