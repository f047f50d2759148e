"""The passes, in order, that turn the portable graph into one that a runtime compiles, with our
plugin or without it.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from exporters.exactness import EXACT, Exactness
from exporters.passes.avoid_saturation import AvoidSaturation
from exporters.passes.center_weights import CenterWeights
from exporters.passes.expand_timestep_quantize import ExpandTimestepQuantize
from exporters.passes.freeze_bucket import FreezeBucket
from exporters.passes.gather_tables_once import GatherTablesOnce
from exporters.passes.widen_int4 import WidenInt4


def to_native(
    model: ir.Model,
    *,
    cast_int4_at_runtime: bool,
    signed_zero_points: bool,
    frozen_bucket: int | None,
    expanded: tuple[ir.passes.InPlacePass, ...] = (),
    exactness: Exactness = EXACT,
    exact: tuple[ir.passes.InPlacePass, ...] = (),
    portable: tuple[ir.passes.InPlacePass, ...] = (),
) -> ir.Model:
    """Rewrite ``model`` in place and return it.

    Args:
        cast_int4_at_runtime, signed_zero_points, frozen_bucket: see WidenInt4, CenterWeights and
        FreezeBucket.
        expanded: a backend's own passes, on the graph whose quantizers have been expanded.
        exactness: what the runtime's integer kernels compute exactly (see AvoidSaturation).
        exact: a backend's own passes, on the graph whose products are exact, its weights not yet
            widened.
        portable: a backend's own passes, on the portable graph, that take quantizers out of the
            expansion.
    """
    ir.passes.Sequential(
        *portable,
        ExpandTimestepQuantize(),
        *expanded,
        *([] if frozen_bucket is None else [FreezeBucket(frozen_bucket)]),
        CenterWeights(signed_zero_points=signed_zero_points),
        *([] if exactness.always else [AvoidSaturation(exactness)]),
        *exact,
        WidenInt4(cast_at_runtime=cast_int4_at_runtime),
        common.CommonSubexpressionEliminationPass(),
        GatherTablesOnce(),
        common.RemoveUnusedNodesPass(),
    )(model)
    return model
