"""The whole engine's output against the reference's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quest_deploy.artifacts.reference import OUTPUT, Key
from quest_deploy.backends.base import open_engine
from quest_deploy.verification.runners import compare
from quest_deploy.verification.tolerances import relative_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from quest_deploy.artifacts.reference import Record
    from quest_deploy.verification.checks.engine import CheckedEngine


def check_end_to_end(engine: CheckedEngine, records: list[Record]) -> list[NDArray[np.float32]]:
    """The relative error of each record's samples, float32 [2]."""
    errors = []
    with open_engine(engine.backend, engine.folder) as runner:
        for record in records:
            mine, theirs = compare(
                engine.backend.name, runner, record.inputs, {OUTPUT: record.tensors[Key.OUTPUT]}
            )
            errors.append(relative_error(next(iter(mine.values())), theirs[OUTPUT]))
    return errors
