from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from quest_deploy.files import read_json
from quest_deploy.serving.triton.server import missing_server
from scripts.bench import draw_served as script
from tests.helpers import assert_holds
from tests.quest_deploy.support import Chain, cli


def invoke(*arguments: str | Path) -> object:
    app = script.typer.Typer()
    app.command()(script.main)
    return CliRunner().invoke(app, [str(word) for word in arguments])


@pytest.mark.slow
def test_images_drawn_together_by_a_real_server_equal_the_one_drawn_alone(
    chain: Chain, tmp_path: Path
) -> None:
    if (reason := missing_server()) is not None:
        pytest.skip(reason)
    assert cli("package", "-w", chain.root, "--triton", tmp_path / "package").code == 0
    target = tmp_path / "found.json"
    done = invoke(tmp_path / "package", "--cpu", "--together", "3", "--json", target)
    assert done.exit_code == 0, done.output  # type: ignore[attr-defined]
    found = read_json(target)
    assert (found["together"], found["equal"]) == (3, 3)
    assert found["seconds"] > 0
    assert found["together_seconds"] > 0


def test_a_folder_that_is_no_package_is_told_and_nothing_is_written(tmp_path: Path) -> None:
    done = invoke(tmp_path, "--json", tmp_path / "found.json")
    assert done.exit_code == 1  # type: ignore[attr-defined]
    assert_holds(done.stderr, "serve.py")  # type: ignore[attr-defined]
    assert not (tmp_path / "found.json").exists()
