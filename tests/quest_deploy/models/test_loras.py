"""LoRAs in every layout, fused into the UNet and the text encoders, compared with an independent
fusion; what cannot be used is named.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quest_deploy.importers.architecture import UNetConfig
from quest_deploy.models import loras
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.pipeline_model import PipelineModel
from quest_deploy.models.registry import ARCHITECTURES
from quest_deploy.models.sgm_names import sgm_names
from tests.helpers import refused

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Layout = Callable[[str, str], str]
    """The key of a layer's tensor, from the layer's name and "down", "up", "mid" or "alpha"."""

WEIGHT = 0.7
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
A_OR_B = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def kohya(prefix: str) -> Layout:
    def key(name: str, role: str) -> str:
        suffix = role if role in ("alpha", "dora_scale") else f"lora_{role}.weight"
        return f"{prefix}{name.replace('.', '_')}.{suffix}"

    return key


def dotted(prefix: str, suffix: str = ".lora") -> Layout:
    def key(name: str, role: str) -> str:
        return (
            f"{prefix}{name}.alpha" if role == "alpha" else f"{prefix}{name}{suffix}.{role}.weight"
        )

    return key


def of_peft(prefix: str) -> Layout:
    return lambda name, role: f"{prefix}{name}.{A_OR_B.get(role, role)}"


def first_of_diffusers(name: str, role: str) -> str:
    """As its first training script wrote a UNet's attention processors."""
    parent, _, last = name.removesuffix(".0").rpartition(".")
    return f"{parent}.processor.{last}_lora.{role}.weight"


UNET_LAYOUTS: dict[str, Layout] = {
    "kohya": kohya("lora_unet_"),
    "peft": of_peft("unet."),
    "diffusers": dotted("unet."),
    "without the part": of_peft(""),
    "ComfyUI": of_peft("diffusion_model."),
}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fusion(
    weight: Tensor, tensors: dict[str, Tensor], factor: float, over: tuple[int, ...] = (1, 2, 3)
) -> np.ndarray[Any, Any]:
    """W + factor * up (mid) down, times DoRA's norm, in double precision, term by term.

    Args:
        over: the axes of DoRA's norm.
    """
    w, up, down = (x.double().numpy() for x in (weight, tensors["up"], tensors["down"]))
    full = w.reshape(*w.shape, *[1] * (4 - w.ndim))
    up, down = up.reshape(len(up), -1), down.reshape(*down.shape, *[1] * (4 - down.ndim))
    down = down if down.shape[1] == full.shape[1] else down.reshape(len(down), *full.shape[1:])
    if "mid" in tensors:
        down = np.einsum("rsxy,siab->rixy", tensors["mid"].double().numpy(), down)
    result = full + factor * np.einsum("or,rixy->oixy", up, down)
    scale = tensors.get("magnitude", tensors.get("dora_scale"))
    if scale is not None:
        norm = np.sqrt((result**2).sum(over, keepdims=True))
        result = result / norm * scale.double().numpy().reshape(norm.shape)
    return result.reshape(w.shape)


def layers_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def tensors_for(weight: Tensor, i: int, *, alpha: bool = True) -> dict[str, Tensor]:
    """A LoRA of the ``i``-th layer: a rank, and an alpha, of its own."""
    rank = 1 + i % 4
    tensors = {
        "down": draw(rank, *weight.shape[1:], seed=2 * i),
        "up": draw(len(weight), rank, *[1] * (weight.dim() - 2), seed=2 * i + 1),
    }
    return tensors | ({"alpha": torch.tensor(rank * (0.5, 1.0, 2.0)[i % 3])} if alpha else {})


def factor_of(tensors: dict[str, Tensor]) -> float:
    rank = len(tensors["down"])
    return WEIGHT * float(tensors.get("alpha", torch.tensor(float(rank)))) / rank


def assert_fused(model: nn.Module, plain: dict[str, Tensor], loras: dict[str, Any]) -> None:
    """Every layer that a LoRA has tensors for is their independent fusion, every other as it was."""
    for name, weight in layers_of(model).items():
        if name not in loras:
            assert torch.equal(weight, plain[name]), name
            continue
        tensors = dict(loras[name])
        expected = fusion(plain[name], tensors, factor_of(tensors), tensors.pop("over", (1, 2, 3)))
        np.testing.assert_allclose(weight.double(), expected, rtol=1e-4, atol=1e-5, err_msg=name)


def save(path: Path, layout: Layout, loras: dict[str, Any], **metadata: Any) -> str:
    """Write a LoRA's file; what ``--lora`` is given."""
    tensors = {
        layout(name, role): tensor
        for name, of_layer in loras.items()
        for role, tensor in of_layer.items()
        if role != "over"
    }
    header = {"format": "pt"} | (
        {"lora_adapter_metadata": json.dumps(metadata)} if metadata else {}
    )
    save_file({key: x.contiguous() for key, x in tensors.items()}, path, metadata=header)
    return f"{path}:{WEIGHT}"


def unet_of(folder: Path, *given: str) -> nn.Module:
    return load_model(resolve_source(str(folder), loras=given)).load_unet()


def encoder_of(folder: Path, name: str, *given: str) -> nn.Module:
    model = load_model(resolve_source(str(folder), loras=given))
    assert isinstance(model, PipelineModel)
    encoder: nn.Module = getattr(model.load_pipeline(vae=None), name)
    return encoder


@pytest.mark.parametrize("layout", UNET_LAYOUTS)
@pytest.mark.parametrize("model", ["sd", "sd-v"])
def test_every_convolution_and_linear_layer_gets_its_own_alpha_and_rank(
    pipelines: Callable[[str], Path], tmp_path: Path, model: str, layout: str
) -> None:
    plain = layers_of(unet_of(pipelines(model)))
    of_layers = {name: tensors_for(weight, i) for i, (name, weight) in enumerate(plain.items())}
    given = save(tmp_path / "style.safetensors", UNET_LAYOUTS[layout], of_layers)
    unet = unet_of(pipelines(model), given)
    assert len(of_layers) >= 27
    assert_fused(unet, plain, of_layers)


def test_attention_processors_of_the_first_layout_are_fused(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    plain = layers_of(unet_of(pipelines("sd")))
    of_layers = {
        name: tensors_for(weight, i, alpha=False)
        for i, (name, weight) in enumerate(plain.items())
        if ".attn" in name
    }
    given = save(tmp_path / "style.safetensors", first_of_diffusers, of_layers)
    assert len(of_layers) == 8
    assert_fused(unet_of(pipelines("sd"), given), plain, of_layers)


def test_sdxls_layers_are_found_by_stabilitys_names(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    unet = unet_of(pipelines("sdxl"))
    plain, names = layers_of(unet), sgm_names(unet)
    of_layers = {name: tensors_for(weight, i) for i, (name, weight) in enumerate(plain.items())}
    layout = kohya("lora_unet_")
    given = save(
        tmp_path / "style.safetensors",
        lambda name, role: layout(names[name], role),
        of_layers,
    )
    assert_fused(unet_of(pipelines("sdxl"), given), plain, of_layers)


def test_stabilitys_names_of_sdxl_are_those_that_diffusers_converts() -> None:
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )
    from diffusers.utils import convert_unet_state_dict_to_peft

    unet = architecture("sdxl")
    names, layers = sgm_names(unet), list(layers_of(unet))
    assert set(layers) <= names.keys()
    state = {
        f"lora_unet_{names[layer].replace('.', '_')}.lora_{role}.weight": torch.tensor(float(i))
        for i, layer in enumerate(layers)
        for role in ("down", "up")
    }
    mapped = _maybe_map_sgm_blocks_to_diffusers(state, unet.config)
    converted, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
    theirs = {
        key.removeprefix("unet.").removesuffix(".lora_A.weight"): layers[int(value)]
        for key, value in convert_unet_state_dict_to_peft(converted).items()
        if "lora_A" in key
    }
    assert theirs == {layer: layer for layer in layers}


def test_stabilitys_names_of_stable_diffusion_are_the_official_checkpoints() -> None:
    config = UNetConfig(
        64, 4, 320, 4, 2, (4, 2, 1), (1, 2, 4, 4), 8, use_spatial_transformer=True, context_dim=768
    )
    official = {layer.targets[0]: layer.name for layer in config.names().layers}
    unet = architecture("sd15")
    names = sgm_names(unet)
    assert {layer: names[layer] for layer in layers_of(unet)} == official


def architecture(name: str) -> Any:
    from diffusers import UNet2DConditionModel

    config = json.loads((ARCHITECTURES / name / "unet" / "config.json").read_text())
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


DORA_LAYOUTS: dict[str, tuple[Layout, str]] = {
    "kohya": (kohya("lora_unet_"), "dora_scale"),
    "peft": (of_peft("unet."), "magnitude"),
}


@pytest.mark.parametrize("layout", DORA_LAYOUTS)
def test_dora_is_normed_in_every_layer(
    pipelines: Callable[[str], Path], tmp_path: Path, layout: str
) -> None:
    plain = layers_of(unet_of(pipelines("sd")))
    key, role = DORA_LAYOUTS[layout]
    of_layers: dict[str, Any] = {}
    for i, (name, weight) in enumerate(plain.items()):
        ones = [1] * (weight.dim() - 1)
        shape = [len(weight), *ones]
        if role == "magnitude":  # as peft saves it
            shape = [1, len(weight), 1, 1] if weight.dim() == 4 else [len(weight)]
        of_layers[name] = tensors_for(weight, i) | {role: draw(*shape, seed=i).abs() + 0.5}
    given = save(tmp_path / "style.safetensors", key, of_layers)
    assert_fused(unet_of(pipelines("sd"), given), plain, of_layers)


def test_dora_over_the_outputs_as_lycoris_once_wrote_it(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    plain = layers_of(unet_of(pipelines("sd")))
    of_layers = {
        name: tensors_for(weight, i)
        | {
            "dora_scale": draw(1, weight.shape[1], *[1] * (weight.dim() - 2), seed=i).abs() + 0.5,
            "over": (0, 2, 3),
        }
        for i, (name, weight) in enumerate(plain.items())
    }
    given = save(tmp_path / "style.safetensors", kohya("lora_unet_"), of_layers)
    assert_fused(unet_of(pipelines("sd"), given), plain, of_layers)


def test_dora_on_a_row_of_zeros_is_refused(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    model, path = shutil.copytree(pipelines("sd"), tmp_path / "model"), tmp_path / "a.safetensors"
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors[f"{ATTENTION}.weight"][3] = 0
    save_file(tensors, weights, metadata={"format": "pt"})
    nothing = {"down": torch.ones(2, 16), "up": torch.zeros(16, 2), "magnitude": torch.ones(16)}
    save(path, of_peft("unet."), {ATTENTION: nothing})
    with refused(path, f"unet.{ATTENTION}", "finite"):
        unet_of(model, str(path))


def test_locons_middle_convolution_is_multiplied_in(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    plain = layers_of(unet_of(pipelines("sd")))
    of_layers = {
        name: {
            "down": draw(3, weight.shape[1], 1, 1, seed=i),
            "mid": draw(3, 3, *weight.shape[2:], seed=i + 100),
            "up": draw(len(weight), 3, 1, 1, seed=i + 200),
            "alpha": torch.tensor(2.0),
        }
        for i, (name, weight) in enumerate(plain.items())
        if weight.dim() == 4 and weight.shape[2] == 3
    }
    given = save(tmp_path / "style.safetensors", kohya("lora_unet_"), of_layers)
    assert len(of_layers) >= 4
    assert_fused(unet_of(pipelines("sd"), given), plain, of_layers)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("layer", ["linear", "pointwise", "convolution"])
def test_a_fused_weight_is_what_peft_merges(layer: str, dora: bool) -> None:
    from peft import LoraConfig, get_peft_model

    kernel = {"pointwise": 1, "convolution": 3}.get(layer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base: Any = nn.Linear(6, 5) if kernel is None else nn.Conv2d(6, 5, kernel)
        plain = base.weight.detach().clone()
        config = LoraConfig(
            r=2, lora_alpha=3, target_modules=["0"], use_dora=dora, init_lora_weights=False
        )
        wrapped = get_peft_model(nn.Sequential(base), config)
        theirs: Any = wrapped.base_model.model[0]
        tensors = {
            "down": theirs.lora_A["default"].weight.detach().clone(),
            "up": theirs.lora_B["default"].weight.detach().clone(),
        }
        if dora:
            magnitude = theirs.lora_magnitude_vector["default"].weight
            magnitude.data = magnitude.data + torch.rand_like(magnitude)
            tensors["magnitude"] = magnitude.detach().clone()
        theirs.scale_layer(WEIGHT)
        theirs.merge()
    ours = loras.fused(plain, tensors, WEIGHT * 3 / 2)
    torch.testing.assert_close(ours, theirs.base_layer.weight.detach(), rtol=1e-5, atol=1e-6)


def old_encoder(prefix: str) -> Layout:
    names = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

    def key(name: str, role: str) -> str:
        parent, _, last = name.rpartition(".")
        return f"{prefix}{parent}.{names[last]}_lora.{role}.weight"

    return key


ENCODER_LAYOUTS: dict[str, Callable[[str], Layout]] = {
    "kohya": lambda name: kohya({"text_encoder": "lora_te1_"}.get(name, "lora_te2_")),
    "peft": lambda name: of_peft(f"{name}."),
    "diffusers": lambda name: dotted(f"{name}.", ".lora_linear_layer"),
    "old": lambda name: old_encoder(f"{name}."),
}


@pytest.mark.parametrize("layout", ENCODER_LAYOUTS)
@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_both_text_encoders_get_their_layers_own_share_at_the_loras_weight(
    pipelines: Callable[[str], Path], tmp_path: Path, name: str, layout: str
) -> None:
    plain = layers_of(encoder_of(pipelines("sdxl"), name))
    of_layers = {
        layer: tensors_for(weight, i, alpha=layout == "kohya")
        for i, (layer, weight) in enumerate(plain.items())
        if layout != "old" or "self_attn" in layer
    }
    # Files have the names of before transformers took "text_model" out of one of the two classes.
    in_file = {
        layer if layer.startswith("text_") else f"text_model.{layer}": tensors
        for layer, tensors in of_layers.items()
    }
    given = save(tmp_path / "style.safetensors", ENCODER_LAYOUTS[layout](name), in_file)
    other = {"text_encoder": "text_encoder_2"}.get(name, "text_encoder")
    untouched = layers_of(encoder_of(pipelines("sdxl"), other))
    assert_fused(encoder_of(pipelines("sdxl"), name, given), plain, of_layers)
    assert_fused(encoder_of(pipelines("sdxl"), other, given), untouched, {})


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_"])
def test_one_text_encoder_is_named_either_way(
    pipelines: Callable[[str], Path], tmp_path: Path, prefix: str
) -> None:
    plain = layers_of(encoder_of(pipelines("sd"), "text_encoder"))
    of_layers = {name: tensors_for(weight, i) for i, (name, weight) in enumerate(plain.items())}
    in_file = {f"text_model.{name}": tensors for name, tensors in of_layers.items()}
    given = save(tmp_path / "style.safetensors", kohya(prefix), in_file)
    assert_fused(encoder_of(pipelines("sd"), "text_encoder", given), plain, of_layers)


def test_a_lora_for_a_text_encoder_alone_leaves_the_unet(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    of_layer = tensors_for(torch.zeros(16, 16), 1)
    given = save(tmp_path / "style.safetensors", kohya("lora_te_"), {layer: of_layer})
    assert_fused(unet_of(pipelines("sd"), given), layers_of(unet_of(pipelines("sd"))), {})


@pytest.mark.parametrize("rslora", [False, True])
def test_alphas_in_the_files_metadata_count(
    pipelines: Callable[[str], Path], tmp_path: Path, rslora: bool
) -> None:
    plain = layers_of(unet_of(pipelines("sd")))
    of_layers = {
        name: tensors_for(weight, i, alpha=False) for i, (name, weight) in enumerate(plain.items())
    }
    given = save(
        tmp_path / "style.safetensors",
        of_peft("unet."),
        of_layers,
        **{
            "unet.r": 4,
            "unet.lora_alpha": 6,
            "unet.alpha_pattern": {"attn1.to_q": 1.5, "conv_in": 5},
            "unet.use_rslora": rslora,
            "text_encoder.lora_alpha": 100,
        },
    )
    for name, tensors in of_layers.items():
        alpha = 1.5 if name.endswith("attn1.to_q") else 5.0 if name == "conv_in" else 6.0
        rank = len(tensors["down"])
        tensors["alpha"] = torch.tensor(alpha * (rank**0.5 if rslora else 1.0))
    assert_fused(unet_of(pipelines("sd"), given), plain, of_layers)


def test_alphas_in_the_metadata_count_under_a_text_encoders_name_in_the_file(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    plain = layers_of(encoder_of(pipelines("sd"), "text_encoder"))
    of_layers = {
        name: tensors_for(weight, i, alpha=False) for i, (name, weight) in enumerate(plain.items())
    }
    first = "encoder.layers.0.self_attn.q_proj"
    given = save(
        tmp_path / "style.safetensors",
        of_peft("text_encoder.text_model."),
        of_layers,
        **{
            "text_encoder.lora_alpha": 6,
            "text_encoder.alpha_pattern": {f"text_model.{first}": 1.5, "fc1": 5},
        },
    )
    for name, tensors in of_layers.items():
        alpha = 1.5 if name == first else 5.0 if name.endswith("fc1") else 6.0
        tensors["alpha"] = torch.tensor(alpha)
    assert first in of_layers
    assert_fused(encoder_of(pipelines("sd"), "text_encoder", given), plain, of_layers)


def of_settings(beside: Path, plain: dict[str, Tensor], layout: Layout) -> tuple[str, Any]:
    """A LoRA whose alpha of 6 stands in adapter_config.json beside it, and its layers with it."""
    of_layers = {
        name: tensors_for(weight, i, alpha=False) for i, (name, weight) in enumerate(plain.items())
    }
    given = save(beside / "adapter_model.safetensors", layout, of_layers)
    settings = {"r": 4, "lora_alpha": 6, "peft_type": "LORA", "init_lora_weights": True}
    (beside / "adapter_config.json").write_text(json.dumps(settings))
    for tensors in of_layers.values():
        tensors["alpha"] = torch.tensor(6.0)
    return given, of_layers


@pytest.mark.parametrize("prefix", ["base_model.model.", "unet.", ""])
def test_the_alpha_in_pefts_file_beside_the_weights_counts(
    pipelines: Callable[[str], Path], tmp_path: Path, prefix: str
) -> None:
    plain = layers_of(unet_of(pipelines("sd")))
    given, of_layers = of_settings(tmp_path, plain, of_peft(prefix))
    assert_fused(unet_of(pipelines("sd"), given), plain, of_layers)


def test_a_lora_of_pefts_without_its_settings_is_refused_and_one_whose_settings_changed(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    plain = layers_of(unet_of(pipelines("sd")))
    given, _ = of_settings(tmp_path, plain, of_peft("base_model.model."))
    source = resolve_source(str(pipelines("sd")), loras=[given])
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 7}')
    with refused(tmp_path / "adapter_model.safetensors"):
        load_model(source)
    (tmp_path / "adapter_config.json").unlink()
    with refused("adapter_config.json"):
        unet_of(pipelines("sd"), given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_of_any_float_type_are_taken(
    pipelines: Callable[[str], Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    plain = layers_of(unet_of(pipelines("sd")))
    of_layer = {role: x.to(dtype) for role, x in tensors_for(plain[ATTENTION], 1).items()}
    given = save(tmp_path / "style.safetensors", kohya("lora_unet_"), {ATTENTION: of_layer})
    assert_fused(unet_of(pipelines("sd"), given), plain, {ATTENTION: of_layer})


def test_two_loras_add_up(pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    plain = layers_of(unet_of(pipelines("sd")))
    both = [tensors_for(plain[ATTENTION], i) for i in (1, 2)]
    given = [
        save(tmp_path / f"{i}.safetensors", kohya("lora_unet_"), {ATTENTION: tensors})
        for i, tensors in enumerate(both)
    ]
    expected = plain[ATTENTION]
    for tensors in both:
        expected = torch.from_numpy(fusion(expected, tensors, factor_of(tensors)))
    fused = layers_of(unet_of(pipelines("sd"), *given))[ATTENTION]
    torch.testing.assert_close(fused.double(), expected, rtol=1e-5, atol=1e-6)


UP, DOWN = torch.ones(16, 2), torch.ones(2, 16)
KOHYA = f"lora_unet_{ATTENTION.replace('.', '_')}"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
WHOLE = {f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.lora_up.weight": UP}
PISSA = {"lora_adapter_metadata": json.dumps({"unet.init_lora_weights": "pissa"})}
BROKEN: dict[str, tuple[dict[str, Tensor], str]] = {
    "LoKr": ({f"{KOHYA}.lokr_w1": UP, f"{KOHYA}.lokr_w2": UP}, f"{KOHYA}.lokr_w1"),
    "LoHa": ({f"{KOHYA}.hada_w1_a": UP}, f"{KOHYA}.hada_w1_a"),
    "a whole difference": ({f"{KOHYA}.diff": UP}, f"{KOHYA}.diff"),
    "LoRA and something else": (
        {**WHOLE, "bundle_emb.word.string_to_param.*": UP},
        "bundle_emb.word.string_to_param.*",
    ),
    "half of it of another model": (
        {**WHOLE, "lora_unet_joint_blocks_0.lora_down.weight": DOWN},
        "lora_unet_joint_blocks_0 UNet2DConditionModel 1 2",
    ),
    "a layer of another model": (
        {"unet.down_blocks.7.to_q.lora_A.weight": DOWN},
        "unet.down_blocks.7.to_q UNet2DConditionModel",
    ),
    "another model's": (
        {"transformer.blocks.0.to_q.lora_A.weight": DOWN},
        "transformer.blocks.0.to_q",
    ),
    "a second text encoder": (
        {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": DOWN},
        "text_encoder_2",
    ),
    "no up": ({f"{KOHYA}.lora_down.weight": DOWN}, f"unet.{ATTENTION} up"),
    "an alpha alone": ({f"{KOHYA}.alpha": torch.tensor(1.0)}, f"unet.{ATTENTION} down up"),
    "alphas by row": ({**WHOLE, f"{KOHYA}.alpha": torch.ones(2)}, f"unet.{ATTENTION} alpha"),
    "another width": (
        {f"{KOHYA}.lora_down.weight": torch.ones(2, 12), f"{KOHYA}.lora_up.weight": UP},
        f"unet.{ATTENTION}",
    ),
    "two ranks": (
        {f"{KOHYA}.lora_down.weight": torch.ones(3, 16), f"{KOHYA}.lora_up.weight": UP},
        f"unet.{ATTENTION}",
    ),
    "no rank": (
        {
            f"{KOHYA}.lora_down.weight": torch.ones(0, 16),
            f"{KOHYA}.lora_up.weight": torch.ones(16, 0),
        },
        f"unet.{ATTENTION}",
    ),
    "a scale of another width": (
        {**WHOLE, f"{KOHYA}.dora_scale": torch.ones(7, 1)},
        f"unet.{ATTENTION} DoRA",
    ),
    "infinity": ({**WHOLE, f"{KOHYA}.lora_up.weight": UP / 0}, f"unet.{ATTENTION} up"),
    "integers": (
        {**WHOLE, f"{KOHYA}.lora_up.weight": UP.to(torch.int8)},
        f"{KOHYA}.lora_up.weight",
    ),
    "nothing": ({}, "nothing"),
    "two spellings of a layer": (
        {
            **WHOLE,
            "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight": DOWN,
        },
        ATTENTION,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_fused_is_named(
    pipelines: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    tensors, facts = BROKEN[name]
    path = tmp_path / "style.safetensors"
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)
    with refused(path, *facts.split()):
        unet_of(pipelines("sd"), str(path))


def test_a_text_encoders_layer_that_it_does_not_have_is_named(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "style.safetensors"
    missing = TEXT.replace("layers_0", "layers_11")
    save_file({f"{missing}.lora_down.weight": DOWN, f"{missing}.lora_up.weight": UP}, path)
    with refused(path, missing, "text_encoder", "CLIPTextModel"):
        encoder_of(pipelines("sd"), "text_encoder", str(path))


def test_a_lora_trained_from_other_weights_than_the_models_is_refused(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "style.safetensors"
    save_file(WHOLE, path, metadata=PISSA)
    with refused(path, "pissa"):
        unet_of(pipelines("sd"), str(path))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_refused(
    pipelines: Callable[[str], Path], tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "style.safetensors"
    path.write_bytes(content)
    with refused(path):
        unet_of(pipelines("sd"), str(path))


def test_loras_are_for_pipelines_that_take_them(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "style.safetensors"
    save_file(WHOLE, path)
    with refused("--lora", "LDMPipeline"):
        unet_of(pipelines("ldm"), str(path))
