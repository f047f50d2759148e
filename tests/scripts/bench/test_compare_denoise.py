from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.files import read_json
from quest_deploy.models.loading import load_model
from scripts.bench import compare_denoise as script
from tests.helpers import assert_holds
from tests.quest_deploy.support import Chain

PROGRAM = """#!{python}
import sys
from pathlib import Path

import numpy as np
import torch

from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.backends.engine_unet import EngineUNet
from quest_deploy.files import read_json

root, backend, schedule, noise, result, *options = sys.argv[1:]
named = dict(zip(options[::2], options[1::2], strict=True))
batch, guidance = int(named["--batch"]), float(named["--guidance"])
name, _, file = named["--condition"].partition("=")
table = read_json(Path(schedule))


def tensor(path, *shape):
    return torch.from_numpy(np.fromfile(path, np.float32).reshape(shape))


states = tensor(file, 2 * batch, *{states})
samples = [tensor(noise, batch, *{sample}) * table["init_noise_sigma"]]
predictions = []
with EngineUNet.load(Workspace.open(Path(root)), backend) as unet:
    for step in table["steps"]:
        rows = torch.cat([samples[-1] * step["input_scale"]] * 2)
        both = unet(rows, torch.full((2 * batch,), step["timestep"]), **{{name: states}})
        without, asked = both.chunk(2)
        predictions.append(without + guidance * (asked - without))
        samples.append(
            sum(scale * samples[-1 - i] for i, scale in enumerate(step["sample_scales"]))
            + sum(scale * predictions[-1 - i] for i, scale in enumerate(step["prediction_scales"]))
        )
(samples[-1] + {wrong}).numpy().astype(np.float32).tofile(result)
print("20 steps in 9 ms")
"""
"""Stands in for apps/denoise: reads what it reads, and computes what it computes."""


def compared(chain: Chain, folder: Path, wrong: float, *options: str) -> Any:
    model = load_model(Workspace.open(chain.root).source)
    (condition,) = model.conditions(np.zeros(1, np.int64)).values()
    program = folder / "denoise"
    program.write_text(
        PROGRAM.format(
            python=sys.executable,
            sample=tuple(model.sample_shape),
            states=tuple(condition.shape[1:]),
            wrong=wrong,
        )
    )
    program.chmod(0o755)
    app = script.typer.Typer()
    app.command()(script.main)
    line = ["-w", chain.root, "--backend", "openvino", "--program", program, "--steps", "3"]
    return CliRunner().invoke(app, [str(word) for word in (*line, *options)])


@pytest.mark.parametrize("wrong", [0.0, 0.05])
def test_a_program_that_draws_what_python_draws_is_told_from_one_that_does_not(
    wrong: float, chain: Chain, tmp_path: Path
) -> None:
    done = compared(chain, tmp_path, wrong, "--json", str(tmp_path / "found.json"))
    assert done.exit_code == 0, done.output
    found = read_json(tmp_path / "found.json")
    assert (found["images"], found["steps"], found["said"]) == (2, 3, "20 steps in 9 ms")
    # The table and the scheduler round differently, which may move a pixel by one.
    assert (found["equal_pixels"] > 0.99 and found["largest_difference"] <= 1) == (wrong == 0)


def test_a_program_that_fails_is_told_by_its_own_message_and_nothing_is_written(
    chain: Chain, tmp_path: Path
) -> None:
    (tmp_path / "found.json").write_text("{}")
    app = script.typer.Typer()
    app.command()(script.main)
    program = tmp_path / "denoise"
    program.write_text("#!/bin/sh\necho error: no GPU is here >&2; exit 1\n")
    program.chmod(0o755)
    line = ["-w", chain.root, "--backend", "openvino", "--program", program, "--steps", "3"]
    done = CliRunner().invoke(
        app, [str(word) for word in (*line, "--json", tmp_path / "found.json")]
    )
    assert done.exit_code == 1
    assert_holds(done.stderr, "no GPU is here")
    assert (tmp_path / "found.json").read_text() == "{}"
