"""A small ``--work`` of the scripts that train on emoji. Import as ``tests.scripts.emoji_work``."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

NAMES = ("red apple", "blue car", "left arrow", "cat")


def squares(*tops: int) -> torch.Tensor:
    """Pictures of a red square on white, its upper edge in that row."""
    pictures = torch.ones(len(tops), 3, 64, 64)
    for picture, top in zip(pictures, tops, strict=True):
        picture[1:, top : top + 20, 20:40] = -1
    return pictures


def small_work(work: Path) -> Path:
    """The pictures of ``NAMES``, in a new folder."""
    work.mkdir()
    entries = [{"emoji": "", "name": name, "keywords": ["thing", "sign"]} for name in NAMES]
    (work / "names.json").write_text(json.dumps(entries))
    pictures = ((squares(5, 10, 20, 30) + 1) * 127.5).byte()
    save_file({"pictures": pictures}, work / "pictures.safetensors")
    return work
