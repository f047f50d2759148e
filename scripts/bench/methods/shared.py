"""What cells share, kept in files: trajectories, images, sensitivities, and checkpoints after each
stage.

A file is named after a hash of all that it was made from, so it is never of something else. The
first cell that needs it makes it, while others wait; what that took is kept beside it, and counted
for every cell that uses it.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from quest_deploy.artifacts.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from quest_deploy.calibration.sensitivity import Sensitivity
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.files import atomic_file, lock, read_json, sha256_of_json, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

T = TypeVar("T")


@dataclass(frozen=True)
class Kind(Generic[T]):
    """A kind of shared file: its name, and how it is written and read."""

    name: str
    save: Callable[[T, Path], None]
    load: Callable[[Path], T]


def _save_images(images: NDArray[np.float32], path: Path) -> None:
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, images)


def _load_images(path: Path) -> NDArray[np.float32]:
    images: NDArray[np.float32] = np.load(path, allow_pickle=False)
    return images


TRAJECTORIES = Kind[Trajectories]("trajectories", Trajectories.save, Trajectories.load)
CHECKPOINT = Kind[Checkpoint]("checkpoint", save_checkpoint, load_checkpoint)
IMAGES = Kind["NDArray[np.float32]"]("images", _save_images, _load_images)
SENSITIVITY = Kind[Sensitivity](
    "sensitivity",
    lambda measured, path: write_json(path, measured.to_json()),
    lambda path: Sensitivity.from_json(read_json(path)),
)


def shared(
    folder: Path, kind: Kind[T], made_from: dict[str, Any], make: Callable[[], T]
) -> tuple[T, float]:
    """Read what ``make`` gives from its file in ``folder``, after making it where there is none;
    with the CPU seconds that making it took.

    Args:
        made_from: all that it depends on, as a JSON value.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{kind.name}-{sha256_of_json(made_from)[:20]}"
    path, record = folder / name, folder / f"{name}.json"
    with _alone(folder / f"{name}.lock"):
        if not record.exists():
            started = time.process_time()
            kind.save(make(), path)
            seconds = time.process_time() - started
            write_json(record, {"made_from": made_from, "cpu_seconds": seconds})
    # Not what is in memory: every cell computes from the very tensors that the others read.
    return kind.load(path), float(read_json(record)["cpu_seconds"])


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process is inside."""
    with path.open("a") as stream, ExitStack() as held:
        while True:
            try:
                held.enter_context(lock(stream.fileno(), shared=False))
                break
            except BlockingIOError:
                time.sleep(0.2)
        yield
