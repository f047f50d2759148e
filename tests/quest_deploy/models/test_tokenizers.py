"""Prompts as people give them: files of every editor, tokenizers without a length, long prompts."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quest_deploy.models.conditions import BLOCK
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.pipeline_model import PipelineModel
from quest_deploy.stages.options import read_prompts
from tests.helpers import refused
from tests.pipelines import TOKENS
from tests.quest_deploy.support import cli

LONG = "a photo of a red cat " * 3
ENCODINGS = {
    "UTF-8": b"a cat\na red dog\n",
    "a byte order mark": "a cat\na red dog\n".encode("utf-8-sig"),
    "Windows' ends of lines": b"a cat\r\na red dog\r\n",
    "both": "a cat\r\na red dog\r\n".encode("utf-8-sig"),
    "old Mac OS's ends of lines": b"a cat\ra red dog\r",
    "UTF-16": "a cat\r\na red dog\r\n".encode("utf-16"),
    "UTF-16, big endian": b"\xfe\xff" + "a cat\na red dog\n".encode("utf-16-be"),
    "empty lines": b"\n\n  a cat \n\n\t\na red dog\n\n\n",
    "no last end of line": b"a cat\na red dog",
}


@pytest.mark.parametrize("content", ENCODINGS.values(), ids=ENCODINGS)
def test_a_prompt_file_is_read_as_any_editor_writes_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "подсказки 提示.txt"
    path.write_bytes(content)
    assert read_prompts(path) == ("a cat", "a red dog")


def test_prompts_in_other_scripts_stay_as_they_are(tmp_path: Path) -> None:
    prompts = ("кошка в шторм", "風の中の猫", "قطة 🐈")
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == prompts


@pytest.mark.parametrize(
    "content", [b"a c\xe4t\n", b"\xff\xfea\n\0b\0\xd8", b"\n \n", b"\xef\xbb\xbf"]
)
def test_a_file_that_is_no_text_or_holds_none_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with refused(path):
        read_prompts(path)


def without_length(model: Path) -> Path:
    for name in ("tokenizer", "tokenizer_2"):
        path = model / name / "tokenizer_config.json"
        if path.exists():
            content = json.loads(path.read_text())
            del content["model_max_length"]
            path.write_text(json.dumps(content))
    return model


def states(folder: Path, prompts: list[str]) -> dict[str, torch.Tensor]:
    return load_model(resolve_source(str(folder)), prompts).conditions(np.arange(len(prompts)))


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_tokenizer_without_a_length_takes_its_text_encoders(
    pipelines: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    bare = without_length(shutil.copytree(pipelines(name), tmp_path / "model"))
    prompts = ["a cat", "", LONG]
    expected, found = states(pipelines(name), prompts), states(bare, prompts)
    assert found["encoder_hidden_states"].shape[1] == TOKENS
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    model = load_model(resolve_source(str(bare)))
    assert isinstance(model, PipelineModel)
    assert model.load_pipeline(vae=None).tokenizer.model_max_length == TOKENS


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_long_prompt_is_cut_as_diffusers_cuts_it_and_all_are_told_of_once(
    pipelines: Callable[[str], Path], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    from diffusers import DiffusionPipeline

    theirs: Any = DiffusionPipeline.from_pretrained(pipelines(name))
    with torch.no_grad():
        expected = theirs.encode_prompt(
            prompt=[LONG, "a cat"],
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )[0]
    with caplog.at_level(logging.WARNING, logger="quest_deploy"):
        found = states(pipelines(name), [LONG, "a cat", f"{LONG} in a house"])
    torch.testing.assert_close(found["encoder_hidden_states"][:2], expected)
    (told,) = (x.getMessage() for x in caplog.records if x.name.startswith("quest_deploy"))
    assert all(fact in told for fact in ("2 of 3", str(TOKENS), repr(LONG)))


def test_long_prompts_are_told_of_once_and_all_of_them_however_few_are_asked_for(
    pipelines: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [LONG, *["a cat"] * (3 * BLOCK - 2), LONG]
    model = load_model(resolve_source(str(pipelines("sd"))), prompts)
    with caplog.at_level(logging.WARNING, logger="quest_deploy"):
        for label in (0, BLOCK, 3 * BLOCK - 1):
            model.conditions(np.asarray([label]))
    (told,) = (x.getMessage() for x in caplog.records if x.name.startswith("quest_deploy"))
    assert f"2 of {3 * BLOCK}" in told


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("tokenizer", None),
        ("tokenizer", {}),
        ("tokenizer", {"vocab.json": '{"a": 0}'}),
        ("tokenizer_2", {"tokenizer.json": ""}),
        ("tokenizer_2", {"vocab.json": "{}", "merges.txt": "#version: 0.2"}),
    ],
)
def test_a_tokenizer_without_a_vocabulary_is_refused_by_its_folder(
    pipelines: Callable[[str], Path], tmp_path: Path, name: str, left: dict[str, str] | None
) -> None:
    folder = shutil.copytree(pipelines("sdxl"), tmp_path / "model") / name
    shutil.rmtree(folder)
    if left is not None:
        folder.mkdir()
        for file, content in left.items():
            (folder / file).write_text(content)
    with refused(folder, "merges.txt"):
        states(folder.parent, ["a cat"])


def test_prompts_that_fit_are_not_told_of(
    pipelines: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="quest_deploy"):
        states(pipelines("sd"), ["a cat", "a red dog"])
    assert not caplog.messages


def test_calibrate_tells_of_long_prompts_in_a_file_with_a_byte_order_mark(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"{LONG}\r\na cat\r\n".encode("utf-8-sig"))
    few = ("--samples", "1", "--steps", "2", "--buckets", "2", "--method", "minmax")
    workspace = tmp_path / "ws"
    ended = cli("calibrate", "-w", workspace, "--model", pipelines("sd"), "--prompts", path, *few)
    assert ended.code == 0
    assert ended.err.count("1 of 2 prompts") == 1
