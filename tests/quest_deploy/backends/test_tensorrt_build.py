"""The builder's options of the TensorRT backends: what is refused and why, and what the real
builder's configuration gets.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import tensorrt_rtx as trt

from exporters.graph_info import (
    MATMULS_KEY,
    SAMPLE_MULTIPLE_KEY,
    SAMPLE_SHAPE_KEY,
    load_graph,
    save_graph,
)
from quest_deploy.backends.base import LOWERED, Runtime, build_engine, engine_info
from quest_deploy.backends.cuda import gpu_count
from quest_deploy.backends.options import ENGINE_OPTIONS, EngineOptions
from quest_deploy.backends.registry import BACKENDS, get_backend
from quest_deploy.backends.tensorrt.base import (
    ENGINE,
    check_sample_sizes,
    configure,
    fitting_profile,
    load_engine,
    profile_shapes,
    started,
    unfused_attention,
)
from quest_deploy.errors import QuestDeployError
from quest_deploy.options import Declared
from quest_deploy.processes import in_own_process
from quest_deploy.progress import no_progress
from tests.helpers import assert_holds, graph_from_text, kinds_checkpoint, kinds_graph, refused

GIVEN: dict[str, Any] = {
    "opt_batch": 3,
    "sample_size": ((8, 8),),
    "pool_limit": 2**30,
    "refittable": True,
    "strip_plan": True,
    "timing_cache": "cache.bin",
    "version_compatible": True,
    "hardware_compatibility_level": "ampere_plus",
    "builder_optimization_level": 5,
    "quantize": "native",
    "plugins": "plugins.so",
    "serialize_plugins": True,
    "fused_attention": True,
    "weight_streaming": True,
    "weight_streaming_budget": 2**20,
    "tactic_sources": ("jit_convolutions",),
    "max_num_tactics": 3,
    "profiling_verbosity": "none",
    "verbose": True,
}
NEEDED: dict[str, dict[str, Any]] = {
    "serialize_plugins": {"version_compatible": True},
    "fused_attention": {"dtype": "bf16"},
    "weight_streaming_budget": {"weight_streaming": True},
}
"""The options that another one needs, and which."""


RTX_LACKS = {
    "serialize_plugins",
    "timing_cache",
    "version_compatible",
    "hardware_compatibility_level",
    "builder_optimization_level",
    "tactic_sources",
    "max_num_tactics",
    "plugins",
}
"""What TensorRT for RTX 1.7 refuses, ignores, or builds the same engine with whatever is chosen
(its documentation, and tried).
"""


def given(option: str) -> EngineOptions:
    """The option, and what it needs."""
    return EngineOptions(**{option: GIVEN[option], **NEEDED.get(option, {})})


class _Log(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.problems: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR:
            self.problems.append(message)


@pytest.fixture(scope="module")
def builder() -> Any:
    return trt.Builder(_Log())


def refusal(backend: str, options: EngineOptions) -> str:
    """Why the backend refuses the options."""
    with refused(backend) as caught:
        get_backend(backend).check_options(options)
    return str(caught.value)


def named_in(refused: str, option: str) -> Declared:
    """The option that the message is about, or one that it needs."""
    of_these = [ENGINE_OPTIONS[name] for name in (option, *NEEDED.get(option, {}))]
    (named,) = (each for each in of_these if refused.startswith(f"{each.flag}:"))
    return named


def test_every_option_of_tensorrt_is_tried_here() -> None:
    of_tensorrt = {
        name
        for name, each in ENGINE_OPTIONS.items()
        if "tensorrt" in each.option.backends and not each.option.ignored
    }
    assert set(GIVEN) == of_tensorrt


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("option", GIVEN)
def test_other_backends_refuse_what_is_tensorrts(backend: str, option: str) -> None:
    told = refusal(backend, given(option))
    assert named_in(told, option)
    assert backend in told
    get_backend("tensorrt").check_options(given(option))


@pytest.mark.parametrize("option", GIVEN)
def test_tensorrt_rtx_refuses_what_it_lacks_and_says_why(option: str) -> None:
    if option not in RTX_LACKS:
        get_backend("tensorrt-rtx").check_options(given(option))
        return
    told = refusal("tensorrt-rtx", given(option))
    assert named_in(told, option).option.reasons["tensorrt-rtx"] in told


@pytest.mark.parametrize(
    ("options", "takers"),
    [
        ({"provider": "cuda"}, {"onnxruntime"}),
        ({"processor": "any"}, {"onnxruntime", "openvino"}),
        ({"compute_capability": ["89"]}, {"tensorrt-rtx"}),
        ({"dtype": "bf16"}, {"openvino", "tensorrt", "tensorrt-rtx"}),
        ({"dtype": "fp16"}, {"tensorrt", "tensorrt-rtx"}),
        ({"dtype": "fp16", "provider": "cuda"}, {"onnxruntime"}),
        ({"max_batch": 2, "threads": 1}, set(BACKENDS)),
    ],
)
def test_a_backend_takes_its_own_options_alone(options: dict[str, Any], takers: set[str]) -> None:
    for backend in BACKENDS:
        if backend in takers:
            get_backend(backend).check_options(EngineOptions(**options))
        else:
            assert backend in refusal(backend, EngineOptions(**options))


def test_tensorrt_rtx_is_quantized_natively_or_by_gathered_scales() -> None:
    backend = get_backend("tensorrt-rtx")
    assert backend.resolve(EngineOptions()).quantize == "native"
    assert backend.resolve(EngineOptions(quantize="gathered")).quantize == "gathered"
    backend.check_build(EngineOptions(quantize="gathered"))
    with refused("--quantize", "tensorrt-rtx"):
        backend.check_build(EngineOptions(quantize="plugin"))


@pytest.mark.parametrize(("capability", "facts"), [("75", "INT8"), ("80", "list"), ("89", "")])
def test_a_compute_capability_that_the_support_matrix_does_not_promise_is_a_warning_at_once(
    capability: str, facts: str, caplog: pytest.LogCaptureFixture
) -> None:
    get_backend("tensorrt-rtx").check_build(EngineOptions(compute_capability=(capability,)))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (1 if facts else 0)
    for message in told:
        assert_holds(message, f"--compute-capability {capability}", facts)


def gpu(monkeypatch: pytest.MonkeyPatch, capability: str, driver: str = "13.0") -> None:
    """A machine with such a GPU, and a driver for that CUDA."""
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_count", lambda: 1)
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_compute_capability", lambda: capability)
    monkeypatch.setattr("quest_deploy.backends.cuda.driver_version", lambda: driver)


@pytest.mark.parametrize(("capability", "runs"), [("89", True), ("121", True), ("90", False)])
def test_a_gpu_that_tensorrt_for_rtx_knows_nothing_of_runs_none_of_its_engines(
    capability: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, capability)
    if runs:
        get_backend("tensorrt-rtx").check_run(EngineOptions())
        return
    with refused(capability, "89", "120", "--backend tensorrt"):
        get_backend("tensorrt-rtx").check_run(EngineOptions())


@pytest.mark.parametrize(
    ("capability", "built", "told"),
    [("89", (), False), ("121", ("86", "89", "120", "121"), False), ("80", (), True)],
)
def test_without_a_choice_an_engine_is_for_this_gpu_too_or_that_it_is_not_is_told(
    capability: str,
    built: tuple[str, ...],
    told: bool,
    hand_model: ir.Model,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpu(monkeypatch, capability)
    backend = get_backend("tensorrt-rtx")
    options = backend.resolve(EngineOptions())
    assert options.compute_capability == built
    chosen = EngineOptions(compute_capability=("89",))
    assert backend.resolve(chosen).compute_capability == ("89",)
    backend.check_graph(hand_model, options)
    assert len(caplog.records) == told
    for record in caplog.records:
        assert_holds(record.getMessage(), capability, "86, 89, 120", "--compute-capability")


def test_that_int8_is_promised_for_weights_alone_is_said_before_the_build(
    hand_model: ir.Model, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    get_backend("tensorrt-rtx").check_graph(hand_model, EngineOptions())
    (record,) = caplog.records
    assert_holds(record.getMessage(), "INT8", "weights", "inspect", "--backend tensorrt")


def test_a_driver_that_is_too_old_is_one_message_with_tensorrts_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu(monkeypatch, "89", "12.4")
    with refused("tensorrt_rtx_cu13", "CUDA 13", "12.4"):
        get_backend("tensorrt-rtx").check_run(EngineOptions())
    logger = _Log()

    def builder(log: Any) -> None:
        log.log(trt.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    with refused("error: 35", "CUDA 12.4", "driver", error=QuestDeployError):
        started(builder, logger)
    assert isinstance(started(trt.Builder, logger), trt.Builder)


def test_engines_are_built_for_what_tensorrt_for_rtx_takes_by_itself() -> None:
    hardware = get_backend("tensorrt-rtx").hardware(EngineOptions())
    assert hardware["compute_capabilities"] == ["86", "89", "120"]


def widened(model: ir.Model, heads: int, size: int, tokens: int | str) -> ir.Model:
    """The graph of kinds as if its attention were so large; "N" stands for a size that varies, of
    which there are 1024.
    """
    values = ir.convenience.create_value_mapping(model.graph)
    values["q"].shape = ir.Shape(["batch", heads, tokens, size])
    values["kt"].shape = ir.Shape(["batch", heads, size, tokens])
    count = 1024 if tokens == "N" else int(tokens)
    products = json.loads(model.metadata_props[MATMULS_KEY])
    for product in products:
        product["macs"] = heads * size * count**2
    model.metadata_props[MATMULS_KEY] = json.dumps(products)
    return model


@pytest.mark.parametrize(
    ("size", "tokens", "facts"),
    [
        (64, 512, None),
        (40, 77, None),
        (80, 256, "heads of 80, 256 tokens"),
        (64, 4096, "heads of 64, 4096 tokens"),
        (40, "N", "heads of 40, 1024 tokens"),
    ],
)
@pytest.mark.parametrize("backend", ["tensorrt-rtx", "tensorrt"])
def test_quantized_attention_that_tensorrt_does_not_fuse_is_a_warning_before_the_build(
    backend: str,
    size: int,
    tokens: int | str,
    facts: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = widened(kinds_graph(kinds_checkpoint()), 8, size, tokens)
    get_backend(backend).check_graph(model, EngineOptions())
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (facts is not None)
    for message in told:
        assert_holds(message, f"attn ({facts})", backend, "--attention-bits", "--softmax-bits")


def test_float_attention_is_none_of_that_warning(hand_model: ir.Model) -> None:
    assert unfused_attention(hand_model) == {}
    model = widened(kinds_graph(kinds_checkpoint()), 8, 64, 4096)
    products = json.loads(model.metadata_props[MATMULS_KEY])
    products[0]["sites"][1] = None
    model.metadata_props[MATMULS_KEY] = json.dumps(products)
    assert unfused_attention(model) == {}


@pytest.mark.parametrize("option", ["refittable", "strip_plan"])
def test_tensorrt_rtx_needs_a_gpu_for_weights_that_can_be_exchanged(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EngineOptions(**{option: True})
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_count", lambda: 1)
    get_backend("tensorrt-rtx").check_build(options)
    monkeypatch.setattr("quest_deploy.backends.cuda.gpu_count", lambda: 0)
    with refused(ENGINE_OPTIONS[option].flag, "GPU"):
        get_backend("tensorrt-rtx").check_build(options)


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"provider": "rocm"}, "--provider"),
        ({"dtype": "fp8"}, "--dtype"),
        ({"threads": -1}, "--threads"),
        ({"max_batch": 0}, "--max-batch"),
        ({"opt_batch": 9, "max_batch": 8}, "--opt-batch"),
        ({"opt_batch": 0}, "--opt-batch"),
        ({"sample_size": ((0, 64),)}, "--sample-size"),
        ({"sample_size": ((64, 64), (64, 64))}, "--sample-size"),
        ({"pool_limit": 0}, "--pool-limit"),
        ({"builder_optimization_level": 6}, "--builder-optimization-level"),
        ({"quantize": "int8"}, "--quantize"),
        ({"quantize": "native", "plugins": "x.so"}, "--quantize native"),
        ({"serialize_plugins": True}, "--serialize-plugins --version-compatible"),
        ({"weight_streaming_budget": 1}, "--weight-streaming-budget --weight-streaming"),
        ({"weight_streaming_budget": -1, "weight_streaming": True}, "--weight-streaming-budget"),
        ({"max_num_tactics": 0}, "--max-num-tactics"),
        ({"profiling_verbosity": "verbose"}, "--profiling-verbosity"),
        ({"hardware_compatibility_level": "hopper"}, "--hardware-compatibility-level"),
    ],
)
def test_options_that_no_builder_takes_are_refused(options: dict[str, Any], facts: str) -> None:
    with refused(*facts.split()):
        EngineOptions(**options)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_onnxruntime_computes_in_half_types_on_gpus_only(dtype: str) -> None:
    with refused("--dtype", "--provider cpu"):
        get_backend("onnxruntime").check_build(EngineOptions(dtype=dtype))
    get_backend("onnxruntime").check_build(EngineOptions(dtype=dtype, provider="cuda"))


def test_flags_and_limits_reach_the_builders_configuration(builder: Any) -> None:
    config = builder.create_builder_config()
    configure(trt, config, EngineOptions())
    flag = trt.BuilderFlag
    asked = (flag.REFIT, flag.STRIP_PLAN, flag.VERSION_COMPATIBLE, flag.WEIGHT_STREAMING)
    assert not any(config.get_flag(flag) for flag in (trt.BuilderFlag.TF32, *asked))
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    configure(
        trt,
        config,
        EngineOptions(
            refittable=True,
            strip_plan=True,
            version_compatible=True,
            pool_limit=3 * 2**20,
            builder_optimization_level=1,
            weight_streaming=True,
            max_num_tactics=7,
            plugins="/plugins.so",
            tactic_sources=("jit_convolutions",),
            profiling_verbosity="layer_names_only",
            serialize_plugins=True,
        ),
    )
    assert all(config.get_flag(flag) for flag in asked)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 3 * 2**20
    assert config.builder_optimization_level == 1
    assert config.get_tactic_sources() == 1 << int(trt.TacticSource.JIT_CONVOLUTIONS)
    assert (config.max_num_tactics, config.plugins_to_serialize) == (7, ["/plugins.so"])
    assert config.profiling_verbosity == trt.ProfilingVerbosity.LAYER_NAMES_ONLY
    configure(trt, config, EngineOptions(tactic_sources=()))
    assert config.get_tactic_sources() == 0


@pytest.mark.parametrize("level", ["none", "ampere_plus", "same_compute_capability"])
def test_hardware_compatibility_levels_are_the_builders_own(level: str) -> None:
    config = SimpleNamespace(
        clear_flag=lambda flag: None
    )  # the real one of this flavour ignores it
    configure(trt, config, EngineOptions(hardware_compatibility_level=level))
    assert config.hardware_compatibility_level == getattr(
        trt.HardwareCompatibilityLevel, level.upper()
    )


class _Network:
    """A network's inputs."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self._inputs = [SimpleNamespace(name=name, shape=shape) for name, shape in shapes.items()]
        self.num_inputs = len(shapes)

    def get_input(self, i: int) -> Any:
        return self._inputs[i]


def dynamic_graph(tmp_path: Path) -> Path:
    """A graph of samples [4, height, width] that is meant for 64 x 96."""
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[batch,4,height,width] sample) => '
        "(float[batch,4,height,width] y)"
        "{ y = Identity(sample) }"
    )
    model.metadata_props[SAMPLE_SHAPE_KEY] = json.dumps([4, 64, 96])
    ir.save(model, tmp_path / LOWERED)
    return tmp_path / LOWERED


def test_each_sample_size_has_a_profile_of_batches_from_one_to_the_largest(tmp_path: Path) -> None:
    network = _Network(sample=(-1, 4, -1, -1), timestep=(-1,), encoder_hidden_states=(-1, 77, 768))
    options = EngineOptions(max_batch=8, opt_batch=4, sample_size=((64, 64), (96, 80)))
    first, second = profile_shapes(network, tmp_path, options)
    assert first["sample"] == ([1, 4, 64, 64], [4, 4, 64, 64], [8, 4, 64, 64])
    assert second["sample"] == ([1, 4, 96, 80], [4, 4, 96, 80], [8, 4, 96, 80])
    assert first["timestep"] == second["timestep"] == ([1], [4], [8])
    assert first["encoder_hidden_states"] == ([1, 77, 768], [4, 77, 768], [8, 77, 768])


def test_without_sample_sizes_there_is_one_profile_of_the_size_that_the_model_is_meant_for(
    tmp_path: Path,
) -> None:
    (shapes,) = profile_shapes(
        _Network(sample=(-1, 4, -1, -1)), dynamic_graph(tmp_path), EngineOptions(max_batch=1)
    )
    assert shapes["sample"] == ([1, 4, 64, 96],) * 3
    (shapes,) = profile_shapes(_Network(sample=(-1, 2, 4, 4)), tmp_path, EngineOptions())
    assert shapes["sample"] == ([1, 2, 4, 4], [2, 2, 4, 4], [16, 2, 4, 4])
    assert profile_shapes(_Network(x=(-1, 5)), tmp_path, EngineOptions(max_batch=3)) == [
        {"x": ([1, 5], [2, 5], [3, 5])}
    ]


def test_tensorrt_for_rtx_builds_one_profile_from_the_least_to_the_largest_size(
    tmp_path: Path,
) -> None:
    network = _Network(sample=(-1, 4, -1, -1), timestep=(-1,))
    shapes = profile_shapes(
        network, tmp_path, EngineOptions(max_batch=8, sample_size=((96, 64), (64, 80)))
    )
    assert get_backend("tensorrt-rtx").profiles(shapes) == [
        {"sample": ([1, 4, 64, 64], [2, 4, 96, 64], [8, 4, 96, 80]), "timestep": ([1], [2], [8])}
    ]
    assert get_backend("tensorrt").profiles(shapes) == shapes


def unet(size: str) -> ir.Model:
    """A graph of samples [4, ``size``], multiples of 4."""
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21]> g (float[batch,4,{size}] sample) => (float[batch,4,{size}] y) {{
            y = Identity(sample)
        }}"""
    )
    model.metadata_props[SAMPLE_MULTIPLE_KEY] = "4"
    return model


def test_a_sample_size_that_the_model_cannot_halve_as_often_as_it_does_is_refused() -> None:
    check_sample_sizes(unet("h,w2"), ((64, 64), (96, 100)))
    with refused("64x98", 4):
        check_sample_sizes(unet("h,w2"), ((64, 64), (64, 98)))


def test_a_graph_of_one_size_takes_no_other() -> None:
    check_sample_sizes(unet("64,96"), ((64, 96),))
    with refused("64x96", "96x96"):
        check_sample_sizes(unet("64,96"), ((96, 96),))


def test_a_sample_size_is_refused_before_the_graph_is_lowered(
    mini_proto: onnx.ModelProto, tmp_path: Path
) -> None:
    model = ir.from_proto(mini_proto)
    model.graph.inputs[0].shape = ir.Shape(["batch", 2, 4, 4])
    with refused("4x4", "5x5"):
        build_engine(
            get_backend("tensorrt-rtx"),
            model,
            tmp_path,
            EngineOptions(sample_size=((5, 5),)),
            "cd" * 32,
        )
    assert not list(tmp_path.iterdir())


def test_the_profile_that_takes_the_inputs_is_found() -> None:
    bounds = {
        "sample": [((1, 4, 64, 64), 0, (8, 4, 64, 64)), ((1, 4, 96, 96), 0, (8, 4, 96, 96))],
        "timestep": [((1,), 0, (8,))] * 2,
    }
    engine = SimpleNamespace(
        num_optimization_profiles=2, get_tensor_profile_shape=lambda name, i: bounds[name][i]
    )
    assert fitting_profile(engine, {"sample": (1, 4, 64, 64), "timestep": (1,)}) == 0
    assert fitting_profile(engine, {"sample": (8, 4, 96, 96), "timestep": (8,)}) == 1
    for shape in ((9, 4, 64, 64), (1, 4, 80, 80), (4, 64, 64)):
        with refused("--sample-size", shape):
            fitting_profile(engine, {"sample": shape, "timestep": (1,)})


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_real_builder_takes_the_unet_in_a_low_precision_type_at_two_sample_sizes_with_a_pool_limit(
    mini_proto: onnx.ModelProto, tmp_path: Path, dtype: str
) -> None:
    options = EngineOptions(
        compute_capability=("89", "120"),
        max_batch=8,
        opt_batch=4,
        dtype=dtype,
        sample_size=((4, 4), (6, 8)),
        pool_limit=2**30,
        weight_streaming=True,
        weight_streaming_budget=2**20,
        profiling_verbosity="none",
    )
    build_engine(
        get_backend("tensorrt-rtx"), ir.from_proto(mini_proto), tmp_path, options, "cd" * 32
    )
    record = engine_info(tmp_path)
    assert record.options == replace(options, quantize="native")
    assert record.runtime == Runtime("tensorrt_rtx", trt.__version__)
    lowered = load_graph(tmp_path / LOWERED)
    half = ir.DataType.FLOAT16 if dtype == "fp16" else ir.DataType.BFLOAT16
    assert {node.outputs[0].dtype for node in lowered.graph if node.op_type == "Conv"} == {half}
    assert (tmp_path / ENGINE).stat().st_size > 100_000


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_real_builder_takes_scales_that_are_gathered_by_the_bucket(
    dtype: str, mini_proto: onnx.ModelProto, tmp_path: Path
) -> None:
    options = EngineOptions(
        compute_capability=("89",), max_batch=4, dtype=dtype, quantize="gathered"
    )
    # In a process of its own: on other graphs of scales that are no constants it has crashed.
    in_own_process(_build, mini_proto, tmp_path, options)
    assert engine_info(tmp_path).options == options
    assert (tmp_path / ENGINE).stat().st_size > 100_000


def _build(proto: onnx.ModelProto, folder: Path, options: EngineOptions) -> None:
    build_engine(get_backend("tensorrt-rtx"), ir.from_proto(proto), folder, options, "cd" * 32)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_real_builder_takes_attention_as_one_node_and_the_lowered_graph_keeps_its_products(
    dtype: str, tmp_path: Path
) -> None:
    kind = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[dtype]
    model = attention_to_build(kind)
    save_graph(model, tmp_path / LOWERED)
    options = EngineOptions(
        compute_capability=("89",), max_batch=4, dtype=dtype, fused_attention=True
    )
    backend = get_backend("tensorrt-rtx")
    (tmp_path / "scratch").mkdir()
    parsed = load_graph(backend.graph_to_parse(tmp_path / LOWERED, tmp_path / "scratch", options))
    assert "Attention" in {node.op_type for node in parsed.graph}
    assert "Attention" not in {node.op_type for node in load_graph(tmp_path / LOWERED).graph}
    in_own_process(_compile, tmp_path, options)
    assert (tmp_path / ENGINE).stat().st_size > 100_000


def attention_to_build(kind: ir.DataType) -> ir.Model:
    """Attention of two heads of 16 over the rows of a sample, in a low-precision type."""
    model = graph_from_text(f"""
one (float[batch,5,2,16] sample, float[batch] timestep) => (float[batch,2,5,16] out)
{{
  x = Cast <to = {kind.value}> (sample)
  q = Transpose <perm = [0, 2, 1, 3]> (x)
  k = Transpose <perm = [0, 2, 3, 1]> (x)
  scores = MatMul (q, k)
  wide = Cast <to = 1> (scores)
  soft = Softmax <axis = -1> (wide)
  weights = Cast <to = {kind.value}> (soft)
  mixed = MatMul (weights, q)
  y = Cast <to = 1> (mixed)
  axes = Constant <value_ints = [1, 2, 3]> ()
  t = Unsqueeze (timestep, axes)
  out = Add (y, t)
}}""")
    model.functions.clear()
    for domain in ("quest", "quest.export"):
        model.graph.opset_imports.pop(domain)
    model.graph.opset_imports[""] = 22  # the first with products in bfloat16
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))


def _compile(folder: Path, options: EngineOptions) -> None:
    get_backend("tensorrt-rtx").compile(folder / LOWERED, folder, options, no_progress)


def test_a_pool_limit_that_is_too_low_is_told_as_the_builder_tells_it(
    mini_proto: onnx.ModelProto, tmp_path: Path
) -> None:
    options = EngineOptions(compute_capability=("89",), pool_limit=1)
    with refused("tensorrt-rtx", tmp_path / LOWERED, "workspace", error=QuestDeployError):
        build_engine(
            get_backend("tensorrt-rtx"), ir.from_proto(mini_proto), tmp_path, options, "cd" * 32
        )


class _FakeTensorRt:
    """The parts of the package that load an engine; what is called is kept."""

    def __init__(self, *, refits: bool = True) -> None:
        self.calls: list[Any] = []
        self.engine = object()
        self.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=self._deserialize)
        self.Refitter = lambda engine, logger: SimpleNamespace(
            refit_cuda_engine=lambda: self._note("refit") or True
        )
        self.OnnxParserRefitter = lambda refitter, logger: SimpleNamespace(
            refit_from_file=lambda path: self._note(path) or refits,
            num_errors=1,
            get_error=lambda i: SimpleNamespace(desc=lambda: "no x"),
        )

    def _deserialize(self, plan: bytes) -> object:
        self.calls.append(plan)
        return self.engine

    def _note(self, what: Any) -> None:
        self.calls.append(what)


def test_a_stripped_engine_gets_its_weights_from_the_lowered_graph_beside_it(
    tmp_path: Path,
) -> None:
    (tmp_path / ENGINE).write_bytes(b"plan")
    fake = _FakeTensorRt()
    assert load_engine(fake, _Log(), tmp_path, EngineOptions(strip_plan=True)) is fake.engine
    assert fake.calls == [b"plan", str(tmp_path / LOWERED), "refit"]
    whole = _FakeTensorRt()
    load_engine(whole, _Log(), tmp_path, EngineOptions())
    assert whole.calls == [b"plan"]
    with refused(tmp_path / LOWERED, "no x", error=QuestDeployError):
        load_engine(_FakeTensorRt(refits=False), _Log(), tmp_path, EngineOptions(strip_plan=True))


def test_without_a_gpu_loading_an_engine_is_one_error(tmp_path: Path) -> None:

    if gpu_count():
        pytest.skip("this machine has a GPU")
    (tmp_path / ENGINE).write_bytes(b"no plan")
    with refused(tmp_path / ENGINE, error=QuestDeployError):
        load_engine(trt, _Log(), tmp_path, EngineOptions(strip_plan=True))
