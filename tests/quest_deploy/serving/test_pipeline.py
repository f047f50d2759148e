"""Diffusers pipelines whose UNet is an engine, end to end."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import quest_deploy
from quest_deploy.artifacts.checkpoint import load_checkpoint
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import CALIBRATED, CHECKPOINT, Workspace
from quest_deploy.backends.engine_unet import EngineUNet
from quest_deploy.errors import InputError
from quest_deploy.files import read_json
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.schedulers import SCHEDULERS
from quest_deploy.quantization.model import QuantizedModel
from quest_deploy.serving.pipeline import PipelineUNet, load_pipeline
from tests.helpers import refused
from tests.quest_deploy.support import Chain, cli

BACKEND = "onnxruntime"
PROMPT = "a photo of a cat"


@pytest.fixture(scope="module")
def pipeline(text_chain: Chain) -> Any:
    """The text-to-image pipeline with its engine. Its scheduler may be changed."""
    made = load_pipeline(text_chain.root, BACKEND)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def quantized(text_chain: Chain) -> QuantizedModel:
    """The fake-quantized model that the engine was made from."""
    return QuantizedModel.from_checkpoint(load_checkpoint(text_chain.root / CHECKPOINT)).eval()


class Recorder:
    """An engine that predicts nothing and keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]] = []

    def __call__(
        self, sample: torch.Tensor, timestep: torch.Tensor, **conditions: torch.Tensor
    ) -> torch.Tensor:
        self.calls.append((sample, timestep, conditions))
        return torch.zeros_like(sample, dtype=torch.float32)


def draw(pipeline: Any, seed: int = 0, **options: Any) -> np.ndarray[Any, Any]:
    options = {"prompt": PROMPT, "num_inference_steps": 3, "output_type": "np", **options}
    images: np.ndarray[Any, Any] = pipeline(
        generator=torch.Generator().manual_seed(seed), **options
    ).images
    return images


def save_anywhere(value: Any) -> None:
    torch.save(value, io.BytesIO())


def with_unet(pipeline: Any, unet: Any) -> Any:
    """The same pipeline around another UNet."""
    made = type(pipeline)(**{**pipeline.components, "unet": unet}, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def faked_unet(pipeline: Any, quantized: QuantizedModel) -> PipelineUNet:
    """The fake-quantized model in the place of an engine."""

    class Fake(PipelineUNet):
        def forward(
            self,
            sample: Any,
            timestep: Any,
            encoder_hidden_states: Any,
            *,
            added_cond_kwargs: Any = None,
            **_: Any,
        ) -> Any:
            conditions = {
                "encoder_hidden_states": encoder_hidden_states,
                **(added_cond_kwargs or {}),
            }
            return (quantized(sample, timestep, **conditions),)

    return Fake(Recorder(), {**pipeline.unet.config, "_class_name": "UNet2DConditionModel"})


def faked(pipeline: Any, quantized: QuantizedModel) -> Any:
    """The same pipeline around the fake-quantized model."""
    return with_unet(pipeline, faked_unet(pipeline, quantized))


def test_importing_the_package_imports_nothing_heavy_and_still_has_load_pipeline() -> None:
    script = (
        "import sys, quest_deploy; print([name for name in ('numpy', 'torch', 'diffusers') "
        "if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert quest_deploy.load_pipeline is load_pipeline


def test_it_is_the_pipeline_that_the_folder_names_around_an_engine(pipeline: Any) -> None:
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert isinstance(pipeline.unet, PipelineUNet)
    assert (pipeline.unet.dtype, pipeline.unet.device) == (torch.float32, torch.device("cpu"))
    assert pipeline.unet.config.in_channels == 4
    assert (
        pipeline.unet.config.time_cond_proj_dim is None
    )  # a default of the class, in no configuration


def test_the_same_seed_gives_the_same_image_and_another_seed_another(pipeline: Any) -> None:
    first, again, other = (draw(pipeline, seed) for seed in (1, 1, 2))
    assert first.shape == (1, 16, 16, 3)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.05


def test_it_draws_what_the_fake_quantized_model_draws(
    pipeline: Any, quantized: QuantizedModel
) -> None:
    theirs = draw(faked(pipeline, quantized))
    assert np.abs(draw(pipeline) - theirs).mean() < 0.01
    assert np.abs(draw(pipeline, 1) - theirs).mean() > 0.05


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler_works(pipeline: Any, text_chain: Chain, name: str) -> None:
    model = load_model(Workspace.open(text_chain.root).source)
    made = type(pipeline)(
        **{**pipeline.components, "scheduler": model.load_scheduler(name)},
        requires_safety_checker=False,
    )
    images = draw(made, num_inference_steps=5)
    assert np.isfinite(images).all()
    assert images.std() > 0.05


def test_float_timesteps_reach_the_engine_as_they_are(pipeline: Any) -> None:
    from diffusers import EulerDiscreteScheduler

    recorder = Recorder()
    made = with_unet(
        pipeline,
        PipelineUNet(recorder, {**pipeline.unet.config, "_class_name": "UNet2DConditionModel"}),
    )
    made.scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="linspace"
    )
    draw(made, num_inference_steps=4)
    assert [call[1][0].item() for call in recorder.calls] == [999.0, 666.0, 333.0, 0.0]
    draw(made, num_inference_steps=3, guidance_scale=1.0)
    assert recorder.calls[-2][1].tolist() == [499.5]


@pytest.mark.parametrize(("guidance", "rows"), [(7.5, 4), (1.0, 2), (0.0, 2)])
def test_guidance_runs_both_halves_as_one_batch_and_none_runs_one(
    pipeline: Any, guidance: float, rows: int
) -> None:
    recorder = Recorder()
    made = with_unet(
        pipeline,
        PipelineUNet(recorder, {**pipeline.unet.config, "_class_name": "UNet2DConditionModel"}),
    )
    draw(made, guidance_scale=guidance, num_images_per_prompt=2, negative_prompt="blue")
    assert [len(call[0]) for call in recorder.calls] == [rows] * 3
    assert all(
        len(call[1]) == rows and len(call[2]["encoder_hidden_states"]) == rows
        for call in recorder.calls
    )


def test_a_negative_prompt_and_guidance_change_the_image(pipeline: Any) -> None:
    images = [
        draw(pipeline),
        draw(pipeline, negative_prompt="a red dog"),
        draw(pipeline, guidance_scale=1.0),
    ]
    assert all(np.abs(images[0] - other).max() > 1e-3 for other in images[1:])


def test_callbacks_see_every_step_and_can_stop_it(pipeline: Any) -> None:
    seen = []

    def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, values["latents"].shape))
        pipe._interrupt = step == 1
        return values

    draw(pipeline, num_inference_steps=5, callback_on_step_end=callback)
    pipeline._interrupt = False
    assert seen[:2] == [(0, (1, 4, 8, 8)), (1, (1, 4, 8, 8))]


def test_image_to_image_starts_from_the_image(pipeline: Any) -> None:
    from diffusers import AutoPipelineForImage2Image

    other = AutoPipelineForImage2Image.from_pipe(pipeline)
    other.set_progress_bar_config(disable=True)
    assert isinstance(other.unet, PipelineUNet)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    near, far = (
        draw(other, image=image, strength=strength, num_inference_steps=10)
        for strength in (0.1, 1.0)
    )
    decoded = (
        pipeline.vae.decode(pipeline.vae.encode(2 * image - 1).latent_dist.mode()).sample.detach()
        / 2
        + 0.5
    )
    start = decoded.clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(near - start).mean() < np.abs(far - start).mean()


@pytest.mark.parametrize(
    "argument",
    [
        {"down_block_additional_residuals": (torch.zeros(1),)},
        {"mid_block_additional_residual": torch.zeros(1)},
        {"cross_attention_kwargs": {"scale": 0.5}},
        {"timestep_cond": torch.zeros(1, 4)},
        {"added_cond_kwargs": {"image_embeds": torch.zeros(1, 4)}},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_what_the_engine_does_not_compute_is_refused_by_name(
    pipeline: Any, argument: dict[str, Any]
) -> None:
    named = "image_embeds" if "added_cond_kwargs" in argument else next(iter(argument))
    with refused(named, "--controlnet-inputs" if "residual" in named else "--lora"):
        pipeline.unet(torch.zeros(1, 4, 8, 8), 5, torch.zeros(1, 8, 16), **argument)


PROCESSOR = torch.nn.Identity()
CALLS: dict[str, Callable[[Any], Any]] = {
    "load_lora_weights": lambda pipe: pipe.load_lora_weights("style.safetensors"),
    "unload_lora_weights": lambda pipe: pipe.unload_lora_weights(),
    "set_adapters": lambda pipe: pipe.set_adapters("style", 0.5),
    "delete_adapters": lambda pipe: pipe.delete_adapters("style"),
    "fuse_lora": lambda pipe: pipe.fuse_lora(lora_scale=0.7),
    "unfuse_lora": lambda pipe: pipe.unfuse_lora(),
    "enable_lora": lambda pipe: pipe.enable_lora(),
    "disable_lora": lambda pipe: pipe.disable_lora(),
    "load_ip_adapter": lambda pipe: pipe.load_ip_adapter("repo", "models", "ip.safetensors"),
    "set_ip_adapter_scale": lambda pipe: pipe.set_ip_adapter_scale(0.5),
    "unload_ip_adapter": lambda pipe: pipe.unload_ip_adapter(),
    "enable_freeu": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "fuse_qkv_projections": lambda pipe: pipe.fuse_qkv_projections(),
    "cross_attention_kwargs": lambda pipe: draw(pipe, cross_attention_kwargs={"scale": 0.5}),
    "image_embeds": lambda pipe: draw(pipe, ip_adapter_image_embeds=[torch.zeros(2, 1, 1, 4)]),
    "load_lora_adapter": lambda pipe: pipe.unet.load_lora_adapter({}),
    "add_adapter": lambda pipe: pipe.unet.add_adapter(None),
    "set_attn_processor": lambda pipe: pipe.unet.set_attn_processor(PROCESSOR),
    "load_attn_procs": lambda pipe: pipe.unet.load_attn_procs({}),
    "load_state_dict": lambda pipe: pipe.unet.load_state_dict({}),
    "enable_gradient_checkpointing": lambda pipe: pipe.unet.enable_gradient_checkpointing(),
    "compile_repeated_blocks": lambda pipe: pipe.unet.compile_repeated_blocks(),
    "enable_parallelism": lambda pipe: pipe.unet.enable_parallelism(config=None),
    "dequantize": lambda pipe: pipe.unet.dequantize(),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_would_change_the_engine_is_refused_with_what_to_do(pipeline: Any, name: str) -> None:
    with refused(name, "calibrate --lora"):
        CALLS[name](pipeline)


@pytest.mark.parametrize(
    "name",
    ["encoder_hid_proj", "down_blocks", "mid_block", "conv_in", "enable_cache", "cache_context"],
)
def test_what_an_engine_does_not_have_is_absent_and_says_so_to_who_takes_it(
    pipeline: Any, name: str
) -> None:
    assert not hasattr(pipeline.unet, name)
    with pytest.raises(InputError, match=rf"unet\.{name}: .*calibrate --"):
        getattr(pipeline.unet, name)


def test_saving_the_pipeline_names_the_workspace(pipeline: Any, tmp_path: Path) -> None:
    with refused("save_pretrained", "workspace"):
        pipeline.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps, save_anywhere])
def test_a_copy_of_an_open_engine_is_refused_with_what_to_do(
    pipeline: Any, copied: Callable[[Any], Any]
) -> None:
    for holder in (pipeline, pipeline.unet, pipeline.unet.engine):
        with refused("load_pipeline", "components"):
            copied(holder)
    again = with_unet(pipeline, pipeline.unet)
    np.testing.assert_array_equal(draw(again), draw(pipeline))


def test_pipelines_made_from_it_refuse_too(pipeline: Any) -> None:
    from diffusers import AutoPipelineForImage2Image

    other = AutoPipelineForImage2Image.from_pipe(pipeline)
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {
        f"{layer}.lora_A.weight": torch.zeros(2, 16),
        f"{layer}.lora_B.weight": torch.zeros(16, 2),
    }
    for call in (lambda: other.load_lora_weights(lora), lambda: other.enable_freeu(1, 1, 1, 1)):
        with refused("calibrate --lora"):
            call()


def offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


HARMLESS: dict[str, Callable[[Any], Any]] = {
    "to": lambda pipe: pipe.to("cpu"),
    "to a type": lambda pipe: pipe.to(torch.float32),
    "unet.to": lambda pipe: pipe.unet.to("cpu", torch.float32),
    "channels last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
    "eval": lambda pipe: pipe.unet.eval().requires_grad_(False),
    "enable_attention_slicing": lambda pipe: pipe.enable_attention_slicing(),
    "disable_attention_slicing": lambda pipe: pipe.disable_attention_slicing(),
    "enable_vae_slicing": lambda pipe: pipe.vae.enable_slicing(),
    "enable_vae_tiling": lambda pipe: pipe.vae.enable_tiling(),
    "enable_model_cpu_offload": offload,
    "disable_freeu": lambda pipe: pipe.disable_freeu(),
    "set_default_attn_processor": lambda pipe: pipe.unet.set_default_attn_processor(),
    "attn_processors": lambda pipe: list(pipe.unet.attn_processors),
    "progress bar": lambda pipe: pipe.set_progress_bar_config(disable=True),
    "get_active_adapters": lambda pipe: pipe.get_active_adapters(),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_is_done_as_diffusers_does(
    text_chain: Chain, pipeline: Any, name: str
) -> None:
    from diffusers import StableDiffusionPipeline

    expected = draw(pipeline)
    unet = PipelineUNet(
        pipeline.unet.engine, {**pipeline.unet.config, "_class_name": "UNet2DConditionModel"}
    )
    made = StableDiffusionPipeline(
        **{**pipeline.components, "unet": unet}, requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    try:
        HARMLESS[name](made)
        np.testing.assert_array_equal(draw(made), expected)
    finally:
        made.remove_all_hooks()
        pipeline.vae.disable_slicing()
        pipeline.vae.disable_tiling()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_another_type_are_computed_in_float32_and_answered_in_theirs(
    pipeline: Any, dtype: torch.dtype
) -> None:
    sample, states = torch.ones(2, 4, 8, 8), torch.ones(2, 8, 16)
    expected = pipeline.unet(sample, 5, states).sample
    found = pipeline.unet(sample.to(dtype), 5, states.to(dtype)).sample
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected.to(dtype).float())


SAMPLE, STATES = torch.zeros(2, 4, 8, 8), torch.zeros(2, 8, 16)
WRONG: dict[str, tuple[tuple[Any, ...], str]] = {
    "no states": ((SAMPLE, 5), "encoder_hidden_states"),
    "another width": ((SAMPLE, 5, torch.zeros(2, 8, 24)), "encoder_hidden_states 16 24"),
    "states of one axis less": ((SAMPLE, 5, torch.zeros(2, 16)), "encoder_hidden_states"),
    "states of another batch": ((SAMPLE, 5, torch.zeros(3, 8, 16)), "encoder_hidden_states 2"),
    "other channels": ((torch.zeros(2, 9, 8, 8), 5, STATES), "sample 4 9"),
    "a sample without batch": ((torch.zeros(4, 8, 8), 5, STATES), "sample"),
    "timesteps of another batch": ((SAMPLE, torch.zeros(3), STATES), "timestep 2"),
    "class labels": ((SAMPLE, 5, STATES, torch.zeros(2)), "class_labels"),
}


@pytest.mark.parametrize("name", WRONG)
def test_inputs_that_are_missing_superfluous_or_of_another_shape_are_named(
    pipeline: Any, name: str
) -> None:
    arguments, facts = WRONG[name]
    with refused(*facts.split()):
        pipeline.unet(*arguments)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def either(
    request: pytest.FixtureRequest, text_chain: Chain, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """The pipeline with an engine of each backend."""
    root = text_chain.root
    if f"build-engine {request.param}" not in text_chain.outcomes:
        root = tmp_path_factory.mktemp("either") / "w"
        shutil.copytree(text_chain.root, root)
        where = ("-w", root, "--backend", request.param, "--threads", "1")
        assert cli("build-engine", *where).code == 0
    made = load_pipeline(root, request.param)
    made.set_progress_bar_config(disable=True)
    return made


def states_of(pipeline: Any, prompts: list[str]) -> torch.Tensor:
    """The text states of several prompts behind each other, as of one long prompt [1, N, D]."""
    states, _ = pipeline.encode_prompt(prompts, torch.device("cpu"), 1, False)
    return states.flatten(0, 1)[None].detach()


@pytest.mark.parametrize("prompts", [2, 3])
@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_prompts_of_several_times_the_tokens_draw_what_the_fake_quantized_model_draws(
    either: Any, quantized: QuantizedModel, prompts: int, guidance: float
) -> None:
    long = states_of(either, ["a red cat", "a blue house", "a photo of a dog"][:prompts])
    none = states_of(either, [""] * prompts)
    assert long.shape == (1, 8 * prompts, 16)
    given = {
        "prompt": None,
        "prompt_embeds": long,
        "negative_prompt_embeds": none,
        "guidance_scale": guidance,
    }
    found = draw(either, **given)
    assert np.abs(found - draw(faked(either, quantized), **given)).mean() < 0.01
    first = {"prompt_embeds": long[:, :8], "negative_prompt_embeds": none[:, :8]}
    assert np.abs(found - draw(either, **(given | first))).max() > 1e-3


@pytest.mark.parametrize(("height", "width"), [(24, 16), (16, 48), (32, 32)])
def test_images_of_other_sizes_are_what_the_fake_quantized_model_draws(
    either: Any, quantized: QuantizedModel, height: int, width: int
) -> None:
    found = draw(either, height=height, width=width)
    assert found.shape == (1, height, width, 3)
    expected = draw(faked(either, quantized), height=height, width=width)
    assert np.abs(found - expected).mean() < 0.01


def test_an_engine_for_a_fixed_number_of_tokens_names_it(pipeline: Any) -> None:
    inputs = {**pipeline.unet.engine._inputs, "encoder_hidden_states": (None, 8, 16)}
    unet = PipelineUNet(
        EngineUNet(Any, 1, inputs), {**pipeline.unet.config, "_class_name": "UNet2DConditionModel"}
    )
    states = torch.zeros(1, 16, 16)
    with refused("encoder_hidden_states", 8, 16, "TensorRT"):
        draw(
            with_unet(pipeline, unet),
            prompt=None,
            prompt_embeds=states,
            negative_prompt_embeds=states,
        )


def test_empty_arguments_and_either_form_of_result_are_as_diffusers_has_them(pipeline: Any) -> None:
    sample, states = torch.ones(2, 4, 8, 8), torch.ones(2, 8, 16)
    whole = pipeline.unet(
        sample, torch.tensor(5), states, cross_attention_kwargs=None, added_cond_kwargs={}
    ).sample
    (part,) = pipeline.unet(
        sample, torch.tensor([5]), encoder_hidden_states=states, return_dict=False
    )
    assert torch.equal(whole, part)


def test_it_answers_in_the_callers_type_and_moves_in_name(pipeline: Any) -> None:
    unet = PipelineUNet(
        Recorder(), {**pipeline.unet.config, "_class_name": "UNet2DConditionModel"}
    ).to(torch.float16)
    assert unet.dtype == torch.float16
    assert unet.num_parameters() == 0
    assert (
        unet(torch.zeros(1, 4, 8, 8, dtype=torch.float16), 5, torch.zeros(1, 8, 16)).sample.dtype
        == torch.float16
    )


def test_samples_of_one_batch_at_different_timesteps_each_get_their_own_buckets_scales(
    pipeline: Any, quantized: QuantizedModel
) -> None:
    generator = torch.Generator().manual_seed(0)
    timesteps = torch.tensor([950.0, 20.0, 500.0, 333.5, 700.0])
    assert len(set(quantized.bucket_of(timesteps).tolist())) == 3
    sample = torch.randn(1, 4, 8, 8, generator=generator).expand(5, -1, -1, -1).contiguous()
    states = torch.randn(1, 8, 16, generator=generator).expand(5, -1, -1).contiguous()
    together = pipeline.unet(sample, timesteps, states).sample
    alone = torch.cat(
        [pipeline.unet(sample[i : i + 1], timesteps[i], states[i : i + 1]).sample for i in range(5)]
    )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    of_one_bucket = pipeline.unet(sample, timesteps[:1].expand(5), states).sample
    assert all((together[i] - of_one_bucket[i]).abs().max() > 1e-3 for i in range(1, 5))


def test_an_unconditional_pipeline_runs_through_its_engine_too(ldm_chain: Chain) -> None:
    made = load_pipeline(str(ldm_chain.root), "openvino")
    made.set_progress_bar_config(disable=True)
    assert type(made).__name__ == "LDMPipeline"
    first, again = (
        made(
            batch_size=2,
            num_inference_steps=2,
            output_type="np",
            generator=torch.Generator().manual_seed(4),
        ).images
        for _ in range(2)
    )
    assert first.shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first[0] - first[1]).max() > 0.05


class SdxlEngine(Recorder):
    """Stands in for SDXL's engine: keeps its inputs."""


@pytest.mark.parametrize("size", [None, 24])
def test_sdxls_pipeline_gives_the_engine_its_added_conditions(
    pipelines: Callable[[str], Path], size: int | None
) -> None:
    from diffusers import StableDiffusionXLPipeline

    engine = SdxlEngine()
    unet = PipelineUNet(engine, read_json(pipelines("sdxl") / "unet" / "config.json"))
    made = StableDiffusionXLPipeline.from_pretrained(pipelines("sdxl"), unet=unet)
    made.set_progress_bar_config(disable=True)
    draw(made, num_inference_steps=2, height=size, width=size)
    sample, _, conditions = engine.calls[0]
    side = size or 16
    assert sample.shape == (2, 4, side // 2, side // 2)
    assert {name: tuple(value.shape) for name, value in conditions.items()} == {
        "encoder_hidden_states": (2, 8, 40),
        "text_embeds": (2, 24),
        "time_ids": (2, 6),
    }
    assert conditions["time_ids"].tolist() == [[side, side, 0, 0, side, side]] * 2


@pytest.mark.slow
def test_sdxls_engine_takes_long_prompts_and_other_sizes(
    tmp_path: Path, pipelines: Callable[[str], Path]
) -> None:
    root = tmp_path / "w"
    few = ("--samples", "2", "--steps", "2", "--buckets", "2")
    for command in (
        ("calibrate", "--model", pipelines("sdxl"), *few),
        ("export",),
        ("build-engine", "--backend", BACKEND, "--threads", "1"),
    ):
        ended = cli(*command, "-w", root)
        assert ended.code == 0, ended.err
    made = load_pipeline(root, BACKEND)
    made.set_progress_bar_config(disable=True)
    with torch.no_grad():
        long, none, pooled, unpooled = made.encode_prompt(["a red cat", "a dog"])
    given = {
        "prompt": None,
        "prompt_embeds": long.flatten(0, 1)[None],
        "negative_prompt_embeds": none.flatten(0, 1)[None],
        "pooled_prompt_embeds": pooled[:1],
        "negative_pooled_prompt_embeds": unpooled[:1],
        "height": 24,
        "width": 32,
    }
    quantized = QuantizedModel.from_checkpoint(load_checkpoint(root / CALIBRATED)).eval()
    found = draw(made, **given)
    assert found.shape == (1, 24, 32, 3)
    made.unet = faked_unet(made, quantized)
    assert np.abs(found - draw(made, **given)).mean() < 0.01


def test_parts_that_are_given_replace_the_folders(text_chain: Chain) -> None:
    from diffusers import LCMScheduler

    scheduler = LCMScheduler()
    assert load_pipeline(text_chain.root, BACKEND, scheduler=scheduler).scheduler is scheduler


def test_a_model_that_is_no_pipeline_is_an_error_that_names_the_runtime(
    tmp_path: Path, pipelines: Callable[[str], Path]
) -> None:
    source = resolve_source(str(pipelines("class-tokens")))
    workspace = Workspace.create(tmp_path / "classes", source, Scheme.parse("w4a4"))
    with refused("quest_deploy.backends.engine_unet.EngineUNet"):
        load_pipeline(workspace)


def test_random_weights_are_no_pipeline(tmp_path: Path) -> None:

    workspace = Workspace.create(
        tmp_path / "ws", resolve_source("sd15", random_weights=True), Scheme.parse("w4a4")
    )
    with refused("random"):
        load_pipeline(workspace)


def test_an_engine_that_was_never_built_names_the_command(
    tmp_path: Path, pipelines: Callable[[str], Path]
) -> None:

    workspace = Workspace.create(
        tmp_path / "ws", resolve_source(str(pipelines("sd"))), Scheme.parse("w4a4")
    )
    with refused("quest-deploy build-engine --backend openvino"):
        load_pipeline(workspace)


def test_the_engine_stays_usable_by_itself(text_chain: Chain) -> None:
    with EngineUNet.load(Workspace.open(text_chain.root), BACKEND) as unet:
        states = np.zeros((2, 8, 16))
        assert unet.predict(
            np.zeros((2, 4, 8, 8)), [3.0, 900.0], encoder_hidden_states=states
        ).shape == (2, 4, 8, 8)


def test_latents_that_the_unet_cannot_halve_are_refused() -> None:
    engine = EngineUNet(Any, sample_multiple=4)
    unet = PipelineUNet(
        engine, {"_class_name": "UNet2DConditionModel", "block_out_channels": [32, 64, 64]}
    )
    with refused(4, [8, 6]):
        unet(torch.zeros(1, 4, 8, 6), 1.0)
