"""A model repository for Triton Inference Server, with what belongs to it: the server's command, a
probe, examples, a README.

One repository for GPU and CPU: models are of the platform tensorrt_plan, with the plan and the ONNX
file side by side. Triton's TensorRT backend loads the plan; the python-based stand-in of
``backends_cpu`` opens the ONNX file.
"""

from __future__ import annotations

import importlib.metadata
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.graph_info import (
    added_inputs,
    graph_info,
    input_sizes,
    load_graph,
    load_signature,
)
from exporters.part_info import part_info
from exporters.parts import trace
from quest_deploy import __version__
from quest_deploy.artifacts.workspace import GRAPH
from quest_deploy.backends.parts import VAE_DECODER, VAE_ENCODER
from quest_deploy.errors import InputError
from quest_deploy.files import atomic_folder, read_json, sha256_of, write_json
from quest_deploy.models.controls import load_control
from quest_deploy.models.ip_adapters import ImagePrompts
from quest_deploy.models.loading import load_model
from quest_deploy.models.residuals import CONTROLNET, IP_ADAPTER, T2I_ADAPTER, kind_of
from quest_deploy.progress import no_progress
from quest_deploy.serving.part_graphs import PartGraphs, without_modules
from quest_deploy.serving.triton.graphs import text_encoder, with_parts
from quest_deploy.serving.triton.layout import FILES, Layout
from quest_deploy.serving.triton.models import (
    write_controlnet,
    write_decoder,
    write_encoder,
    write_image_encoder,
    write_network,
    write_text_encoder,
)
from quest_deploy.serving.triton.parts import EncoderPlaceholder
from quest_deploy.serving.triton.pipelines import (
    guidable,
    largest_image,
    pixels_per_latent,
    write_no_image,
    write_pipelines,
)
from quest_deploy.serving.triton.plans import find_plan
from quest_deploy.serving.triton.readme import write_readme

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import onnx_ir as ir

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.models.networks.prompt_encoders import Tokens
    from quest_deploy.models.pipeline_model import PipelineModel
    from quest_deploy.progress import Progress
    from quest_deploy.serving.triton.layout import Signature
    from quest_deploy.serving.triton.options import TritonOptions

FORMAT, VERSION = "quest-deploy triton package", 1
PACKAGE_FILE = "package.json"
PLUGINS, BACKENDS_CPU = "plugins", "backends_cpu"


def write_package(
    workspace: Workspace,
    folder: Path,
    options: TritonOptions,
    progress: Progress = no_progress,
    controlnet: Path | None = None,
) -> dict[str, Any]:
    """Write the repository and what belongs to it into ``folder``, replacing an earlier package
    there; return what it holds.

    Args:
        controlnet: the folder of a ControlNet to serve beside the UNet.

    Raises:
        InputError: the workspace's model cannot be served, its graph or plan is not up to date, or
            ``folder`` holds something else.
    """
    check_target(folder)
    workspace.require("export")
    model = load_model(workspace.source)
    model.require_weights("serve")
    if model.channels.image_kind is not None and not model.channels.image:
        raise InputError(
            f"{model.name} inpaints with a UNet that has no channels for an image, which a "
            "package does not; use quest_deploy.load_pipeline"
        )
    parts = PartGraphs(workspace, model)
    net = _controlnet(workspace, model, controlnet)
    prompts = None if model.source.ip_adapter is None else ImagePrompts(model)
    shown = None if prompts is None else prompts.settings
    rows = 1 if not guidable(model) else 2 if model.image_guidance is None else 3
    of_text = model.asked_for == "prompt"
    plan = find_plan(workspace, options, alone=not parts.has_decoder and not of_text, rows=rows)
    if options.max_batch is not None and options.max_batch < rows:
        raise InputError(
            f"--max-batch {options.max_batch}: an image with guidance is {rows} rows at once"
        )
    with atomic_folder(folder) as made:
        graph = load_graph(workspace.path(GRAPH))
        info = graph_info(graph)
        latents = (model.sample_shape[0], *info.sample_shape[1:])
        factor = pixels_per_latent(model, latents)
        layout = Layout(made, options, plan, latents, info.sample_multiple, factor)
        _check_largest(model, layout)
        pipeline, tokens, states = None, None, 0
        signatures: dict[str, Signature] = {}
        takes_image = model.channels.image > 0
        total = 2 + of_text + parts.has_decoder + takes_image
        total += (net is not None) + (prompts is not None)

        network = model.network.part
        progress(model.network.noun, 0, total)
        signatures[network] = write_network(layout, graph, network)
        del graph  # its weights are large
        if of_text:
            progress("text encoder", len(signatures), total)
            encoders = {name: parts.load(name) for name in parts.encoders}
            pipeline, tokens, encoder = text_model(model, encoders)
            signatures["text_encoder"] = write_text_encoder(layout, encoder)
            states = _row_bytes(encoder)
            del encoder, encoders
        if parts.has_decoder:
            progress("decoder", len(signatures), total)
            signatures["vae_decoder"] = write_decoder(layout, parts.load(VAE_DECODER))
        if takes_image:
            progress("encoder", len(signatures), total)
            encoder = parts.load(VAE_ENCODER)
            scale = model.image_scale(part_info(encoder).config["scaling_factor"])
            signatures["vae_encoder"] = write_encoder(layout, encoder, scale)
        residuals = {} if net is None else model.network.residuals(model.config, CONTROLNET)
        if net is not None:
            progress("ControlNet", len(signatures), total)
            conditions = model.null_conditions(2)
            signatures["controlnet"] = write_controlnet(layout, net, residuals, conditions)
        if prompts is not None:
            progress("image encoder", len(signatures), total)
            signatures["image_encoder"] = write_image_encoder(layout, prompts)
        progress("pipeline", len(signatures), total)
        settings = write_pipelines(layout, model, pipeline, signatures, residuals, shown, tokens)
        if prompts is not None:
            write_no_image(layout, prompts)
        plugins = options.plugin_library if plan is None else plan.plugins
        _write_surroundings(made, plugins, of_text=of_text)
        progress("pipeline", total, total)
        record = {
            "format": FORMAT,
            "version": VERSION,
            "made_by": f"quest-deploy {__version__}",
            "model": model.name,
            "scheme": workspace.scheme.to_json(),
            "checkpoint_sha256": info.checkpoint_sha256,
            "options": {
                **options.to_json(),
                "max_batch": layout.max_batch,
                "max_size": layout.max_size,
                "plugins": [plugin.name for plugin in plugins],
            },
            "models": sorted(signatures),
            "part_weights": parts.weights,
            "plan": plan is not None,
            "version_compatible": plan is not None and plan.options.version_compatible,
            "files": _hashes(made),
        }
        write_json(made / PACKAGE_FILE, record)
        write_readme(
            layout, model, workspace.scheme.name, signatures, settings, parts.weights, states
        )
        files = [path for path in made.rglob("*") if path.is_file()]
        return {**record, "bytes": sum(path.stat().st_size for path in files)}


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


def _controlnet(workspace: Workspace, model: PipelineModel, folder: Path | None) -> Any:
    """The ControlNet in ``folder``, None without; raise InputError where the graph's inputs are not
    what it needs.
    """
    added = added_inputs(load_signature(workspace.path(GRAPH)))
    kinds = set(map(kind_of, added)) - {IP_ADAPTER}
    if T2I_ADAPTER in kinds:
        raise InputError(
            f"{workspace.root}: its graph has inputs for T2I-adapters, which a package does not "
            "serve; use quest_deploy.load_pipeline, or run `quest-deploy export "
            "--no-t2i-adapter-inputs`"
        )
    if kinds and folder is None:
        raise InputError(
            f"{workspace.root}: its graph has inputs for a ControlNet: give one with --controlnet, "
            "or run `quest-deploy export --no-controlnet-inputs`"
        )
    if folder is None:
        return None
    if not kinds:
        raise InputError(
            f"--controlnet: the graph in {workspace.root} has no inputs for what it adds; run "
            "`quest-deploy export --controlnet-inputs`, and build the engine again"
        )
    return load_control(folder, model, CONTROLNET)


def text_model(
    model: PipelineModel, graphs: Mapping[str, ir.Model]
) -> tuple[Any, Sequence[Tokens] | None, ir.Model]:
    """The model's pipeline, of which the tokenizers are wanted, what they give, and one graph of
    its text encoders.

    Args:
        graphs: of the text encoders, in their order, by the names of the parts; they are changed.
    """
    pipeline = without_modules(model)
    if model.network.prompt_encoder is None:
        for name, graph in graphs.items():
            tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
            (tokenizer.model_max_length,) = input_sizes(graph)["input_ids"][1:]
        return pipeline, None, text_encoder(list(graphs.values()))
    for name, graph in graphs.items():
        setattr(pipeline, name, EncoderPlaceholder(name, graph))
    encoder = model.network.prompt_encoder(pipeline)
    traced = trace(encoder, encoder.examples(), encoder.outputs)
    return pipeline, encoder.tokens, with_parts(traced, graphs)


def _row_bytes(encoder: ir.Model) -> int:
    """What a prompt's outputs take, in float32."""
    shapes = [list(value.shape or [])[1:] for value in encoder.graph.outputs]
    known = [[size for size in shape if isinstance(size, int)] for shape in shapes]
    return 4 * sum(math.prod(sizes) for sizes in known)


def _check_largest(model: PipelineModel, layout: Layout) -> None:
    """Raise InputError where a request might ask for more than the network has positions for."""
    largest = largest_image(model, layout)
    if largest is not None and layout.max_size > largest:
        raise InputError(
            f"--max-size {layout.max_size}: {model.name} has positions for images of up to "
            f"{largest} pixels"
        )


def _write_surroundings(folder: Path, plugins: Iterable[Path], *, of_text: bool) -> None:
    shutil.copytree(
        FILES / BACKENDS_CPU,
        folder / BACKENDS_CPU,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for path in FILES.glob("*.py"):
        shutil.copyfile(path, folder / path.name)
    for plugin in plugins:
        (folder / PLUGINS).mkdir(exist_ok=True)
        shutil.copyfile(plugin, folder / PLUGINS / plugin.name)
    # Not NumPy: a container brings the one that its python backend was built for.
    packages = ["diffusers", "pillow", "torch", *(["tokenizers"] if of_text else [])]
    (folder / "requirements.txt").write_text("".join(map(_pinned, packages)))
    (folder / "requirements-cpu.txt").write_text("-r requirements.txt\n" + _pinned("onnxruntime"))


def _hashes(folder: Path) -> dict[str, str]:
    """Of the files that are run; configurations and texts are the operator's to edit."""
    return {
        str(path.relative_to(folder)): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != "config.pbtxt"
        and not (path.parent == folder and path.suffix in (".md", ".txt"))
    }


def _pinned(package: str) -> str:
    """A line of a requirements file: the version that is installed here, if it is."""
    try:
        return f"{package}=={importlib.metadata.version(package).split('+')[0]}\n"
    except importlib.metadata.PackageNotFoundError:  # such as onnxruntime where onnxruntime-gpu is
        return f"{package}\n"
