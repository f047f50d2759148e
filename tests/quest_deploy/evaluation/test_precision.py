"""What layers really run in, asked of the real runtimes about graphs whose precision is known."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.exactness import EXACT_ANYWHERE, Exactness
from exporters.graph_info import save_graph
from exporters.multiplications import multiplications
from quest_deploy.artifacts.checkpoint import Checkpoint
from quest_deploy.backends import exactness
from quest_deploy.backends.base import LOWERED, build_engine
from quest_deploy.backends.onnxruntime import profiled_precisions
from quest_deploy.backends.openvino.precision import runtime_precisions
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import get_backend
from quest_deploy.backends.tensorrt.base import told_precisions
from quest_deploy.evaluation.precision import (
    LayerPrecision,
    PrecisionReport,
    Sizes,
    engine_precision,
    graph_precision,
)
from tests.helpers import (
    BRANCHED_TEXT,
    WITH_VNNI,
    assert_holds,
    branched_checkpoint,
    graph_from_text,
    hand_graph,
    inserted,
    kinds_checkpoint,
    kinds_graph,
)
from tests.quest_deploy.backends.test_tensorrt_build import attention_to_build

CPU_BACKENDS = ("onnxruntime", "openvino")
OPTIONS = EngineOptions(threads=1)
each_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)
each_answer = pytest.mark.parametrize(
    "answer", [WITH_VNNI, EXACT_ANYWHERE], ids=["vnni", "without vnni"]
)
Report = Callable[[str, Exactness, ir.Model], PrecisionReport]


@pytest.fixture
def report_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    """The report of a model's engine, built and opened here as on a processor of that answer."""

    def report(backend: str, answer: Exactness, model: ir.Model) -> PrecisionReport:
        monkeypatch.setattr(exactness, "measured", lambda _: answer)
        build_engine(get_backend(backend), model, tmp_path, OPTIONS, "cd" * 32)
        return engine_precision(get_backend(backend), tmp_path, OPTIONS)

    return report


@pytest.mark.parametrize(
    ("backend", "answer", "in_float", "warnings"),
    [
        ("openvino", WITH_VNNI, [], []),
        # "conv" is grouped: onnxruntime alone has no integer form of it.
        ("onnxruntime", WITH_VNNI, ["conv"], ["1 of 4, 25.0%"]),
        # "last" and "to_k" have 8-bit weights: openvino has no kernel of unsigned ones.
        ("openvino", EXACT_ANYWHERE, ["last", "to_k"], ["2 of 4, 50.0%"]),
        (
            "onnxruntime",
            EXACT_ANYWHERE,
            ["conv"],
            ["1 of 4, 25.0%", "2 of 4, 50.0%"],
        ),
    ],
    ids=[
        f"{backend}-{vnni}"
        for vnni in ("vnni", "without vnni")
        for backend in ("openvino", "onnxruntime")
    ],
)
def test_integer_convolutions_and_linears_run_on_integers_and_what_falls_back_is_a_warning(
    hand: Checkpoint,
    report_of: Report,
    backend: str,
    answer: Exactness,
    in_float: list[str],
    warnings: list[str],
) -> None:
    report = report_of(backend, answer, hand_graph(hand))
    assert {x.name: x.runs_in for x in report.layers} == {
        name: "fp32" if name in in_float else "int8" for name in ("conv", "last", "to_q", "to_k")
    }
    assert {x.name: (x.bits, x.asked) for x in report.layers}["conv"] == ("w4a4", "int8")
    assert [layer.name for layer in report.fell_back] == in_float
    for warning, facts in zip(report.warnings, warnings, strict=True):
        assert_holds(warning, *facts.split(", "))


@each_answer
@each_backend
def test_a_quantizer_that_computes_in_float_is_no_fallback_and_runs_in_fp32(
    report_of: Report, backend: str, answer: Exactness
) -> None:
    report = report_of(backend, answer, kinds_graph(kinds_checkpoint()))
    found = {layer.name: (layer.asked, layer.runs_in) for layer in report.layers}
    for name in ("free_conv", "by_channel", "by_token", "half.mix"):
        assert found[name] == ("float", "fp32"), name
    assert found["padded"] == found["attn.scores"] == ("int8", "int8")
    fell_back = {layer.name for layer in report.fell_back}
    assert fell_back == {
        name for name, (asked, runs_in) in found.items() if asked == "int8" and runs_in == "fp32"
    }
    # "plain" has asymmetric 8-bit weights, "attn.mix" 8-bit operands, which no form is exact for.
    saturating = {"plain", "attn.mix"} if answer is EXACT_ANYWHERE else set()
    assert {layer.name for layer in report.layers if layer.saturating} == saturating
    # Asymmetric 8-bit weights of a linear: openvino widens them to float, without a word.
    assert fell_back == saturating - {"plain"} | ({"plain"} if backend == "openvino" else set())
    assert {name for name in found if any(name in text for text in report.warnings)} == (
        fell_back | saturating
    )


@each_backend
def test_a_model_of_float_weights_runs_in_float_and_its_layers_are_warned_of(
    hand: Checkpoint, backend: str, tmp_path: Path
) -> None:
    model = get_backend(backend).lower(hand_graph(hand), EngineOptions())
    for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        # As a runtime without integer kernels has it: codes widened to float in front of each
        # layer.
        cast = ir.Node(
            "", "Cast", [node.inputs[0]], [ir.Attr("to", ir.AttributeType.INT, 1)], num_outputs=1
        )
        cast.outputs[0].name, cast.outputs[0].type = (
            f"{node.outputs[0].name}_cast",
            ir.TensorType(ir.DataType.FLOAT),
        )
        model.graph.insert_before(node, cast)
        ir.convenience.replace_all_uses_with(node.outputs[0], cast.outputs[0])
        model.graph.remove(node, safe=True)
    save_graph(model, tmp_path / LOWERED)
    report = engine_precision(get_backend(backend), tmp_path, OPTIONS)
    assert {layer.runs_in for layer in report.layers} == {"fp32"}
    assert (report.shares, len(report.fell_back)) == ({"fp32": 1.0}, 4)
    assert_holds(report.warnings[0], "fp32")


@each_backend
def test_a_whole_unet_runs_on_integers_but_for_its_float_attention(
    report_of: Report, mini_proto: onnx.ModelProto, backend: str
) -> None:
    report = report_of(backend, WITH_VNNI, ir.from_proto(mini_proto))
    assert {layer.runs_in for layer in report.layers if layer.asked == "int8"} == {"int8"}
    assert {layer.runs_in for layer in report.layers if layer.asked == "float"} == {"fp32"}
    assert len(report.layers) == 27 + 2 * 2
    assert report.shares["int8"] == report.asked_share
    assert report.warnings == []


def test_quantized_attention_is_asked_for_and_told_by_product(tmp_path: Path) -> None:
    save_graph(kinds_graph(kinds_checkpoint()), tmp_path / "unet.onnx")
    report = graph_precision(tmp_path / "unet.onnx")
    asked = {layer.name: (layer.bits, layer.asked, layer.runs_in) for layer in report.layers}
    assert asked["attn.scores"] == ("a4", "int8", None)
    assert asked["attn.mix"] == ("a8", "int8", None)
    assert asked["half.mix"] == ("float", "float", None)
    assert asked["padded"] == ("w4a8", "int8", None)
    assert report.shares == {}
    assert report.warnings == []


MHA = """
mha (float[2,3,8,4] q, float[2,3,8,4] k, float[2,3,8,4] v) => (float[2,3,8,4] o)
<float one = {1.0}, int8 zero = {0}>
{
  qc = QuantizeLinear(q, one, zero)
  kc = QuantizeLinear(k, one, zero)
  qd = DequantizeLinear(qc, one, zero)
  kd = DequantizeLinear(kc, one, zero)
  kt = Transpose <perm = [0, 1, 3, 2]> (kd)
  s = MatMul(qd, kt)
  p = Softmax <axis = -1> (s)
  values = MatMul(v, m)
  o = MatMul(p, values)
}
"""


@pytest.mark.parametrize(("hint", "floats"), [("f32", "fp32"), ("bf16", "bf16")])
def test_inside_openvinos_fused_attention_each_product_is_told_by_its_own_operands(
    hint: str, floats: str
) -> None:
    import openvino

    model = graph_from_text(MHA, m=np.eye(4, dtype=np.float32) * 2)
    for node in model.graph:
        node.name = f"n_{node.outputs[0].name}"
    core = openvino.Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        floats = "fp32"  # whatever is asked for
    read = core.read_model(ir.to_proto(model).SerializeToString())
    compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    found = runtime_precisions(compiled.get_runtime_model(), multiplications(model, {}))
    assert found == {"n_s": "int8", "n_values": floats, "n_o": floats}


@pytest.mark.parametrize(
    ("kernel", "types", "expected"),
    [
        ("MatMulIntegerToFloat", ["uint8", "float"], "int8"),
        ("QLinearConv", ["uint8", "float"], "int8"),
        ("Conv", ["float", "float"], "fp32"),
        ("MatMul", ["float16", "float16"], "fp16"),
        ("MatMulNBits", ["float", "uint8"], "fp32"),
    ],
)
def test_onnxruntimes_profile_tells_by_the_kernel(
    kernel: str, types: list[str], expected: str
) -> None:
    event = {
        "cat": "Node",
        "name": "a.product_kernel_time",
        "args": {"op_name": kernel, "input_type_shape": [{t: [1]} for t in types]},
    }
    other = {
        "cat": "Node",
        "name": "a.product_kernel_time",
        "args": {"op_name": "Mul", "input_type_shape": [{"float": [1]}]},
    }
    assert profiled_precisions([event, other], ["a.product", "b.product"]) == {
        "a.product": expected
    }


def test_a_fused_node_goes_to_the_longest_name_that_begins_its_own() -> None:
    args = {"op_name": "FusedMatMul", "input_type_shape": [{"float": [1]}, {"float": [1]}]}
    events = [
        {"cat": "Node", "name": f"{n}_kernel_time", "args": args}
        for n in ("attention_1", "attention_1_2/MatMulScaleFusion/")
    ]
    assert profiled_precisions(events, ["attention", "attention_1", "attention_1_2"]) == {
        "attention_1": "fp32",
        "attention_1_2": "fp32",
    }


def tensor_10(kind: str) -> dict[str, Any]:
    """A tensor in TensorRT 10's layer information: the type ends the format's text."""
    text = {"Int8": "Thirty-two wide channel vectorized row major Int8 format"}
    return {"Name": "t", "Dimensions": [2, 4], "Format/Datatype": text.get(kind, kind)}


def tensor_11(kind: str) -> dict[str, Any]:
    """In TensorRT 11's: apart from the format, which may name another."""
    return {"Name": "t", "Dimensions": [2, 4], "Format": "Row major FP32", "Datatype": kind}


def information(form: str, layers: list[Any]) -> dict[str, Any]:
    """An engine's, as NVIDIA's migration guide from 10 to 11 has both forms."""
    ends = {"Name": "sample", "IOMode": "Input", "DataType": "Float", "Dimensions": [-1, 4]}
    return {"Layers": layers} | (
        {"Bindings": ["sample"]} if form == "10" else {"I/O Tensors": [ends]}
    )


TENSORS = {"10": tensor_10, "11": tensor_11}
each_form = pytest.mark.parametrize("form", TENSORS)


@each_form
def test_tensorrts_layer_information_tells_by_operands_and_leaves_out_what_it_does_not_tell(
    form: str,
) -> None:
    def layer(metadata: str, inputs: list[str], **more: Any) -> dict[str, Any]:
        tensors = [TENSORS[form](kind) for kind in inputs]
        return {"Name": "x", "Metadata": metadata, "Inputs": tensors, **more}

    layers = [
        layer("[ONNX Layer: conv.product]", ["Int8"], Weights={"Type": "Int8"}),
        layer(
            "[ONNX Layer: fc.product]\x1e[ONNX Layer: fc.biased]",
            ["Row major linear FP16 format"],
            Weights={"Type": "Half"},
        ),
        layer("[ONNX Layer: qk.product]", ["Int8", "Int8"]),
        layer("[ONNX Layer: pv.product]", ["Half", "Int8"]),
        layer("[ONNX Layer: bf.product]", ["BFloat16", "BFloat16"]),
        layer("[ONNX Layer: f.product]", ["Float", "Float"]),
        layer("[ONNX Layer: a.product]\x1e[ONNX Layer: b.product]", ["Int8", "Int8"]),
        {"Metadata": "[ONNX Layer: u.product]", "Inputs": [{"Name": "t"}]},
        "a layer that has only a name",
    ]
    names = ("conv", "fc", "qk", "pv", "bf", "f", "a", "b", "u")
    wanted = [f"{name}.product" for name in names]
    assert told_precisions(information(form, layers)["Layers"], wanted) == {
        "conv.product": "int8",
        "fc.product": "fp16",
        "qk.product": "int8",
        "pv.product": "fp16",
        "bf.product": "bf16",
        "f.product": "fp32",
    }


@pytest.mark.parametrize("form", [*TENSORS, "unknown"])
def test_the_precision_of_an_engine_is_told_of_each_form_and_what_is_not_told_is_a_warning(
    form: str, mini_proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = get_backend("tensorrt-rtx")
    lowered = backend.lower(ir.from_proto(mini_proto), EngineOptions())
    save_graph(lowered, tmp_path / LOWERED)
    asked = graph_precision(tmp_path / LOWERED).layers
    kinds = {
        node: "Int8" if layer.asked == "int8" else "Float"
        for layer in asked
        for node in layer.nodes
    }
    tensor = TENSORS.get(form, lambda kind: {"Name": "t", "Type of it": kind})
    layers = [
        {"Metadata": f"[ONNX Layer: {node}]", "Inputs": [tensor(kind), tensor(kind)]}
        for node, kind in kinds.items()
    ]

    class Inspector:
        def get_engine_information(self, wanted: object) -> str:
            return json.dumps(information(form, layers))

    shared = "quest_deploy.backends.tensorrt.base"
    engine = SimpleNamespace(create_engine_inspector=Inspector)
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_count", lambda: 1)
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_compute_capability", lambda: "89")
    monkeypatch.setattr("quest_deploy.backends.cuda.driver_version", lambda: "13.0")
    monkeypatch.setattr(f"{shared}.engine_options", lambda backend, folder: EngineOptions())
    monkeypatch.setattr(f"{shared}.load_engine", lambda *arguments: engine)
    report = engine_precision(backend, tmp_path, EngineOptions())
    if form == "unknown":
        assert report.shares.keys() == {"unknown"}
        assert report.warnings
        return
    assert report.shares == {
        "int8": pytest.approx(report.asked_share),
        "fp32": pytest.approx(1 - report.asked_share),
    }
    assert (report.warnings, report.fell_back) == ([], [])


def test_an_attention_that_is_one_layer_tells_what_both_its_products_run_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_graph(attention_to_build(ir.DataType.FLOAT16), tmp_path / LOWERED)
    layers = [{"Metadata": "[ONNX Layer: node_scores]", "Inputs": [tensor_11("Half")] * 3}]
    inspector = SimpleNamespace(
        get_engine_information=lambda wanted: json.dumps(information("11", layers))
    )
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
    shared = "quest_deploy.backends.tensorrt.base"
    monkeypatch.setattr(f"{shared}.engine_options", lambda backend, folder: EngineOptions())
    monkeypatch.setattr(f"{shared}.load_engine", lambda *arguments: engine)
    backend, told = get_backend("tensorrt-rtx"), {"node_scores": "fp16"}
    assert backend.realised_precision(tmp_path, EngineOptions(dtype="fp16")) == told
    options = EngineOptions(dtype="fp16", fused_attention=True)
    assert backend.realised_precision(tmp_path, options) == told | {"node_mixed": "fp16"}


def test_an_engine_that_needs_a_gpu_says_so_and_claims_nothing(
    mini_proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_count", lambda: 0)
    backend = get_backend("tensorrt-rtx")
    save_graph(backend.lower(ir.from_proto(mini_proto), EngineOptions()), tmp_path / LOWERED)
    report = engine_precision(backend, tmp_path, EngineOptions())
    assert_holds(report.unavailable, "tensorrt-rtx", "GPU")
    assert {layer.runs_in for layer in report.layers} == {"unknown"}
    assert (report.warnings, report.fell_back, report.summary()["int8_share"]) == ([], [], None)


def test_a_layer_that_the_runtime_does_not_name_is_a_warning_and_not_counted_as_integer(
    report_of: Report, mini_proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = get_backend("onnxruntime")
    monkeypatch.setattr(
        type(backend), "realised_precision", lambda *_: {"conv_out.product": "int8"}
    )
    report = report_of("onnxruntime", WITH_VNNI, ir.from_proto(mini_proto))
    (warning,) = report.warnings
    assert_holds(warning, "26 of 31")
    assert report.fell_back == []
    assert 0 < report.shares["int8"] < 0.5


def test_sizes_count_parameters_and_not_scales(hand: Checkpoint, tmp_path: Path) -> None:
    save_graph(hand_graph(hand), tmp_path / "unet.onnx")
    sizes = graph_precision(tmp_path / "unet.onnx").sizes
    four = sum(layer.weight_codes.size for layer in hand.layers.values() if layer.weight_bits == 4)
    eight = sum(layer.weight_codes.size for layer in hand.layers.values() if layer.weight_bits == 8)
    biases = sum(layer.bias.size for layer in hand.layers.values() if layer.bias is not None)
    edges = hand.scheme.buckets - 1
    assert sizes.fp16 == 2 * (four + eight + biases + edges)
    assert sizes.ideal == four // 2 + eight + 2 * (biases + edges)
    assert sizes.engine is None
    assert sizes.graph == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_a_branch_is_float_of_its_layers_kind_and_no_parameter_of_the_float_model(
    tmp_path: Path,
) -> None:
    checkpoint = branched_checkpoint()
    save_graph(inserted(BRANCHED_TEXT, checkpoint), tmp_path / "unet.onnx")
    report = graph_precision(tmp_path / "unet.onnx")
    found = {x.name: (x.asked, x.bits, x.group) for x in report.layers if x.asked == "float"}
    parts = [f"{name}.{part}" for name in ("last", "to_q") for part in ("down", "up")]
    assert found == dict.fromkeys(parts, ("float", "float", "other"))
    bits = {layer.weight_bits: 0 for layer in checkpoint.layers.values()}
    for layer in checkpoint.layers.values():
        bits[layer.weight_bits] += layer.weight_codes.size
    factors = sum(down.size + up.size for down, up in checkpoint.branches.values())
    biases = sum(x.bias.size for x in checkpoint.layers.values() if x.bias is not None)
    others = biases + checkpoint.scheme.buckets - 1
    assert report.sizes.fp16 == 2 * (bits[4] + bits[8] + others)
    assert report.sizes.ideal == bits[4] // 2 + bits[8] + 2 * (others + factors)


@each_backend
def test_sizes_of_an_engine_are_those_of_its_graph_but_for_its_files(
    mini_engines: Callable[[str], Path], mini_proto: onnx.ModelProto, backend: str, tmp_path: Path
) -> None:
    save_graph(ir.from_proto(mini_proto), tmp_path / "unet.onnx")
    portable = graph_precision(tmp_path / "unet.onnx").sizes
    engine = engine_precision(get_backend(backend), mini_engines(backend), OPTIONS).sizes
    assert engine.fp16 == pytest.approx(portable.fp16, rel=0.01)
    assert engine.ideal == pytest.approx(portable.ideal, rel=0.01)
    files = (LOWERED, f"{LOWERED}.data")  # not what only lets it open sooner
    assert engine.engine == sum((mini_engines(backend) / x).stat().st_size for x in files)


def test_a_report_is_json_and_its_shares_are_of_all_multiply_adds() -> None:
    layer = LayerPrecision("a", ("a.product",), "other", "Conv", 4, 4, 60, "int8", "int8")
    report = PrecisionReport(
        [
            layer,
            dataclasses.replace(layer, name="b", macs=30, runs_in="bf16", reason="because"),
            dataclasses.replace(
                layer,
                name="c",
                weight_bits=None,
                activation_bits=32,
                macs=10,
                asked="float",
                runs_in="fp32",
            ),
        ],
        Sizes(100, 120, 400, 90),
    )
    content = json.loads(json.dumps(report.to_json()))
    assert content["shares"] == {"int8": 0.6, "bf16": 0.3, "fp32": 0.1}
    assert (content["asked_int8_share"], content["int8_share"], content["fell_back"]) == (
        0.9,
        0.6,
        ["b"],
    )
    (warning,) = content["warnings"]
    assert_holds(warning, "1 of 3", "30.0%", "because (b)")
    assert [x["bits"] for x in content["layers"]] == ["w4a4", "w4a4", "float"]
