"""UNets as diffusers can configure them: each goes through every stage and is verified, or is
refused by the first command. There is no third outcome.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import quest_deploy as qd
from quest_deploy.artifacts.scheme import Granularity
from quest_deploy.calibration.trajectories import record_trajectories
from quest_deploy.errors import InputError
from quest_deploy.models.loading import load_model, resolve_source
from tests.pipelines import SCHEDULER

PLAIN_DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
PLAIN_UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
SKIP_DOWN, SKIP_UP = (
    ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    ("SkipUpBlock2D", "AttnSkipUpBlock2D"),
)
CROSS_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D")
CROSS_UP = ("UpBlock2D", "CrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D")
K_DOWN, K_UP = (
    ("KDownBlock2D", "KCrossAttnDownBlock2D"),
    ("KUpBlock2D", "KCrossAttnUpBlock2D"),
)
ACTIVATIONS = ("silu", "gelu", "mish", "relu")
SIZES = (4, 8, (8, 4), 6, 7, None)


@st.composite
def unets(draw: st.DrawFn) -> dict[str, Any]:
    """A UNet's configuration, valid or not, of one or two small levels."""
    levels = draw(st.integers(1, 2))
    conditional = draw(st.booleans())
    kinds = [(CROSS_DOWN, CROSS_UP), (PLAIN_DOWN, PLAIN_UP), (K_DOWN, K_UP)]
    plain = [(PLAIN_DOWN, PLAIN_UP), (SKIP_DOWN, SKIP_UP)]
    down, up = draw(st.sampled_from(kinds if conditional else plain))

    def some(*values: Any) -> Any:
        """The first one most of the time: unusual settings one or two at a time."""
        return draw(st.sampled_from((*values[:1] * 3, *values)))

    def blocks(names: tuple[str, ...]) -> list[str]:
        return [draw(st.sampled_from(names)) for _ in range(levels)]

    config: dict[str, Any] = {
        "sample_size": some(*SIZES),
        "in_channels": 3,
        "out_channels": 3,
        "center_input_sample": some(False, True),
        "flip_sin_to_cos": some(True, False),
        "freq_shift": some(0, 1),
        "time_embedding_type": some("positional", "fourier", "learned"),
        "down_block_types": blocks(down),
        "up_block_types": blocks(up),
        "block_out_channels": [
            32 if down in (K_DOWN, SKIP_DOWN) else draw(st.sampled_from((8, 16)))
            for _ in range(levels)
        ],
        "layers_per_block": some(1, 2),
        "downsample_padding": some(1, 0),
        "mid_block_scale_factor": some(1, 1.4142135),
        "act_fn": some(*ACTIVATIONS),
        "norm_num_groups": some(4, 8, 3),
        "norm_eps": some(1e-5, 1e-6),
        "resnet_time_scale_shift": some("default", "scale_shift"),
        "attention_head_dim": some(4, 8, 2),
        "num_class_embeds": some(None, 3),
        "class_embed_type": some(None, None, "timestep"),
    }
    if not conditional:
        return config | {
            "_class_name": "UNet2DModel",
            "mid_block_type": some("UNetMidBlock2D", None),
            "add_attention": some(True, False),
            "attention_head_dim": some(4, None, 8),
            "downsample_type": some("conv", "resnet"),
            "upsample_type": some("conv", "resnet"),
            "attn_norm_num_groups": some(None, 2),
            "num_train_timesteps": 1000,
        }
    middle = {CROSS_DOWN: "UNetMidBlock2DCrossAttn", PLAIN_DOWN: "UNetMidBlock2D", K_DOWN: None}
    return config | {
        "_class_name": "UNet2DConditionModel",
        "mid_block_type": some(middle[down], None, "UNetMidBlock2DSimpleCrossAttn"),
        "cross_attention_dim": 16,
        "only_cross_attention": some(False, True),
        "transformer_layers_per_block": some(1, 2),
        "use_linear_projection": some(False, True),
        "upcast_attention": some(False, True),
        "resnet_skip_time_act": some(False, True),
        "resnet_out_scale_factor": some(1.0, 1.4142135),
        "time_embedding_dim": some(None, 24),
        "time_embedding_act_fn": some(None, "silu"),
        "timestep_post_act": some(None, "silu"),
        "conv_in_kernel": some(3, 1),
        "conv_out_kernel": some(3, 5),
        "cross_attention_norm": some(None, "layer_norm", "group_norm"),
        "mid_block_only_cross_attention": some(None, True),
        "class_embeddings_concat": some(False, True),
        "attention_type": some("default", "gated"),
        **(
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 16 + 6 * 8,
            }
            if some(False, True)
            else {}
        ),
    }


@st.composite
def schemes(draw: st.DrawFn) -> dict[str, Any]:
    """What may be chosen of a scheme."""
    operands = st.sampled_from((None, None, "4", "8"))
    return {
        "bits": draw(st.sampled_from(("w4a4", "w8a8"))),
        "buckets": draw(st.integers(1, 3)),
        "attention_bits": draw(operands),
        "softmax_bits": draw(operands),
        "split_shortcuts": draw(st.booleans()),
        "eight_bit_layers": draw(st.sampled_from(((), ("*conv*", "*time_emb*"), ("*",)))),
        "granularity": draw(st.sampled_from(Granularity)),
    }


def write_model(folder: Path, unet: dict[str, Any], *, of_text: bool) -> Path:
    """A pipeline's configurations alone, which random weights need no more than."""
    index = {"_class_name": "LDMPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    index |= {"vae": ["diffusers", "AutoencoderKL"], "unet": ["diffusers", unet["_class_name"]]}
    if of_text:
        index |= {"text_encoder": ["transformers", "CLIPTextModel"]}
    for name, content in (
        ("model_index.json", index),
        ("scheduler/scheduler_config.json", SCHEDULER),
        ("unet/config.json", unet),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def assert_refused_rightly(error: InputError, unet: dict[str, Any]) -> None:
    """By a setting's name, or by what catches whatever diffusers raises: then diffusers itself
    cannot run the UNet.
    """
    if not any(words in str(error) for words in ("cannot be loaded (", "does not run on")):
        return
    size = unet["sample_size"] or 8
    height, width = size if isinstance(size, tuple) else (size, size)
    given: dict[str, Any] = {}
    if unet["_class_name"] == "UNet2DConditionModel":
        given["encoder_hidden_states"] = torch.zeros(1, 4, 16)
    if unet.get("addition_embed_type"):
        embeds, ids = torch.zeros(1, 16), torch.zeros(1, 6)
        given["added_cond_kwargs"] = {"text_embeds": embeds, "time_ids": ids}
    if unet["num_class_embeds"] or unet["class_embed_type"]:
        given["class_labels"] = torch.zeros(1, dtype=torch.long)
    try:
        made = getattr(diffusers, unet["_class_name"]).from_config(unet)
        made(torch.zeros(1, 3, height, width), 1, **given)
    except Exception:
        return
    raise AssertionError(f"diffusers runs it: {error}") from error


def assert_many(through: list[bool]) -> None:
    """Of those that were tried, a good part went through: who refuses all is no help. The tests'
    seed keeps what they try, whose share differs.
    """
    assert sum(through) >= len(through) / 6, f"{sum(through)} of {len(through)}"


def goes_through_or_is_refused(
    folder: Path, unet: dict[str, Any], scheme: dict[str, Any], *, of_text: bool
) -> bool:
    """Whether it went through all stages, to an engine that computes it; InputError of the first
    one alone is a refusal.
    """
    model = write_model(folder / "model", unet, of_text=of_text)
    try:
        workspace = qd.calibrate(
            str(model),
            random_weights=True,
            workspace=folder / "workspace",
            method="minmax",
            samples=1,
            steps=2,
            **scheme,
        )
    except InputError as e:
        assert_refused_rightly(e, unet)
        return False
    qd.export(workspace)
    qd.reference(workspace, measured=1)
    qd.build_engine(workspace, backend="onnxruntime", threads=1)
    result = qd.verify(workspace, backend="onnxruntime")
    assert result["passed"], result["problems"]
    return True


def test_a_random_unet_samples_or_is_refused_rightly(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    through: list[bool] = []

    @seed(1)
    @settings(max_examples=30, suppress_health_check=list(HealthCheck))
    @given(unet=unets(), of_text=st.booleans())
    def try_one(unet: dict[str, Any], *, of_text: bool) -> None:
        folder = write_model(tmp_path_factory.mktemp("unet"), unet, of_text=of_text)
        try:
            model = load_model(resolve_source(str(folder), random_weights=True))
            recorded = record_trajectories(model, model.load_unet(), steps=1, samples=1, seed=0)
        except InputError as e:
            assert_refused_rightly(e, unet)
            through.append(False)
        else:
            assert recorded.output.shape == recorded.sample.shape
            through.append(True)

    try_one()
    assert_many(through)


@pytest.mark.slow
def test_a_random_unet_goes_through_every_stage_or_is_refused_by_the_first(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    through: list[bool] = []

    @seed(1)
    @settings(max_examples=20, suppress_health_check=list(HealthCheck))
    @given(unet=unets(), scheme=schemes(), of_text=st.booleans())
    def try_one(unet: dict[str, Any], scheme: dict[str, Any], *, of_text: bool) -> None:
        folder = tmp_path_factory.mktemp("unet")
        through.append(goes_through_or_is_refused(folder, unet, scheme, of_text=of_text))

    try_one()
    assert_many(through)
