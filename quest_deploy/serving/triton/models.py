"""A package's models that run on TensorRT, or without a GPU on its stand-in: the denoising network,
the text encoder, the decoder.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from exporters.exactness import LEVELS
from exporters.graph_info import save_graph, size_divisors
from exporters.parts import trace
from exporters.passes.fix_tokens import FixTokens
from exporters.probe import make_probe
from quest_deploy.backends.base import LOWERED
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.parts import IMAGE_BATCH
from quest_deploy.backends.registry import get_backend
from quest_deploy.backends.tensorrt.base import ENGINE
from quest_deploy.models.residuals import IMAGE_TOKENS
from quest_deploy.serving.triton import graphs
from quest_deploy.serving.triton.layout import ONNX, PLAN
from quest_deploy.serving.triton.parts import ControlNet, ImageEncoder
from quest_deploy.serving.triton.plans import FLOAT_INPUTS, write_plan

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import onnx_ir as ir

    from quest_deploy.models.ip_adapters import ImagePrompts
    from quest_deploy.serving.triton.layout import Layout, Signature

IMAGE = "image"
"""What a ControlNet is shown; see :class:`quest_deploy.serving.triton.parts.ControlNet`."""


def write_network(layout: Layout, graph: ir.Model, name: str) -> Signature:
    """The denoising network, from its portable graph, as the model ``name``."""
    version, plan = layout.version_folder(name), layout.plan
    FixTokens()(graph)  # a prompt is padded to so many
    graph = lower_network(graph, version, layout.options.processor)
    inputs = {value.name or "": _dims(value) for value in graph.graph.inputs}
    ((output, predicted),) = ((x.name or "", _dims(x)[0]) for x in graph.graph.outputs)
    save_graph(graph, version / ONNX)
    if plan is not None and layout.half:
        write_plan(plan.folder / LOWERED, version / PLAN, plan.options, low_precision_io=True)
    elif plan is not None:
        shutil.copyfile(plan.folder / ENGINE, version / PLAN)
    return layout.write_plan_config(
        name,
        inputs,
        {output: [predicted, *inputs["sample"][1:]]},
        layout.max_batch,
        {name: "TYPE_FP32" if name in FLOAT_INPUTS else layout.kind for name in inputs},
        layout.options.queue_delay,
        len(layout.sizes),
        divisors=size_divisors(graph),
    )


def lower_network(graph: ir.Model, version: Path, processor: str) -> ir.Model:
    """The graph that runs without a GPU; a probe of its kernels is written into ``version``.

    Args:
        processor: as of :class:`quest_deploy.serving.triton.options.TritonOptions`.
    """
    backend, options = get_backend("onnxruntime"), EngineOptions(processor=processor)
    probe = make_probe(LEVELS[0])
    save_graph(backend.lower(probe.model, options), version / "probe.onnx")
    arrays = {f"feed.{name}": x for name, x in probe.feeds.items()} | {
        f"exact.{name}": y for name, y in probe.exact.items()
    }
    np.savez_compressed(version / "probe.npz", **arrays)  # type: ignore[arg-type]
    return backend.lower(graph, options)


def write_text_encoder(layout: Layout, graph: ir.Model) -> Signature:
    """The text encoders as one model, from their graph."""
    version = layout.version_folder("text_encoder")
    save_graph(graph, version / ONNX)
    _write_plan_beside(layout, version, layout.max_batch)
    ids = {value.name or "": _dims(value) for value in graph.graph.inputs}
    return layout.write_plan_config(
        "text_encoder",
        ids,
        {value.name or "": _dims(value) for value in graph.graph.outputs},
        layout.max_batch,
        dict.fromkeys(ids, "TYPE_INT32"),
    )


def write_decoder(layout: Layout, part: ir.Model) -> Signature:
    """The decoder, from its graph, which is changed."""
    graph, version = graphs.decoder(part), layout.version_folder("vae_decoder")
    save_graph(graph, version / ONNX)
    _write_plan_beside(layout, version, IMAGE_BATCH, layout.sizes)
    return layout.write_plan_config(
        "vae_decoder",
        {"sample": [layout.sample_shape[0], -1, -1]},
        {value.name or "": _dims(value) for value in graph.graph.outputs},
        IMAGE_BATCH,
        {"sample": layout.kind},
        profiles=len(layout.sizes),
    )


def write_encoder(layout: Layout, part: ir.Model, scale: float) -> Signature:
    """What encodes the images that are inpainted or edited, from its graph, which is changed.

    Args:
        scale: of the latents that the UNet takes.
    """
    graph, version = graphs.encoder(part, scale), layout.version_folder("vae_encoder")
    save_graph(graph, version / ONNX)
    sizes = tuple(layout.pixels(each) for each in layout.sizes)
    _write_plan_beside(layout, version, IMAGE_BATCH, sizes)
    return layout.write_plan_config(
        "vae_encoder",
        {"sample": [3, -1, -1]},
        {value.name or "": _dims(value) for value in graph.graph.outputs},
        IMAGE_BATCH,
        {"sample": layout.kind},
        profiles=len(layout.sizes),
        size=layout.pixels(layout.size),
    )


def write_image_encoder(layout: Layout, prompts: ImagePrompts) -> Signature:
    """What makes an IP-Adapter's tokens of an image."""
    module = ImageEncoder(prompts.encoder, prompts.projection)
    pixels = {"pixels": torch.zeros(2, 3, *prompts.crop)}
    version = layout.version_folder("image_encoder")
    save_graph(trace(module, pixels, module.outputs, any_size=False), version / ONNX)
    _write_plan_beside(layout, version, IMAGE_BATCH)
    return layout.write_plan_config(
        "image_encoder",
        {"pixels": [3, *prompts.crop]},
        {IMAGE_TOKENS: list(prompts.null(1)[IMAGE_TOKENS].shape[1:])},
        IMAGE_BATCH,
        {"pixels": layout.kind},
    )


def write_controlnet(
    layout: Layout, net: Any, residuals: Iterable[str], tokens: dict[str, Any]
) -> Signature:
    """A ControlNet, which takes what the UNet takes and an image.

    Args:
        net: a ControlNetModel.
        residuals: the names of what it adds, in its own order.
        tokens: an example [2, ...] of each of the UNet's conditions.
    """
    pixels, (height, width) = layout.pixels_per_latent, layout.size
    examples = {
        "sample": torch.zeros(2, layout.sample_shape[0], height, width),
        "timestep": torch.zeros(2),
        **{name: torch.zeros(value.shape) for name, value in tokens.items()},
    }
    image = {IMAGE: torch.zeros(2, 3 * pixels**2, height, width)}
    version = layout.version_folder("controlnet")
    module, outputs = ControlNet(net, list(examples), pixels), list(residuals)
    save_graph(trace(module, {**examples, **image}, outputs), version / ONNX)
    _write_plan_beside(layout, version, layout.max_batch, layout.sizes)
    with torch.no_grad():
        added = module(*examples.values(), *image.values())
    kinds = {name: "TYPE_FP32" if name in FLOAT_INPUTS else layout.kind for name in examples}
    free = {name: [x.shape[1], -1, -1] for name, x in {**examples, **image}.items() if x.dim() == 4}
    return layout.write_plan_config(
        "controlnet",
        {name: free.get(name, list(x.shape[1:])) for name, x in {**examples, **image}.items()},
        {name: [x.shape[1], -1, -1] for name, x in zip(outputs, added, strict=True)},
        layout.max_batch,
        {**kinds, IMAGE: layout.kind},
        profiles=len(layout.sizes),
    )


def _write_plan_beside(
    layout: Layout, version: Path, max_batch: int, sizes: tuple[tuple[int, int], ...] = ()
) -> None:
    """Where the UNet has a plan, build that of a part beside it, in FP32, from the ONNX file in
    ``version``, with the UNet's own options.
    """
    if layout.plan is None:
        return
    options = replace(
        layout.plan.options,
        max_batch=max_batch,
        sample_size=sizes,
        dtype="fp32",
        quantize="native",
        plugins=None,
        serialize_plugins=False,
        opt_batch=None,
    )
    write_plan(version / ONNX, version / PLAN, options, low_precision_io=layout.half)


def _dims(value: ir.Value) -> list[int]:
    """The dimensions of a graph's input or output without the batch; -1 for those that are free."""
    return [size if isinstance(size, int) else -1 for size in list(value.shape or [])[1:]]
