from __future__ import annotations

import pytest

from quest_deploy.backends.exactness import measured
from quest_deploy.backends.registry import get_backend
from scripts.bench import compare_forms as script

EXACT = 1e-5
"""Above what float sums lose, far below what saturates."""


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_every_form_of_a_product_gives_the_exact_result_where_the_runtime_is_exact(
    backend: str,
) -> None:
    exact_everywhere = min(measured(get_backend(backend)).levels.values()) == 127
    for product in (
        script.Product("convolution", script.Kind.CONVOLUTION, (1, 8, 6, 6), 8, 1),
        script.Product("linear", script.Kind.LINEAR, (1, 16, 32), 8),
        script.Product("attention", script.Kind.ATTENTION, (2, 16, 32), 16),
    ):
        rows = script.compare(product, backend, runs=1)
        assert [row.form for row in rows] == list(script.FORMS[product.kind])
        assert all(row.seconds > 0 for row in rows)
        layers_in_uint8 = [
            row for row in rows if row.form == "uint8" and product.kind != "attention"
        ]
        assert all(row.error < EXACT for row in (rows if exact_everywhere else layers_in_uint8))


def test_a_form_that_saturates_is_told_from_one_that_does_not() -> None:
    row = script.Row("openvino", "linear", "int8", 1.0, 1.0, 0.24)
    assert script._wrong(row)
    assert not script._wrong(script.Row("openvino", "linear", "int8", 1.0, 1.0, 1e-6))
