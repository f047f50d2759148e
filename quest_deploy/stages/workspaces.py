"""Which workspace a command or a function is about: what was chosen of its model and its scheme."""

import glob
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quest_deploy.artifacts.model_source import IPAdapter, Lora, ModelSource
from quest_deploy.artifacts.scheme import (
    DEFAULT_BUCKETS,
    SUPPORTED_BITS,
    TRAIN_TIMESTEPS,
    Granularity,
    Scheme,
    as_float32,
    quantile_edges,
)
from quest_deploy.artifacts.workspace import MANIFEST, Workspace, check_vacant
from quest_deploy.backends.base import require_package
from quest_deploy.errors import InputError
from quest_deploy.files import absolute
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.registry import (
    EMBEDDED,
    MODEL_NAMES,
    DiffusionModel,
    check_model_name,
)
from quest_deploy.models.schedulers import PREDICTION_TYPES, set_steps
from quest_deploy.options import Option, Options
from quest_deploy.stages.options import QDIFF, parse_patterns

Place = Workspace | Path | str | None
"""An open workspace or its folder; None for quest-out/<model>-<bits>, or the only one there."""
OUTPUT = Path("quest-out")
DEFAULT_MODEL, DEFAULT_BITS = EMBEDDED, "w4a8"
logger = logging.getLogger(__name__)
FLOAT, NONE = "float", "none"
OPERAND_BITS = ("4", "8", FLOAT)
MODEL = Option(
    f"The model: {', '.join(MODEL_NAMES)}; or the path of a diffusers folder or of a "
    "single-file checkpoint.",
    default=f"the workspace's, or {DEFAULT_MODEL}",
)
BITS = Option(
    f"Bits of weights and activations: {', '.join(SUPPORTED_BITS)}.",
    default=f"the workspace's, or {DEFAULT_BITS}",
)

LORA = Option(
    "A LoRA to fuse before quantization, a .safetensors file; may be repeated.",
    metavar="PATH:WEIGHT",
)


def _parse_layers(text: str) -> tuple[str, ...]:
    return () if text == NONE else parse_patterns(text)


def _parse_edges(text: str) -> tuple[float, ...] | str:
    """Numbers separated by commas, or the text itself, which names a schedule."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return text


@dataclass(frozen=True, kw_only=True)
class SchemeChoices(Options):
    """What the user chose of the scheme; None for what is the workspace's, or the default."""

    bits: str | None = BITS.field(None)
    buckets: int | None = Option(
        "Timestep buckets, from 1 to the number of training steps.",
        default=f"the workspace's, or {DEFAULT_BUCKETS}",
    ).field(None)
    bucket_edges: Sequence[float] | str | None = Option(
        "Where buckets end and begin: timesteps separated by commas; or SCHEDULER:STEPS, for "
        "as many of that schedule's timesteps in each of --buckets.",
        default="the workspace's, or equally wide buckets; of flow matching the model's steps",
        text=str,
        parse=_parse_edges,
    ).field(None)
    granularity: Granularity | None = Option(
        "What one activation scale covers, besides its bucket.",
        default=f"the workspace's, or {Granularity.FOLDED_CHANNEL.value}",
    ).field(None)
    attention_bits: str | None = Option(
        "Bits of attention's q, k and v: 4, 8 or float.",
        choices=OPERAND_BITS,
        default="the workspace's, or float",
    ).field(None)
    softmax_bits: str | None = Option(
        "Bits of attention's softmax, unsigned: 4, 8 or float.",
        choices=OPERAND_BITS,
        default="the workspace's, or float",
    ).field(None)
    split_shortcuts: bool | None = Option(
        "Quantize the two halves of what a shortcut convolution reads, h and the skip "
        "connection, each by itself.",
        flags=("--split-shortcuts/--whole-shortcuts",),
        default="the workspace's, or whole",
    ).field(None)
    eight_bit_layers: Sequence[str] | None = Option(
        "Layers whose weights and inputs have 8 bits, whatever those of the rest have: globs "
        "separated by commas, or none.",
        default="the workspace's, or the model's",
        text=str,
        parse=_parse_layers,
    ).field(None)
    float_layers: Sequence[str] | None = Option(
        "Layers that are not quantized: globs separated by commas, or none.",
        default="the workspace's, or the model's",
        text=str,
        parse=_parse_layers,
    ).field(None)
    low_rank: int | None = Option(
        "Rank of the branches in FP16 that run beside layers; 0 for none.",
        minimum=0,
        default="the workspace's, or 0",
    ).field(None)
    low_rank_layers: Sequence[str] | None = Option(
        "Layers that have such a branch, such as those that `sensitivity` picks: globs "
        "separated by commas, or all.",
        default="the workspace's, or none",
        text=str,
        parse=parse_patterns,
    ).field(None)

    def scheme(
        self,
        train_timesteps: int = TRAIN_TIMESTEPS,
        *,
        edges: Sequence[float] | None = None,
        split_shortcuts: bool = False,
        eight_bit_layers: Sequence[str] = (),
        float_layers: Sequence[str] = (),
    ) -> Scheme:
        """The scheme of a new workspace; raise InputError for what is unknown.

        Args:
            train_timesteps: the number of steps that the model was trained with.
            edges: those of the buckets; equally wide ones where it is None.
            split_shortcuts: where the user chose neither.
            eight_bit_layers, float_layers: where the user chose none. Layers of 7-bit weights are
                none of the former: they would lose what those are for.
        """
        bits = self.bits or DEFAULT_BITS
        if bits.startswith("w7"):
            eight_bit_layers = ()
        usual = min(DEFAULT_BUCKETS, train_timesteps)
        return Scheme.parse(
            bits,
            buckets=usual if self.buckets is None else self.buckets,
            edges=edges,
            train_timesteps=train_timesteps,
            granularity=self.granularity or Granularity.FOLDED_CHANNEL,
            attention_bits=_operand_bits(self.attention_bits),
            softmax_bits=_operand_bits(self.softmax_bits),
            split_shortcuts=split_shortcuts
            if self.split_shortcuts is None
            else self.split_shortcuts,
            eight_bit_layers=eight_bit_layers
            if self.eight_bit_layers is None
            else self.eight_bit_layers,
            float_layers=float_layers if self.float_layers is None else self.float_layers,
            low_rank=self.low_rank or 0,
            low_rank_layers=self.low_rank_layers or (),
        )

    def edges(
        self, model: DiffusionModel, usual: int = DEFAULT_BUCKETS
    ) -> tuple[float, ...] | None:
        """The edges that the user chose of ``model``'s timesteps, or else the model's own; None for
        equally wide buckets.

        Args:
            usual: how many buckets a schedule is divided into where the user did not choose it.

        Raises:
            InputError: they are not as many as the buckets, or name no schedule of the model's.
        """
        chosen = self.bucket_edges
        if chosen is None and model.bucket_steps is not None:
            chosen = f"{model.calibration_scheduler}:{max(model.bucket_steps, self.buckets or 1)}"
        if isinstance(chosen, str):
            return _edges_of_schedule(chosen, model, self.buckets, usual)
        if chosen is not None and self.buckets not in (None, len(chosen) + 1):
            raise InputError(
                f"--bucket-edges: expected {(self.buckets or 1) - 1} for --buckets {self.buckets}, "
                f"found {len(chosen)}"
            )
        return None if chosen is None else tuple(chosen)

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
            "eight_bit_layers": scheme.eight_bit_layers,
            "float_layers": scheme.float_layers,
            "low_rank": scheme.low_rank,
            "low_rank_layers": scheme.low_rank_layers,
        }
        for name, value in found.items():
            _check(workspace, name.replace("_", " "), getattr(self, name), value)
        if self.bucket_edges is not None:
            edges = self.edges(load_model(workspace.source), scheme.buckets)
            wanted = None if edges is None else as_float32(edges)
            _check(workspace, "bucket edges", wanted, scheme.bucket_edges)


@dataclass(frozen=True, kw_only=True)
class ModelChoices(Options):
    """What the user chose of the model; None, False or nothing for what is the workspace's, or the
    default.
    """

    model: str | None = MODEL.field(None)
    revision: str | None = Option(
        "Commit, branch or tag of a model on the Hugging Face Hub.", default="the registry's commit"
    ).field(None)
    random_weights: bool = Option(
        "Build the model's architecture alone, for size and speed; needs no download."
    ).field(False)
    lora: Sequence[str] = LORA.field(())
    ip_adapter: str | None = Option(
        "An IP-Adapter to quantize with the model, a .safetensors file, and the scale to "
        "calibrate with.",
        metavar="PATH:SCALE",
        default="the workspace's, or none",
    ).field(None)
    image_encoder: Path | None = Option(
        "The folder of what encodes the IP-Adapter's images.",
        metavar="DIR",
        default="image_encoder beside the IP-Adapter, or the model's",
    ).field(None)
    prediction_type: str | None = Option(
        "What the model predicts, where its files do not say it.",
        choices=PREDICTION_TYPES,
        default="what its files say",
    ).field(None)

    @property
    def name(self) -> str:
        """What the model is called: its name in the registry, or the stem of its path."""
        model = self.model or DEFAULT_MODEL
        if model in MODEL_NAMES:
            return model
        path = absolute(Path(model))
        return path.stem if path.is_file() else path.name

    def source(self) -> ModelSource:
        """Where the model comes from; a model on the hub is fetched. Raise InputError where there
        is none.
        """
        return resolve_source(
            self.model or DEFAULT_MODEL,
            revision=self.revision,
            random_weights=self.random_weights,
            loras=self.lora,
            prediction_type=self.prediction_type,
            ip_adapter=self.ip_adapter,
            image_encoder=self.image_encoder,
        )

    def check(self, workspace: Workspace) -> None:
        """Raise InputError where the workspace's model is another one."""
        source = workspace.source
        if self.model is not None:
            recorded = source.name if source.path is None else source.location
            named = self.model if self.model in MODEL_NAMES else str(absolute(Path(self.model)))
            if source.path is None or os.path.realpath(source.path) != os.path.realpath(named):
                _check(workspace, "model", named, recorded)
        if self.revision not in (None, source.requested, source.revision):
            _check(workspace, "revision", self.revision, source.revision)
        if self.random_weights:
            _check(
                workspace,
                "weights",
                "random ones",
                "random ones" if source.random_weights else "trained ones",
            )
        _check(workspace, "prediction type", self.prediction_type, source.prediction_type)
        if self.lora:
            _check(workspace, "LoRAs", [Lora.parse(text) for text in self.lora], list(source.loras))
        if self.image_encoder is not None and self.ip_adapter is None:
            raise InputError("--image-encoder: needs --ip-adapter")
        if self.ip_adapter is not None:
            adapter = IPAdapter.parse(self.ip_adapter, self.image_encoder)
            if source.ip_adapter is not None:
                source.ip_adapter.check()
            _check(workspace, "the IP-Adapter", adapter, source.ip_adapter or "none")


def open_workspace(workspace: Place, model: str | None, bits: str | None) -> Workspace:
    """Open an existing workspace; raise InputError where it is not of the given model or bits."""
    choices = ModelChoices(model=model)
    opened = _opened(workspace, choices, bits)
    choices.check(opened)
    SchemeChoices(bits=bits).check(opened)
    return opened


def create_workspace(
    workspace: Place,
    model: ModelChoices,
    choices: SchemeChoices,
    *,
    split_shortcuts: bool = False,
    check: Callable[[ModelSource], None] | None = None,
) -> Workspace:
    """Open a workspace, or make it; what is not given is taken from it, or else the default
    (``split_shortcuts`` is that default). What ``check`` refuses of a new one's source is refused
    before it is made.

    Raises:
        InputError: it holds something else, or cannot be made, such as without torch.
    """
    check_model_name(model.model or DEFAULT_MODEL)
    if (model.model or DEFAULT_MODEL) in MODEL_NAMES:  # trained with 1000 steps, all of them
        choices.scheme()  # refused before anything is downloaded
    if not isinstance(workspace, Workspace):
        root = _root(workspace, model, choices.bits)
        if not (root / MANIFEST).exists():
            check_vacant(root)  # before anything is downloaded
            require_package("torch", "torch", "a new workspace")  # and before anything is written
            source = model.source()
            if check is not None:
                check(source)
            loaded = load_model(source)
            scheme = choices.scheme(
                loaded.train_timesteps,
                edges=choices.edges(loaded),
                split_shortcuts=split_shortcuts,
                eight_bit_layers=loaded.eight_bit_layers,
                float_layers=loaded.float_layers,
            )
            return Workspace.create(root, source, scheme)
    opened = _opened(workspace, model, choices.bits)
    model.check(opened)
    choices.check(opened)
    return opened


def _edges_of_schedule(
    text: str, model: DiffusionModel, buckets: int | None, usual: int
) -> tuple[float, ...]:
    """The edges of SCHEDULER:STEPS; where ``buckets`` is None, of one for each timestep, up to
    ``usual`` buckets.
    """
    name, _, number = text.partition(":")
    if not number.isdigit():
        raise InputError(
            "--bucket-edges: expected timesteps separated by commas, or SCHEDULER:STEPS, not "
            f"{text!r}"
        )
    scheduler = model.load_scheduler(name)
    set_steps(scheduler, int(number))
    visited = sorted(set(scheduler.timesteps.tolist()))
    return quantile_edges(visited, buckets or min(usual, len(visited)))


def method_name(workspace: Workspace) -> str:
    """Return what its calibrated checkpoint is called beside others."""
    if (folded := workspace.stages.get("lora")) is not None:
        return str(folded.details["method"])
    record = workspace.stages.get("calibrate")
    return "Q-Diffusion" if record is not None and record.options.get("method") == QDIFF else "PTQ"


def _root(workspace: Path | str | None, model: ModelChoices, bits: str | None) -> Path:
    return Path(workspace or OUTPUT / f"{model.name}-{bits or DEFAULT_BITS}")


def _opened(workspace: Place, model: ModelChoices, bits: str | None) -> Workspace:
    if isinstance(workspace, Workspace):
        return workspace
    if workspace is None and (only := only_workspace(model.model, bits)):
        logger.info("working on %s, the only workspace here", only)
        workspace = only
    return Workspace.open(_root(workspace, model, bits))


def only_workspace(model: str | None, bits: str | None) -> Path | None:
    """The one workspace in quest-out/ that fits what is chosen, where the default one is not there;
    None where none fits.

    Raises:
        InputError: several fit, or the model is neither known nor a path.
    """
    chosen = ModelChoices(model=model)
    if (_root(None, chosen, bits) / MANIFEST).exists():
        return None
    pattern = "-".join(glob.escape(x) if x else "*" for x in (model and chosen.name, bits))
    found = sorted(path.parent for path in OUTPUT.glob(f"{pattern}/{MANIFEST}"))
    if not found and model:
        check_model_name(model)
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise InputError(f"several workspaces may be meant: {names}; say which one with -w")
    return found[0] if found else None


def _operand_bits(value: str | None) -> int | None:
    return None if value in (None, FLOAT) else int(value)


def _check(workspace: Workspace, name: str, wanted: object, found: object) -> None:
    if wanted is not None and wanted != found:
        raise InputError(
            f"{workspace.root} holds {name} {found}, not {wanted}; give another folder with -w"
        )
