"""What a workspace's page tells: facts from its manifest, checkpoints, engine records and images.

A stage that is not up to date shows nothing: the page names the command that makes it.
"""

from __future__ import annotations

import base64
import re
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from quest_deploy.artifacts.checkpoint import ActivationQuantizerData, load_checkpoint
from quest_deploy.artifacts.model_source import IMPORTED_ALONE
from quest_deploy.artifacts.workspace import CALIBRATED, CHECKPOINT, ENGINES, FOLDED
from quest_deploy.backends.base import engine_info
from quest_deploy.quantization.layer_kinds import group_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from quest_deploy.artifacts.checkpoint import Checkpoint, QuantizerData
    from quest_deploy.artifacts.scheme import Scheme
    from quest_deploy.artifacts.workspace import StageRecord, Workspace

    Records = Mapping[str, StageRecord]

REPORT = "report"
"""The page's own stage, of which it says nothing: equal workspaces have equal pages."""
WHOLE_MODEL = ("calibrate", "sensitivity", "finetune", "generate", "evaluate")
"""What an imported checkpoint, a UNet alone, cannot go through."""
ELSEWHERE = {
    "import": (WHOLE_MODEL, IMPORTED_ALONE),
    "lora": (("calibrate", "sensitivity", "finetune"), FOLDED),
}
"""Where another stage than calibrate made the first checkpoint: what it cannot go through, why."""
MOST_IMAGE_BYTES = 6_000_000
"""Of the single images in a page; it shows fewer of large ones."""
MOST_COLUMNS = 128
"""Of the charts of ranges: where there are more buckets, neighbours share one."""
HEAT_STEP, HEAT_LEVELS = 0.25, 4
"""A colour of the heat map for each quarter of an octave, up to four on either side of the mean."""
_MACHINES = ("AMD64", "aarch64", "arm64", "x86_64")


def gather(workspace: Workspace) -> dict[str, Any]:
    """All that the page shows, by its parts."""
    states = {name: why for name, why in workspace.states().items() if name != REPORT}
    records = {name: workspace.stages[name] for name, why in states.items() if why is None}
    missing = _Missing(workspace, states)
    checkpoints = _checkpoints(workspace, records)
    deployed = next(reversed(checkpoints.values()), None)
    method = None if deployed is None else deployed.provenance.get("method")
    engines = {
        name: engine_info(workspace.path(ENGINES, name))
        for name in _of_engines(records, "build-engine")
    }
    return {
        "model": workspace.model,
        "scheme": workspace.scheme,
        "source": workspace.source,
        "contents": _contents(records),
        "method": method,
        "finetuned": "finetune" in records or method == "quest",
        "kinds": [] if deployed is None else _kinds(deployed),
        "export": _details(records, "export"),
        "reference": _details(records, "reference"),
        "finetuning": _details(records, "finetune"),
        "evaluations": [
            _evaluation(workspace, record) for record in _of_engines(records, "evaluate").values()
        ],
        "verifications": _each(records, "verify"),
        "ranges": _ranges(checkpoints, workspace.scheme),
        "sensitivity": _details(records, "sensitivity"),
        "engines": {
            name: engine.to_json() | {"built_by": _versions(engine.built_by)}
            for name, engine in engines.items()
        },
        "engine_bytes": {
            name: sum(x["bytes"] for x in record.files.values())
            for name, record in _of_engines(records, "build-engine").items()
        },
        "benchmarks": _each(records, "benchmark"),
        "missing": {
            "model": missing.of_model(),
            "images": missing.of_engine("evaluate", once=True),
            "verification": missing.of("reference") + missing.of_engine("verify"),
            "ranges": missing.of(missing.first),
            "sensitivity": missing.of("sensitivity"),
            "precision": missing.of("export") + missing.of_engine("build-engine", once=True),
            "speed": missing.of_engine("benchmark"),
        },
        "outdated": [
            {"name": name, "command": _again(*name.partition("/")[::2])}
            for name, why in states.items()
            if why is not None
        ],
        "stages": _stages(workspace, states),
        "interrupted": workspace.interrupted_stages,
    }


class _Missing:
    """Which commands make what the page lacks, and why it lacks it."""

    def __init__(self, workspace: Workspace, states: Mapping[str, str | None]) -> None:
        self._states, self._root = states, workspace.root
        others = [x for x in ELSEWHERE if x in workspace.stages]
        self.first = others[0] if others and "calibrate" not in workspace.stages else "calibrate"
        """The stage that made the first checkpoint."""
        self._refused, self._reason = ELSEWHERE.get(self.first, ((), ""))
        self._random = workspace.source.random_weights

    def of_model(self) -> list[dict[str, str]]:
        return self.of(self.first, *(["finetune"] if self.first == "calibrate" else []))

    def of(self, *stages: str) -> list[dict[str, str]]:
        return [found for stage in stages for found in self._of(stage)]

    def of_engine(self, stage: str, *, once: bool = False) -> list[dict[str, str]]:
        """For every engine that is built; ``once``: for one at least."""
        built = [x.partition("/")[2] for x in self._states if x.startswith("build-engine/")]
        done = [x.partition("/")[2] for x in self._states if x.startswith(f"{stage}/")]
        if once:
            return [x for name in done or built[:1] or [""] for x in self._of(stage, name)]
        return [x for name in built or [""] for x in self._of(stage, name)]

    def _of(self, stage: str, backend: str | None = None) -> list[dict[str, str]]:
        name = stage if backend is None else f"{stage}/{backend}"
        if name in self._states and self._states[name] is None:
            return []
        why = _nameless(self._states.get(name) or "", self._root)
        if not why and stage in self._refused:
            return [{"command": "", "why": self._reason}]
        if stage == "lora":  # whose command names the other workspace; the reason has it
            return [{"command": "", "why": why}]
        if not why and self._random and stage == "evaluate":
            return [{"command": "", "why": "the model's weights are random: it draws nothing"}]
        return [
            {
                "stage": stage,
                "backend": backend or "",
                "command": _again(stage, backend),
                "why": why,
            }
        ]


def _again(stage: str, backend: str | None) -> str:
    """The command that makes a stage."""
    return f"quest-deploy {stage} -w WORKSPACE{f' --backend {backend}' if backend else ''}"


def _nameless(reason: str, root: Path) -> str:
    """The reason without the workspace's own place, which may be a name as short as "s"."""
    here = re.escape(str(root))
    reason = re.sub(
        rf"(-w|--output) {here}(?=`)",
        r"\1 WORKSPACE",
        re.sub(rf"^{here} ", "the workspace ", reason),
    )
    return re.sub(rf"(?<!\S){here}/", "", reason)


def _details(records: Records, stage: str) -> dict[str, Any] | None:
    return records[stage].details if stage in records else None


def _of_engines(records: Records, stage: str) -> dict[str, StageRecord]:
    """The records of a stage by backend, in the order of their names."""
    prefix = f"{stage}/"
    return {x.removeprefix(prefix): records[x] for x in sorted(records) if x.startswith(prefix)}


def _each(records: Records, stage: str) -> dict[str, dict[str, Any]]:
    return {name: record.details for name, record in _of_engines(records, stage).items()}


def _contents(records: Records) -> dict[str, Any] | None:
    made = (_details(records, stage) for stage in ("calibrate", *ELSEWHERE))
    return next((details for details in made if details), None)


def _checkpoints(workspace: Workspace, records: Records) -> dict[str, Checkpoint]:
    """Of each stage that made one; the one to be deployed last."""
    made = dict.fromkeys((*ELSEWHERE, "calibrate"), CALIBRATED) | {"finetune": CHECKPOINT}
    return {
        stage: load_checkpoint(workspace.path(file))
        for stage, file in made.items()
        if stage in records
    }


def _kinds(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The kinds of layers: how many, their bits and their share of the multiply-adds."""
    bits = {
        name: quantizer.bits
        for quantizer in checkpoint.quantizers.values()
        for name in quantizer.layers
    }
    of_layers = [
        (group_of(x.name), f"W{x.weight_bits}A{bits[x.name]}", x.macs)
        for x in checkpoint.layers.values()
    ]
    of_products = [
        (group_of(x.name), _product_bits(checkpoint.product_bits(x)), x.macs)
        for x in checkpoint.matmuls.values()
    ]
    kinds: dict[tuple[str, str], list[int]] = {}
    for kind, name, macs in of_layers + of_products:
        kinds.setdefault((kind, name), []).append(macs)
    total = sum(sum(macs) for macs in kinds.values()) or 1
    return [
        {"kind": kind, "bits": name, "layers": len(macs), "share": sum(macs) / total}
        for (kind, name), macs in sorted(kinds.items(), key=lambda x: (-sum(x[1]), x[0]))
    ]


def _product_bits(bits: int) -> str:
    return f"A{bits}" if bits < 32 else "float"


def _evaluation(workspace: Workspace, record: StageRecord) -> dict[str, Any]:
    """What `evaluate` found, with the images that it kept, by contestant, as data URIs."""
    images = record.details.get("images", {})
    captions = record.details.get("captions", [])
    # Only what the manifest has the hash of, which has been checked.
    rows = {
        name: [path for path in paths if path in record.files] for name, paths in images.items()
    }
    columns = min((len(paths) for paths in rows.values()), default=0)
    widest = max((record.files[x]["bytes"] for paths in rows.values() for x in paths), default=1)
    shown = min(columns, max(1, MOST_IMAGE_BYTES // (widest * max(1, len(rows)))))
    return {
        **record.details,
        "captions": captions[:shown],
        "images": {
            name: [_data_uri(workspace.path(path).read_bytes()) for path in paths[:shown]]
            for name, paths in rows.items()
        },
        "kept": columns,
    }


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _ranges(checkpoints: Mapping[str, Checkpoint], scheme: Scheme) -> dict[str, Any] | None:
    """The range that each quantizer clips to, in each bucket or over a few neighbouring ones."""
    if not checkpoints:
        return None
    deployed = list(checkpoints.values())[-1]
    columns = min(scheme.buckets, MOST_COLUMNS)
    firsts = [scheme.buckets * i // columns for i in range(columns)]
    quantizers = []
    levels: list[list[int]] = []
    for name, quantizer in deployed.quantizers.items():
        bounds = {
            stage: _clip_ranges(checkpoint.quantizers[name], firsts)
            for stage, checkpoint in checkpoints.items()
            if name in checkpoint.quantizers
        }
        low, high = _clip_ranges(quantizer, firsts)
        width = np.maximum(high - low, np.finfo(np.float32).tiny)
        relative = width / np.exp(np.log(width).mean())
        heat = np.clip(np.round(np.log2(relative) / HEAT_STEP), -HEAT_LEVELS, HEAT_LEVELS)
        levels.append([int(x) + HEAT_LEVELS for x in heat])
        quantizers.append(
            {
                "name": name,
                "readers": list(quantizer.layers),
                "bits": quantizer.bits,
                "range": {stage: [_rounded(x) for x in both] for stage, both in bounds.items()},
                "moves": float(width.max() / width.min()),
            }
        )
    edges = [0.0, *scheme.bucket_edges, float(scheme.train_timesteps)]
    blocks, first = [], 0
    for block, members in groupby(deployed.quantizers, key=_block):
        rows = levels[first : first + len(list(members))]
        blocks.append({"name": block, "first": first, "levels": rows})
        first += len(rows)
    chart = {
        "edges": [*(edges[first] for first in firsts), edges[-1]],
        "stages": list(checkpoints),
        "quantizers": quantizers,
    }
    return {"chart": chart, "blocks": blocks, "columns": columns, "edges": edges}


def _clip_ranges(
    quantizer: QuantizerData, firsts: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """:func:`clip_range` over the buckets from each of the ``firsts`` to before the next."""
    low, high = clip_range(quantizer)
    return np.minimum.reduceat(low, firsts), np.maximum.reduceat(high, firsts)


def clip_range(quantizer: QuantizerData) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The smallest and the largest value that each bucket's codes stand for, float64 [K] each: of
    the tensor divided by its smoothing scales, or over all channels of a per-channel quantizer.
    """
    scale = quantizer.scale.astype(np.float64)
    if isinstance(quantizer, ActivationQuantizerData):
        ends = np.stack([scale * quantizer.low, scale * quantizer.high])
        return ends.min(0), ends.max(0)
    ends = np.stack([scale * (x - quantizer.zero_point) for x in _codes(quantizer)])
    return ends.min((0, 2)), ends.max((0, 2))


def _codes(quantizer: Any) -> tuple[int, int]:
    return quantizer.code_low, quantizer.code_high


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{x:.4g}") for x in values]


def _block(name: str) -> str:
    """The part of the UNet that a module's path begins with, such as up_blocks.1."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first


def _stages(workspace: Workspace, states: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """Each finished stage: what it was made from and by, and its files."""
    found = []
    for name, why in states.items():
        record = workspace.stages[name]
        made = dict(record.made)
        found.append(
            {
                "name": name,
                "why": why and _nameless(why, workspace.root),
                "time": str(made.pop("time", "")).replace("T", " ").removesuffix("Z"),
                "versions": _versions(made),
                "inputs": record.inputs,
                "options": record.options,
                "files": [
                    {"path": path, "bytes": entry["bytes"], "sha256": entry["sha256"]}
                    for path, entry in sorted(record.files.items())
                ],
            }
        )
    return found


def _versions(made: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {system(str(version)) if name == 'platform' else version}"
        for name, version in made.items()
    )


def system(platform: str) -> str:
    """What ``platform.platform()`` says but for the kernel's build, which is one machine's.

    >>> system("Linux-6.1.0-13-amd64-x86_64-with-glibc2.36")
    'Linux x86_64 glibc2.36'
    """
    family, *rest = platform.split("-")
    return " ".join(
        [family, *(x for x in rest if x in _MACHINES or x.startswith(("glibc", "musl")))]
    )
