"""FLUX.1: its positions, its schedule, its guidance and its pipeline, against diffusers' own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.transformers import transformer_flux
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from quest_deploy.artifacts.checkpoint import ScoreScale
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.calibration.ptq import CalibrationOptions, calibrate
from quest_deploy.calibration.trajectories import record_trajectories
from quest_deploy.evaluation.sampling import float_denoiser, sample_images
from quest_deploy.files import read_json
from quest_deploy.models.channels import GUIDANCE, guidance_of
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.pipeline_model import PipelineModel
from quest_deploy.models.schedulers import FLOW_SCHEDULERS, set_steps
from quest_deploy.quantization.prepare import prepare
from quest_deploy.serving.pipeline import stand_in
from quest_deploy.serving.schedule import run_schedule, schedule_from_scheduler
from quest_deploy.stages.generate import steps_of
from quest_deploy.stages.options import BenchmarkOptions, GenerateOptions
from quest_deploy.stages.schedule import write_schedule
from quest_deploy.stages.workspaces import SchemeChoices
from tests.helpers import refused
from tests.quest_deploy.support import cli

NAMES = ("flux", "flux-schnell")
OF_FLUX = (16, 56, 56)
"""The published models' axes."""


def inputs_of(model: PipelineModel, size: tuple[int, int] = (8, 8)) -> dict[str, Tensor]:
    """Random samples of a size, each at a timestep of its own, and the first prompts' states."""
    generator = torch.Generator().manual_seed(1)
    (conditions,) = guidance_of(model, None, None).parts(model.conditions(np.arange(2)), None)
    sample = torch.randn(2, model.sample_shape[0], *size, generator=generator)
    return {"sample": sample, "timestep": torch.tensor([3.0, 871.5]), **conditions}


def drawn(pipeline: Any, **options: Any) -> Any:
    """Its images of two prompts from the same noise, [B, H, W, C]."""
    pipeline.set_progress_bar_config(disable=True)
    given = {
        "prompt": ["a red cat", "photo of a house"],
        "num_inference_steps": 3,
        "height": 16,
        "width": 16,
        **options,
    }
    generator = torch.Generator().manual_seed(0)
    return pipeline(generator=generator, output_type="np", **given).images


def test_the_table_of_another_size_has_the_shift_of_that_size(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = pipelines("flux")
    workspace: Any = SimpleNamespace(source=resolve_source(str(folder)))
    for size, tokens in (((None, None), 16), ((32, 48), 96), ((None, 48), 48)):
        table = tmp_path / "table.json"
        write_schedule(workspace, "euler", 4, table, *size)
        kind = diffusers.FlowMatchEulerDiscreteScheduler
        scheduler = kind.from_pretrained(folder / "scheduler")
        sigmas = np.linspace(1.0, 1 / 4, 4)
        scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(tokens))
        found = [step["timestep"] for step in read_json(table)["steps"]]
        assert found == pytest.approx(scheduler.timesteps.tolist())
    with refused("--height", "4"):
        write_schedule(workspace, "euler", 4, tmp_path / "odd.json", 18)


@pytest.mark.parametrize("size", [(8, 8), (30, 12), (256, 200)])
def test_positions_turn_queries_and_keys_as_diffusers_has_them(
    models: Callable[[str], PipelineModel], size: tuple[int, int]
) -> None:
    network: Any = models("flux").load_unet()
    network.pos_embed = transformer_flux.FluxPosEmbed(theta=10000, axes_dim=OF_FLUX)
    height, width = size
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(
        1, height // 2, width // 2, None, torch.float32
    )
    expected = network.pos_embed(torch.cat([torch.zeros(5, 3), ids]))
    for ours, theirs in zip(network.rotary(5, torch.zeros(1, 4, *size)), expected, strict=True):
        assert ours.shape == (5 + height * width // 4, sum(OF_FLUX))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_operands_of_explicit_attention_are_those_that_diffusers_multiplies(
    models: Callable[[str], PipelineModel], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models(name)
    inputs = inputs_of(model, (8, 12))
    network: Any = model.load_unet()
    theirs: list[Tensor] = []
    attend = transformer_flux.dispatch_attention_fn

    def seen(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        theirs.extend(x.transpose(1, 2) for x in (q, k, v))
        result: Tensor = attend(q, k, v, **options)
        return result

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", seen)
    expected = network(**inputs, return_dict=False)[0]
    network = prepare(network, {}, ScoreScale.PRODUCT)
    ours: list[Tensor] = []
    for block in (*network.transformer_blocks, *network.single_transformer_blocks):
        assert (block.attn.scores.operands, block.attn.mix.operands) == (
            ("q", "k"),
            ("softmax", "v"),
        )
        block.attn.scores.register_forward_pre_hook(
            lambda _, operands: ours.extend((operands[0], operands[1].transpose(2, 3)))
        )
        block.attn.mix.register_forward_pre_hook(lambda _, operands: ours.append(operands[1]))
    found = network(**inputs, return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    assert len(ours) == len(theirs) == 6
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_sides_are_those_that_the_decoder_is_meant_for_or_the_pipelines(
    models: Callable[[str], PipelineModel], changed: Callable[..., Path], name: str
) -> None:
    assert models(name).sample_shape == (4, 8, 8)
    folder = changed(name, "vae/config.json", sample_size=24)
    assert load_model(resolve_source(str(folder))).sample_shape == (4, 12, 12)
    folder = changed(name, "vae/config.json", sample_size=None)
    assert load_model(resolve_source(str(folder))).sample_shape == (4, 128, 128)
    folder = changed(name, "vae/config.json", sample_size=18)
    with refused("sample_size", 9):
        load_model(resolve_source(str(folder)))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_our_loop_draws_what_diffusers_pipeline_draws(
    models: Callable[[str], PipelineModel], name: str
) -> None:
    model = models(name)
    guidance = 5.0 if model.embeds_guidance else 1.0
    own = model.pipeline_class().from_pretrained(model.folder)
    expected = drawn(own, prompt=model.prompts[:2], guidance_scale=guidance)
    ours = sample_images(
        model,
        float_denoiser(model.load_unet()),
        np.asarray([0, 1]),
        scheduler="euler",
        steps=3,
        guidance=guidance,
        seed=0,
    )
    np.testing.assert_allclose(ours, 2 * expected.transpose(0, 3, 1, 2) - 1, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheduler", FLOW_SCHEDULERS)
@torch.no_grad()
def test_a_pipeline_tells_our_schedulers_the_shift_of_the_size_and_a_loop_has_the_models_own(
    models: Callable[[str], PipelineModel], name: str, scheduler: str
) -> None:
    model = models(name)
    engine: Any = float_denoiser(model.load_unet())
    pipeline = model.load_pipeline(transformer=stand_in(engine, model.config))
    own = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    pipeline.scheduler = model.load_scheduler(scheduler)
    visited = []
    for height in (16, 96):
        assert np.isfinite(drawn(pipeline, height=height)).all()
        visited.append(pipeline.scheduler.timesteps.double())
        mu = 0.5 + 0.65 / 3840 * (height * 16 // 16 - 256)
        if scheduler in ("ddim", "euler"):
            own.set_timesteps(sigmas=np.linspace(1.0, 1 / 3, 3), mu=mu)
            assert torch.equal(own.timesteps, pipeline.scheduler.timesteps)
    alone = model.load_scheduler(scheduler)
    set_steps(alone, 3)
    torch.testing.assert_close(alone.timesteps.double(), visited[0], rtol=0, atol=1.01)
    assert torch.equal(visited[0], visited[1]) == (name == "flux-schnell")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheduler", FLOW_SCHEDULERS)
def test_a_table_for_cpp_holds_the_flow(
    models: Callable[[str], PipelineModel], name: str, scheduler: str
) -> None:
    model = models(name)

    def make() -> Any:
        made = model.load_scheduler(scheduler)
        set_steps(made, 4)
        return made

    table, made = schedule_from_scheduler(make), make()
    generator = torch.Generator().manual_seed(0)
    sample, *predictions = torch.randn(5, 1, 3, generator=generator).unbind()
    found = run_schedule(table, sample, predictions, [torch.zeros_like(sample)] * 4)
    for prediction, timestep, following in zip(predictions, made.timesteps, found[1:], strict=True):
        sample = made.step(prediction, timestep, sample).prev_sample
        torch.testing.assert_close(following.float(), sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"time_shift_type": "linear"}, "time_shift_type linear"),
        ({"base_image_seq_len": 64, "max_image_seq_len": 64}, "base_image_seq_len 64"),
        ({"base_shift": "half"}, "base_shift"),
        ({"max_shift": 9}, "max_shift"),
        ({"base_shift": -8, "max_shift": 8, "max_image_seq_len": 257}, "base_shift max_shift"),
        ({"shift_terminal": 0.1}, "shift_terminal"),
    ],
)
def test_a_shift_that_cannot_be_computed_is_refused(
    changed: Callable[..., Path], changes: dict[str, Any], facts: str
) -> None:
    folder = changed("flux", "scheduler/scheduler_config.json", **changes)
    with refused(*facts.split()):
        load_model(resolve_source(str(folder)))


def test_the_shift_is_that_of_the_models_own_size_by_its_own_numbers(
    changed: Callable[..., Path],
) -> None:
    numbers = {"base_image_seq_len": 16, "max_image_seq_len": 1024, "base_shift": 0.25}
    folder = changed("flux", "scheduler/scheduler_config.json", **numbers)
    model = load_model(resolve_source(str(folder)))
    for name in FLOW_SCHEDULERS:
        config = model.load_scheduler(name).config
        shift = config["shift" if name in ("ddim", "euler") else "flow_shift"]
        assert shift == pytest.approx(math.exp(0.25))
        # What the pipeline computes another size's by.
        assert numbers.items() <= dict(config).items()


def test_schnell_has_a_bucket_for_each_of_its_four_steps_and_dev_some_of_its_28(
    models: Callable[[str], PipelineModel],
) -> None:
    for name, steps, buckets in (("flux-schnell", 4, 4), ("flux", 28, 20)):
        model = models(name)
        assert (model.bucket_steps, model.calibration_steps) == (steps, steps)
        scheme = Scheme.parse("w4a4", buckets=buckets, edges=SchemeChoices().edges(model))
        scheduler = model.load_scheduler("euler")
        set_steps(scheduler, steps)
        held = {scheme.bucket_of(t) for t in scheduler.timesteps.tolist()}
        assert held == set(range(buckets))


def test_what_is_drawn_has_schnells_four_steps_and_devs_20_unless_told_otherwise(
    models: Callable[[str], PipelineModel],
) -> None:
    for name, steps in (("flux-schnell", 4), ("flux", 20)):
        assert steps_of(models(name), GenerateOptions()) == steps
        assert steps_of(models(name), BenchmarkOptions(pipeline=True).drawing) == steps
        assert steps_of(models(name), GenerateOptions(steps=3)) == 3


def test_calibration_records_one_row_a_sampling_with_the_guidance_that_dev_embeds(
    models: Callable[[str], PipelineModel],
) -> None:
    model = models("flux")
    network = model.load_unet()
    options: dict[str, Any] = {"steps": 2, "samples": 2, "seed": 0}
    for given, weight in ((None, 3.5), (2, 2.0)):
        recorded = record_trajectories(model, network, guidance=given, **options)
        assert recorded.sample.shape == (2, 2, 4, 8, 8)
        assert recorded.parts == 1
        assert recorded.conditions[GUIDANCE].tolist() == [weight] * 2
    schnell = models("flux-schnell")
    recorded = record_trajectories(schnell, schnell.load_unet(), **options)
    assert GUIDANCE not in recorded.conditions
    assert (model.calibration_samples, schnell.calibration_samples) == (4, 4)


@torch.no_grad()
def test_the_guidance_that_dev_embeds_changes_its_prediction(
    models: Callable[[str], PipelineModel],
) -> None:
    model = models("flux")
    network, inputs = model.load_unet(), inputs_of(model)
    first, second = (
        network(**{**inputs, GUIDANCE: torch.full((2,), weight)}, return_dict=False)[0]
        for weight in (1.0, 7.0)
    )
    assert (first - second).abs().max() > 1e-3


def test_a_guidance_weight_that_nothing_heeds_is_refused(
    models: Callable[[str], PipelineModel],
) -> None:
    schnell = models("flux-schnell")
    assert not guidance_of(schnell, 0.0, None).guided
    with refused("--guidance", "4"):
        guidance_of(schnell, 4.0, None)
    for name in NAMES:
        with refused("guidance"):
            models(name).null_conditions(1)


@pytest.mark.parametrize("option", ["--guidance", "--image-guidance"])
def test_calibrate_refuses_what_guides_nothing_before_anything_is_sampled(
    pipelines: Callable[[str], Path], tmp_path: Path, option: str
) -> None:
    small = ("--model", pipelines("flux-schnell"), "--samples", "1")
    outcome = cli("calibrate", "-w", tmp_path / "ws", *small, option, "4")
    outcome.assert_refused(option)
    assert "trajectories" not in outcome.err


def test_a_timestep_in_another_unit_is_noticed(models: Callable[[str], PipelineModel]) -> None:
    model = models("flux")
    network = model.load_unet()
    recorded = record_trajectories(model, network, steps=4, samples=1, seed=0)
    scheme = Scheme.parse("w8a8", buckets=2, float_layers=model.float_layers)
    calibrate("flux", network, recorded, scheme, CalibrationOptions())
    # Of the pipeline's unit all would be in one bucket.
    thousandths = dataclasses.replace(recorded, timestep=recorded.timestep / 1000)
    with refused("buckets", [1]):
        calibrate("flux", network, thousandths, scheme, CalibrationOptions())
    given = from_pipeline(model)
    engine: Any = float_denoiser(network)
    transformer: Any = stand_in(engine, model.config)
    transformer(**given)
    with refused("timestep", 1000, 871.5):
        transformer(**{**given, "timestep": given["timestep"] * 1000})


def from_pipeline(model: PipelineModel) -> dict[str, Any]:
    """What diffusers' pipeline calls the transformer with."""
    given: dict[str, Any] = inputs_of(model)
    sample, steps = given.pop("sample"), given.pop("timestep")
    pipeline = diffusers.FluxPipeline
    return {
        **given,
        "hidden_states": pipeline._pack_latents(sample, *sample.shape),
        "timestep": steps / 1000,
        "img_ids": pipeline._prepare_latent_image_ids(2, 4, 4, None, torch.float32),
        "txt_ids": torch.zeros(given["encoder_hidden_states"].shape[1], 3),
    }


@torch.no_grad()
def test_positions_of_anything_but_one_image_are_refused(
    models: Callable[[str], PipelineModel],
) -> None:
    model = models("flux")
    engine: Any = float_denoiser(model.load_unet())
    transformer: Any = stand_in(engine, model.config)
    given = from_pipeline(model)
    expected = transformer(**given).sample
    assert expected.shape == given["hidden_states"].shape
    former = {"img_ids": given["img_ids"][None], "txt_ids": given["txt_ids"][None]}
    assert torch.equal(transformer(**{**given, **former}).sample, expected)
    second = given["img_ids"].clone()
    second[8:, 0] = 1  # as Kontext has the image that it edits
    for changes in (
        {"img_ids": second},
        {"img_ids": given["img_ids"].flip(0)},
        {"img_ids": given["img_ids"][:8]},
        {"img_ids": None},
        {"txt_ids": given["txt_ids"] + 1},
    ):
        with refused("img_ids", "txt_ids"):
            transformer(**{**given, **changes})


@torch.no_grad()
def test_classifier_free_guidance_of_the_pipeline_itself_works_around_our_network(
    models: Callable[[str], PipelineModel],
) -> None:
    model = models("flux-schnell")
    engine: Any = float_denoiser(model.load_unet())
    ours = model.load_pipeline(transformer=stand_in(engine, model.config))
    own = model.pipeline_class().from_pretrained(model.folder)
    options = {"true_cfg_scale": 3.0, "negative_prompt": ["blue", ""], "height": 24}
    np.testing.assert_allclose(drawn(ours, **options), drawn(own, **options), atol=1e-4)


@pytest.mark.parametrize(
    ("file", "changes", "facts"),
    [
        ("model_index.json", {"text_encoder_2": [None, None]}, "text_encoder_2"),
        ("model_index.json", {"_class_name": "FluxKontextPipeline"}, "FluxKontextPipeline image"),
        ("vae/config.json", {"sample_size": 10**9}, "sample_size"),
    ],
)
def test_a_pipeline_that_is_not_supported_is_refused(
    changed: Callable[..., Path], tmp_path: Path, file: str, changes: dict[str, Any], facts: str
) -> None:
    folder = changed("flux", file, **changes)
    outcome = cli("calibrate", "-w", tmp_path / "ws", "--model", folder)
    outcome.assert_refused(*facts.split())
    assert not (tmp_path / "ws").exists()
