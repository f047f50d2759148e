"""TensorRT and TensorRT for RTX: the same Python API in two packages.

TensorRT for RTX builds ahead of time on a machine without a GPU; TensorRT proper, in
sdk.py, on the GPU it will run on.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import math
import re
import signal
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quest_deploy.backends import cuda
from quest_deploy.backends.base import (
    LOWERED,
    REPAIR,
    Backend,
    EngineRecord,
    OneBucketRunner,
    Runner,
    Runtime,
    SplitRunner,
    engine_options,
    input_arrays,
)
from quest_deploy.backends.options import AUTO, GATHERED, NATIVE, PLUGIN, EngineOptions
from quest_deploy.backends.tensorrt.plugin import load_plugin
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import atomic_file, link_or_copy

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from quest_deploy.progress import Progress

messages = logging.getLogger(__name__)
ENGINE = "model.engine"
SAMPLE = "sample"
RTX = "tensorrt_rtx"
_TYPES = {
    "int8": "int8",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "half": "fp16",
    "float16": "fp16",
    "fp16": "fp16",
    "float": "fp32",
    "fp32": "fp32",
}
"""How its layer information names types, in whatever case; the first that a text holds."""
_TYPE_KEYS = ("Datatype", "DataType", "Format/Datatype")
"""Where it has a tensor's type: apart from the format since TensorRT 11, which spells the key in
two ways (a layer's tensors, the engine's own); before, at the end of the format's text.
"""
DEFAULT_CAPABILITIES = ("86", "89", "120")
"""Ampere, Ada and Blackwell: what TensorRT for RTX itself takes where nothing is asked for."""
UNSUPPORTED_CAPABILITIES = {
    "75": "has no INT8 there, and it refuses FP32 matrix products",
    "80": "does not list it",
}
"""What its support matrix (1.0 to 1.5) says of compute capabilities that it builds for all the
same.
"""
INT8_OF_WEIGHTS = (
    "the support matrix of tensorrt-rtx lists INT8 for weights alone: on the GPU, `quest-deploy "
    "inspect` tells whether products of integers run as such, and --backend tensorrt runs them so"
)
FUSED_HEAD_SIZE, FUSED_TOKENS = 64, 512
"""The largest attention that TensorRT computes in one kernel of INT8; a larger one is slower than
in FP16.
"""


Shapes = dict[str, tuple[list[int], list[int], list[int]]]
"""An optimization profile: the least, the tuned for and the largest shape of each input."""


class TensorRtBackend(Backend):
    """What the two flavours share. What differs is in :class:`TensorRtRtxBackend` and in
    sdk.py.
    """

    package: str
    """The Python module that provides the flavour."""
    remedy: str
    """How to get it."""

    def check_run(self, options: EngineOptions) -> None:
        self._module()
        if cuda.gpu_count() == 0:
            raise InputError(
                f"{self.name} engines run on an NVIDIA GPU, and this machine has none; copy the "
                "workspace to one that has"
            )
        self.check_driver()

    def check_driver(self) -> None:
        """Raise InputError where this machine's is too old for the package's CUDA."""
        needed = cuda.major_of(self.package)
        driver = cuda.driver_version() if needed is not None else ""
        if needed is not None and int(driver.split(".")[0]) < needed:
            raise InputError(
                f"{self.package}_cu{needed} needs a driver that runs CUDA {needed}, and this runs "
                f"{driver}: update it, or install the package for an older CUDA"
            )

    def check_engine(self, record: EngineRecord) -> EngineOptions:
        """Its version, its GPU and, where it has one, its plugin must be here."""
        options, built = super().check_engine(record), record.runtime
        here = version_number(self._module())
        if built is not None and not runs_engines_of(
            here, built.version, version_compatible=options.version_compatible
        ):
            raise InputError(
                f"the engine was built by {self.name} {built.version}, and {here}, which is "
                f"installed, does not run it; {REPAIR}"
            )
        check_compute_capability(record.hardware, options)
        return options

    def check_builder(self, trt: Any, options: EngineOptions) -> None:
        """Raise InputError where the builder lacks what ``options`` ask for, by the names that its
        Python module has.
        """
        if options.hardware_compatibility_level is not None:
            _member(
                trt,
                "HardwareCompatibilityLevel",
                options.hardware_compatibility_level,
                "--hardware-compatibility-level",
            )
        for source in options.tactic_sources or ():
            _member(trt, "TacticSource", source, "--tactic-sources")
        if options.max_num_tactics is not None and not hasattr(
            trt.IBuilderConfig, "max_num_tactics"
        ):
            raise InputError(
                f"--max-num-tactics: {self.name} {trt.__version__} has no such option; a later one "
                "has"
            )

    def check_graph(self, model: ir.Model, options: EngineOptions) -> None:
        """The sample sizes must be those that the graph can take; warns of quantized attention that
        TensorRT does not fuse.
        """
        check_sample_sizes(model, options.sample_size)
        if large := unfused_attention(model):
            shown = ", ".join(f"{name} ({what})" for name, what in list(large.items())[:3])
            messages.warning(
                "%d quantized attentions are larger than %s fuses in INT8, heads of %d and %d "
                "tokens, and are slower than in FP16: %s; calibrate with --attention-bits float "
                "and --softmax-bits float for it",
                len(large),
                self.name,
                FUSED_HEAD_SIZE,
                FUSED_TOKENS,
                shown,
            )

    def lower(
        self, model: ir.Model, options: EngineOptions, *, frozen_bucket: int | None = None
    ) -> ir.Model:
        from exporters.lowering.tensorrt import Quantize, lower

        lowerings: dict[str, Quantize] = {PLUGIN: "plugin", GATHERED: "gathered"}
        lowering = lowerings.get(options.quantize, "native")
        return lower(
            model,
            frozen_bucket=frozen_bucket,
            dtype=options.dtype,
            quantize=lowering,
        )

    def compile(
        self,
        lowered: Path,
        folder: Path,
        options: EngineOptions,
        progress: Progress,
    ) -> None:
        trt = self._module()
        logger = make_logger(trt, verbose=options.verbose)
        monitor = _monitor(trt, progress)
        # From the first object that logs on: parsing calls back into Python too.
        with _interrupts_stop(monitor), tempfile.TemporaryDirectory(dir=folder) as scratch:
            builder = started(trt.Builder, logger)
            if options.quantize == PLUGIN:
                load_plugin(builder.get_plugin_registry(), options.plugins, logger)
            network = builder.create_network(
                1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            )
            parser = trt.OnnxParser(network, logger)
            if not parser.parse_from_file(
                str(self.graph_to_parse(lowered, Path(scratch), options))
            ):
                errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
                raise QuestDeployError(f"{self.name} cannot parse {lowered}: {errors}")
            config = builder.create_builder_config()
            config.progress_monitor = monitor
            configure(trt, config, options)
            for shapes in self.profiles(profile_shapes(network, lowered, options)):
                _add_profile(builder, config, shapes)
            self.configure_flavour(trt, config, options)
            timing_cache = read_timing_cache(config, options)
            serialized = (
                None if monitor.stopped else builder.build_serialized_network(network, config)
            )
        if serialized is None:
            raise QuestDeployError(
                f"{self.name} cannot build {lowered}: "
                f"{'; '.join(logger.problems[-3:]) or 'no reason given'}"
            )
        (folder / ENGINE).write_bytes(serialized)
        if timing_cache is not None and options.timing_cache is not None:
            with atomic_file(options.timing_cache) as temporary:
                temporary.write_bytes(timing_cache.serialize())

    def refit(
        self, base: Path, folder: Path, options: EngineOptions, changed: Sequence[str]
    ) -> None:
        trt = self._module()
        logger = make_logger(trt, verbose=options.verbose)
        engine = _deserialized(trt, logger, base, options)
        refitter = trt.Refitter(engine, logger)
        if fixed := sorted(set(changed) - set(refitter.get_all_weights())):
            raise InputError(
                f"--refit-from: {len(fixed)} of {len(changed)} weights that changed are fixed in "
                f"{base / ENGINE}, such as {fixed[0]}; leave it out to build the engine"
            )
        _put_weights(trt, logger, refitter, folder)
        if options.strip_plan:  # it has no weights: they are put in when it is opened
            link_or_copy(base / ENGINE, folder / ENGINE)
        else:
            (folder / ENGINE).write_bytes(engine.serialize())

    def open(self, folder: Path, options: EngineOptions) -> Runner:
        runner = SplitRunner(_TensorRtRunner(folder, options, self.package), options.max_batch)
        return OneBucketRunner(runner) if options.quantize == GATHERED else runner

    def graph_to_parse(self, lowered: Path, scratch: Path, options: EngineOptions) -> Path:
        """Return what the parser gets: the lowered graph, or what :meth:`parser_passes` made of it
        in ``scratch``; ``lowered`` itself keeps the values that `verify` cuts it at.
        """
        passes = self.parser_passes(options)
        if not passes:
            return lowered
        from exporters.graph_info import load_graph, save_graph

        model = load_graph(lowered)
        modified = [each(model).modified for each in passes]
        if not any(modified):
            return lowered
        save_graph(model, scratch / lowered.name)
        return scratch / lowered.name

    def parser_passes(self, options: EngineOptions) -> list[ir.passes.InPlacePass]:
        """What joins nodes of the lowered graph for the parser."""
        if not options.fused_attention:
            return []
        from exporters.passes.fuse_attention import FuseAttention

        return [FuseAttention()]

    def configure_flavour(self, trt: Any, config: Any, options: EngineOptions) -> None:
        """Set what only this flavour's builder takes."""

    def profiles(self, shapes: list[Shapes]) -> list[Shapes]:
        """The optimization profiles to build for inputs of ``shapes``: one each, since the builder
        times kernels for each.
        """
        return shapes

    def realised_precision(self, folder: Path, options: EngineOptions) -> dict[str, str]:
        """From the engine's own layer information; only a GPU that can run the engine can read
        it.
        """
        from exporters.graph_info import load_graph
        from exporters.multiplications import multiplication_names

        lowered = load_graph(folder / LOWERED)
        wanted = multiplication_names(lowered)
        trt = self._module()
        engine = load_engine(trt, make_logger(trt), folder, engine_options(self, folder))
        told = engine.create_engine_inspector().get_engine_information(
            trt.LayerInformationFormat.JSON
        )
        found = told_precisions(json.loads(told)["Layers"], wanted)
        if options.fused_attention:  # one layer, which has the name of the first product
            from exporters.passes.fuse_attention import float_attentions

            joined = float_attentions(lowered).items()
            found |= {mix: found[scores] for mix, scores in joined if scores in found}
        return found

    def record(self, options: EngineOptions) -> dict[str, Any]:
        return {"runtime": Runtime(self.package, version_number(self._module()))}

    def _module(self) -> Any:
        try:
            return importlib.import_module(self.package)
        except (ImportError, OSError) as e:  # the wheel may be there without its libraries
            needed = (
                f"the {self.name} backend needs the Python package {self.name} and its libraries"
            )
            raise InputError(f"{needed} ({e}): {self.remedy}") from e


class TensorRtRtxBackend(TensorRtBackend):
    """TensorRT for RTX: built ahead of time for the GPUs chosen, on any machine."""

    name = "tensorrt-rtx"
    package = RTX
    remedy = "pip install 'quest-deploy[tensorrt-rtx]'"

    def resolve(self, options: EngineOptions) -> EngineOptions:
        """Without a choice, for this machine's GPU too, where it builds for that."""
        if options.quantize == AUTO:
            options = replace(options, quantize=NATIVE)
        if not options.compute_capability and cuda.gpu_count():
            here = cuda.gpu_compute_capability()
            more = {*known_capabilities(self._module())}.difference(
                DEFAULT_CAPABILITIES, UNSUPPORTED_CAPABILITIES
            )
            if here in more:
                return replace(options, compute_capability=(*DEFAULT_CAPABILITIES, here))
        return options

    def check_run(self, options: EngineOptions) -> None:
        super().check_run(options)
        here, known = cuda.gpu_compute_capability(), known_capabilities(self._module())
        if here not in known:
            raise InputError(
                f"tensorrt-rtx runs on GPUs of compute capability {', '.join(known)}, and this "
                f"machine's has {here}; use --backend tensorrt here"
            )

    def check_build(self, options: EngineOptions) -> None:
        self.check_options(options)
        trt = self._module()
        if (options.refittable or options.strip_plan) and cuda.gpu_count() == 0:
            raise InputError(
                "--refittable and --strip-plan need an NVIDIA GPU, and this machine has none: "
                "tensorrt-rtx compiles what puts weights into an engine with the GPU's driver"
            )
        for capability in options.compute_capability:
            _compute_capability(trt, capability)
            if capability in UNSUPPORTED_CAPABILITIES:
                messages.warning(
                    "--compute-capability %s: the support matrix of tensorrt-rtx %s",
                    capability,
                    UNSUPPORTED_CAPABILITIES[capability],
                )

    def check_graph(self, model: ir.Model, options: EngineOptions) -> None:
        super().check_graph(model, options)
        messages.info("%s", INT8_OF_WEIGHTS)
        built = options.compute_capability or DEFAULT_CAPABILITIES
        if cuda.gpu_count() and (here := cuda.gpu_compute_capability()) not in built:
            messages.warning(
                "this machine's GPU, of compute capability %s, will not run the engine, which is "
                "built for %s: give --compute-capability, or use --backend tensorrt",
                here,
                ", ".join(built),
            )

    def profiles(self, shapes: list[Shapes]) -> list[Shapes]:
        """One for all: kernels are made for a shape when it is met, while each profile would be
        compiled anew (see spanning_shapes).
        """
        return [spanning_shapes(shapes)]

    def configure_flavour(self, trt: Any, config: Any, options: EngineOptions) -> None:
        _target(trt, config, options.compute_capability)

    def hardware(self, options: EngineOptions) -> dict[str, Any]:
        return {
            "device": "GPU",
            "compute_capabilities": list(options.compute_capability or DEFAULT_CAPABILITIES),
        }


def version_number(trt: Any) -> str:
    """TensorRT's version, without what some packages add to it: 10.14.1.48 of 10.14.1.48.post1."""
    return re.sub(r"\.post\d+$", "", str(trt.__version__))


def runs_engines_of(here: str, built: str, *, version_compatible: bool) -> bool:
    """Whether TensorRT ``here`` runs an engine that version ``built`` made: its own, and earlier
    ones' that are version compatible.

    Raises:
        InputError: one of them is no version of three numbers or more.
    """
    mine, theirs = _version(here), _version(built)
    parts = min(len(mine), len(theirs))  # some of its names leave the build's number out
    return mine[:parts] == theirs[:parts] or (version_compatible and mine[:parts] > theirs[:parts])


def _version(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+){2,}", text):
        raise InputError(
            "expected TensorRT's version as three numbers or more, such as 10.16.1, found "
            f"{text!r}; run `quest-deploy build-engine` again"
        )
    return tuple(map(int, text.split(".")))


def check_compute_capability(hardware: dict[str, Any], options: EngineOptions) -> None:
    """Raise InputError where an engine that was built for ``hardware`` (see
    :meth:`Backend.hardware`) does not run on this GPU.
    """
    here, built = cuda.gpu_compute_capability(), hardware.get("compute_capabilities")
    anywhere = options.hardware_compatibility_level == "ampere_plus" and int(here) >= 80
    if isinstance(built, list) and here not in built and not anywhere:
        raise InputError(
            f"the engine was built for compute capabilities {', '.join(map(str, built))}, and this "
            f"machine's GPU has {here}; {REPAIR}, for it"
        )


def _member(trt: Any, enumeration: str, name: str, option: str) -> Any:
    """The member of one of TensorRT's enumerations, its name in lower case; raise InputError where
    this version has none such.
    """
    members = getattr(trt, enumeration).__members__
    if name.upper() not in members:
        raise InputError(
            f"{option}: TensorRT {trt.__version__} has no {name!r}: it has "
            f"{', '.join(m.lower() for m in members)}"
        )
    return members[name.upper()]


def told_precisions(layers: list[Any], wanted: list[str]) -> dict[str, str]:
    """Return what each ``wanted`` node runs in, by its name, from the layer information at detailed
    verbosity of TensorRT 10 or 11.

    A layer's metadata names the ONNX nodes it was made of. One that holds several multiplications
    does not tell what each runs in, so they are left out; so is a layer whose operands' types are
    not told.
    """
    names, found = set(wanted), {}
    for layer in (entry for entry in layers if isinstance(entry, dict)):
        made_of = [
            name
            for name in re.findall(r"\[ONNX Layer: ([^\]]+)\]", str(layer.get("Metadata", "")))
            if name in names
        ]
        operands = [_told_type(entry) for entry in layer.get("Inputs", [])[:2]]
        if isinstance(weights := layer.get("Weights"), dict):
            operands = [*operands[:1], str(weights.get("Type", _told_type(weights)))]
        types = [
            next((name for word, name in _TYPES.items() if word in operand.lower()), None)
            for operand in operands
        ]
        if len(set(made_of)) == 1 and types and None not in types:
            found[made_of[0]] = (
                "int8"
                if set(types) == {"int8"}
                else str(next(kind for kind in types if kind != "int8"))
            )
    return found


def _told_type(tensor: dict[str, Any]) -> str:
    return str(next((tensor[key] for key in _TYPE_KEYS if key in tensor), ""))


def make_logger(trt: Any, *, verbose: bool = False) -> Any:
    """The process's logger for the package ``trt``, its ``problems`` forgotten, for what comes
    next.

    There is one: TensorRT keeps the first that it is given until all of its objects are gone,
    whichever made them.
    """
    logger = _logger(trt.ILogger)
    logger.problems.clear()
    logger.verbose = verbose
    return logger


@functools.cache
def _logger(base: Any) -> Any:
    class Logger(base):  # type: ignore[misc]
        """Keeps errors for our own message instead of logging them; logs everything if it is
        ``verbose``.
        """

        def __init__(self) -> None:
            base.__init__(self)
            self.problems: list[str] = []
            self.verbose = False

        def log(self, severity: Any, message: str) -> None:
            if severity <= base.Severity.ERROR:
                self.problems.append(message.strip())
            if self.verbose:
                messages.info("[%s] %s", severity.name, message)

    return Logger()


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes the builder's phases on; ``stopped`` ends the build at its next step."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}
            self.stopped = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.totals[phase_name] = num_steps
            progress(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(phase_name, step + 1, self.totals.get(phase_name, step + 1))
            return not self.stopped

        def phase_finish(self, phase_name: str) -> None:
            total = self.totals.get(phase_name, 1)
            progress(phase_name, total, total)

    return Monitor()


@contextmanager
def _interrupts_stop(monitor: Any) -> Iterator[None]:
    """Let SIGINT and SIGTERM stop the build through its monitor: a KeyboardInterrupt raised in a
    callback would be lost in C++.
    """
    if threading.current_thread() is not threading.main_thread():  # only there do signals arrive
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        monitor.stopped = True

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if monitor.stopped:
        raise KeyboardInterrupt


def check_sample_sizes(model: ir.Model, sizes: Sequence[tuple[int, int]]) -> None:
    """Raise InputError where a graph cannot take samples of one of ``sizes``."""
    from exporters.graph_info import sample_multiple

    (own,) = (list(value.shape or [])[2:] for value in model.graph.inputs if value.name == SAMPLE)
    multiple = sample_multiple(model)
    for size in sizes:
        if all(isinstance(side, int) for side in own) and list(size) != own:
            raise InputError(
                f"the graph takes samples of {own[0]}x{own[1]} alone, not of {size[0]}x{size[1]}"
            )
        if any(side % multiple for side in size):
            raise InputError(
                f"a sample of {size[0]}x{size[1]}: the model takes multiples of {multiple}"
            )


def unfused_attention(model: ir.Model) -> dict[str, str]:
    """The attentions of the portable graph ``model`` whose scores are a product of integers and
    which are larger than TensorRT fuses, by name: head size and tokens, at the size that the model
    is meant for.
    """
    from onnx_ir.convenience import create_value_mapping

    from exporters.graph_info import graph_info

    values, found = create_value_mapping(model.graph), {}
    for product in graph_info(model).matmuls.values():
        attention = product.name.removesuffix(".scores")
        if attention == product.name or None in product.sites:
            continue
        (_, heads, queries, size), (*_, keys) = (
            [side if isinstance(side, int) else None for side in values[name].shape or ()]
            for name in product.inputs
        )
        if heads is None or size is None:
            continue
        pairs = product.macs // (heads * size)  # queries times keys
        known = queries or keys or math.isqrt(pairs)
        tokens = max(known, pairs // known)
        if size > FUSED_HEAD_SIZE or tokens > FUSED_TOKENS:
            found[attention] = f"heads of {size}, {tokens} tokens"
    return found


def configure(trt: Any, config: Any, options: EngineOptions) -> None:
    """Set what ``options`` ask of a builder's configuration, besides its profiles and targets."""
    flag = trt.BuilderFlag
    # On by default, it rounds the float products' operands to 10 bits: what is not quantized is
    # FP32, as on the other backends.
    config.clear_flag(flag.TF32)
    config.profiling_verbosity = _member(
        trt, "ProfilingVerbosity", options.profiling_verbosity, "--profiling-verbosity"
    )
    chosen = {
        flag.REFIT: options.refittable,
        flag.STRIP_PLAN: options.strip_plan,
        flag.VERSION_COMPATIBLE: options.version_compatible,
        flag.WEIGHT_STREAMING: options.weight_streaming,
    }
    for name, wanted in chosen.items():
        if wanted:
            config.set_flag(name)
    if options.pool_limit is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.pool_limit)
    if options.hardware_compatibility_level is not None:
        level = _member(
            trt,
            "HardwareCompatibilityLevel",
            options.hardware_compatibility_level,
            "--hardware-compatibility-level",
        )
        config.hardware_compatibility_level = level
    if options.builder_optimization_level is not None:
        config.builder_optimization_level = options.builder_optimization_level
    if options.tactic_sources is not None:
        sources = (
            int(_member(trt, "TacticSource", name, "--tactic-sources"))
            for name in options.tactic_sources
        )
        config.set_tactic_sources(sum(1 << source for source in sources))
    if options.max_num_tactics is not None:
        config.max_num_tactics = options.max_num_tactics
    if options.serialize_plugins:
        config.plugins_to_serialize = [str(options.plugins)]


def read_timing_cache(config: Any, options: EngineOptions) -> Any:
    """Let the builder use what is in the timing cache's file; an empty one, and say so, if that is
    another version's or GPU's.
    """
    if options.timing_cache is None:
        return None
    path = options.timing_cache
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        messages.warning(
            "the timing cache %s is not this TensorRT's and this GPU's; it is written anew", path
        )
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def profile_shapes(network: Any, lowered: Path, options: EngineOptions) -> list[Shapes]:
    """The least, the tuned for and the largest shape of each input by name, for each optimization
    profile.

    One for each of the sample sizes, or one of the size that the model is meant for; inputs whose
    sizes follow the sample's have theirs of it, the other conditions' shapes are the graph's.
    """
    from exporters.graph_info import load_signature, size_divisors

    inputs = {
        tensor.name: list(tensor.shape)[1:]
        for tensor in map(network.get_input, range(network.num_inputs))
    }
    sizes: list[list[int]] = [list(size) for size in options.sample_size] or [
        inputs.get(SAMPLE, [])[1:]
    ]
    if any(side < 0 for size in sizes for side in size):
        sizes = [_own_sample_size(lowered)]

    follows = any(-1 in shape for name, shape in inputs.items() if name != SAMPLE)
    divisors = (size_divisors(load_signature(lowered)) if follows else {}) | {SAMPLE: 1}

    def shapes(size: list[int], batch: int) -> dict[str, list[int]]:
        return {
            name: [
                batch,
                *(
                    [*shape[:1], *(side // divisors[name] for side in size)]
                    if name in divisors
                    else shape
                ),
            ]
            for name, shape in inputs.items()
        }

    batches = (1, options.opt_batch or min(2, options.max_batch), options.max_batch)
    bounds = [[shapes(size, batch) for batch in batches] for size in sizes]
    return [
        {name: (least[name], tuned_for[name], largest[name]) for name in inputs}
        for least, tuned_for, largest in bounds
    ]


def spanning_shapes(profiles: list[Shapes]) -> Shapes:
    """One profile that takes what any of ``profiles`` takes, and what lies between; tuned for what
    the first is tuned for.
    """
    return {
        name: (
            [min(sides) for sides in zip(*(shapes[name][0] for shapes in profiles), strict=True)],
            profiles[0][name][1],
            [max(sides) for sides in zip(*(shapes[name][2] for shapes in profiles), strict=True)],
        )
        for name in profiles[0]
    }


def _own_sample_size(lowered: Path) -> list[int]:
    """The height and width of the samples that a graph is meant for, which takes others too."""
    from exporters.graph_info import load_signature, sample_shape

    try:
        return list(sample_shape(load_signature(lowered)))[1:]
    except KeyError as e:
        raise QuestDeployError(
            f"{lowered} takes samples of any size and does not say which it is meant for"
        ) from e


def _add_profile(builder: Any, config: Any, shapes: Shapes) -> None:
    profile = builder.create_optimization_profile()
    for name, (least, tuned_for, largest) in shapes.items():
        profile.set_shape(name, least, tuned_for, largest)
    config.add_optimization_profile(profile)


def _target(trt: Any, config: Any, capabilities: Sequence[str]) -> None:
    names = capabilities or DEFAULT_CAPABILITIES
    config.num_compute_capabilities = len(names)
    for i, name in enumerate(names):
        config.set_compute_capability(_compute_capability(trt, name), i)


def _compute_capability(trt: Any, name: str) -> Any:
    if name not in (known := known_capabilities(trt)):
        raise InputError(
            f"unknown compute capability {name!r}: this TensorRT for RTX builds for "
            f"{', '.join(known)}"
        )
    return trt.ComputeCapability.__members__[f"SM{name}"]


def known_capabilities(trt: Any) -> list[str]:
    """The compute capabilities that this TensorRT for RTX builds for."""
    members = trt.ComputeCapability.__members__
    return [name.removeprefix("SM") for name in members if name.startswith("SM")]


def started(kind: Any, logger: Any) -> Any:
    """A builder or a runtime of TensorRT's.

    Raises:
        QuestDeployError: CUDA does not start, as where the driver is older than TensorRT's CUDA;
            the package then raises a TypeError that does not tell.
    """
    try:
        return kind(logger)
    except TypeError as e:
        told = "; ".join(logger.problems[-3:]) or str(e)
        driver = f"; this driver runs CUDA {cuda.driver_version()}" if cuda.gpu_count() else ""
        raise QuestDeployError(
            f"TensorRT's {kind.__name__} cannot start: {told}{driver}; update the driver, or "
            "install the package for an older CUDA"
        ) from e


def load_engine(trt: Any, logger: Any, folder: Path, options: EngineOptions) -> Any:
    """The engine in ``folder``, on the GPU, with its weights: one that was stripped gets them from
    the lowered graph.
    """
    engine = _deserialized(trt, logger, folder, options)
    if options.strip_plan:
        _put_weights(trt, logger, trt.Refitter(engine, logger), folder)
    return engine


def _deserialized(trt: Any, logger: Any, folder: Path, options: EngineOptions) -> Any:
    runtime = started(trt.Runtime, logger)
    runtime.engine_host_code_allowed = (
        options.version_compatible
    )  # such an engine brings the runtime that it needs, or the plugin
    if options.quantize == PLUGIN and not options.serialize_plugins:
        load_plugin(runtime.get_plugin_registry(), options.plugins, logger)
    engine = runtime.deserialize_cuda_engine((folder / ENGINE).read_bytes())
    if engine is None:
        raise QuestDeployError(
            f"{folder / ENGINE} cannot be loaded: "
            f"{'; '.join(logger.problems[-3:]) or 'no reason given'}"
        )
    return engine


def _put_weights(trt: Any, logger: Any, refitter: Any, folder: Path) -> None:
    """Put the weights of the lowered graph in ``folder`` into the refitter's engine, all that can
    be: the parser takes nothing less.
    """
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(folder / LOWERED)) or not refitter.refit_cuda_engine():
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise QuestDeployError(
            f"the engine cannot be given the weights of {folder / LOWERED}: "
            f"{'; '.join([*errors, *logger.problems[-3:]]) or 'no reason given'}"
        )


def fitting_profile(engine: Any, shapes: dict[str, tuple[int, ...]]) -> int:
    """The first optimization profile of ``engine`` that takes inputs of ``shapes``; raise
    InputError where none does.
    """
    for profile in range(engine.num_optimization_profiles):
        bounds = {name: engine.get_tensor_profile_shape(name, profile) for name in shapes}
        if all(
            len(least) == len(shapes[name])
            and all(a <= x <= b for a, x, b in zip(least, shapes[name], largest, strict=True))
            for name, (least, _, largest) in bounds.items()
        ):
            return profile
    raise InputError(
        f"the engine was built for other inputs than {shapes}; {REPAIR}, with their --sample-size"
    )


class _TensorRtRunner(Runner):
    """Polygraphy's TrtRunner on the engine; threads take turns, since it has one context."""

    def __init__(self, folder: Path, options: EngineOptions, package: str) -> None:
        from polygraphy import config

        config.USE_TENSORRT_RTX = (
            package == RTX
        )  # before its TensorRT backend is imported; one flavour a process
        cuda.show_libraries()
        from polygraphy.backend.trt import TrtRunner

        trt = importlib.import_module(package)
        self._engine, self._profile = load_engine(trt, make_logger(trt), folder, options), 0
        # -1: TensorRT chooses.
        budget = (
            options.weight_streaming_budget if options.weight_streaming_budget is not None else -1
        )
        self._runner = TrtRunner(
            self._engine, weight_streaming_budget=budget if options.weight_streaming else None
        )
        self._runner.activate()
        self._lock = threading.Lock()

    def infer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        profile = fitting_profile(
            self._engine, {name: value.shape for name, value in feeds.items()}
        )
        with self._lock:
            if profile != self._profile:
                self._runner.set_profile(profile)
                self._profile = profile
            outputs = self._runner.infer(input_arrays(feeds))
            return {name: value.copy() for name, value in outputs.items()}

    def close(self) -> None:
        self._runner.deactivate()
