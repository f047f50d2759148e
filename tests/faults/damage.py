"""Ways in which a file is damaged or replaced, drawn from a seed."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[Path, random.Random], None]
STRANGE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2.5,
    1e308,
    10**30,
    -(10**30),
    "",
    "x" * 1000,
    "\u0000",
    [],
    [[]],
    {},
    {"a": 1},
    [0] * 1000,
)
"""What takes the place of a part of a JSON value."""


def flip_bits(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        # Half of them near the beginning, where headers are.
        at = rng.randrange(min(len(content), 4096) if rng.random() < 0.5 else len(content))
        content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def append(path: Path, rng: random.Random) -> None:
    with path.open("ab") as stream:
        stream.write(rng.randbytes(rng.randint(1, 4096)))


def overwrite(path: Path, rng: random.Random) -> None:
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.seek(rng.randrange(size))
        stream.write(rng.randbytes(rng.randint(1, 256)))


def replace_by_noise(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(rng.randint(1, 4096)))


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def replace_by_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def replace_by_pipe(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_endless_device(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def replace_by_link_to_itself(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path)


def grow_to_a_gigabyte(path: Path, rng: random.Random) -> None:
    os.truncate(path, 2**30)  # sparse


def change_json(path: Path, rng: random.Random) -> None:
    """A part of it is another value, is gone or is new."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(changed(content, rng)))


def nest_json(path: Path, rng: random.Random) -> None:
    path.write_text("[" * 100_000 + "]" * 100_000)


def change_header(path: Path, rng: random.Random) -> None:
    """The JSON header of a safetensors file is another one."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    inner = header.get("__metadata__", {}).get("content")
    if inner is not None and rng.random() < 0.7:
        header["__metadata__"]["content"] = json.dumps(changed(json.loads(inner), rng))
    else:
        header = changed(header, rng)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def changed(value: Any, rng: random.Random) -> Any:
    """The JSON value with one change somewhere in it."""
    places = list(_places(value))
    if not places:
        return rng.choice(STRANGE)
    container, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.2:
        del container[key]
    elif kind < 0.3 and isinstance(container, dict):
        container[f"new-{rng.randint(0, 9)}"] = rng.choice(STRANGE)
    elif kind < 0.4 and isinstance(container[key], int | float):
        container[key] *= rng.choice((-1, 2, 1000, 10**9))
    else:
        container[key] = rng.choice(STRANGE)
    return value


def _places(value: Any) -> Any:
    keys = value if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


OF_ANY: tuple[Damage, ...] = (
    flip_bits,
    truncate,
    append,
    overwrite,
    replace_by_noise,
    empty,
    remove,
    replace_by_folder,
    replace_by_pipe,
    replace_by_endless_device,
    replace_by_link_to_itself,
    grow_to_a_gigabyte,
)


def damages_of(path: Path) -> tuple[Damage, ...]:
    """The damages that make sense for a file, those of its form the most often."""
    if path.suffix == ".json":
        return (*OF_ANY, *[change_json] * 20, nest_json)
    if path.suffix == ".safetensors":
        return (*OF_ANY, *[change_header] * 12)
    return OF_ANY


def damage(path: Path, seed: int) -> str:
    """Damage the file; the name of what was done."""
    rng = random.Random(seed)
    chosen = rng.choice(damages_of(path))
    chosen(path, rng)
    return chosen.__name__


def restore(path: Path, original: Path) -> None:
    """Put the file back as it was."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    shutil.copyfile(original, path)
