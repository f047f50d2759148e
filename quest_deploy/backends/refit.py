"""Make an engine by giving another's plan the weights of a graph of the same structure, which
TensorRT calls to refit it and which takes no build.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING

from quest_deploy import __version__
from quest_deploy.artifacts.workspace import versions
from quest_deploy.backends.base import (
    ENGINE_FILE,
    LOWERED,
    check_unchanged,
    engine_info,
    lower_into,
)
from quest_deploy.backends.options import ENGINE_OPTIONS, EngineOptions
from quest_deploy.errors import InputError
from quest_deploy.files import sealed, sha256_of, write_json

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

    from quest_deploy.backends.base import Backend, EngineRecord

BUILD = "leave out --refit-from to build it"


def refitted_options(base: Path, chosen: EngineOptions) -> EngineOptions:
    """The options of the engine that refitting the one in ``base`` gives: its own.

    Raises:
        InputError: there is no engine, it was built without ``--refittable``, or an option was
            chosen, other than its default, that it was not built with.
    """
    found = engine_info(base).options
    if not found.refittable:
        raise InputError(
            f"--refit-from: the weights of {base} are fixed; build it again with "
            f"`quest-deploy build-engine --refittable`, or {BUILD}"
        )
    for name, each in ENGINE_OPTIONS.items():
        if name == "verbose":  # nothing of the engine depends on it
            continue
        value, own = getattr(chosen, name), getattr(found, name)
        if value not in (own, each.default):
            raise InputError(
                f"{each.flag} {value}: --refit-from takes the options of {base}, which was built "
                f"with {own}; leave this one out, or {BUILD}"
            )
    return found


def refit_engine(
    backend: Backend, model: ir.Model, base: Path, folder: Path, graph_sha256: str
) -> tuple[EngineRecord, int]:
    """Lower ``model`` (changed in place), put its weights into the plan in ``base`` as one in
    ``folder``, and write its ``engine.json``.

    Returns:
        The record, and how many weights differ.

    Raises:
        InputError: the graphs differ in more than their weights, a file in ``base`` was changed,
            this machine cannot run the engine, or its plan has one of the weights fixed.
        QuestDeployError: TensorRT cannot exchange them.
    """
    from exporters.graph_info import graph_info, load_graph

    before = engine_info(base)
    check_unchanged(base, before)
    options = backend.check_engine(before)
    checkpoint = graph_info(model).checkpoint_sha256
    lowered = lower_into(backend, model, folder, options)
    try:
        changed = changed_weights(load_graph(base / LOWERED), lowered)
    except ValueError as e:
        raise InputError(
            f"--refit-from: expected the graph of {base} with other weights, found another one "
            f"({e}); {BUILD}"
        ) from e
    backend.refit(base, folder, options, changed)
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    record = replace(
        before,
        built_by={"quest-deploy": __version__, **versions()},
        graph_sha256=graph_sha256,
        checkpoint_sha256=checkpoint,
        refitted_from=before.graph_sha256,
        files=files,
    )
    write_json(folder / ENGINE_FILE, sealed(record.to_json()))
    return record, len(changed)


def changed_weights(before: ir.Model, after: ir.Model) -> list[str]:
    """The initializers whose values differ; raise ValueError, which says where, if anything else
    does: a name, a type, a shape, a node.
    """
    for old, new in zip_longest(_structure(before), _structure(after)):
        if old != new:
            name = next(entry[0] for entry in (new, old) if entry is not None)
            raise ValueError(f"{name} differs")
    weights = after.graph.initializers
    return [
        name
        for name, value in before.graph.initializers.items()
        if _bytes(value) != _bytes(weights[name])
    ]


def _structure(model: ir.Model) -> list[tuple[str, object]]:
    """All of a graph but the values of its initializers, in order, each part with its name."""
    from onnx_ir import serde

    graph = model.graph
    parts: list[tuple[str, object]] = [
        (str(value.name), (value.dtype, str(value.shape)))
        for value in (*graph.inputs, *graph.outputs)
    ]
    for name, value in sorted(graph.initializers.items()):
        if (tensor := value.const_value) is not None:
            parts.append((name, (tensor.dtype, str(tensor.shape))))
    for node in graph:
        proto = serde.serialize_node(node)
        for field in ("doc_string", "metadata_props"):
            proto.ClearField(field)
        parts.append((str(node.name), proto.SerializeToString(deterministic=True)))
    return parts


def _bytes(value: ir.Value) -> bytes:
    assert value.const_value is not None
    return value.const_value.tobytes()
