"""Pipelines whose network is a diffusion transformer, against diffusers' own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from quest_deploy.artifacts.checkpoint import ScoreScale
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.calibration.ptq import CalibrationOptions, calibrate
from quest_deploy.calibration.trajectories import record_trajectories
from quest_deploy.evaluation.sampling import float_denoiser, sample_images
from quest_deploy.models.channels import guidance_of
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.networks import MISSING, NETWORKS, TRANSFORMERS, network_of
from quest_deploy.models.networks.patch_transformers import repeated_tokens
from quest_deploy.models.pipeline_model import PipelineModel
from quest_deploy.models.registry import KNOWN_MODELS
from quest_deploy.quantization.planner import plan_quantization
from quest_deploy.quantization.prepare import prepare
from quest_deploy.serving.pipeline import stand_in
from tests.helpers import refused
from tests.pipelines import TEXT_WIDTH, sana
from tests.pipelines import TRANSFORMERS as PIPELINES
from tests.quest_deploy.support import cli

PROMPTS = ["a red cat", "photo of a house"]


def inputs_of(model: PipelineModel, size: tuple[int, ...], batch: int = 2) -> dict[str, Tensor]:
    """Random samples of a size, each at a timestep of its own, and the first labels' conditions."""
    generator = torch.Generator().manual_seed(1)
    (conditions,) = guidance_of(model, None, None).parts(model.conditions(np.arange(batch)), None)
    return {
        "sample": torch.randn(batch, model.sample_shape[0], *size, generator=generator),
        "timestep": torch.tensor([3.0, 871.5])[:batch],
        **conditions,
    }


def theirs(model: PipelineModel, inputs: dict[str, Tensor]) -> Tensor:
    """What diffusers' own transformer predicts."""
    kind = getattr(diffusers, model.config["_class_name"])
    own = kind.from_pretrained(model.folder / "transformer").eval()
    given = dict(inputs)
    sample = given.pop("sample")
    if kind is diffusers.FluxTransformer2DModel:
        return packed_and_back(own, sample, given)
    if "class_labels" in given:
        given["class_labels"] = given["class_labels"].long()
    if kind is diffusers.PixArtTransformer2DModel:
        added = {name: given.pop(name, None) for name in ("resolution", "aspect_ratio")}
        given["added_cond_kwargs"] = added
    result: Tensor = own(sample, **given).sample
    return result


def packed_and_back(own: Any, sample: Tensor, given: dict[str, Tensor]) -> Tensor:
    """What diffusers' FLUX predicts, called as its pipeline does, by the pipeline's own packing."""
    pipeline = diffusers.FluxPipeline
    batch, channels, height, width = sample.shape
    ids = pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, None, sample.dtype)
    text = torch.zeros(given["encoder_hidden_states"].shape[1], 3)
    patches = pipeline._pack_latents(sample, *sample.shape)
    steps = {"timestep": given.pop("timestep") / 1000}
    predicted = own(patches, img_ids=ids, txt_ids=text, **steps, **given).sample
    unpacked: Tensor = pipeline._unpack_latents(predicted, 8 * height, 8 * width, 8)
    assert unpacked.shape == (batch, channels, height, width)
    return unpacked


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("flux", (8, 8)),
        ("flux", (12, 6)),
        ("flux-schnell", (2, 40)),
        ("sd3", (8, 8)),
        ("sd3", (12, 6)),
        ("sd3", (24, 2)),
        ("pixart", (8, 8)),
        ("pixart", (12, 6)),
        ("pixart-alpha", (64, 96)),
        ("dit", (8, 8)),
        ("dit", (4, 4)),
        ("sana", (16, 16)),
        ("sana", (5, 8)),
    ],
)
@torch.no_grad()
def test_the_network_is_diffusers_own_at_every_size(
    models: Callable[[str], PipelineModel], name: str, size: tuple[int, int]
) -> None:
    model = models(name)
    inputs = inputs_of(model, size)
    found = model.load_unet()(**inputs, return_dict=False)[0]
    torch.testing.assert_close(found, theirs(model, inputs), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_the_network_computes_where_its_inputs_are(
    models: Callable[[str], PipelineModel], name: str
) -> None:
    model = models(name)
    inputs = inputs_of(model, model.sample_shape[1:])
    network: Any = prepare(model.load_unet(), {}, ScoreScale.PRODUCT).to("meta")
    found = network(**{name: x.to("meta") for name, x in inputs.items()}, return_dict=False)[0]
    assert found.device.type == "meta"  # which cannot be mixed with others, as a GPU cannot


@torch.no_grad()
def test_dit_takes_samples_that_are_no_squares_and_predicts_each_patch_in_its_place(
    models: Callable[[str], PipelineModel],
) -> None:
    model = models("dit")
    network = model.load_unet()
    inputs = inputs_of(model, (4, 8))
    found = network(**inputs, return_dict=False)[0]
    assert found.shape == (2, 8, 4, 8)
    turned = {**inputs, "sample": inputs["sample"].transpose(2, 3)}
    assert network(**turned, return_dict=False)[0].shape == (2, 8, 8, 4)
    # The last projection alone, set to give each patch one number, shows where patches go.
    with torch.no_grad():
        network.proj_out_2.weight.zero_()
        network.proj_out_2.bias.copy_(torch.arange(32.0))
    flat = network(**inputs, return_dict=False)[0][0]
    patch = flat[:, :2, :2]  # [C, row, column] of one patch: diffusers has rows, columns, channels
    assert torch.equal(patch.permute(1, 2, 0).flatten(), torch.arange(32.0))
    assert torch.equal(flat[:, 2:, 6:], patch)


@pytest.mark.parametrize("name", ["pixart", "pixart-alpha", "sd3", "sana", "flux", "flux-schnell"])
@torch.no_grad()
def test_a_pipeline_around_our_network_draws_what_diffusers_draws(
    models: Callable[[str], PipelineModel], name: str
) -> None:
    model = models(name)
    network = model.load_unet()

    def engine(sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        floats = {key: value.float() for key, value in conditions.items()}
        return network(sample, timestep, **floats, return_dict=False)[0]

    ours = model.load_pipeline(transformer=stand_in(engine, model.config))  # type: ignore[arg-type]
    own = model.pipeline_class().from_pretrained(model.folder)
    drawn = []
    height, width = model.image_size
    binned = name in ("pixart", "pixart-alpha", "sana")
    binning = {"use_resolution_binning": False} if binned else {}
    for pipeline in (ours, own):
        pipeline.set_progress_bar_config(disable=True)
        drawn.append(
            pipeline(
                PROMPTS,
                negative_prompt=["blue", ""],
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(0),
                output_type="np",
                height=height,
                width=width,
                **binning,
            ).images
        )
    np.testing.assert_allclose(drawn[0], drawn[1], atol=1e-4)


@torch.no_grad()
def test_dits_pipeline_around_our_network_draws_what_our_own_loop_and_diffusers_draw(
    models: Callable[[str], PipelineModel],
) -> None:
    model = models("dit")
    network = model.load_unet()
    engine: Any = float_denoiser(network)
    ours = model.load_pipeline(transformer=stand_in(engine, model.config))
    own = model.pipeline_class().from_pretrained(model.folder)
    drawn = []
    for pipeline in (ours, own):
        pipeline.set_progress_bar_config(disable=True)
        made = pipeline(
            [3, 5],
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        )
        drawn.append(2 * made.images.transpose(0, 3, 1, 2) - 1)
    np.testing.assert_allclose(drawn[0], drawn[1], atol=2e-4)
    loop = sample_images(
        model, engine, np.asarray([3, 5]), scheduler="ddim", steps=2, guidance=4.0, seed=0
    )
    np.testing.assert_allclose(loop, drawn[1], atol=2e-4)


@torch.no_grad()
def test_conditions_are_the_pipelines_own_states_and_masks(
    models: Callable[[str], PipelineModel],
) -> None:
    model = models("pixart")
    pipeline = model.pipeline_class().from_pretrained(model.folder)
    states, mask, no_states, no_mask = pipeline.encode_prompt(model.prompts[:2])
    found, null = model.conditions(np.arange(2)), model.null_conditions(2)
    assert found["encoder_hidden_states"].shape == (2, 300, TEXT_WIDTH)
    torch.testing.assert_close(found["encoder_hidden_states"], states)
    torch.testing.assert_close(null["encoder_hidden_states"], no_states)
    assert torch.equal(found["encoder_attention_mask"], mask.float())
    assert torch.equal(null["encoder_attention_mask"], no_mask.float())
    assert {x.dtype for x in (*found.values(), *null.values())} == {torch.float32}


def test_alpha_is_told_the_images_size(models: Callable[[str], PipelineModel]) -> None:
    found = models("pixart-alpha").conditions(np.arange(3))
    assert found["resolution"].tolist() == [[256, 256]] * 3
    assert found["aspect_ratio"].tolist() == [[1]] * 3


@torch.no_grad()
def test_explicit_joint_attention_computes_what_diffusers_does(
    models: Callable[[str], PipelineModel],
) -> None:
    model = models("sd3")
    inputs = inputs_of(model, (8, 12))
    network = prepare(model.load_unet(), {}, ScoreScale.PRODUCT)
    found = network(**inputs, return_dict=False)[0]
    torch.testing.assert_close(found, theirs(model, inputs), rtol=1e-5, atol=2e-6)
    assert network.transformer_blocks[0].attn.scores.operands == ("q", "k")
    assert network.transformer_blocks[0].attn2.mix.operands == ("softmax", "v")


@torch.no_grad()
def test_sd3_is_given_its_pipelines_states_and_pooled_states(
    models: Callable[[str], PipelineModel],
) -> None:
    model = models("sd3")
    pipeline = model.pipeline_class().from_pretrained(model.folder)
    given = {"prompt_2": None, "prompt_3": None}
    states, no_states, pooled, no_pooled = pipeline.encode_prompt(model.prompts[:2], **given)
    found, null = model.conditions(np.arange(2)), model.null_conditions(2)
    torch.testing.assert_close(found["encoder_hidden_states"], states)
    torch.testing.assert_close(null["encoder_hidden_states"], no_states)
    torch.testing.assert_close(found["pooled_projections"], pooled)
    torch.testing.assert_close(null["pooled_projections"], no_pooled)


@torch.no_grad()
def test_a_network_that_is_built_anew_with_the_same_weights_predicts_the_same(
    models: Callable[[str], PipelineModel],
) -> None:
    model = models("sd3")
    loaded, inputs = model.load_unet(), inputs_of(model, (8, 12))
    built = model.network.build("FlatSD3", dict(loaded.config)).eval()
    built.load_state_dict(loaded.state_dict())
    assert built.config.pos_embed_max_size == loaded.config.pos_embed_max_size
    found, expected = (x(**inputs, return_dict=False)[0] for x in (built, loaded))
    assert torch.equal(found, expected)


@torch.no_grad()
def test_samples_beyond_its_positions_are_refused_as_diffusers_does(
    models: Callable[[str], PipelineModel],
) -> None:
    model = models("sd3")
    engine: Any = float_denoiser(model.load_unet())
    network: Any = stand_in(engine, model.config)
    for size in ((24, 2), (26, 2)):
        given = inputs_of(model, size)
        sample = given.pop("sample")
        if max(size) <= 24:
            assert network(sample, **given).sample.shape == sample.shape
            continue
        with pytest.raises(ValueError, match="pos_embed_max_size"):
            theirs(model, {"sample": sample, **given})
        with refused("24"):
            network(sample, **given)


def test_the_states_of_no_prompt_that_published_weights_of_pixart_hold_are_left_out(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(pipelines("pixart"), tmp_path / "m")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["caption_projection.y_embedding"] = torch.ones(120, TEXT_WIDTH)
    save_file(tensors, path, {"format": "pt"})
    found = load_model(resolve_source(str(folder))).load_unet().state_dict()
    assert found.keys() == tensors.keys() - {"caption_projection.y_embedding"}
    save_file({**tensors, "further.weight": torch.ones(1)}, path, {"format": "pt"})
    with refused("further.weight"):
        load_model(resolve_source(str(folder))).load_unet()


def test_a_table_of_positions_that_is_not_one_of_sines_is_refused(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(pipelines("sd3"), tmp_path / "m")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["pos_embed.pos_embed"] = tensors["pos_embed.pos_embed"].half().float()
    save_file(tensors, path, {"format": "pt"})
    state = load_model(resolve_source(str(folder))).load_unet().state_dict()
    assert "pos_embed.pos_embed" not in state
    tensors["pos_embed.pos_embed"] = tensors["pos_embed.pos_embed"].flip(1)
    save_file(tensors, path, {"format": "pt"})
    with refused("pos_embed.pos_embed"):
        load_model(resolve_source(str(folder))).load_unet()


@torch.no_grad()
def test_sana_is_given_what_its_pipeline_asks_with_its_instruction(
    models: Callable[[str], PipelineModel],
) -> None:
    model = models("sana")
    pipeline = model.pipeline_class().from_pretrained(model.folder)
    pipeline.set_progress_bar_config(disable=True)
    given: list[dict[str, Tensor]] = []
    kept = pipeline.transformer.forward
    pipeline.transformer.forward = lambda *x, **named: (given.append(named), kept(*x, **named))[1]
    arguments = {"use_resolution_binning": False, "clean_caption": False, "output_type": "latent"}
    arguments |= {"height": 32, "width": 32}
    pipeline(model.prompts[:2], num_inference_steps=1, **arguments)
    null, found = model.null_conditions(2), model.conditions(np.arange(2))
    for name in found:
        expected = torch.cat([null[name], found[name]])
        torch.testing.assert_close(given[0][name].float(), expected)
    assert found["encoder_hidden_states"].shape == (2, 300, TEXT_WIDTH)


@torch.no_grad()
def test_linear_attention_stays_as_it_is_where_products_are_quantized(
    models: Callable[[str], PipelineModel],
) -> None:
    model = models("sana")
    inputs = inputs_of(model, (16, 16))
    network = prepare(model.load_unet(), {}, ScoreScale.PRODUCT)
    found = network(**inputs, return_dict=False)[0]
    torch.testing.assert_close(found, theirs(model, inputs), rtol=1e-5, atol=2e-6)
    scheme = Scheme.parse("w8a8", buckets=2, attention_bits=8, softmax_bits=8)
    products = plan_quantization(network, inputs, scheme).matmuls
    assert [x.name for x in products] == [
        f"transformer_blocks.0.attn2.{x}" for x in ("scores", "mix")
    ]


@torch.no_grad()
def test_sana_with_positions_has_those_of_diffusers(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = sana(tmp_path / "m", interpolation_scale=2)
    model = load_model(resolve_source(str(folder)))
    for size in ((16, 16), (8, 12)):
        inputs = inputs_of(model, size)
        found = model.load_unet()(**inputs, return_dict=False)[0]
        torch.testing.assert_close(found, theirs(model, inputs), rtol=1e-5, atol=2e-6)


@torch.no_grad()
def test_explicit_attention_heeds_the_mask_of_the_prompt(
    models: Callable[[str], PipelineModel],
) -> None:
    model = models("pixart")
    inputs = inputs_of(model, (8, 8))
    network = prepare(model.load_unet(), {}, ScoreScale.PRODUCT)
    found = network(**inputs, return_dict=False)[0]
    torch.testing.assert_close(found, theirs(model, inputs), rtol=1e-5, atol=2e-6)
    states = inputs["encoder_hidden_states"].clone()
    states[:, 250:] = 1e3  # padding
    other = network(**{**inputs, "encoder_hidden_states": states}, return_dict=False)[0]
    torch.testing.assert_close(found, other)


@pytest.mark.parametrize("name", ["pixart", "sana"])
def test_no_scale_depends_on_what_a_prompts_padding_holds(
    models: Callable[[str], PipelineModel], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models(name)
    network, conditions_of = model.load_unet(), model.conditions
    operands = {"attention_bits": 8, "softmax_bits": 8}
    scheme = Scheme.parse("w4a4", buckets=1, float_layers=model.float_layers[:2], **operands)
    found = []
    for content in (0.0, 1e3):

        def filled(labels: Any, content: float = content) -> dict[str, Tensor]:
            given = conditions_of(labels)
            padding = given["encoder_attention_mask"][..., None] == 0
            states = given["encoder_hidden_states"].masked_fill(padding, content)
            return {**given, "encoder_hidden_states": states}

        monkeypatch.setattr(model, "conditions", filled)
        recorded = record_trajectories(model, network, steps=1, samples=2, seed=0)
        found.append(calibrate(name, network, recorded, scheme, CalibrationOptions()))
    first, second = ({k: x.scale.tolist() for k, x in y.quantizers.items()} for y in found)
    assert first == second
    assert any(site.endswith("attn2.to_k") for site in first)
    assert any(site.endswith("attn2.k") for site in first)


def test_a_prompts_tokens_are_repeated_in_the_place_of_its_padding_wherever_that_is() -> None:
    states = torch.arange(15.0).view(3, 5, 1)
    mask = torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]])
    found = repeated_tokens(states, mask)[..., 0]
    assert found.tolist() == [[0, 1, 0, 1, 0], [8, 9, 8, 8, 9], [10, 11, 12, 13, 14]]


@pytest.mark.parametrize("name", PIPELINES)
def test_the_blocks_are_quantized_and_embedders_norms_and_last_projection_stay_in_float(
    models: Callable[[str], PipelineModel], name: str
) -> None:
    model = models(name)
    network, probe = model.load_unet(), inputs_of(model, model.sample_shape[1:])
    scheme = Scheme.parse("w4a4", buckets=2, float_layers=model.float_layers)
    planned = [layer.name for layer in plan_quantization(network, probe, scheme).layers]
    of_blocks = (".attn.", ".attn1.", ".attn2.", ".ff.net.", ".ff_context.net.")
    of_blocks += (".ff.conv_inverted", ".ff.conv_point", ".proj_mlp", "blocks.0.proj_out")
    assert planned
    assert all(any(part in name for part in of_blocks) for name in planned)
    # Two rows of each sample, which no bucket can be chosen for.
    flattened = ("*.resolution_embedder.*",) if name == "pixart-alpha" else ()
    if flattened:
        with refused("resolution_embedder", "--float-layers"):
            plan_quantization(network, probe, Scheme.parse("w4a4", buckets=2))
    scheme = Scheme.parse("w4a4", buckets=2, float_layers=flattened)
    everything = plan_quantization(network, probe, scheme).layers
    bits = {x.name: x.weight_bits for x in everything}
    left = bits.keys() - set(planned)
    assert not any(any(part in name for part in of_blocks) for name in left)
    (first,) = (name for name in left if name.endswith(("_embed.proj", "x_embedder")))
    last = everything[-1].name
    assert {name for name, width in bits.items() if width == 8} == {first, last}
    assert last in ("proj_out", "proj_out_2")


def test_an_embedder_that_runs_again_on_the_same_timestep_is_one_quantizer(
    models: Callable[[str], PipelineModel],
) -> None:
    model = models("dit")
    plan = plan_quantization(
        model.load_unet(), inputs_of(model, (8, 8)), Scheme.parse("w8a8", buckets=2)
    )
    embedder = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"
    assert [x.name for x in plan.layers].count(embedder) == 1
    assert [x.layers for x in plan.quantizers if embedder in x.layers] == [(embedder,)]


def test_calibration_records_both_halves_with_the_models_guidance(
    models: Callable[[str], PipelineModel],
) -> None:
    for name, guidance in (("pixart", 4.5), ("sd3", 7.0), ("sana", 4.5), ("dit", 4.0)):
        model = models(name)
        assert model.guidance == guidance
        recorded = record_trajectories(model, model.load_unet(), steps=2, samples=2, seed=0)
        side = model.sample_shape[-1]
        assert recorded.sample.shape == (2, 4, 4, side, side)
        # With the variance, which is not sampled, where one is predicted.
        assert recorded.output.shape[2] == (8 if name in ("pixart", "dit") else 4)
        assert recorded.parts == 2
    assert recorded.conditions["class_labels"].tolist()[::2] == [1000, 1000]


def test_random_weights_need_neither_text_encoder_nor_decoder(
    pipelines: Callable[[str], Path],
) -> None:
    source = resolve_source(str(pipelines("pixart-alpha")), random_weights=True)
    model = load_model(source)
    inputs = model.draw_conditions(2, torch.Generator().manual_seed(0))
    assert inputs["encoder_hidden_states"].shape[2] == TEXT_WIDTH
    lengths = inputs["encoder_attention_mask"].sum(1)
    assert lengths.min() >= 1
    assert lengths.max() < inputs["encoder_attention_mask"].shape[1]
    assert inputs["resolution"].tolist() == [[1024, 1024]] * 2
    output = model.load_unet()(torch.zeros(2, 4, 32, 64), 5, **inputs, return_dict=False)[0]
    assert output.shape == (2, 8, 32, 64)
    with refused("random weights"):
        model.images(np.zeros((1, 4, 128, 128), np.float32))


@pytest.mark.parametrize(
    ("name", "millions", "latents", "states"),
    [
        ("pixart-sigma", 611, (4, 128, 128), (300, 4096)),
        ("sd35-medium", 2243, (16, 128, 128), (333, 4096)),
        ("sana", 1604, (32, 32, 32), (300, 2304)),
        ("flux-dev", 11901, (16, 128, 128), (512, 4096)),
        ("flux-schnell", 11891, (16, 128, 128), (512, 4096)),
    ],
)
def test_a_known_transformer_has_its_authors_size_and_a_pinned_commit_but_for_sana(
    name: str, millions: int, latents: tuple[int, ...], states: tuple[int, int]
) -> None:
    known = KNOWN_MODELS[name]
    assert known.repository is not None
    assert len(known.revision or "") == (0 if name == "sana" else 40)
    model = load_model(resolve_source(name, random_weights=True))
    assert (model.sample_shape, model.train_timesteps) == (latents, 1000)
    with torch.device("meta"):
        network = model.network.build(model.config["_class_name"], model.config)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions
    drawn = model.draw_conditions(1, torch.Generator())["encoder_hidden_states"]
    assert drawn.shape == (1, *states)


def test_a_folder_of_older_diffusers_names_its_class_by_its_norm(
    changed: Callable[..., Path], models: Callable[[str], PipelineModel]
) -> None:
    for name in ("pixart", "dit"):
        folder = changed(name, "transformer/config.json", _class_name="Transformer2DModel")
        model = load_model(resolve_source(str(folder)))
        expected = models(name).load_unet().state_dict()
        found = model.load_unet().state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("kind", MISSING)
def test_a_transformer_without_an_adapter_is_refused_by_what_is_missing(
    changed: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    folder = changed("pixart", "transformer/config.json", _class_name=kind)
    outcome = cli("calibrate", "-w", tmp_path / "ws", "--model", folder)
    outcome.assert_refused(kind, *MISSING[kind].split(", ")[:1], "PixArtTransformer2DModel")
    assert not (tmp_path / "ws").exists()


@pytest.mark.parametrize(
    ("name", "changes", "facts"),
    [
        ("pixart", {"_class_name": "HunyuanDiT2DModel"}, "HunyuanDiT2DModel"),
        ("pixart", {"sample_size": 9}, "sample_size 9 patch_size 2"),
        ("pixart", {"out_channels": 5}, "in_channels 4 out_channels 5"),
        ("pixart", {"sample_size": None}, "sample_size"),
        ("pixart", {"num_layers": 10**9}, "num_layers"),
        ("pixart", {"use_additional_conditions": True}, "use_additional_conditions 128"),
        ("pixart", {"attention_head_dim": 9}, "attention_head_dim 18"),
        ("dit", {"num_embeds_ada_norm": None}, "num_embeds_ada_norm"),
        ("flux", {"patch_size": 2}, "patch_size 2"),
        ("flux", {"in_channels": 18}, "in_channels 18"),
        ("flux", {"axes_dims_rope": [4, 6, 8]}, "axes_dims_rope 16"),
        ("flux", {"axes_dims_rope": [4, 5, 7]}, "axes_dims_rope even"),
        ("flux", {"in_channels": 32, "out_channels": 16}, "in_channels 32 out_channels 16"),
        ("flux", {"num_single_layers": 0}, "num_single_layers"),
        ("sana", {"guidance_embeds": True}, "guidance_embeds"),
        ("sana", {"qk_norm": "rms_norm_across_heads"}, "qk_norm"),
        ("sana", {"timestep_scale": 0.001}, "timestep_scale 0.001"),
        ("sana", {"mlp_ratio": 1e9}, "mlp_ratio"),
    ],
)
def test_a_transformer_that_is_not_supported_is_refused_by_its_setting(
    changed: Callable[..., Path], tmp_path: Path, name: str, changes: dict[str, Any], facts: str
) -> None:
    folder = changed(name, "transformer/config.json", **changes)
    outcome = cli("calibrate", "-w", tmp_path / "ws", "--model", folder)
    outcome.assert_refused(*facts.split())
    assert not (tmp_path / "ws").exists()


def test_loras_are_refused_at_once(pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(1)}, tmp_path / "style.safetensors")
    source = resolve_source(str(pipelines("pixart")), loras=[str(tmp_path / "style.safetensors")])
    with refused("--lora", "transformer"):
        load_model(source)


def test_a_prompt_longer_than_the_pipeline_takes_is_told_of(
    pipelines: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(resolve_source(str(pipelines("pixart"))), ["cat " * 400, "a dog"])
    model.conditions(np.arange(2))
    assert [x.args[:3] for x in caplog.records if x.args] == [(1, 2, 300)]


def test_every_kind_of_network_knows_its_classes_and_has_layer_sets() -> None:
    from quest_deploy.finetuning.layer_sets import layer_sets

    for kind in NETWORKS:
        assert all(network_of(name) is kind for name in kind.class_names)
    for kind in TRANSFORMERS:
        sets = layer_sets(kind.layer_set_name(kind.family({}, of_text=True)))
        assert sets.in_float
