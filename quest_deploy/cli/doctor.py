"""`quest-deploy doctor`: what this machine can build and run, and what to install for the rest."""

from __future__ import annotations

from quest_deploy.backends.machine import saturating
from quest_deploy.cli.console import Console, table
from quest_deploy.cli.options import JsonOption
from quest_deploy.stages import api


def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine can build and run, and what to install for the rest."""
    found = api.doctor()
    here, backends = found["machine"], found["backends"]
    rows = [
        [name, *("yes" if state[able] is None else "no" for able in ("build", "run"))]
        for name, state in backends.items()
    ]
    remedies = dict.fromkeys(
        problem for state in backends.values() for problem in state.values() if problem
    )
    remedies |= {found["torch"]: None} if found["torch"] else {}
    Console(as_json=as_json).result(
        found,
        f"{here['processor']}, {here['gpus']} NVIDIA GPUs, "
        f"{here['free_disk_bytes'] / 1e9:.0f} GB free here",
        ", ".join(f"{name} {version}" for name, version in here["versions"].items()),
        table(["backend", "builds", "runs"], rows),
        *_integers(here["integer_instructions"]),
        *(
            line
            for name, levels in found["exact_integers"].items()
            for line in _describe_exact(name, levels)
        ),
        *(f"- {remedy}" for remedy in remedies),
    )


def _describe_exact(name: str, levels: dict[str, int] | None) -> list[str]:
    if levels is None:
        return []
    short = saturating(levels)
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
    """Return what runs on integers here."""
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
