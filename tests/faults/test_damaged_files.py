"""Every kind of file, damaged in many ways: a message, or what it was; nothing else.

``make fuzz MINUTES=10`` tries other damages, thousands of them, until the time is over.
"""

from __future__ import annotations

import ast
import contextlib
import faulthandler
import itertools
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from quest_deploy.errors import QuestDeployError
from quest_deploy.evaluation.memory import peak_memory, reset_peak_memory
from tests.faults.damage import damage, restore
from tests.faults.readers import Kind, kinds
from tests.faults.results import keep
from tests.quest_deploy.support import Chain

TRIES = 15
"""How many damages of each kind `make test` tries."""
MINUTES = float(os.environ.get("FUZZ_MINUTES", "0"))
HANG_SECONDS, MOST_BYTES = 30, 2**30  # a gigabyte's hash takes some on a busy machine
GOOD = {"message", "same", "read"}
"""How a read may end; *read* where no hash could tell that the file has another content."""
OPENERS = {
    "check_archive",
    "load_file",
    "open_regular",
    "open_tensors",
    "read_bounded",
    "read_configuration",
    "read_json",
    "read_tensors",
    "safe_load",
    "safe_open",
    "stored_tensors",
}
"""What reads a file, and ``torch.load`` and ``ir.load``."""
OPENING = ("files.py", "tensors.py", "lazy_tensors.py")
"""Modules of those functions themselves."""
OWN = {
    "models.plain_yaml:load_yaml": "a text, whose files' readers have kinds",
    "backends.openvino.blobs:_weights_beside": "the graph that the same command has just lowered",
    "evaluation.retrieval:__init__": "the package's own file",
    "evaluation.perceptual:_state_dict": "another project's weights, by `weights_only` and its own tests",
    "models.controls:load_control": "a ControlNet's configuration, by `read_json` and its own tests",
    "models.networks.patch_transformers:require_encoders": "the model index again, which has a kind",
    "models.weights:_is_narrow": "files whose headers `_elements` has read, which has a kind",
    "models.loras:_beside": "a LoRA's small neighbour, by `read_json` and its own tests",
    "serving.part_graphs:takes_mask": "of a model that was loaded before",
    "stages.api:client": "sends the bytes: the server checks them, `read_bounded` the file",
}
"""Readers without a kind, and why."""


class HangError(Exception):
    """A read took too long."""


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def end(*_: object) -> NoReturn:
        raise HangError

    before = signal.signal(signal.SIGALRM, end)
    # Where a library does not return to Python, the process ends with the place.
    faulthandler.dump_traceback_later(3 * seconds, exit=True)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def outcome(kind: Kind, original: Path, expected: Any, seed: int) -> tuple[str, str]:
    """How a read of the file, damaged by ``seed``, ends, and what was done to the file."""
    restore(kind.path, original)
    done = damage(kind.path, seed)
    reset_peak_memory()
    before = peak_memory()
    try:
        with at_most(HANG_SECONDS):
            result = kind.read(kind.path)
        ended = _judged(kind, result, expected)
    except QuestDeployError as e:
        ended = "message" if str(e) else "an empty message"
    except HangError:
        ended = "hang"
    except Exception as e:
        ended = f"traceback of {type(e).__name__}: {e}"
    if peak_memory() - before > MOST_BYTES:
        ended = f"memory, {(peak_memory() - before) / 1e9:.1f} GB"
    return ended, done


def _judged(kind: Kind, result: Any, expected: Any) -> str:
    """What a read came to that gave ``result``, and ``expected`` of the sound file."""
    if kind.guarded:
        return "same" if _same(result, expected) else "silently wrong"
    # Nothing is compared where the reader gives nothing.
    return "same" if result is not None and _same(result, expected) else "read"


def _same(result: Any, expected: Any) -> bool:
    """Equal, or where parts of it are only a shortcut: absent."""
    if result is None:
        return True
    if isinstance(expected, list):
        return all(_same(a, b) for a, b in zip(result, expected, strict=True))
    if isinstance(expected, torch.Tensor):
        return torch.equal(result, expected)
    return repr(result) == repr(expected)


@pytest.fixture(scope="module")
def examples(
    mini_chain: Chain, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Kind, Path, Any]]:
    """By kind: it, its file as it was, and what its reader gives of that."""
    folder = tmp_path_factory.mktemp("kinds")
    found = {}
    for i, (name, kind) in enumerate(kinds(mini_chain.root, folder).items()):
        original = folder / f"original-{i}"
        shutil.copyfile(kind.path, original)
        found[name] = (kind, original, kind.read(kind.path))
    return found


def test_damaged_files_end_in_a_message_or_are_as_they_were(
    examples: dict[str, tuple[Kind, Path, Any]],
) -> None:
    counts, wrong = {name: Counter[str]() for name in examples}, []
    deadline = time.monotonic() + 60 * MINUTES
    for seed in itertools.count(int(time.time()) if MINUTES else 0):
        if (time.monotonic() > deadline) if MINUTES else seed >= TRIES:
            break
        for name, (kind, original, expected) in examples.items():
            ended, done = outcome(kind, original, expected, seed)
            restore(kind.path, original)
            counts[name][ended if ended in GOOD else "wrong"] += 1
            if ended not in GOOD:
                wrong.append(f"{name}, {done} (seed {seed}): {ended}")
    if MINUTES:
        keep("damaged files", {name: dict(each) for name, each in counts.items()}, wrong)
    total = sum(counts.values(), Counter[str]())
    print(dict(total), *wrong, sep="\n")
    assert wrong == []
    assert total["message"] > total["same"] + total["read"]
    assert min(total["same"], total["read"]) > 0


def test_every_reader_of_the_code_has_a_kind(examples: dict[str, tuple[Kind, Path, Any]]) -> None:
    covered = {function for kind, _, _ in examples.values() for function in kind.functions}
    found = set()
    root = Path(__file__).parents[2]
    for path in (*root.glob("quest_deploy/**/*.py"), *root.glob("exporters/**/*.py")):
        if "triton_files" in path.parts or path.name in OPENING:
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and _opens(function):
                found.add(f"{module.removeprefix('quest_deploy.')}:{function.name}")
    assert found == covered | OWN.keys()
    assert covered.isdisjoint(OWN)


def _opens(function: ast.FunctionDef) -> bool:
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    names = {ast.unparse(call) for call in calls}
    passed = {ast.unparse(node) for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    return not {name.rpartition(".")[2] for name in names}.isdisjoint(OPENERS) or bool(
        passed & {"torch.load", "ir.load", "onnx.load"}
    )
