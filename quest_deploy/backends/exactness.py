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
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

import exporters
from exporters.exactness import (
    ACTIVATIONS,
    EXACT,
    EXACT_ANYWHERE,
    KINDS,
    LEVELS,
    SAFE,
    UNSIGNED,
    Exactness,
    integer_products,
    kernel,
)
from exporters.graph_info import save_graph
from exporters.passes.insert_quantized_layers import product_name
from exporters.probe import make_probe
from quest_deploy.artifacts.schema import one_of, parse
from quest_deploy.backends.base import LOWERED, cpu_flags, processor_name, require_package
from quest_deploy.backends.options import EngineOptions
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import read_json, write_json

if TYPE_CHECKING:
    from quest_deploy.backends.cpu import CpuBackend

TOLERANCE = 1e-5
"""Relative to the largest sum: a runtime may multiply in float, in any order; what saturates is off
by percents.
"""
UNSIGNED_FORM = Exactness(
    {kernel(kind, activation, UNSIGNED): LEVELS[0] for kind in KINDS for activation in ACTIVATIONS}
)
"""What makes a lowering store every weight as UINT8."""
VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""What makes oneDNN's kernels others."""
_Level = Annotated[int, Field(strict=True), one_of(0, *LEVELS)]
_Answers = dict[str, Annotated[dict[str, _Level], Field(min_length=1)]]


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
    # What is rewritten for a processor that saturates, where small weights fit its kernels.
    for name, exact in _exact_kernels(backend, SAFE, EXACT_ANYWHERE).items():
        if not exact:
            levels[name] = 0
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
            # A single row may have kernels of its own.
            row = runner.infer({name: x[:1] for name, x in probe.feeds.items()})
    found: dict[str, bool] = {}
    for case, exact in probe.exact.items():
        off = max(
            np.abs(outputs[case].astype(np.float64) - exact).max(),
            np.abs(row[case].astype(np.float64) - exact[:1]).max(),
        )
        if (kernel_name := kernels.get(product_name(case))) is not None:
            exactly = bool(off <= TOLERANCE * np.abs(exact).max())
            found[kernel_name] = found.get(kernel_name, True) and exactly
    return found


@functools.cache
def measured(backend: CpuBackend) -> Exactness:
    """Return what the backend's runtime computes exactly on this machine: what is kept, or else
    asked and kept.
    """
    path, key = _cache_file(), measurement_key(backend)
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
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))  # the XDG specification: ignored if relative
    root = given if given.is_absolute() else Path.home() / ".cache"
    return root / "quest-deploy" / "exact-integers.json"


def _kept(path: Path) -> dict[str, dict[str, int]]:
    """The answers that are kept; none where they cannot be read."""
    try:
        return parse(_Answers, read_json(path), str(path))
    except (QuestDeployError, OSError):
        return {}


def measurement_key(backend: CpuBackend) -> str:
    """Return what an answer depends on: :func:`kernels_key`, and the probe itself."""
    return f"{kernels_key(backend)}, probe {_exporters_digest()}"


def kernels_key(backend: CpuBackend) -> str:
    """Return what the kernels that a backend's runtime takes depend on: its version, and what the
    processor says it has.
    """
    flags = " ".join((*cpu_flags(), *_told_by_cpuid()))
    variables = "".join(f", {name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
    machine = f"{platform.machine()}, {processor_name()}, {_digest(flags.encode())}{variables}"
    return f"{backend.name} {_version(backend.package)}: {machine}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        pass  # another distribution of the same package, such as onnxruntime-gpu
    require_package(package, "cpu", "asking which integer products are exact")
    return str(importlib.import_module(package).__version__)


def _told_by_cpuid() -> list[str]:
    """The instruction sets that this very process is told of: under an emulator or a shim they are
    others than Linux's, and the runtimes believe these.
    """
    # NumPy asks CPUID when it is loaded; it has no public function that tells the answer.
    from numpy._core._multiarray_umath import (  # type: ignore[import-not-found]
        __cpu_features__,
    )

    return sorted(name for name, has in __cpu_features__.items() if has)


@functools.cache
def _exporters_digest() -> str:
    """Of the code that makes the probe and lowers it."""
    files = sorted(Path(exporters.__file__ or "").parent.rglob("*.py"))
    return _digest(b"".join(file.read_bytes() for file in files))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def check_kernels(exactness: Exactness, kernels: dict[str, int], command: str) -> None:
    """Raise InputError where an engine needs ``kernels`` that are not exact on this machine;
    ``command`` builds it again.
    """
    short = exactness.short_of(kernels)
    if short:
        raise InputError(
            f"this engine was built where its runtime computes {', '.join(short)} exactly; here "
            f"({processor_name()}) these saturate, and its results would be wrong; run `{command}` "
            "here on the same workspace, or build it with --processor any"
        )
