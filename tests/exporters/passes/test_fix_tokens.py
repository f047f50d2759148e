from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir

from exporters.graph_info import TOKENS_KEY, usual_tokens
from exporters.passes.fix_tokens import FixTokens
from tests.helpers import graph_from_text, op_counts, run


def attending(tokens: int | None) -> ir.Model:
    """Attends to five states, or to any number, where the model has so many ``tokens``."""
    model = graph_from_text(
        "g (float[batch,4,2] sample, "
        f"float[batch,{'tokens' if tokens else 5},2] encoder_hidden_states) => "
        "(float[batch,4,2] y) { keys = Transpose <perm = [0, 2, 1]> (encoder_hidden_states)\n "
        "scores = MatMul (sample, keys)\n y = MatMul (scores, encoder_hidden_states) }"
    )
    if tokens is not None:
        model.metadata_props[TOKENS_KEY] = json.dumps(tokens)
    return model


def test_a_graph_for_any_number_of_tokens_takes_its_models_and_computes_the_same() -> None:
    rng = np.random.default_rng(0)
    feeds = {
        name: rng.standard_normal((3, size, 2)).astype(np.float32)
        for name, size in (("sample", 4), ("encoder_hidden_states", 5))
    }
    (expected,) = run(attending(5), feeds)
    model = attending(5)
    assert FixTokens()(model).modified
    assert [list(value.shape or ())[1:] for value in model.graph.inputs] == [[4, 2], [5, 2]]
    assert (usual_tokens(model), op_counts(model)) == (None, op_counts(attending(5)))
    np.testing.assert_array_equal(run(model, feeds)[0], expected)


def test_a_graph_for_one_number_is_left_alone() -> None:
    assert not FixTokens()(attending(None)).modified
