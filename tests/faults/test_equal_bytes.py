from __future__ import annotations

import json
from pathlib import Path

import pytest

from quest_deploy.files import sha256_of
from tests.quest_deploy.support import CHAIN, Chain, cli

STEPS = ("calibrate", "finetune", "export", "reference", "build-engine onnxruntime", "schedule")


@pytest.mark.slow
@pytest.mark.usefixtures("mini_emoji")
def test_equal_inputs_give_equal_bytes_in_every_file_that_a_stage_reads(
    mini_chain: Chain, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    for step in STEPS:
        command, _, backend = step.partition(" ")
        where = ["--backend", backend] if backend else []
        ended = cli(command, "-w", again, *where, *CHAIN[step])
        assert ended.code == 0, ended.err
    files = {
        path.relative_to(again)
        for path in again.rglob("*")
        if path.is_file() and path.name not in (".lock", "manifest.json", "engine.json")
    }
    assert len(files) > 10
    changed = [f for f in files if sha256_of(again / f) != sha256_of(mini_chain.root / f)]
    assert changed == []
    engines = [
        json.loads((root / "engines/onnxruntime/engine.json").read_text())
        for root in (again, mini_chain.root)
    ]
    assert engines[0] == engines[1]
