"""Asks a backend's runtime which integer products it computes exactly on this machine, and keeps
the answer.

Worst-case codes go through every kind of product, in the very form that the backend's lowering
writes, and are compared with exact integers. The answer is kept by machine, package and version in
``~/.cache/quest-deploy`` (``XDG_CACHE_HOME``).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.exactness import (
    ACTIVATIONS,
    EXACT,
    KINDS,
    LEVELS,
    UNSIGNED,
    Exactness,
    integer_products,
    kernel,
)
from exporters.graph_info import save_graph
from exporters.passes.insert_quantized_layers import product_name
from exporters.probe import make_probe
from quest_deploy import __version__
from quest_deploy.backends.base import LOWERED, EngineOptions, cpu_flags, processor_name
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import read_json, write_json

if TYPE_CHECKING:
    from quest_deploy.backends.cpu import CpuBackend

TOLERANCE = 1e-5
"""Relative to the largest sum: float32 rounds sums beyond 2^24; what saturates is off by percents.
"""
UNSIGNED_FORM = Exactness(
    {kernel(kind, activation, UNSIGNED): LEVELS[0] for kind in KINDS for activation in ACTIVATIONS}
)
"""What makes a lowering store every weight as UINT8."""
VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""What makes oneDNN's kernels others."""


def ask(backend: CpuBackend) -> Exactness:
    """Run the probe, without looking at what is kept."""
    levels: dict[str, int] = {}
    for form in (EXACT, UNSIGNED_FORM):
        for level in LEVELS if form is EXACT else LEVELS[:1]:
            found = _exact_kernels(backend, level, form)
            for name, exact in found.items():
                levels[name] = max(levels.get(name, 0), level if exact else 0)
            if all(found.values()):
                break
    return Exactness(levels)


def _exact_kernels(backend: CpuBackend, magnitude: int, form: Exactness) -> dict[str, bool]:
    """By kernel, whether all its products of the probe are exact."""
    probe, options = make_probe(magnitude), EngineOptions()
    lowered = backend.lower_for(probe.model, options, form)
    kernels = {product.node.name: product.kernel for product in integer_products(lowered)}
    with tempfile.TemporaryDirectory(prefix="quest-deploy-") as name:
        folder = Path(name)
        save_graph(lowered, folder / LOWERED)
        with backend.open(folder, options) as runner:
            outputs = runner.infer(probe.feeds)
    found: dict[str, bool] = {}
    for case, exact in probe.exact.items():
        error = np.abs(outputs[case].astype(np.float64) - exact).max() / np.abs(exact).max()
        if (kernel_name := kernels.get(product_name(case))) is not None:
            found[kernel_name] = found.get(kernel_name, True) and bool(error <= TOLERANCE)
    return found


@functools.cache
def measured(backend: CpuBackend) -> Exactness:
    """What the backend's runtime computes exactly on this machine: what is kept, or else asked and
    kept.
    """
    path, key = _cache_file(), _key(backend)
    kept = _kept(path)
    if key not in kept:
        kept[key] = dict(ask(backend).levels)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, kept)
        except OSError:
            pass  # asked again by the next process
    return Exactness(kept[key])


def _cache_file() -> Path:
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "quest-deploy"
        / "exact-integers.json"
    )


def _kept(path: Path) -> dict[str, dict[str, int]]:
    """The answers that are kept; none where they cannot be read."""
    try:
        content: Any = read_json(path)
    except (QuestDeployError, OSError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {
        key: levels
        for key, levels in content.items()
        if isinstance(levels, dict) and set(levels.values()) <= {0, *LEVELS}
    }


def _key(backend: CpuBackend) -> str:
    try:
        version = metadata.version(backend.package)
    except (
        metadata.PackageNotFoundError
    ):  # another distribution of the same package, such as onnxruntime-gpu
        version = str(importlib.import_module(backend.package).__version__)
    flags = hashlib.sha256(" ".join(cpu_flags()).encode()).hexdigest()[:16]
    variables = "".join(f", {name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
    machine = f"{platform.machine()}, {processor_name()}, {flags}{variables}"
    return f"{backend.name} {version}, quest-deploy {__version__}: {machine}"


def check_kernels(exactness: Exactness, kernels: dict[str, int], command: str) -> None:
    """Raise InputError where an engine needs ``kernels`` that are not exact on this machine;
    ``command`` builds it again.
    """
    short = exactness.short_of(kernels)
    if short:
        raise InputError(
            f"this engine was built for another processor: on this one ({processor_name()}) the "
            f"sums of {', '.join(short)} saturate, "
            f"and its results would be wrong; run `{command}` here, or build it with --processor "
            "any"
        )
