from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import numpy as np

from scripts.bench.methods.shared import IMAGES, shared


def images(value: float) -> np.ndarray:
    return np.full((1, 3, 2, 2), value, np.float32)


def _make(folder: Path) -> None:
    def slow() -> np.ndarray:
        with (folder / "made").open("a") as log:
            log.write("once\n")
        time.sleep(0.5)
        return images(1.0)

    shared(folder, IMAGES, {"of": "two"}, slow)


def test_what_was_made_from_the_same_is_read_and_from_another_is_made(tmp_path: Path) -> None:
    first, seconds = shared(tmp_path, IMAGES, {"seed": 0}, lambda: images(0.25))
    again = shared(tmp_path, IMAGES, {"seed": 0}, lambda: images(0.5))
    other, _ = shared(tmp_path, IMAGES, {"seed": 1}, lambda: images(0.5))
    np.testing.assert_array_equal(first, images(0.25))
    np.testing.assert_array_equal(again[0], first)
    assert again[1] == seconds
    np.testing.assert_array_equal(other, images(0.5))


def test_what_failed_while_it_was_made_is_made_again(tmp_path: Path) -> None:
    def fail() -> np.ndarray:
        raise OSError("no space")

    for make in (fail, lambda: images(1.0)):
        try:
            found = shared(tmp_path, IMAGES, {}, make)
        except OSError:
            continue
    np.testing.assert_array_equal(found[0], images(1.0))


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_make, args=(tmp_path,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "made").read_text() == "once\n"
