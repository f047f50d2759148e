"""The portable graph of a small UNet, against the ONNX specification's evaluator, onnxruntime and
the fake-quantized model.
"""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from exporters import torch_to_qdq
from exporters.editor import array_of
from exporters.graph_info import GraphInfo, graph_info, input_sizes, load_graph, save_graph
from exporters.passes.cut import cut_bucket, cut_codes, cut_layer
from exporters.torch_to_qdq import portable_graph
from quest_deploy.artifacts.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from quest_deploy.artifacts.lazy_tensors import LazyArray
from quest_deploy.artifacts.scheme import Scheme, quantile_edges
from quest_deploy.calibration.ptq import CalibrationOptions, RangeMethod, calibrate
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.quantization.model import QuantizedModel
from tests.helpers import (
    Array,
    Feeds,
    float32,
    graph_from_text,
    numpy_layer,
    op_counts,
    proto_of,
    quantizer_codes,
    refused,
    relative_error,
    run,
    run_reference,
    session,
)

BATCH = 5


@pytest.fixture(scope="module")
def feeds(small_inputs: dict[str, torch.Tensor]) -> Feeds:
    return {name: value.numpy() for name, value in small_inputs.items()}


@pytest.fixture(scope="module")
def info(small_proto: onnx.ModelProto) -> GraphInfo:
    return graph_info(ir.from_proto(small_proto))


@pytest.fixture(scope="module")
def torch_values(
    small_checkpoint: Checkpoint, small_inputs: dict[str, torch.Tensor]
) -> dict[str, tuple[Array, Array]]:
    """Each layer's input and output in the fake-quantized model, and the model's own output under
    "".
    """
    model = QuantizedModel.from_checkpoint(small_checkpoint).eval()
    seen: dict[str, tuple[Array, Array]] = {}
    for name, layer in model.quantized_layers().items():
        layer.register_forward_hook(
            lambda m, a, o, n=name: seen.__setitem__(n, (a[0].detach().numpy(), o.detach().numpy()))
        )
    output = model(**small_inputs).detach().numpy()
    return seen | {"": (output, output)}


@pytest.fixture(scope="module")
def bucket(small_checkpoint: Checkpoint, feeds: Feeds) -> Array:
    return np.asarray([small_checkpoint.scheme.bucket_of(float(t)) for t in feeds["timestep"]])


def test_the_graph_passes_the_full_check(small_proto: onnx.ModelProto) -> None:
    onnx.checker.check_model(small_proto, full_check=True)


def test_opsets_and_ir_version_are_the_published_ones(small_proto: onnx.ModelProto) -> None:
    assert small_proto.ir_version == 10
    assert {o.domain: o.version for o in small_proto.opset_import} == {"": 21, "quest": 1}
    assert [(f.domain, f.name) for f in small_proto.functions] == [("quest", "TimestepQuantize")]


def test_inputs_and_outputs_have_the_published_names_types_and_dynamic_sizes(
    small_graph: ir.Model,
) -> None:
    def described(
        values: list[ir.Value],
    ) -> dict[str | None, tuple[ir.DataType | None, list[object]]]:
        return {
            v.name: (
                v.dtype,
                [d.value if isinstance(d, ir.SymbolicDim) else d for d in v.shape or ()],
            )
            for v in values
        }

    assert described(list(small_graph.graph.inputs)) == {
        "sample": (ir.DataType.FLOAT, ["batch", 2, "height", "width"]),
        "timestep": (ir.DataType.FLOAT, ["batch"]),
        "encoder_hidden_states": (ir.DataType.FLOAT, ["batch", "tokens", 8]),
    }
    assert described(list(small_graph.graph.outputs)) == {
        "out_sample": (ir.DataType.FLOAT, ["batch", 2, "height", "width"])
    }


def test_there_is_one_quantizer_a_site_and_no_other_node_of_ours(
    small_graph: ir.Model, small_checkpoint: Checkpoint
) -> None:
    ours = [node for node in small_graph.graph if node.domain]
    assert {node.op_identifier()[:2] for node in ours} == {("quest", "TimestepQuantize")}
    assert sorted(node.outputs[0].name or "" for node in ours) == sorted(
        f"{name}.codes" for name in small_checkpoint.quantizers
    )


def test_layers_that_share_a_site_read_its_one_quantizer(
    small_graph: ir.Model, small_checkpoint: Checkpoint
) -> None:
    values = ir.convenience.create_value_mapping(small_graph.graph)
    for quantizer in small_checkpoint.quantizers.values():
        assert len(values[f"{quantizer.name}.codes"].consumers()) == 1, quantizer.name
        assert len(values[f"{quantizer.name}.dequantized"].consumers()) == len(quantizer.layers), (
            quantizer.name
        )
    sizes = sorted(
        len(quantizer.layers)
        for quantizer in small_checkpoint.quantizers.values()
        if len(quantizer.layers) > 1
    )
    attentions = sum(name.endswith("attn1.to_q") for name in small_checkpoint.layers)
    resnets = sum(name.endswith("time_emb_proj") for name in small_checkpoint.layers)
    assert sizes == sorted([*[3] * attentions, 2 * attentions, resnets])


def middle(codes: ir.Value) -> int:
    """The zero-point of a symmetric weight's or an activation's codes: 8-bit weights are UINT8
    (INT8 may saturate).
    """
    return 128 if codes.dtype is ir.DataType.UINT8 else 0


def test_weights_are_stored_as_the_checkpoints_integers_at_their_own_width(
    small_graph: ir.Model, small_checkpoint: Checkpoint
) -> None:
    for name, layer in small_checkpoint.layers.items():
        weight = small_graph.graph.initializers[f"{name}.weight"]
        assert weight.dtype == (ir.DataType.INT4 if layer.weight_bits == 4 else ir.DataType.UINT8)
        codes = layer.weight_codes if layer.conv else layer.weight_codes.T
        np.testing.assert_array_equal(array_of(weight).astype(np.int16) - middle(weight), codes)
        assert weight.const_value is not None
        assert weight.const_value.nbytes == (codes.size * layer.weight_bits + 7) // 8


def test_no_float_weight_of_a_quantized_layer_is_in_the_graph(
    small_graph: ir.Model, small_checkpoint: Checkpoint
) -> None:
    largest = max(
        array_of(v).size
        for v in small_graph.graph.initializers.values()
        if v.dtype is ir.DataType.FLOAT
    )
    assert largest <= max(layer.weight_codes.shape[0] for layer in small_checkpoint.layers.values())


def test_every_dequantizer_has_an_explicit_zero_point_in_the_middle_of_its_codes_and_activations_have_unit_scale(
    small_graph: ir.Model,
) -> None:
    for node in small_graph.graph:
        if node.op_type == "DequantizeLinear":
            value, scale, zero = node.inputs
            assert value is not None
            assert scale is not None
            assert zero is not None
            assert zero.dtype == value.dtype
            assert (array_of(zero).astype(np.int16) == middle(value)).all()
            if value.const_value is None:
                assert array_of(scale) == 1


def test_the_metadata_names_scheme_checkpoint_and_every_layer_and_quantizer(
    small_graph: ir.Model, info: GraphInfo, small_checkpoint: Checkpoint
) -> None:
    assert (info.scheme, info.checkpoint_sha256) == (small_checkpoint.scheme, "ab" * 32)
    assert (info.sample_shape, info.sample_multiple) == ((2, 4, 4), 2)
    assert list(info.layers) == list(small_checkpoint.layers)
    assert list(info.quantizers) == list(small_checkpoint.quantizers)
    values = ir.convenience.create_value_mapping(small_graph.graph)
    for name, layer in info.layers.items():
        data = small_checkpoint.layers[name]
        assert (layer.weight_bits, layer.macs) == (data.weight_bits, data.macs)
        assert layer.site == small_checkpoint.quantizer_of(name).name
        assert {layer.output, layer.weight} <= values.keys()
    for name, site in info.quantizers.items():
        assert site.bits == small_checkpoint.quantizers[name].bits
        quantizer = values[site.codes].producer()
        assert quantizer is not None
        assert quantizer.inputs[0] is values[site.input]


def test_the_graphs_bucket_is_the_schemes_on_and_around_every_edge(
    small_graph: ir.Model, small_checkpoint: Checkpoint
) -> None:
    edges = np.asarray(small_checkpoint.scheme.bucket_edges, np.float32)
    down, up = (np.nextafter(edges, np.float32(end)) for end in (0, 1e6))
    timesteps = np.concatenate([edges, down, up, float32(0, 999, 0.5, 1000)])
    (found,) = run(cut_bucket(small_graph), {"timestep": timesteps})
    assert found.dtype == np.int64
    assert found.tolist() == [small_checkpoint.scheme.bucket_of(float(t)) for t in timesteps]


def test_buckets_of_any_widths_reach_the_graph(
    small_unet: torch.nn.Module,
    small_trajectories: Trajectories,
    small_inputs: dict[str, torch.Tensor],
) -> None:
    edges = quantile_edges(small_trajectories.timestep.tolist(), 3)
    scheme = Scheme.parse("w4a4", edges=edges)
    checkpoint = calibrate(
        "small", small_unet, small_trajectories, scheme, CalibrationOptions(RangeMethod.MINMAX)
    )
    graph = portable_graph(checkpoint, small_inputs, "ab" * 32)
    timesteps = float32(0, *np.nextafter(float32(*edges), np.float32(0)), *edges, 999)
    (found,) = run(cut_bucket(graph), {"timestep": timesteps})
    assert (graph_info(graph).scheme, edges) == (scheme, (260.0, 550.0))
    assert found.tolist() == [0, 0, 1, 1, 2, 2]


def test_every_quantizer_gives_the_codes_of_numpy(
    small_proto: onnx.ModelProto,
    info: GraphInfo,
    small_checkpoint: Checkpoint,
    torch_values: dict[str, tuple[Array, Array]],
    bucket: Array,
) -> None:
    graph = ir.from_proto(small_proto)
    for name, quantizer in small_checkpoint.quantizers.items():
        x = torch_values[quantizer.layers[0]][0]
        (found,) = run(
            cut_codes(graph, info, name), {info.quantizers[name].input: x, "bucket": bucket}
        )
        np.testing.assert_array_equal(found, quantizer_codes(quantizer, x, bucket), err_msg=name)


@pytest.mark.parametrize("runtime", ["reference", "onnxruntime", "onnxruntime optimized"])
def test_every_layer_agrees_with_the_fake_quantized_model_on_that_models_inputs(
    small_proto: onnx.ModelProto,
    info: GraphInfo,
    small_checkpoint: Checkpoint,
    torch_values: dict[str, tuple[Array, Array]],
    bucket: Array,
    runtime: str,
) -> None:
    graph = ir.from_proto(small_proto)
    for name, layer in info.layers.items():
        x, y = torch_values[name]
        cut, inputs = (
            cut_layer(graph, info, name),
            {info.quantizers[layer.site].input: x, "bucket": bucket},
        )
        (found,) = (
            run_reference(cut, inputs)
            if runtime == "reference"
            else run(cut, inputs, optimized=runtime.endswith("optimized"))
        )
        assert relative_error(found, y) < 1e-6, name
        assert relative_error(found, numpy_layer(small_checkpoint, name, x, bucket)) < 1e-6, name


def with_codes(proto: onnx.ModelProto, info: GraphInfo) -> onnx.ModelProto:
    """The graph with every quantizer's codes as further outputs."""
    model = ir.from_proto(proto)
    values = ir.convenience.create_value_mapping(model.graph)
    model.graph.outputs.extend(values[quantizer.codes] for quantizer in info.quantizers.values())
    return proto_of(model)


def test_end_to_end_runtimes_agree_for_every_sample_without_a_flipped_tie(
    small_proto: onnx.ModelProto,
    info: GraphInfo,
    small_checkpoint: Checkpoint,
    torch_values: dict[str, tuple[Array, Array]],
    feeds: Feeds,
    bucket: Array,
) -> None:
    graph = with_codes(small_proto, info)
    from_torch = [
        quantizer_codes(quantizer, torch_values[quantizer.layers[0]][0], bucket)
        for quantizer in small_checkpoint.quantizers.values()
    ]
    results = {"reference": run_reference(graph, feeds), "onnxruntime": run(graph, feeds)}
    for runtime, (output, *codes) in results.items():
        same = np.ones(BATCH, bool)
        for ours, theirs in zip(codes, from_torch, strict=True):
            same &= (ours == theirs).reshape(BATCH, -1).all(1)
        assert same.sum() >= BATCH - 2, (
            f"{runtime}: flipped ties in most samples, which chance does not explain"
        )
        assert relative_error(output[same], torch_values[""][0][same]) < 2e-5, runtime


def test_a_batch_that_mixes_timesteps_equals_each_sample_alone(
    small_proto: onnx.ModelProto, feeds: Feeds
) -> None:
    infer = session(small_proto)
    (together,) = infer(feeds)
    for i in range(BATCH):
        (alone,) = infer({name: value[i : i + 1] for name, value in feeds.items()})
        np.testing.assert_allclose(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "tokens"), [((2, 2), 3), ((6, 10), 3), ((4, 4), 1), ((4, 4), 6), ((2, 6), 9)]
)
def test_samples_and_states_of_other_sizes_give_what_the_fake_quantized_model_gives(
    small_proto: onnx.ModelProto,
    small_checkpoint: Checkpoint,
    feeds: Feeds,
    size: tuple[int, int],
    tokens: int,
) -> None:
    rng = np.random.default_rng(3)
    given = feeds | {
        "sample": rng.standard_normal((BATCH, 2, *size)).astype(np.float32),
        "encoder_hidden_states": rng.standard_normal((BATCH, tokens, 8)).astype(np.float32),
    }
    model = QuantizedModel.from_checkpoint(small_checkpoint).eval()
    expected = (
        model(**{name: torch.from_numpy(value) for name, value in given.items()}).detach().numpy()
    )
    (found,) = run(small_proto, given)
    errors = [relative_error(found[i], expected[i]) for i in range(BATCH)]
    # A flipped tie may change a sample or two.
    assert sum(error < 2e-5 for error in errors) >= BATCH - 2, errors


@pytest.mark.slow
def test_a_checkpoint_whose_scales_may_lie_along_the_tokens_keeps_their_number(
    small_checkpoint: Checkpoint, small_inputs: dict[str, torch.Tensor]
) -> None:
    architecture = dataclasses.replace(small_checkpoint.architecture, official_sums=True)
    imported = dataclasses.replace(small_checkpoint, architecture=architecture)
    sizes = input_sizes(portable_graph(imported, small_inputs, "ab" * 32))
    assert sizes["encoder_hidden_states"] == (None, 3, 8)


def test_the_bucket_and_not_only_the_time_embedding_follows_the_timestep(
    small_proto: onnx.ModelProto,
    info: GraphInfo,
    torch_values: dict[str, tuple[Array, Array]],
    bucket: Array,
) -> None:
    x = torch_values["conv_out"][0]
    infer = session(cut_layer(ir.from_proto(small_proto), info, "conv_out"))
    name = info.quantizers["conv_out"].input
    moved = infer({name: x, "bucket": (bucket + 1) % 4})[0]
    assert (
        np.abs(moved - infer({name: x, "bucket": bucket})[0]).reshape(BATCH, -1).max(1) > 0
    ).all()


@pytest.fixture(scope="module")
def plain_unet() -> torch.nn.Module:
    """A UNet without attention and conditions, 15 layers: quick to export."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
    }
    return UNet2DModel(
        4, 2, 2, layers_per_block=1, block_out_channels=(4,), norm_num_groups=2, **blocks
    ).eval()


@pytest.mark.parametrize("buckets", [1, 1000])
def test_one_bucket_and_one_bucket_a_training_step_both_export_and_agree_with_the_model(
    plain_unet: torch.nn.Module, buckets: int
) -> None:
    sample = torch.randn(1, 2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    recorded = Trajectories(sample, torch.tensor([500.0]), sample, {})
    options = CalibrationOptions(method=RangeMethod.MINMAX)
    one = calibrate("plain", plain_unet, recorded, Scheme.parse("w8a8", buckets=1), options)
    # Calibrating 1000 buckets takes long, and any scales will do here.
    scales = np.random.default_rng(0).uniform(0.8, 1.25, buckets).astype(np.float32)
    quantizers = {
        name: dataclasses.replace(
            quantizer,
            scale=quantizer.scale[0] * scales,
            low=quantizer.low[0] * np.ones_like(scales),
            high=quantizer.high[0] * np.ones_like(scales),
        )
        for name, quantizer in one.quantizers.items()
    }
    checkpoint = dataclasses.replace(
        one, scheme=Scheme.parse("w8a8", buckets=buckets), quantizers=quantizers
    )
    inputs = {
        "sample": sample.expand(2, -1, -1, -1, -1).flatten(0, 1),
        "timestep": torch.tensor([0.0, 998.5, 999.0, 417.0]),
    }
    graph = portable_graph(checkpoint, inputs, "")
    feeds = {name: value.numpy() for name, value in inputs.items()}
    onnx.checker.check_model(proto_of(graph), full_check=True)
    found = run(cut_bucket(graph), feeds)[0].tolist()
    assert found == ([0] * 4 if buckets == 1 else [0, 998, 999, 417])
    expected = QuantizedModel.from_checkpoint(checkpoint).eval()(**inputs).detach().numpy()
    # Eight bits: a flipped tie would show as a difference of about a hundredth.
    assert relative_error(run(graph, feeds)[0], expected) < 0.02


def test_a_saved_graph_loads_again_and_computes_the_same(
    small_proto: onnx.ModelProto, feeds: Feeds, tmp_path: Path
) -> None:
    save_graph(ir.from_proto(small_proto), tmp_path / "model.onnx")
    loaded = load_graph(tmp_path / "model.onnx")
    assert graph_info(loaded) == graph_info(ir.from_proto(small_proto))
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    reloaded = onnx.load(tmp_path / "model.onnx")
    np.testing.assert_array_equal(run(reloaded, feeds)[0], run(small_proto, feeds)[0])


def saved(checkpoint: Checkpoint, inputs: dict[str, torch.Tensor], folder: Path) -> list[bytes]:
    """The files of the portable graph of ``checkpoint``."""
    folder.mkdir()
    save_graph(portable_graph(checkpoint, inputs, "ab" * 32), folder / "model.onnx")
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def test_a_checkpoint_that_lies_in_a_file_gives_the_bytes_of_one_in_memory(
    small_checkpoint: Checkpoint, small_inputs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    layers = {
        name: dataclasses.replace(layer, codes=layer.weight_codes)
        for name, layer in small_checkpoint.layers.items()
    }
    held = dataclasses.replace(small_checkpoint, layers=layers)
    save_checkpoint(small_checkpoint, tmp_path / "checkpoint")
    stored = load_checkpoint(tmp_path / "checkpoint")
    expected = saved(held, small_inputs, tmp_path / "held")
    assert len(expected) == 2
    assert saved(stored, small_inputs, tmp_path / "stored") == expected


def test_weights_are_read_one_at_a_time_and_none_stays_in_memory(
    small_checkpoint: Checkpoint, small_inputs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    reads: dict[str, int] = {}
    made: list[weakref.ref[Array]] = []
    most = 0

    def watched(name: str, array: Array | LazyArray) -> LazyArray:
        def read() -> Array:
            nonlocal most
            found = np.array(array)
            made.append(weakref.ref(found))
            reads[name] = reads.get(name, 0) + 1
            most = max(most, sum(each() is not None for each in made))
            return found

        return LazyArray(array.shape, array.dtype, read)

    layers = {
        name: dataclasses.replace(layer, codes=watched(name, layer.codes))
        for name, layer in small_checkpoint.layers.items()
    }
    floats = {name: watched(name, value) for name, value in small_checkpoint.floats.items()}
    watching = dataclasses.replace(small_checkpoint, layers=layers, floats=floats)
    graph = portable_graph(watching, small_inputs, "")
    four_bits = {x.name for x in layers.values() if x.weight_bits == 4}
    assert four_bits
    assert not four_bits & reads.keys()
    save_graph(graph, tmp_path / "model.onnx")
    assert reads.keys() == layers.keys() | floats.keys()
    assert most <= 2


def test_a_graph_that_is_missing_damaged_or_foreign_is_an_input_error(tmp_path: Path) -> None:
    with refused(tmp_path / "a.onnx", "quest-deploy export"):
        load_graph(tmp_path / "a.onnx")
    (tmp_path / "b.onnx").write_bytes(b"not a graph")
    with refused(tmp_path / "b.onnx", "ONNX"):
        load_graph(tmp_path / "b.onnx")
    foreign = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[1] x) => (float[1] y) { y = Abs(x) }'
    )
    with refused("quest-deploy export"):
        graph_info(foreign)


@pytest.mark.parametrize("place", ["initializer", "constant", "subgraph"])
@pytest.mark.parametrize(
    ("kind", "size", "stored"),
    [
        (onnx.TensorProto.FLOAT, 10, 32),
        (onnx.TensorProto.INT4, 40, 4),
        (onnx.TensorProto.INT8, 2, 3),
    ],
)
def test_a_tensor_with_other_bytes_than_its_shape_says_is_an_input_error(
    tmp_path: Path, place: str, kind: int, size: int, stored: int
) -> None:
    tensor = onnx.TensorProto(name="w", data_type=kind, dims=[size], raw_data=bytes(stored))
    nodes = [onnx.helper.make_node("Identity", ["w"], ["y"])]
    if place == "constant":
        nodes.insert(0, onnx.helper.make_node("Constant", [], ["w"], value=tensor))
    output = onnx.helper.make_tensor_value_info("y", kind, [size])
    held = [tensor] if place == "initializer" else []
    graph = onnx.helper.make_graph(nodes, "g", [], [output], held)
    if place == "subgraph":
        graph.initializer.append(tensor)
        taken = onnx.TensorProto(name="b", data_type=onnx.TensorProto.BOOL, raw_data=b"\1")
        either = onnx.helper.make_node("If", ["b"], ["y"], then_branch=graph, else_branch=graph)
        graph = onnx.helper.make_graph([either], "whole", [], [output], [taken])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    with refused(tmp_path / "model.onnx", "tensor w", stored):
        load_graph(tmp_path / "model.onnx")


def test_every_layer_is_one_conv_or_one_matmul(
    small_graph: ir.Model, small_checkpoint: Checkpoint
) -> None:
    counts, linears = (
        op_counts(small_graph),
        sum(layer.conv is None for layer in small_checkpoint.layers.values()),
    )
    assert counts["Conv"] == len(small_checkpoint.layers) - linears
    attentions = sum(name.endswith(".to_q") for name in small_checkpoint.layers)
    assert counts["MatMul"] == linears + 2 * attentions


class _Unknown(torch.nn.Module):
    """An operator that torch.onnx translates only once it is decomposed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.softshrink(x, 0.25)


class _Writes(torch.nn.Module):
    """What writes into a tensor that is read afterwards."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y[:, :2].add_(1.0)
        return y


class _Attention(torch.nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(2, (2, 4)).transpose(1, 2)
        y: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(
            heads, heads * 2, heads + 1, **self.options
        )  # type: ignore[arg-type]
        return y


class _Moves(torch.nn.Module):
    """What moves a tensor to where it is, and to another type."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(x.device) * x.to(x.device, torch.float64).sum().float()


MASK = torch.tensor([[0.0, -1.0, 2.0, 0.5, -3.0]])


@pytest.mark.parametrize(
    "module",
    [
        _Unknown(),
        _Writes(),
        _Attention(),
        _Attention(scale=0.3),
        _Attention(is_causal=True),
        _Attention(attn_mask=MASK),
        torch.nn.RMSNorm(8, eps=1e-2),
        torch.nn.RMSNorm((5, 8), elementwise_affine=False),
        _Moves(),
    ],
    ids=["unknown", "writes", "attention", "scale", "causal", "mask", "rms", "rms of two", "moves"],
)
@torch.no_grad()
def test_what_torch_onnx_does_not_know_as_it_is_is_exported_and_computes_the_same(
    module: torch.nn.Module,
) -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    shapes = {"x": {0: torch.export.Dim("batch", max=63)}}
    exported = torch.export.export(module, (x,), dynamic_shapes=tuple(shapes.values()))
    program = torch_to_qdq._to_onnx(exported, ["x"], shapes)
    assert program is not None
    (found,) = run(program.model, {"x": x[:2].numpy()})
    np.testing.assert_allclose(found, module(x[:2]).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", [_Unknown(), _Writes()], ids=["unknown", "writes"])
def test_what_has_no_values_is_traced_by_its_shape_where_operators_are_decomposed_too(
    module: torch.nn.Module,
) -> None:
    with FakeTensorMode():
        layer = torch.nn.Linear(8, 8).requires_grad_(requires_grad=False)
    shapes = {"x": {0: torch.export.Dim("batch", max=63)}}
    exported = torch.export.export(
        torch.nn.Sequential(layer, module),
        (torch.zeros(3, 5, 8),),
        dynamic_shapes=tuple(shapes.values()),
    )
    program = torch_to_qdq._to_onnx(exported, ["x"], shapes)
    assert program is not None
    initializers = program.model.graph.initializers
    assert {"0.weight", "0.bias"} <= initializers.keys()
    for name in ("0.weight", "0.bias"):
        tensor = initializers[name].const_value
        assert isinstance(tensor, ir.Tensor)
        assert isinstance(tensor.raw, FakeTensor)


@pytest.mark.parametrize("operator", ["Mul", "Div", "Add", "Sub"])
@pytest.mark.parametrize("away", [0.0, 9e-6, 5e-9, 1e-15])
@pytest.mark.parametrize("shape", [(), (1, 1, 1)])
def test_an_operator_is_left_out_where_its_constant_is_exactly_the_neutral_scalar(
    operator: str, away: float, shape: tuple[int, ...]
) -> None:
    neutral = np.float32(operator in ("Mul", "Div"))
    constant = np.full(shape, neutral + np.float32(away), np.float32)
    sizes = "1, 1, n" if shape else "n"
    model = graph_from_text(
        f"g (float[n] x) => (float[{sizes}] y) {{ y = {operator}(x, c) }}", c=constant
    )
    model.functions.clear()
    x = float32(0, 1, -3.75, 1e-8)
    (expected,) = run(model, {"x": x}, optimized=False)
    torch_to_qdq._simplify(model)
    assert (operator not in op_counts(model)) == (not shape and constant == neutral)
    (found,) = run(model, {"x": x}, optimized=False)
    np.testing.assert_array_equal(found, expected, strict=True)
