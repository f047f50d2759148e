"""Export the graph of a model that is too large to be calibrated here, by its shapes alone.

    python -m scripts.bench.export_shapes MODEL FOLDER [--bits w4a4] [--json FILE]

MODEL is a name of the registry's or a folder in diffusers' layout, of which the configurations are
read. The float model runs once, on tensors without values, among which layers share a quantizer
where they read the same one. FOLDER gets the graph that `quest-deploy export` would write, with all
of its data, a layer at a time: the codes are all the largest, the scales ones, and the weights that
stay in float zeros, which take 16 bits each, as where a model was published in bfloat16.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import onnx
import torch
import typer
from torch._subclasses.fake_tensor import FakeTensorMode

from exporters.graph_info import save_graph
from exporters.torch_to_qdq import portable_graph
from quest_deploy.artifacts.checkpoint import (
    ActivationQuantizerData,
    Architecture,
    Checkpoint,
    LayerData,
)
from quest_deploy.artifacts.lazy_tensors import LazyArray
from quest_deploy.artifacts.scheme import Symmetry, activation_levels, weight_range
from quest_deploy.artifacts.workspace import GRAPH
from quest_deploy.models.channels import GUIDANCE
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.registry import KNOWN_MODELS
from quest_deploy.quantization.architectures import without_weights
from quest_deploy.quantization.model import build_float_model, conv_geometry
from quest_deploy.quantization.planner import plan_quantization
from quest_deploy.stages.workspaces import SchemeChoices
from scripts.bench.measure_export import payload_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quest_deploy.artifacts.scheme import Scheme
    from quest_deploy.models.pipeline_model import PipelineModel
    from quest_deploy.quantization.planner import LayerPlan, QuantizerPlan


def example_of(model: PipelineModel) -> dict[str, Tensor]:
    """Random inputs of two rows."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "sample": torch.randn(2, *model.sample_shape, generator=generator),
        "timestep": torch.tensor([250.0, 750.0]),
        **model.draw_conditions(2, generator),
    }
    if model.embeds_guidance:
        inputs[GUIDANCE] = torch.full((2,), model.guidance)
    return inputs


def shape_checkpoint(
    model: PipelineModel, scheme: Scheme, example: dict[str, Tensor]
) -> Checkpoint:
    """A checkpoint of ``model``, its attention's products in float, whose weights take no memory;
    see the module's docstring.
    """
    known = KNOWN_MODELS.get(model.name)
    architecture = Architecture(
        model.config["_class_name"],
        {name: value for name, value in model.config.items() if not name.startswith("_")},
        {},
        None,
        None if known is None else known.heads,
    )
    with without_weights():
        network = build_float_model(architecture)
    state = network.state_dict()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        empty = {name: torch.empty(value.shape) for name, value in state.items()}
        network.load_state_dict(empty, assign=True)
        probe = {name: mode.from_tensor(value) for name, value in example.items()}
        plan = plan_quantization(network, probe, scheme)
    of_layers = tuple(f"{layer.name}." for layer in plan.layers)
    return Checkpoint(
        model.name,
        architecture,
        scheme,
        {layer.name: _layer(network, layer) for layer in plan.layers},
        {x.name: _quantizer(network, x, scheme.buckets) for x in plan.quantizers},
        {
            name: _filled(tuple(value.shape), np.float32, 0)
            for name, value in state.items()
            if not name.startswith(of_layers)
        },
        {"method": "shapes"},
    )


def _filled(shape: tuple[int, ...], dtype: type, value: int) -> LazyArray:
    return LazyArray(shape, np.dtype(dtype), lambda: np.full(shape, value, dtype))


def _layer(network: nn.Module, plan: LayerPlan) -> LayerData:
    layer: Any = network.get_submodule(plan.name)
    shape, ones = tuple(layer.weight.shape), np.ones(len(layer.weight), np.float32)
    codes = _filled(shape, np.int8, weight_range(plan.weight_bits)[1])
    bias = None if layer.bias is None else np.zeros_like(ones)
    return LayerData(
        plan.name, plan.weight_bits, codes, ones, bias, conv_geometry(layer), plan.macs
    )


def _quantizer(network: nn.Module, plan: QuantizerPlan, buckets: int) -> ActivationQuantizerData:
    symmetric = plan.symmetry is Symmetry.SYMMETRIC
    bounds = (-127, 127) if symmetric else (0, activation_levels(plan.bits))
    layer: Any = network.get_submodule(plan.layers[0])
    scale, low, high = (np.full(buckets, x, np.float32) for x in (1, *bounds))
    channel = np.ones(layer.weight.shape[1] * getattr(layer, "groups", 1), np.float32)
    return ActivationQuantizerData(
        plan.name, plan.bits, plan.symmetry, plan.axis, plan.layers, scale, low, high, channel
    )


def main(
    model: Annotated[str, typer.Argument(help="A name of the registry's, or a folder.")],
    folder: Annotated[Path, typer.Argument(help="Where the graph goes.")],
    bits: str = "w4a4",
    buckets: int = 20,
    json_file: Annotated[Path | None, typer.Option("--json", help="What it has.")] = None,
) -> None:
    """Export, and check the graph."""
    loaded = load_model(resolve_source(model, random_weights=True))
    choices = SchemeChoices(bits=bits, buckets=buckets)
    scheme = choices.scheme(
        loaded.train_timesteps,
        edges=choices.edges(loaded),
        eight_bit_layers=loaded.eight_bit_layers,
        float_layers=loaded.float_layers,
    )
    example = example_of(loaded)
    checkpoint = shape_checkpoint(loaded, scheme, example)
    folder.mkdir(parents=True, exist_ok=True)
    save_graph(portable_graph(checkpoint, example, ""), folder / GRAPH)
    onnx.checker.check_model(str(folder / GRAPH), full_check=True)
    layers = checkpoint.layers.values()
    found = {
        "quantized_layers": len(layers),
        "quantized_weights": sum(x.codes.size for x in layers),
        "float_weights": sum(x.size for x in checkpoint.floats.values()),
        "payload_bytes": payload_bytes(checkpoint),
        "quantizers": len(checkpoint.quantizers),
        "nodes": len(onnx.load(folder / GRAPH, load_external_data=False).graph.node),
        "bytes": sum(path.stat().st_size for path in folder.glob(f"{GRAPH}*")),
    }
    print(json.dumps(found))
    if json_file is not None:
        json_file.write_text(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
