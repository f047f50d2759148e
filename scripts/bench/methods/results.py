"""The cells' files, ``<name>.json``, each with the definition that it was measured under."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from quest_deploy.errors import InputError
from quest_deploy.evaluation.quality import Quality
from quest_deploy.evaluation.retrieval import Judgement
from quest_deploy.files import read_json, sha256_of_json, write_json

if TYPE_CHECKING:
    from pathlib import Path

    from scripts.bench.methods.cells import Cell

FORMAT = "quest-deploy comparison cell"
VERSION = 2
_REPAIR = "delete it and run `python -m scripts.bench.methods` again"


@dataclass(frozen=True)
class Result:
    """What was measured of one cell.

    Attributes:
        definition: what its figures depend on (see :func:`recipes.definition_of`).
        quality: its epsilon-MSE is over 20 equally wide buckets, whatever the cell's own scheme.
        judgement: what the model's judge says.
        payload_bytes: of the parameters, see :class:`recipes.Made`.
        cpu_seconds: of each stage of making the model, also where another cell did it.
        wall_seconds, process_seconds: of this cell, judging included: on the clock, and the CPU's.
        notes: what else the method reports.
        environment: threads, processor and package versions.
    """

    definition: dict[str, Any]
    quality: Quality
    judgement: Judgement
    payload_bytes: int
    cpu_seconds: dict[str, float]
    wall_seconds: float
    process_seconds: float
    notes: dict[str, Any]
    environment: dict[str, Any]

    @property
    def total_seconds(self) -> float:
        """CPU seconds of making the model."""
        return sum(self.cpu_seconds.values())

    @classmethod
    def from_json(cls, definition: dict[str, Any], measured: dict[str, Any]) -> Result:
        """From what :func:`scripts.bench.methods.worker.measure` returns; raise KeyError or
        TypeError for anything else.
        """
        rest = {key: value for key, value in measured.items() if key != "quality"}
        flat = dict(measured["quality"])
        judgement = Judgement(**{each.name: flat.pop(each.name) for each in fields(Judgement)})
        return cls(definition, Quality(**flat, judgement=judgement), judgement, **rest)

    def to_json(self) -> dict[str, Any]:
        """The inverse of :meth:`from_json`, the definition and its digest included."""
        rest = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.name not in ("definition", "quality", "judgement")
        }
        return {
            "definition_sha256": sha256_of_json(self.definition),
            "definition": self.definition,
            "quality": self.quality.to_json(),
            **rest,
        }


def cell_path(folder: Path, cell: Cell) -> Path:
    """The file of ``cell``."""
    return folder / f"{cell.name}.json"


def save_result(folder: Path, cell: Cell, result: Result) -> None:
    """Write the file of ``cell``, whole or not at all."""
    write_json(
        cell_path(folder, cell),
        {"format": FORMAT, "version": VERSION, "cell": cell.name, **result.to_json()},
    )


def load_result(folder: Path, cell: Cell, definition: dict[str, Any]) -> Result | None:
    """The result of ``cell``, or None where there is none or it was measured under another
    definition.

    Raises:
        InputError: the file is damaged.
    """
    path = cell_path(folder, cell)
    if not path.exists():
        return None
    value = read_json(path, repair=_REPAIR)
    try:
        header = {key: value.pop(key) for key in ("format", "version", "cell")}
        if header != {"format": FORMAT, "version": VERSION, "cell": cell.name}:
            raise ValueError(f"its header is {header}")
        digest, stored = value.pop("definition_sha256"), value.pop("definition")
        if digest != sha256_of_json(stored):
            raise ValueError("its definition is not the one that was hashed")
        result = Result.from_json(stored, value)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path}: not a readable comparison cell ({e}); {_REPAIR}") from e
    return result if stored == definition else None
