"""Text encoders as graphs: what transformers' own compute, of small ones with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import Gemma2Config, Gemma2Model, T5Config, T5EncoderModel

from exporters.graph_info import input_sizes, save_graph
from exporters.part_info import IDS, LAST_STATE, MASK
from exporters.parts import text_encoder_graph
from exporters.passes.compress_weights import CompressWeights
from tests.helpers import op_counts, relative_error, run

if TYPE_CHECKING:
    from pathlib import Path

TOKENS, WORDS = 40, 3000
"""More than T5 has buckets for single distances, and those of a tokenizer."""


def t5() -> Any:
    shape = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(T5Config(vocab_size=WORDS, feed_forward_proj="gated-gelu", **shape))


def gemma() -> Any:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, **heads}
    return Gemma2Model(Gemma2Config(vocab_size=WORDS, **shape))


ENCODERS = {"T5EncoderModel": t5, "Gemma2Model": gemma}


@pytest.fixture(scope="module", params=ENCODERS)
def made(request: pytest.FixtureRequest) -> tuple[Any, ir.Model]:
    """An encoder, and the graph of another with its weights."""
    encoder, again = (ENCODERS[request.param]().eval() for _ in range(2))
    again.load_state_dict(encoder.state_dict())
    return encoder, text_encoder_graph(again, TOKENS)


def prompts() -> dict[str, np.ndarray]:
    """Three prompts of different lengths."""
    ids = np.random.default_rng(0).integers(2, WORDS, (3, TOKENS), np.int32)
    mask = (np.arange(TOKENS) < np.asarray([[3], [TOKENS], [17]])).astype(np.int32)
    return {IDS: ids, MASK: mask}


def states(encoder: Any, feeds: dict[str, np.ndarray]) -> np.ndarray:
    given = {name: torch.from_numpy(x).long() for name, x in feeds.items()}
    with torch.no_grad():
        found: np.ndarray = encoder(**given)[0].numpy()
    return found


def test_a_graph_gives_the_states_of_a_masked_batch(made: tuple[Any, ir.Model]) -> None:
    encoder, graph = made
    assert input_sizes(graph) == {IDS: (None, TOKENS), MASK: (None, TOKENS)}
    assert [x.name for x in graph.graph.outputs] == [LAST_STATE]
    feeds = prompts()
    (found,) = run(graph, feeds)
    read = feeds[MASK].astype(bool)
    assert relative_error(found[read], states(encoder, feeds)[read]) < 1e-5


def test_t5_counts_distances_without_a_logarithm() -> None:
    # Whose last bit, where a bucket begins, would put tokens into another one. Of few tokens the
    # optimizer computes it.
    assert "Log" not in op_counts(text_encoder_graph(t5().eval(), 300))


def test_int8_is_a_quarter_and_changes_the_states_little(
    made: tuple[Any, ir.Model], tmp_path: Path
) -> None:
    encoder, graph = made
    feeds, read = prompts(), prompts()[MASK].astype(bool)
    sizes = []
    small = graph.clone()
    CompressWeights()(small)
    for name, each in (("fp32", graph), ("int8", small)):
        save_graph(each, tmp_path / f"{name}.onnx")
        sizes.append((tmp_path / f"{name}.onnx.data").stat().st_size)
    assert 0.24 < sizes[1] / sizes[0] < 0.3
    (found,) = run(small, feeds)
    assert 1e-4 < relative_error(found[read], states(encoder, feeds)[read]) < 0.03


def test_large_weights_are_read_when_the_graph_is_saved(made: tuple[Any, ir.Model]) -> None:
    tensors = [x.const_value for x in made[1].graph.initializers.values()]
    large = [x for x in tensors if x is not None and x.size > 8192]
    assert len(large) > 10
    assert all(isinstance(x, ir.LazyTensor) for x in large)
