"""The text encoders of a pipeline, its decoder of latents and its encoder of images as graphs.

A part's graph computes in float, takes any batch (images of any size too), and says what it was
made from: the class and its configuration.
"""

from __future__ import annotations

import json
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from exporters.editor import Editor, lazy, replace_value
from exporters.graph_info import HEIGHT, SAMPLE_SHAPE_KEY, WIDTH
from exporters.part_info import (
    HIDDEN_STATE,
    IDS,
    IMAGE,
    LAST_STATE,
    LATENTS,
    MASK,
    MOMENTS,
    PART_KEY,
    POOLED,
    PartInfo,
    last_norm,
)
from exporters.torch_to_qdq import quiet
from quest_deploy.artifacts.lazy_tensors import LazyArray

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

OPSET = 20
DECODER_CLASSES = ("AutoencoderKL", "AutoencoderTiny", "VQModel")
ENCODER_CLASSES = ("AutoencoderKL",)
"""The classes that engines stand in for in a pipeline."""


class _LastState(nn.Module):
    """A text encoder that reads token ids, to its last states alone."""

    inputs: tuple[str, ...] = (IDS,)

    def __init__(self, encoder: Any, tokens: int) -> None:
        """Wrap ``encoder`` for so many ``tokens``."""
        super().__init__()
        self.encoder = encoder

    @property
    def outputs(self) -> list[str]:
        """The names of what it gives."""
        return [LAST_STATE]

    def forward(self, *inputs: Tensor) -> Any:
        """The outputs for the inputs, in order."""
        given = dict(zip(self.inputs, (x.long() for x in inputs), strict=True))
        return self.encoder(**given)[0]


class _CLIP(_LastState):
    """CLIP, to its pooled state and the states after each layer too."""

    @property
    def outputs(self) -> list[str]:
        layers = range(self.encoder.config.num_hidden_layers + 1)
        return [LAST_STATE, POOLED, *(HIDDEN_STATE.format(i) for i in layers)]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        (ids,) = inputs
        found = self.encoder(ids.long(), output_hidden_states=True)
        pooled = found.get("text_embeds", found.get("pooler_output"))
        return found.last_hidden_state, pooled, *found.hidden_states


class _Masked(_LastState):
    """A text encoder that reads a mask too."""

    inputs = (IDS, MASK)


class _T5(_Masked):
    """T5, the buckets of its tokens' distances a constant.

    It finds them by a logarithm, which is whole where a bucket begins: computed again in a runtime,
    whose last bit may differ, tokens 16 apart would be taken for nearer ones.
    """

    buckets: Tensor

    def __init__(self, encoder: Any, tokens: int) -> None:
        super().__init__(encoder, tokens)
        attention = next(
            x for x in encoder.modules() if getattr(x, "has_relative_attention_bias", False)
        )
        places = torch.arange(tokens)
        buckets = attention._relative_position_bucket(
            places[None] - places[:, None],
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        self.register_buffer("buckets", buckets.int())
        attention._relative_position_bucket = lambda *_, **__: self.buckets


TEXT_CLASSES: dict[str, type[_LastState]] = {
    "CLIPTextModel": _CLIP,
    "CLIPTextModelWithProjection": _CLIP,
    "Gemma2Model": _Masked,
    "T5EncoderModel": _T5,
}
"""The classes of text encoders that engines stand in for, and how each is exported."""
MASKED_CLASSES = tuple(name for name, kind in TEXT_CLASSES.items() if MASK in kind.inputs)


class _Decoder(nn.Module):
    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, sample: Tensor) -> Tensor:
        image: Tensor = self.decoder.decode(sample, return_dict=False)[0]
        return image


class _Encoder(nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, sample: Tensor) -> Tensor:
        moments: Tensor = self.encoder.encode(sample, return_dict=False)[0].parameters
        return moments


def text_encoder_graph(encoder: Any, tokens: int) -> ir.Model:
    """From token ids, int32 [B, tokens], and of some classes a mask, to what ``LAST_STATE`` and
    those after it say; from ids to the last states where ``encoder`` is of another class than
    ``TEXT_CLASSES``. ``encoder`` is changed.
    """
    module = TEXT_CLASSES.get(type(encoder).__name__, _LastState)(encoder, tokens)
    ids = {name: torch.ones(2, tokens, dtype=torch.int32) for name in module.inputs}
    graph = trace(module, ids, module.outputs)
    if POOLED in module.outputs:
        last_norm(graph)  # refused now
    return _described(graph, encoder, encoder.config.to_dict())


def decoder_graph(decoder: Any, sample_shape: Sequence[int]) -> ir.Model:
    """From latents as the decoder takes them, ``sample`` [B, C, h, w], to images [B, 3, H, W].

    Args:
        sample_shape: of the latents that it is meant for, [C, h, w].
    """
    return _of_images(_Decoder(decoder), decoder, sample_shape, IMAGE)


def encoder_graph(encoder: Any, image_shape: Sequence[int]) -> ir.Model:
    """From images, ``sample`` [B, 3, H, W] in [-1, 1], to the means of their latents and the
    logarithms of the variances, [B, 2C, h, w].

    Args:
        encoder: of one of ``ENCODER_CLASSES``.
        image_shape: of the images that it is meant for, [3, H, W].
    """
    return _of_images(_Encoder(encoder), encoder, image_shape, MOMENTS)


def _of_images(module: nn.Module, part: Any, shape: Sequence[int], output: str) -> ir.Model:
    graph = trace(module, {LATENTS: torch.zeros(2, *shape)}, [output])
    graph.metadata_props[SAMPLE_SHAPE_KEY] = json.dumps(list(shape))
    return _described(graph, part, dict(part.config))


def _described(graph: ir.Model, part: Any, config: Mapping[str, Any]) -> ir.Model:
    plain = json.loads(json.dumps(config, default=str))
    info = PartInfo(type(part).__name__, plain)
    graph.metadata_props[PART_KEY] = json.dumps(asdict(info))
    return graph


def trace(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    *,
    any_size: bool = True,
) -> ir.Model:
    """``module`` as an ONNX graph, for any batch.

    Args:
        inputs: examples by name.
        any_size: whether the height and the width of images, the inputs of four axes, may be any
            too.
    """
    names = [
        {0: "batch", 2: HEIGHT, 3: WIDTH} if any_size and value.dim() == 4 else {0: "batch"}
        for value in inputs.values()
    ]
    shapes = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in names)
    kinds = {x.kind for x in signature(module.forward).parameters.values()}
    together = Parameter.VAR_POSITIONAL in kinds  # of *inputs, one argument holds all
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        quiet("torch.onnx"),
        _by_shape(module.eval()) as weights,
    ):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=(shapes,) if together else shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            optimize=False,  # not before there are weights
        )
    assert program is not None
    _give_weights(program.model, weights)
    program.optimize()
    traced = program.model.graph.inputs
    for value, example, axes in zip(traced, inputs.values(), names, strict=True):
        # torch has names of its own, and a profile is by these
        value.shape = ir.Shape([axes.get(i, size) for i, size in enumerate(example.shape)])
    return program.model


@contextmanager
def _by_shape(module: nn.Module) -> Iterator[dict[str, LazyArray]]:
    """Let ``module`` hold the shapes of its weights alone, in float32, for a while; yields what
    reads them, by name, one at a time when a graph is saved, whatever type they are held in.
    """
    held = [
        (part, name, value)
        for part in module.modules()
        for name, value in part._parameters.items()
        if value is not None
    ]
    with FakeTensorMode():
        shapes = {
            id(x): nn.Parameter(torch.empty(x.shape, dtype=torch.float32), requires_grad=False)
            for _, _, x in held
        }
    weights = {
        name: LazyArray(tuple(value.shape), np.dtype(np.float32), partial(_read, value))
        for name, value in module.named_parameters(remove_duplicate=False)
    }
    try:
        for part, name, value in held:
            part._parameters[name] = shapes[id(value)]
        yield weights
    finally:
        for part, name, value in held:
            part._parameters[name] = value


def _read(weight: Tensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = weight.detach().float().numpy()
    return values


def _give_weights(graph: ir.Model, weights: Mapping[str, LazyArray]) -> None:
    """Give the initializers that were traced by shape their values, and transposed matrices theirs,
    which the optimizer would compute and hold in memory.
    """
    editor = Editor(graph.graph)
    given = {
        value: weights[name]
        for name, value in graph.graph.initializers.items()
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor)
    }
    for value, array in given.items():
        value.const_value = lazy(str(value.name), array)
    for node in list(graph.graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is not None and source in given and len(given[source].shape) == 2:
            name = f"{source.name}.transposed"
            turned = editor.constant(name, lazy(name, _transposed(given[source])))
            replace_value(node.outputs[0], turned)
            graph.graph.remove(node, safe=True)


def _transposed(matrix: LazyArray) -> LazyArray:
    return LazyArray(matrix.shape[::-1], matrix.dtype, lambda: np.asarray(matrix).T)
