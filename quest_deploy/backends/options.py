"""The options of an engine: each is declared here alone, with the backends that take it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict

from quest_deploy.errors import InputError
from quest_deploy.options import Declared, Option, Options, declared

CPUS = ("openvino", "onnxruntime")
RTX, SDK = "tensorrt-rtx", "tensorrt"
TENSORRT = (RTX, SDK)
DTYPES = ("fp32", "fp16", "bf16")
PROVIDERS = ("cpu", "cuda", "tensorrt")
HARDWARE_COMPATIBILITY_LEVELS = ("none", "ampere_plus", "same_compute_capability")
PROFILING_VERBOSITIES = ("detailed", "layer_names_only", "none")
QUANTIZE = AUTO, PLUGIN, NATIVE, GATHERED = ("auto", "plugin", "native", "gathered")
PROCESSORS = NATIVE_PROCESSOR, ANY_PROCESSOR = ("native", "any")
TENSORRTS_CHOICE = "TensorRT's choice"
RUNS_NO_PLUGINS = {RTX: "it runs no plugins"}
LOOKS_WHEN_IT_RUNS = {RTX: "it looks for fast kernels when an engine runs, not when it is built"}


def parse_sample_size(text: str) -> tuple[int, int]:
    """A height and a width from "64" or "64x96"; raise InputError for anything else."""
    found = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text)
    if found is None:
        raise InputError(
            "--sample-size: expected a size, such as 64, or a height and a width, such as 64x96, "
            f"not {text!r}"
        )
    return int(found[1]), int(found[2] or found[1])


def parse_sample_sizes(texts: list[str]) -> tuple[tuple[int, int], ...]:
    """As :func:`parse_sample_size`, of each."""
    return tuple(map(parse_sample_size, texts))


def parse_pool_limit(text: str) -> int:
    """Bytes from "workspace:2G" (units of 1024: K, M, G); raise InputError for anything else."""
    pool, _, size = text.partition(":")
    found = _bytes(size) if pool == "workspace" else None
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
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    return None if found is None else int(found[1]) * units[found[2]]


def parse_tactic_sources(names: list[str]) -> tuple[str, ...]:
    """The names; "none", which must be alone, is no source at all."""
    if "none" in names and len(names) > 1:
        raise InputError("--tactic-sources none excludes every other")
    return () if names == ["none"] else tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class EngineOption(Option):
    """An engine's option, and which backends take it.

    Attributes:
        backends: those that take it; empty means all.
        ignored: whether the others ignore it, rather than refuse it.
        limits: the choices of a backend that does not take all; "onnxruntime --provider cpu" is
            one of its execution providers.
        reasons: why a backend does not take it, or not all choices.
    """

    backends: tuple[str, ...] = ()
    ignored: bool = False
    limits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def refusal(self, backend: str, provider: str, value: Any) -> str | None:
        """Why a backend does not take a value that was chosen; None where it does."""
        if self.backends and backend not in self.backends:
            if self.ignored:
                return None
            reason = self.reasons.get(backend, f"it is for {' and '.join(self.backends)}")
            return f"{backend} does not take it: {reason}"
        for place in (backend, f"{backend} --provider {provider}"):
            if value not in (taken := self.limits.get(place, (value,))):
                reason = f": {self.reasons[place]}" if place in self.reasons else ""
                return f"{place} takes {' or '.join(taken)}, not {value}{reason}"
        return None


REFIT_FROM = EngineOption(
    "TensorRT: build nothing, but put the weights into a copy of the --refittable engine of this "
    "workspace, such as the one that `quest-deploy lora` started from, with its options.",
    metavar="WORKSPACE",
    backends=TENSORRT,
)


def declared_options(kind: type) -> Iterator[tuple[Declared, EngineOption]]:
    """The engine's options among those of ``kind``."""
    for each in declared(kind).values():
        if isinstance(each.option, EngineOption):
            yield each, each.option


@dataclass(frozen=True, kw_only=True)
class EngineOptions(Options):
    """How to build and run an engine. TensorRT's options have Polygraphy's names; sizes are in
    bytes.

    Attributes:
        compute_capability: empty means Ampere, Ada and Blackwell.
        max_batch: of a TensorRT engine's optimization profiles; its runner splits larger batches.
        opt_batch: None means 2, or the largest batch.
        sample_size: heights and widths of the model's samples; empty means the graph's own.
        pool_limit: the most GPU memory that one layer may use for itself; None is all there is.
        strip_plan: :meth:`Backend.open` then takes the weights from the lowered graph.
        quantize: "plugin" is ``quest::TimestepQuantize``, "native" arithmetic and QuantizeLinear,
            "gathered" QuantizeLinear with the scale of the batch's bucket, "auto" the plugin where
            its library is found.
        plugins: None looks where :func:`quest_deploy.backends.tensorrt.plugin.plugin_library`
            says.
        weight_streaming_budget: the bytes of weights that stay on the GPU.
        tactic_sources: by TensorRT's own names, lower case; None is its default, empty is no extra
            one.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        strict=True, extra="forbid", alias_generator=lambda name: ENGINE_OPTIONS[name].recorded
    )
    provider: str = EngineOption(
        "onnxruntime's execution provider: cpu, cuda or tensorrt.",
        choices=PROVIDERS,
        backends=("onnxruntime",),
    ).field("cpu")
    threads: int = EngineOption(
        "CPU threads; 0 lets the backend choose.", minimum=0, backends=CPUS, ignored=True
    ).field(0)
    compute_capability: Sequence[str] = EngineOption(
        "tensorrt-rtx: a GPU to build for, such as 89; may be repeated.",
        recorded="compute_capabilities",
        backends=(RTX,),
        reasons={SDK: "it builds for the GPU that it runs on"},
    ).field(())
    max_batch: int = EngineOption(
        "TensorRT: the largest batch.", minimum=1, backends=TENSORRT, ignored=True
    ).field(16)
    compiled_batch: Sequence[int] = EngineOption(
        "openvino: a batch, of inputs of the model's own sizes, that the engine opens for "
        "without compiling; may be repeated; 0 is none.",
        minimum=0,
        default="2, an image with guidance",
        recorded="compiled_batches",
        backends=("openvino",),
        ignored=True,
    ).field((2,))
    compiled_weights: bool = EngineOption(
        "openvino: keep the weights with what was compiled, as INT8: more than twice the size "
        "on disk, nearly half the memory.",
        backends=("openvino",),
    ).field(False)
    dtype: str = EngineOption(
        f"The precision of the non-quantized ops: {', '.join(DTYPES)}; openvino takes fp32 "
        "and bf16.",
        choices=DTYPES,
        limits={"openvino": ("fp32", "bf16"), "onnxruntime --provider cpu": ("fp32",)},
        reasons={"onnxruntime --provider cpu": "--provider cuda takes all"},
    ).field("fp32")
    opt_batch: int | None = EngineOption(
        "TensorRT: the batch to tune for.",
        minimum=1,
        default="2, or the largest batch",
        backends=TENSORRT,
    ).field(None)
    sample_size: Sequence[tuple[int, int]] = EngineOption(
        "TensorRT: a size of the model's samples, such as 64 for Stable Diffusion's "
        "latents at 512 pixels; may be repeated: "
        "one optimization profile each (tensorrt-rtx: one from the least to the largest).",
        metavar="SIZE|HEIGHTxWIDTH",
        default="the model's",
        text=list[str],
        parse=parse_sample_sizes,
        recorded="sample_sizes",
        backends=TENSORRT,
    ).field(())
    pool_limit: int | None = EngineOption(
        "TensorRT: the most memory that a layer may use, such as workspace:2G.",
        minimum=1,
        metavar="workspace:SIZE",
        text=str,
        parse=parse_pool_limit,
        recorded="workspace_limit",
        backends=TENSORRT,
    ).field(None)
    refittable: bool = EngineOption(
        "TensorRT: let --refit-from exchange the weights; tensorrt-rtx needs a GPU for it.",
        backends=TENSORRT,
    ).field(False)
    strip_plan: bool = EngineOption(
        "TensorRT: an engine without weights, given them when it is opened; needs a GPU.",
        backends=TENSORRT,
    ).field(False)
    timing_cache: Path | None = EngineOption(
        "tensorrt: keep the times of kernels in a file, for the next engine.",
        metavar="FILE",
        backends=(SDK,),
        reasons={RTX: "it times no kernels when it builds"},
    ).field(None)
    version_compatible: bool = EngineOption(
        "tensorrt: an engine that later versions can run.",
        backends=(SDK,),
        reasons={RTX: "its engines run on the release that built them alone"},
    ).field(False)
    hardware_compatibility_level: str | None = EngineOption(
        f"tensorrt: the GPUs that can run it: {', '.join(HARDWARE_COMPATIBILITY_LEVELS)}.",
        choices=HARDWARE_COMPATIBILITY_LEVELS,
        backends=(SDK,),
        reasons={RTX: "its engines run on the GPUs given with --compute-capability"},
    ).field(None)
    builder_optimization_level: int | None = EngineOption(
        "tensorrt: how long to look for fast kernels, from 0 to 5.",
        choices=tuple(range(6)),
        backends=(SDK,),
        reasons=LOOKS_WHEN_IT_RUNS,
    ).field(None)
    quantize: str = EngineOption(
        f"TensorRT: what quantizes activations: {', '.join(QUANTIZE)}. plugin is "
        "quest::TimestepQuantize, for tensorrt alone; native is arithmetic and QuantizeLinear; "
        "gathered is QuantizeLinear alone, its scale the bucket's, for batches of one bucket; "
        "auto takes the plugin where its library is found, else native.",
        choices=QUANTIZE,
        backends=TENSORRT,
        limits={RTX: (AUTO, NATIVE, GATHERED)},
        reasons=RUNS_NO_PLUGINS,
    ).field(AUTO)
    plugins: Path | None = EngineOption(
        "tensorrt: the library of the plugin.",
        metavar="FILE",
        default="QUEST_DEPLOY_PLUGINS in the environment, or trt_plugins/build",
        backends=(SDK,),
        reasons=RUNS_NO_PLUGINS,
    ).field(None)
    serialize_plugins: bool = EngineOption(
        "tensorrt: put the plugin's library into the engine; with --version-compatible.",
        backends=(SDK,),
        reasons=RUNS_NO_PLUGINS,
    ).field(False)
    fused_attention: bool = EngineOption(
        "TensorRT: compute float attention in one kernel, by ONNX's Attention; with --dtype "
        "fp16 or bf16.",
        backends=TENSORRT,
    ).field(False)
    weight_streaming: bool = EngineOption(
        "TensorRT: let weights stay in the host's memory, fetched while the engine runs.",
        backends=TENSORRT,
    ).field(False)
    weight_streaming_budget: int | None = EngineOption(
        "TensorRT: weights to keep on the GPU then, such as 2G.",
        minimum=0,
        metavar="SIZE",
        default=TENSORRTS_CHOICE,
        text=str,
        parse=parse_budget,
        backends=TENSORRT,
    ).field(None)
    tactic_sources: Sequence[str] | None = EngineOption(
        "tensorrt: what kernels may be taken from, such as edge_mask_convolutions, or "
        "none; may be repeated.",
        default=TENSORRTS_CHOICE,
        parse=parse_tactic_sources,
        backends=(SDK,),
        reasons=LOOKS_WHEN_IT_RUNS,
    ).field(None)
    max_num_tactics: int | None = EngineOption(
        "tensorrt: how many kernels to time for a layer.",
        minimum=1,
        default=TENSORRTS_CHOICE,
        backends=(SDK,),
        reasons=LOOKS_WHEN_IT_RUNS,
    ).field(None)
    profiling_verbosity: str = EngineOption(
        f"TensorRT: what the engine tells of its layers: {', '.join(PROFILING_VERBOSITIES)}; "
        "`quest-deploy inspect` tells what they run in only if it is the first.",
        choices=PROFILING_VERBOSITIES,
        backends=TENSORRT,
    ).field("detailed")
    processor: str = EngineOption(
        "CPU backends: native, exact on processors that compute as this one does, or any, "
        "exact on every x86-64 and slower "
        "where that has 8-bit weights.",
        choices=PROCESSORS,
        backends=CPUS,
    ).field(NATIVE_PROCESSOR)
    verbose: bool = EngineOption(
        "TensorRT: print all that it logs while it builds.", backends=TENSORRT
    ).field(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 in self.compiled_batch:
            if len(self.compiled_batch) > 1:
                raise InputError("--compiled-batch 0 excludes every other")
            object.__setattr__(self, "compiled_batch", ())
        for name in ("timing_cache", "plugins"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(path).resolve())
        if self.opt_batch is not None and self.opt_batch > self.max_batch:
            raise InputError(
                f"--opt-batch: expected at most --max-batch, {self.max_batch}, not {self.opt_batch}"
            )
        if any(side < 1 for size in self.sample_size for side in size) or len(
            set(self.sample_size)
        ) < len(self.sample_size):
            sizes = ", ".join(f"{height}x{width}" for height, width in self.sample_size)
            raise InputError(
                f"--sample-size: expected positive sizes, each given once, found {sizes}"
            )
        without = self.quantize in (NATIVE, GATHERED)
        if without and (self.plugins is not None or self.serialize_plugins):
            raise InputError(
                "--plugins and --serialize-plugins are for --quantize plugin; --quantize "
                f"{self.quantize} uses no plugin"
            )
        if self.serialize_plugins and not self.version_compatible:
            raise InputError(
                "--serialize-plugins needs --version-compatible: TensorRT puts plugins into such "
                "engines alone"
            )
        if self.fused_attention and self.dtype == "fp32":
            raise InputError(
                "--fused-attention needs --dtype fp16 or bf16: TensorRT has no kernel for it in "
                "FP32"
            )
        if self.weight_streaming_budget is not None and not self.weight_streaming:
            raise InputError("--weight-streaming-budget needs --weight-streaming")

    def check_taken(self, backend: str) -> None:
        """Raise InputError where an option that was chosen is not ``backend``'s."""
        for each, option in declared_options(type(self)):
            value = getattr(self, each.name)
            if value == each.default:
                continue
            if (refusal := option.refusal(backend, self.provider, value)) is not None:
                raise InputError(f"{each.flag}: {refusal}")


ENGINE_OPTIONS: Mapping[str, Declared] = declared(EngineOptions)
