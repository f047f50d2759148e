"""`quest-deploy doctor`: what this machine can build and run, and what to install for the rest."""

from __future__ import annotations

import shutil
from typing import Any

from quest_deploy.artifacts.workspace import versions
from quest_deploy.backends.base import (
    EngineOptions,
    integer_instructions,
    processor_name,
)
from quest_deploy.backends.cpu import CpuBackend
from quest_deploy.backends.registry import BACKENDS
from quest_deploy.backends.tensorrt.base import gpu_count
from quest_deploy.cli.console import Console, table
from quest_deploy.cli.options import JsonOption
from quest_deploy.errors import InputError


def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine can build and run, and what to install for the rest."""
    console = Console(as_json=as_json)
    backends = {}
    for name, backend in BACKENDS.items():
        providers = ("cpu", "cuda", "tensorrt") if name == "onnxruntime" else ("cpu",)
        for provider in providers:
            options = EngineOptions(provider=provider)
            label = name if provider == "cpu" else f"{name} --provider {provider}"
            backends[label] = {
                "build": _problem(backend.check_build, options),
                "run": _problem(backend.check_run, options),
            }
    machine: dict[str, Any] = {
        "processor": processor_name(),
        "integer_instructions": list(integer_instructions()),
        "gpus": gpu_count(),
        "free_disk_bytes": shutil.disk_usage(".").free,
        "versions": versions(),
    }
    exact = {
        name: _exact_integers(backend)
        for name, backend in BACKENDS.items()
        if isinstance(backend, CpuBackend)
    }
    rows = [
        [name, "yes" if s["build"] is None else "no", "yes" if s["run"] is None else "no"]
        for name, s in backends.items()
    ]
    remedies = dict.fromkeys(
        problem for s in backends.values() for problem in s.values() if problem
    )
    console.result(
        {"machine": machine, "backends": backends, "exact_integers": exact},
        f"{machine['processor']}, {machine['gpus']} NVIDIA GPUs, "
        f"{machine['free_disk_bytes'] / 1e9:.0f} GB free here",
        ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        table(["backend", "builds", "runs"], rows),
        *_integers(machine["integer_instructions"]),
        *(line for name, levels in exact.items() for line in _describe_exact(name, levels)),
        *(f"- {remedy}" for remedy in remedies),
    )


def _exact_integers(backend: CpuBackend) -> dict[str, int] | None:
    """By kernel, the largest weights that the runtime multiplies exactly here; None where it does
    not run.
    """
    if _problem(backend.check_run, EngineOptions()) is not None:
        return None
    return dict(backend.exactness(EngineOptions()).levels)


def _describe_exact(name: str, levels: dict[str, int] | None) -> list[str]:
    from exporters.exactness import LEVELS

    if levels is None:
        return []
    short = {kernel: level for kernel, level in levels.items() if level < LEVELS[0]}
    if not short:
        return [f"{name} computes every integer product exactly on this processor"]
    return [
        f"{name} saturates on this processor, and engines avoid it: exact are "
        + ", ".join(
            f"{kernel} up to weights of {level}" if level else f"{kernel} never"
            for kernel, level in sorted(short.items())
        )
    ]


def _integers(instructions: list[str]) -> list[str]:
    """What runs on integers here."""
    found = (
        f"has {', '.join(instructions)}"
        if instructions
        else "shows neither VNNI nor AMX: integers gain little speed on it"
    )
    return [
        f"integers: this processor {found}",
        "openvino and TensorRT run quantized convolutions and linears as INT8",
        "onnxruntime runs both as INT8 matrix products, convolutions rewritten as such, since its "
        "own integer convolutions are slower "
        "than float; grouped convolutions stay in float",
        "`quest-deploy inspect` on an engine tells what each of its layers runs in",
    ]


def _problem(check: Any, options: EngineOptions) -> str | None:
    try:
        check(options)
    except InputError as e:
        return str(e)
    return None
