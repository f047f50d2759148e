"""A model repository for Triton Inference Server, with what belongs to it: the server's command, a
probe, examples, a README.

One repository for GPU and CPU: models are of the platform tensorrt_plan, with the plan and the ONNX
file side by side. Triton's TensorRT backend loads the plan; the python-based stand-in of
``backends_cpu`` opens the ONNX file.
"""

from __future__ import annotations

import importlib.metadata
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from quest_deploy import __version__
from quest_deploy.artifacts.workspace import ENGINES, GRAPH
from quest_deploy.backends.base import LOWERED, EngineRecord, engine_info
from quest_deploy.backends.options import NATIVE_PROCESSOR, PROCESSORS, EngineOptions
from quest_deploy.backends.registry import get_backend
from quest_deploy.backends.tensorrt.base import ENGINE
from quest_deploy.backends.tensorrt.plugin import recorded_library
from quest_deploy.errors import InputError
from quest_deploy.files import atomic_folder, read_json, sha256_of, write_json
from quest_deploy.models.loading import load_model
from quest_deploy.models.schedulers import SCHEDULERS
from quest_deploy.progress import no_progress
from quest_deploy.serving.triton.configs import pipeline_config, plan_config
from quest_deploy.serving.triton.pbtxt import pbtxt
from quest_deploy.serving.triton.plans import FLOAT_INPUTS, write_plan

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.progress import Progress

FORMAT, VERSION = "quest-deploy triton package", 1
PACKAGE_FILE = "package.json"
MODELS, PLUGINS, BACKENDS_CPU = "models", "plugins", "backends_cpu"
NO_PLAN = """\
**There is no plan in this package yet.** On the GPU machine, run
`quest-deploy build-engine --backend tensorrt` on the workspace and
`quest-deploy package --triton` again."""
FILES = Path(__file__).parent / "triton_files"
"""What is copied as it is."""
TRT = "tensorrt"
PLAN, ONNX = "model.plan", "model.onnx"
IO_DTYPES = {"fp32": "TYPE_FP32", "fp16": "TYPE_FP16"}
NUMPY_TYPES = {"TYPE_FP32": "float32", "TYPE_FP16": "float16", "TYPE_INT32": "int32"}
DECODER_BATCH = 4
MODEL_TIMEOUT = 600
"""Seconds that a pipeline waits for one answer of another model: long enough for the largest UNet
in its largest batch on a CPU.
"""
STEPS, SCHEDULER = 20, "ddim"
INPUTS = {
    "prompt": "what to draw; needed",
    "negative_prompt": "what not to draw",
    "label": "the class to draw; needed",
    "seed": "the same seed draws the same image; the server chooses one if there is none",
    "steps": f"denoising steps; {STEPS} unless given",
    "scheduler": f"{', '.join(SCHEDULERS)}; {SCHEDULER} unless given",
    "guidance": "classifier-free guidance weight; 1 is none",
    "height": "pixels",
    "width": "pixels",
}
"""The pipelines' inputs in words."""


@dataclass(frozen=True)
class TritonOptions:
    """What the repository is configured for; all of it can be changed later in its ``config.pbtxt``
    files.

    Attributes:
        max_batch: rows that the UNet runs at once, an image with guidance being two; None is the
            plan's own, or 16.
        max_steps: the most denoising steps of a request.
        max_size: the most pixels of a height or width; None is the plan's largest, or the model's
            own.
        max_images: the most images of one request.
        max_in_flight: images that are drawn at the same time; more wait.
        max_queue: requests that wait; more are refused at once.
        queue_delay: microseconds that the UNet's batcher waits for more requests, at every
            denoising step.
        io_dtype: fp32 or fp16, of the models' inputs and outputs but for timesteps, which FP16
            would round.
        plugins: TensorRT plugin libraries that the plan needs, besides the one that the engine's
            record names.
        processor: the processors that the package shall be exact on without a GPU: native, those
            that compute as this one does, or any.
    """

    max_batch: int | None = None
    max_steps: int = 100
    max_size: int | None = None
    max_images: int = 4
    max_in_flight: int = 16
    max_queue: int = 64
    queue_delay: int = 0
    io_dtype: str = "fp32"
    plugins: tuple[str, ...] = ()
    processor: str = NATIVE_PROCESSOR

    def __post_init__(self) -> None:
        if self.processor not in PROCESSORS:
            raise InputError(
                f"--processor: expected one of {', '.join(PROCESSORS)}, not {self.processor!r}"
            )
        if self.io_dtype not in IO_DTYPES:
            raise InputError(
                f"unknown type {self.io_dtype!r} of inputs and outputs: expected "
                f"{' or '.join(IO_DTYPES)}"
            )
        least = {
            "max_batch": 2,
            "max_steps": 1,
            "max_size": 1,
            "max_images": 1,
            "max_in_flight": 1,
            "max_queue": 1,
            "queue_delay": 0,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise InputError(
                    f"--{name.replace('_', '-')}: expected {bound} or more, not {value}"
                )
        if self.max_images > self.max_in_flight:
            raise InputError(
                f"--max-images {self.max_images}: expected at most --max-in-flight, "
                f"{self.max_in_flight}"
            )
        for plugin in self.plugins:
            if not Path(plugin).is_file():
                raise InputError(f"--plugin-library {plugin}: there is no such file")


def write_package(
    workspace: Workspace,
    folder: Path,
    options: TritonOptions,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write the repository and what belongs to it into ``folder``, replacing an earlier package
    there; return what it holds.

    Raises:
        InputError: the workspace's model cannot be served, its graph or plan is not up to date, or
            ``folder`` holds something else.
    """
    from quest_deploy.models.pipeline_model import PipelineModel

    check_target(folder)
    workspace.require("export")
    model = load_model(workspace.source)
    if isinstance(model, PipelineModel):
        model.require_weights("serve")
    plan = _plan(
        workspace, options, alone=not isinstance(model, PipelineModel), guidable=_guidable(model)
    )
    with atomic_folder(folder) as made:
        writer = Writer(workspace, model, made, options, plan, progress)
        return writer.write()


def check_target(folder: Path) -> None:
    """Raise InputError where ``folder`` holds anything but an earlier package, which may be
    replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, not a folder; give another one with --triton")
    if not folder.exists() or not any(folder.iterdir()):
        return
    earlier = folder / PACKAGE_FILE
    content = read_json(earlier) if earlier.is_file() else None
    if not (isinstance(content, dict) and content.get("format") == FORMAT):
        raise InputError(
            f"{folder} is not empty and no package of an earlier time; give another folder with "
            "--triton"
        )


@dataclass(frozen=True)
class Plan:
    """A TensorRT engine of the workspace.

    Attributes:
        folder: the engine's.
        options: what it was built with.
        tensorrt: the version that built it.
        plugins: the libraries of plugins that it needs.
    """

    folder: Path
    options: EngineOptions
    tensorrt: str
    plugins: tuple[Path, ...]

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Heights and widths of the samples that it takes; empty for the model's own."""
        return tuple(self.options.sample_size)


def _plan(
    workspace: Workspace, options: TritonOptions, *, alone: bool, guidable: bool
) -> Plan | None:
    """The workspace's TensorRT engine, if it has one.

    Args:
        alone: whether the model has nothing beside the UNet that needs a plan too.
        guidable: whether requests may ask for guidance.

    Raises:
        InputError: it does not go with ``options``, or further plans must be built and this machine
            cannot.
    """
    if f"build-engine/{TRT}" not in workspace.stages:
        return None
    workspace.require(f"build-engine/{TRT}")
    folder = workspace.path(ENGINES, TRT)
    record = engine_info(folder)
    built = record.options
    if built.strip_plan:
        raise InputError(
            f"{folder} holds a plan without weights, which Triton cannot load; build it without "
            "--strip-plan"
        )
    if options.max_batch is not None and options.max_batch > built.max_batch:
        raise InputError(
            f"--max-batch {options.max_batch}: the plan in {folder} takes batches up to "
            f"{built.max_batch}"
        )
    if guidable and built.max_batch < 2:
        raise InputError(
            f"the plan in {folder} takes batches of {built.max_batch}, and an image with guidance "
            "is two rows; "
            "run `quest-deploy build-engine` again with --max-batch 2 or more"
        )
    if options.io_dtype != "fp32" or not alone:
        why = (
            "the text encoder and the decoder need plans too"
            if options.io_dtype == "fp32"
            else "--io-dtype fp16 needs another plan"
        )
        try:
            get_backend(TRT).check_build(built)
        except InputError as e:
            raise InputError(f"{why}, and {e}") from e
    return Plan(
        folder, built, record.built_by.get(TRT, "unknown"), _plugins(record, options.plugins)
    )


def _plugins(record: EngineRecord, given: tuple[str, ...]) -> tuple[Path, ...]:
    """The plugin libraries to package: those given, and the one that the engine's ``record``
    names, found by its hash.
    """
    plugin, libraries = record.plugin, tuple(map(Path, given))
    names = [path.name for path in libraries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"--plugin-library: two files are called {', '.join(twice)}, and both go into one "
            "folder; rename one"
        )
    if (
        plugin is None
        or plugin.serialized
        or any(sha256_of(path) == plugin.sha256 for path in libraries)
    ):
        return libraries
    found = recorded_library(record.options.plugins, plugin.sha256)
    if found.name in names:
        raise InputError(
            f"--plugin-library: a file is called {found.name}, as the engine's own plugin library; "
            "rename it"
        )
    return (*libraries, found)


class Writer:
    """Writes one package.

    Args:
        model: a :class:`quest_deploy.models.registry.DiffusionModel`.
    """

    def __init__(
        self,
        workspace: Workspace,
        model: Any,
        folder: Path,
        options: TritonOptions,
        plan: Plan | None,
        progress: Progress,
    ) -> None:
        from quest_deploy.models.pipeline_model import PipelineModel

        self.workspace, self.model, self.folder, self.options, self.plan = (
            workspace,
            model,
            folder,
            options,
            plan,
        )
        self.progress = progress
        self.of_text = model.asked_for == "prompt"
        self.max_batch = options.max_batch or (16 if plan is None else plan.options.max_batch)
        self.plugins = tuple(map(Path, options.plugins)) if plan is None else plan.plugins
        self.half = options.io_dtype == "fp16"
        # Each image in flight of both pipelines waits for one answer at a time; the rest is for
        # pipelines with a few instances.
        self.inner_queue = 8 * options.max_in_flight
        self.kind = IO_DTYPES[options.io_dtype]
        self.signatures: dict[str, Any] = {}
        self.decoder = model.load_decoder() if isinstance(model, PipelineModel) else None

    def write(self) -> dict[str, Any]:
        steps = [("UNet", self._write_unet)]
        if self.of_text:
            steps.append(("text encoder", self.write_text_encoder))
        if self.decoder is not None:
            steps.append(("decoder", self.write_decoder))
        steps.append(("pipeline", self.write_pipelines))
        for i, (name, step) in enumerate(steps):
            self.progress(name, i, len(steps))
            step()
        self._write_surroundings()
        self.progress("pipeline", len(steps), len(steps))
        record = self._record()
        self._write_readme()
        return {
            **record,
            "bytes": sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()),
        }

    def of_shape(self, shape: tuple[int, ...], multiple: int) -> None:
        """The UNet's sample [C, H, W] is of ``shape``, and other heights and widths are multiples
        of ``multiple``.
        """
        self.sample_shape, self.sample_multiple = shape, multiple
        native = shape[1], shape[2]
        # A plan takes the sizes that it was built for and no other.
        self.sizes = (self.plan.sizes or (native,)) if self.plan is not None else ()
        self.size = native if not self.sizes or native in self.sizes else self.sizes[0]

    # the models that run on TensorRT, or its stand-in

    def _write_unet(self) -> None:
        from exporters.graph_info import (
            graph_info,
            load_graph,
            sample_multiple,
            sample_shape,
            save_graph,
        )

        graph = load_graph(self.workspace.path(GRAPH))
        self.of_shape(sample_shape(graph), sample_multiple(graph))
        self.checkpoint_sha256 = graph_info(graph).checkpoint_sha256
        graph, version = self._lowered(graph), self._version_folder("unet")
        inputs = {value.name or "": _dims(value) for value in graph.graph.inputs}
        (output,) = (value.name or "" for value in graph.graph.outputs)
        save_graph(graph, version / ONNX)
        if self.plan is not None and self.half:
            write_plan(
                get_backend(TRT),
                self.plan.folder / LOWERED,
                version / PLAN,
                self.plan.options,
                half_io=True,
            )
        elif self.plan is not None:
            shutil.copyfile(self.plan.folder / ENGINE, version / PLAN)
        kinds = {name: "TYPE_FP32" if name in FLOAT_INPUTS else self.kind for name in inputs}
        self._write_model(
            "unet",
            inputs,
            {output: inputs["sample"]},
            self.max_batch,
            kinds,
            self.options.queue_delay,
            len(self.sizes),
        )

    def _lowered(self, graph: ir.Model) -> ir.Model:
        """The graph that runs without a GPU, with a probe of its kernels beside it."""
        import numpy as np

        from exporters.exactness import LEVELS
        from exporters.graph_info import save_graph
        from exporters.probe import make_probe

        backend = get_backend("onnxruntime")
        options = EngineOptions(processor=self.options.processor)
        probe, version = make_probe(LEVELS[0]), self._version_folder("unet")
        save_graph(backend.lower(probe.model, options), version / "probe.onnx")
        arrays = {f"feed.{name}": x for name, x in probe.feeds.items()} | {
            f"exact.{name}": y for name, y in probe.exact.items()
        }
        np.savez_compressed(version / "probe.npz", **arrays)  # type: ignore[arg-type]
        return backend.lower(graph, options)

    def write_text_encoder(self) -> None:
        """The text encoders as one model."""
        import torch

        from quest_deploy.serving.triton.parts import TextEncoder, save_onnx

        self.pipeline = self.model.load_pipeline(vae=None)
        found = [
            (
                getattr(self.pipeline, f"text_encoder{suffix}"),
                getattr(self.pipeline, f"tokenizer{suffix}"),
            )
            for suffix in ("", "_2")
            if getattr(self.pipeline, f"text_encoder{suffix}", None) is not None
        ]
        module = TextEncoder(*(encoder for encoder, _ in found))
        names = ["input_ids", "input_ids_2"][: len(found)]
        ids = {
            name: torch.zeros(2, words.model_max_length, dtype=torch.int32)
            for name, (_, words) in zip(names, found, strict=True)
        }
        version = self._version_folder("text_encoder")
        save_onnx(module, ids, module.outputs, {0: "batch"}, version / ONNX)
        if self.plan is not None:
            self._build_plan(version, self.max_batch)
        with torch.no_grad():
            outputs = dict(zip(module.outputs, module(*ids.values()), strict=True))
        self._write_model(
            "text_encoder",
            {name: list(value.shape[1:]) for name, value in ids.items()},
            {name: list(value.shape[1:]) for name, value in outputs.items()},
            self.max_batch,
            dict.fromkeys(ids, "TYPE_INT32"),
        )
        self.tokenizers = [words for _, words in found]

    def write_decoder(self) -> None:
        """The decoder."""
        import torch

        from quest_deploy.serving.triton.parts import Decoder, save_onnx

        latents = torch.zeros(1, *self.sample_shape)
        module = Decoder(self.decoder)
        with torch.no_grad():
            channels = module(latents).shape[1]
        free = {0: "batch", 2: "height", 3: "width"}
        version = self._version_folder("vae_decoder")
        save_onnx(module, {"sample": latents.repeat(2, 1, 1, 1)}, ["image"], free, version / ONNX)
        if self.plan is not None:
            self._build_plan(version, DECODER_BATCH, self.sizes)
        shapes = {"sample": [self.sample_shape[0], -1, -1]}, {"image": [channels, -1, -1]}
        self._write_model(
            "vae_decoder", *shapes, DECODER_BATCH, {"sample": self.kind}, profiles=len(self.sizes)
        )

    def _build_plan(
        self, version: Path, max_batch: int, sizes: tuple[tuple[int, int], ...] = ()
    ) -> None:
        """Build the plan of a part beside the UNet, in FP32, from the ONNX file in ``version``,
        with the UNet's own options.
        """
        assert self.plan is not None
        chosen = replace(
            self.plan.options,
            max_batch=max_batch,
            sample_size=sizes,
            dtype="fp32",
            quantize="native",
            plugins=None,
            serialize_plugins=False,
            opt_batch=None,
        )
        write_plan(get_backend(TRT), version / ONNX, version / PLAN, chosen, half_io=self.half)

    def _write_model(
        self,
        name: str,
        inputs: dict[str, list[int]],
        outputs: dict[str, list[int]],
        max_batch: int,
        kinds: dict[str, str],
        queue_delay: int = 0,
        profiles: int = 1,
    ) -> None:
        """Configure a model of the platform tensorrt_plan; see
        :func:`quest_deploy.serving.triton.configs.plan_config`.
        """
        tensors = {key: (kinds[key], dims) for key, dims in inputs.items()}
        sample = (self.sample_shape[0], *self.size)
        native = {
            key: [s if s > 0 else sample[axis] for axis, s in enumerate(dims)]
            for key, dims in inputs.items()
        }
        given = {key: (self.kind, dims) for key, dims in outputs.items()}
        limits = {"queue_delay": queue_delay, "max_queue": self.inner_queue, "profiles": profiles}
        self._write_config(name, plan_config(name, tensors, given, native, max_batch, **limits))
        self.signatures[name] = {
            "inputs": {key: NUMPY_TYPES[kind] for key, kind in kinds.items()},
            "outputs": list(outputs),
        }

    # the models that call them

    def write_pipelines(self) -> None:
        """``pipeline`` and ``pipeline_stream``, after the models that they call."""
        import numpy as np

        factor = (
            self.model.images(np.zeros((1, *self.sample_shape), np.float32)).shape[2]
            // self.sample_shape[1]
        )
        height, width = (side * factor for side in self.size)
        largest = max((side * factor for size in self.sizes for side in size), default=None)
        self.max_size = self.options.max_size or largest or max(height, width)
        if self.max_size < max(height, width):
            raise InputError(
                f"--max-size {self.max_size}: images are {height}x{width} where a request does not "
                "say"
            )
        if largest is not None and self.max_size > largest:
            raise InputError(
                f"--max-size {self.max_size}: the plan's largest side is {largest}; build it with "
                "a "
                "larger --sample-size"
            )
        self.settings = self._settings(factor)
        for name, stream in (("pipeline", False), ("pipeline_stream", True)):
            version = self._version_folder(name)
            for source in (FILES / "pipeline").glob("*.py"):
                shutil.copyfile(source, version / source.name)
            self._write_conditions(version)
            write_json(version / "settings.json", self.settings)
            limits = {
                "max_steps": self.options.max_steps,
                "max_size": self.max_size,
                "max_in_flight": self.options.max_in_flight,
                "model_timeout": MODEL_TIMEOUT,
            }
            images, queue = 1 if stream else self.options.max_images, self.options.max_queue
            self._write_config(
                name, pipeline_config(name, self._inputs(), limits, images, queue, stream=stream)
            )

    def _write_conditions(self, version: Path) -> None:
        """What the UNet is conditioned on: tokenizers, or a table with a row for each label, the
        last one for none.
        """
        import numpy as np

        if self.of_text:
            for tokenizer, name in zip(self.tokenizers, ("tokenizer", "tokenizer_2"), strict=False):
                tokenizer.save_pretrained(version / name)
                if not (version / name / "tokenizer.json").is_file():
                    raise InputError(
                        f"the {name} of {self.model.name} has no tokenizer.json; expected a fast "
                        "tokenizer of transformers"
                    )
            return
        tables = {
            name: value.numpy()
            for name, value in self.model.conditions(np.arange(self.model.labels)).items()
        }
        if (null := _null_conditions(self.model)) is not None:
            tables = {
                name: np.concatenate([value, null[name].numpy()]) for name, value in tables.items()
            }
        if tables:
            np.savez(version / "conditions.npz", **tables)

    def _settings(self, factor: int) -> dict[str, Any]:
        of_xl = self.of_text and self.model.config.get("addition_embed_type") == "text_time"
        return {
            "model": self.model.name,
            "sample_shape": list(self.sample_shape),
            "text": self.of_text,
            "labels": 1 if self.of_text else self.model.labels,
            "guidable": _guidable(self.model),
            "pixels_per_latent": factor,
            "size": [side * factor for side in self.size],
            "sizes": [[side * factor for side in size] for size in self.sizes],
            "size_factor": factor * self.sample_multiple,
            "decoder": self.decoder is not None,
            "schedulers": SCHEDULERS,
            "scheduler_config": self.model.scheduler_config(),
            "defaults": {"steps": STEPS, "scheduler": SCHEDULER, "guidance": self.model.guidance},
            "zero_unconditional": of_xl
            and bool(self.pipeline.config.get("force_zeros_for_empty_prompt")),
            "time_ids": of_xl,
            "models": self.signatures,
        }

    def _inputs(self) -> dict[str, str]:
        """The pipelines' inputs and their types."""
        asked = {"prompt": "TYPE_STRING", "negative_prompt": "TYPE_STRING"} if self.of_text else {}
        asked |= {"label": "TYPE_INT32"} if self.model.asked_for == "label" else {}
        chosen = {
            "seed": "TYPE_INT64",
            "steps": "TYPE_INT32",
            "scheduler": "TYPE_STRING",
            "guidance": "TYPE_FP32",
        }
        return asked | chosen | {"height": "TYPE_INT32", "width": "TYPE_INT32"}

    # what belongs to the repository

    def _write_surroundings(self) -> None:
        shutil.copytree(
            FILES / BACKENDS_CPU,
            self.folder / BACKENDS_CPU,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        for path in FILES.glob("*.py"):
            shutil.copyfile(path, self.folder / path.name)
        for plugin in self.plugins:
            (self.folder / PLUGINS).mkdir(exist_ok=True)
            shutil.copyfile(plugin, self.folder / PLUGINS / plugin.name)
        # Not NumPy: a container brings the one that its python backend was built for.
        packages = ["diffusers", "pillow", "torch", *(["tokenizers"] if self.of_text else [])]
        (self.folder / "requirements.txt").write_text("".join(map(_pinned, packages)))
        (self.folder / "requirements-cpu.txt").write_text(
            "-r requirements.txt\n" + _pinned("onnxruntime")
        )

    def _write_readme(self) -> None:
        """Last, for the server's command is ``serve.py``'s own."""
        printed = subprocess.run(
            [sys.executable, self.folder / "serve.py", "--print"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        command = printed.strip().replace(str(self.folder.resolve()), "/package")
        question, option = '("seed", "INT64", np.int64(7))', ""
        if self.of_text:
            question, option = (
                '("prompt", "BYTES", b"a lighthouse in a storm")',
                '--prompt "a lighthouse in a storm"',
            )
        elif self.model.asked_for == "label":
            question, option = '("label", "INT32", np.int32(3))', "--label 3"
        plan = (
            f"The plan was built with TensorRT {self.plan.tensorrt}; take the container that has it"
            + (
                ", or a later one: the plan is version-compatible."
                if self.plan.options.version_compatible
                else "."
            )
            if self.plan
            else NO_PLAN
        )
        values = {
            **asdict(self.options),
            "model": self.model.name,
            "scheme": self.workspace.scheme.name,
            "models": ", ".join(
                f"`{name}`" for name in (*self.signatures, "pipeline", "pipeline_stream")
            ),
            "plan": plan,
            "command": " \\\n        ".join(shlex.split(command)),
            "inputs": "\n".join(
                f"| `{name}` | {kind.removeprefix('TYPE_').replace('STRING', 'BYTES')} | "
                f"{INPUTS[name]} |"
                for name, kind in self._inputs().items()
            ),
            "question": question,
            "option": option,
            "delay": self.options.queue_delay,
            "max_size": self.max_size,
            "max_batch": self.max_batch,
            "inner_queue": self.inner_queue,
            "model_timeout": MODEL_TIMEOUT,
            "sizes": ", ".join(f"{height}x{width}" for height, width in self.settings["sizes"])
            or f"multiples of {self.settings['size_factor']}",
        }
        template = Template((FILES / "README.md").read_text())
        (self.folder / "README.md").write_text(template.substitute(values))

    def _record(self) -> dict[str, Any]:
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        record = {
            "format": FORMAT,
            "version": VERSION,
            "made_by": f"quest-deploy {__version__}",
            "model": self.model.name,
            "scheme": self.workspace.scheme.to_json(),
            "checkpoint_sha256": self.checkpoint_sha256,
            "options": {
                **asdict(self.options),
                "max_batch": self.max_batch,
                "max_size": self.max_size,
                "plugins": [plugin.name for plugin in self.plugins],
            },
            "models": sorted(self.signatures),
            "plan": self.plan is not None,
            "version_compatible": self.plan is not None and self.plan.options.version_compatible,
            # Configurations are the operator's to edit; what is run is not.
            "files": {
                str(path.relative_to(self.folder)): sha256_of(path)
                for path in files
                if path.name != "config.pbtxt"
                and not (path.parent == self.folder and path.suffix in (".md", ".txt"))
            },
        }
        write_json(self.folder / PACKAGE_FILE, record)
        return record

    # small things

    def _version_folder(self, model: str) -> Path:
        folder = self.folder / MODELS / model / "1"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _write_config(self, model: str, config: dict[str, Any]) -> None:
        (self.folder / MODELS / model / "config.pbtxt").write_text(pbtxt(config))


def _guidable(model: Any) -> bool:
    return model.asked_for == "prompt" or _null_conditions(model) is not None


def _null_conditions(model: Any) -> dict[str, Tensor] | None:
    """What an image without a condition is drawn from; None where the model has none, and so no
    guidance.
    """
    try:
        conditions: dict[str, Tensor] = model.null_conditions(1)
    except InputError:
        return None
    return conditions


def _dims(value: ir.Value) -> list[int]:
    """The dimensions of a graph's input without the batch; -1 for those that are free."""
    return [size if isinstance(size, int) else -1 for size in list(value.shape or [])[1:]]


def _pinned(package: str) -> str:
    """A line of a requirements file: the version that is installed here, if it is."""
    try:
        return f"{package}=={importlib.metadata.version(package).split('+')[0]}\n"
    except importlib.metadata.PackageNotFoundError:  # such as onnxruntime where onnxruntime-gpu is
        return f"{package}\n"
