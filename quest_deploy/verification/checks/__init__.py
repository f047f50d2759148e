"""Verify an engine: the choice of the bucket, every layer and all between them with the reference's
own values, the whole model.

Two correct runtimes differ in the last bit of a float; where that bit decides a rounding tie, a
code flips, and in a deep 4-bit network one flip grows to percents at the output. So the sharp test
is per layer: each layer, cut out of the lowered graph, gets the reference's inputs (teacher
forcing), so that nothing can hide behind an earlier flip. Every code mismatch must be explained by
a tie. What the layers leave (norms, SiLU, softmax, residual sums) is tested likewise: a segment is
all that is computed in float from layers' outputs to one quantizer's input, and gets the
reference's outputs. The end-to-end error is judged against the reference model's own sensitivity to
last-bit differences; where that is large, end to end proves nothing, and layers and segments
decide.

A reference of a large model holds a sample of the quantizers in each record, so the result says how
many of all were checked, and in how many buckets. One record's values are in memory at a time: its
quantizers are one cut, and so are its layers, where the backend compiles as it opens.

Where an engine computes in FP16 or bf16, its graph says which values have that type. A quantizer
then gets the reference's values rounded to it, and must give the codes that belong to those: they
are computed here, from the reference's tables. A layer gets the middle of each code, which rounding
leaves in it, and so must give the reference's output, but for a low-precision type's rounding;
likewise a segment. End to end, the reference's sensitivity is that to activations of the type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporters.graph_info import input_sizes
from quest_deploy.artifacts.reference import load_reference
from quest_deploy.errors import InputError
from quest_deploy.progress import no_progress
from quest_deploy.verification.checks.buckets import check_buckets
from quest_deploy.verification.checks.codes import check_codes
from quest_deploy.verification.checks.end_to_end import check_end_to_end
from quest_deploy.verification.checks.engine import CheckedEngine
from quest_deploy.verification.checks.layers import check_layers
from quest_deploy.verification.checks.results import Verification
from quest_deploy.verification.checks.segments import check_segments
from quest_deploy.verification.checks.summary import summarize

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from exporters.graph_info import GraphInfo
    from quest_deploy.artifacts.reference import Record, Tables
    from quest_deploy.backends.base import Backend
    from quest_deploy.backends.options import EngineOptions
    from quest_deploy.progress import Progress
    from quest_deploy.verification.checks.engine import ByRecord
    from quest_deploy.verification.tolerances import CodeMismatches

__all__ = ["Verification", "verify_engine"]


def verify_engine(
    backend: Backend,
    options: EngineOptions,
    engine: Path,
    reference: Path,
    progress: Progress = no_progress,
) -> Verification:
    """Verify the engine folder ``engine`` against the records in ``reference``.

    Raises:
        InputError: an engine, a graph or a reference that is missing, damaged or of another model.
    """
    checked = CheckedEngine(backend, options, engine)
    info = checked.info
    records, tables = load_reference(reference)
    if not _fits(info, records, tables):
        raise InputError(
            f"{reference} is the reference of another model or version; run `quest-deploy "
            "reference` again"
        )
    _check_inputs(checked, records)
    # First, before hundreds of cuts are compiled: an engine may not load, or not take these sizes.
    end_to_end = check_end_to_end(checked, records)
    wrong_buckets = check_buckets(checked)
    by_quantizer = {
        quantizer: held
        for quantizer in info.quantizers
        if (held := {i: r for i, r in enumerate(records) if quantizer in r.entry.sites})
    }
    by_layer = {
        layer.name: by_quantizer[layer.site]
        for layer in info.layers.values()
        if layer.site in by_quantizer
    }
    by_layer |= {
        name: held
        for name in info.matmuls
        if (held := {i: r for i, r in enumerate(records) if name in r.entry.products})
    }
    total = len(by_quantizer) + len(by_layer) + 1
    codes: ByRecord[list[CodeMismatches]] = {}
    errors: ByRecord[NDArray[np.float32]] = {}
    for of_quantizers in check_codes(checked, by_quantizer, tables):
        codes |= of_quantizers
        progress("sites", len(codes), total)
    for of_layers in check_layers(checked, by_layer, tables):
        errors |= of_layers
        progress("layers", len(codes) + len(errors), total)
    codes = {name: codes[name] for name in by_quantizer}  # in execution order
    errors = {name: errors[name] for name in by_layer}
    segments = check_segments(checked, records)
    progress("segments", total, total)
    return summarize(checked, records, wrong_buckets, codes, errors, segments, end_to_end)


def _check_inputs(checked: CheckedEngine, records: list[Record]) -> None:
    """Raise InputError where the records were made for a graph with other inputs."""
    taken, recorded = set(input_sizes(checked.graph)), set(records[0].inputs)
    if taken != recorded:
        more, fewer = sorted(taken - recorded), sorted(recorded - taken)
        raise InputError(
            f"{checked.folder}: the engine takes {', '.join(more) or 'nothing'} besides what the "
            f"reference holds, and does not take {', '.join(fewer) or 'nothing'} of it; run "
            "`quest-deploy reference` again after the export"
        )


def _fits(info: GraphInfo, records: list[Record], tables: dict[str, Tables]) -> bool:
    """Whether a reference is of the graph's model, and whole: each record has what belongs to its
    quantizers and products.
    """
    if tables.keys() != info.quantizers.keys():
        return False
    if all(record.entry.sensitivity is None for record in records):
        return False
    for record in records:
        quantizers, products = set(record.entry.sites), set(record.entry.products)
        layers = [layer.name for layer in info.layers.values() if layer.site in quantizers]
        known = quantizers <= info.quantizers.keys() and products <= info.matmuls.keys()
        if not quantizers or not known or not record.is_whole(layers):
            return False
    return True
