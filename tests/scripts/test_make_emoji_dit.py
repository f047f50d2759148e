"""The transformer that draws emoji: what it is trained on, and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PixArtSigmaPipeline

from quest_deploy.models.registry import EMBEDDED_FOLDER
from scripts import make_emoji_dit as script
from scripts.make_emoji_model import WEIGHTS
from tests.scripts.emoji_work import NAMES, small_work


def test_its_tokenizer_knows_every_letter_of_the_names_and_ends_each(tmp_path: Path) -> None:
    entries = [{"name": name, "keywords": ["fruit"]} for name in NAMES]
    script.make_tokenizer(tmp_path, entries)
    tokenizer = script.T5Tokenizer.from_pretrained(tmp_path)
    padding, end, unknown = (tokenizer.convert_tokens_to_ids(x) for x in script.SPECIAL)
    assert (padding, end, unknown) == (0, 1, 2)
    found = tokenizer([*NAMES, ""]).input_ids
    assert all(ids[-1] == end and unknown not in ids for ids in found)
    assert [tokenizer.decode(ids[:-1]) for ids in found] == [*NAMES, ""]


def test_sigmas_are_shifted_fractions_and_cover_their_range() -> None:
    sigmas = script.sigmas_for(20_000, torch.Generator().manual_seed(0)).numpy()
    fractions = sigmas / (script.SHIFT - (script.SHIFT - 1) * sigmas)  # the shift undone
    assert 0 < sigmas.min() < sigmas.max() < 1
    assert np.median(fractions) == pytest.approx(0.5, abs=0.01)
    # A quarter is uniform, the others logit-normal: beyond 0.95 are 5% and 0.16% of them.
    expected = script.EVEN_SHARE * 0.05 + (1 - script.EVEN_SHARE) * 0.0016
    for share in ((fractions > 0.95).mean(), (fractions < 0.05).mean()):
        assert share == pytest.approx(expected, rel=0.2)


@torch.no_grad()
def test_a_new_transformer_predicts_nothing_and_heeds_no_prompt_yet() -> None:
    torch.manual_seed(0)
    made = script.new_transformer().eval()
    sample, states = torch.randn(2, 8, 8, 8), torch.randn(2, 2, 3, script.TEXT["d_model"])
    options: dict[str, Any] = {
        "timestep": torch.tensor([10.0, 900.0]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    assert not made(sample, encoder_hidden_states=states[0], **options).sample.any()
    torch.nn.init.normal_(made.proj_out.weight)
    one, other = (made(sample, encoder_hidden_states=x, **options).sample for x in states)
    assert one.any()
    torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_training_writes_a_pipeline_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script.TRANSFORMER, "num_layers", 1)
    work, out = small_work(tmp_path / "work"), tmp_path / "out"
    options: dict[str, Any] = {"out": out, "work": work, "model": EMBEDDED_FOLDER, "batch": 2}

    with pytest.raises(KeyboardInterrupt):
        _interrupted_after(1, monkeypatch, lambda: script.main(**options, steps=2))
    assert torch.load(work / "dit.pt", weights_only=True)["step"] == 1
    script.main(**options, steps=2)
    first = (out / "transformer" / WEIGHTS).read_bytes()

    whole = small_work(tmp_path / "whole")
    script.main(**{**options, "work": whole, "out": tmp_path / "other"}, steps=2)
    assert (tmp_path / "other" / "transformer" / WEIGHTS).read_bytes() == first

    for path in out.rglob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text())
    pipeline: Any = DiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32)
    assert isinstance(pipeline, PixArtSigmaPipeline)
    drawn = pipeline(
        "red apple", height=64, width=64, num_inference_steps=2, use_resolution_binning=False
    )
    assert drawn.images[0].size == (64, 64)
    assert sorted(NAMES) == sorted((out / "prompts.txt").read_text().splitlines())


def _interrupted_after(steps: int, monkeypatch: pytest.MonkeyPatch, train: Any) -> None:
    """Run ``train``, which is interrupted after so many steps; its state is saved at each."""
    from scripts import make_emoji_model

    with monkeypatch.context() as patch:
        patch.setattr(make_emoji_model, "SAVE_SECONDS", -1.0)
        save = make_emoji_model.Training.save

        def saving(training: Any) -> None:
            save(training)
            if training.step == steps:
                raise KeyboardInterrupt

        patch.setattr(make_emoji_model.Training, "save", saving)
        train()
