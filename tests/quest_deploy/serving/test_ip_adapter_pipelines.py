"""Diffusers' pipelines with IP-Adapters, around an engine: its stand-in is the float UNet here, so
that the images must be those of diffusers' own pipeline.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import pytest
import torch

from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.backends.engine_unet import EngineUNet
from quest_deploy.errors import InputError
from quest_deploy.models.controls import load_control
from quest_deploy.models.image_inputs import made_image
from quest_deploy.models.ip_adapters import load_image_parts
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.residuals import CONTROLNET, T2I_ADAPTER
from quest_deploy.serving.pipeline import PipelineUNet, load_pipeline
from tests.helpers import refused
from tests.pipelines import controlnet, ip_adapter, t2i_adapter
from tests.quest_deploy.serving.float_engine import FloatEngine, draw

if TYPE_CHECKING:
    from collections.abc import Callable

    from quest_deploy.models.pipeline_model import PipelineModel

GIVEN = made_image(3, 16, 16)
SHOWN = made_image(4, 20, 24).image
CASES: dict[str, tuple[str, dict[str, bool], dict[str, Any]]] = {
    "plain": ("controlled", {}, {}),
    "plus": ("controlled", {"plus": True}, {}),
    "full": ("controlled", {"full": True}, {}),
    "unguided": ("controlled", {"plus": True}, {"guidance_scale": 1.0}),
    "two images": ("controlled", {}, {"num_images_per_prompt": 2}),
    "xl": ("controlled-xl", {"plus": True}, {}),
    "inpaint": ("controlled-inpaint", {}, {"image": GIVEN.image, "mask_image": GIVEN.mask}),
}


def model_with(pipeline: Path, adapter: Path) -> PipelineModel:
    return load_model(resolve_source(str(pipeline), ip_adapter=f"{adapter}:0.6"))


def pipeline_of(model: PipelineModel, **parts: Any) -> Any:
    kinds = (CONTROLNET,) if "controlnet" in parts else ()
    engine: Any = FloatEngine(model, *kinds)
    unet = PipelineUNet(engine, model.config, model.source.ip_adapter)
    pipeline = model.load_pipeline(unet=unet, **load_image_parts(model), **parts)
    pipeline.set_ip_adapter_scale = unet.set_ip_adapter_scale
    return pipeline


def diffusers_own(kind: Any, folder: Path, path: Path, **parts: Any) -> Any:
    safe = {} if "XL" in kind.__name__ else {"safety_checker": None}
    pipeline = kind.from_pretrained(folder, **safe, **parts)
    pipeline.load_ip_adapter(
        str(path.parent.parent), subfolder=path.parent.name, weight_name=path.name
    )
    return pipeline


@pytest.mark.parametrize("case", CASES)
def test_around_an_engine_that_predicts_as_the_unet_it_draws_as_diffusers_own(
    pipelines: Callable[[str], Path], tmp_path: Path, case: str
) -> None:
    name, kind_of_adapter, options = CASES[case]
    adapter = ip_adapter(tmp_path / "models", pipelines(name), **kind_of_adapter)
    model = model_with(pipelines(name), adapter)
    ours, kind = pipeline_of(model), model.pipeline_class()
    theirs = diffusers_own(kind, model.folder, adapter)
    theirs.set_ip_adapter_scale(0.6)  # ours begins as it was calibrated
    image = draw(ours, ip_adapter_image=SHOWN, **options)
    np.testing.assert_allclose(image, draw(theirs, ip_adapter_image=SHOWN, **options), atol=1e-5)
    without = draw(ours, **options)
    assert np.abs(image - without).max() > 1e-3
    for pipeline in (ours, theirs):
        pipeline.set_ip_adapter_scale(1.1)
    guided = options.get("guidance_scale", 5.0) > 1
    embeds = theirs.prepare_ip_adapter_image_embeds(SHOWN, None, torch.device("cpu"), 1, guided)
    given = {"ip_adapter_image_embeds": embeds, **options}
    np.testing.assert_allclose(draw(ours, **given), draw(theirs, **given), atol=1e-5)
    ours.set_ip_adapter_scale([0])
    np.testing.assert_array_equal(draw(ours, ip_adapter_image=SHOWN, **options), without)


def test_beside_a_controlnet_it_draws_as_diffusers_own(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = pipelines("controlled")
    adapter = ip_adapter(tmp_path / "models", folder)
    model = model_with(folder, adapter)
    net = load_control(controlnet(tmp_path / "net", folder), model, CONTROLNET)
    ours = pipeline_of(model, controlnet=net)
    kind = diffusers.StableDiffusionControlNetPipeline
    assert type(ours) is kind
    theirs = diffusers_own(kind, folder, adapter, controlnet=net)
    theirs.set_ip_adapter_scale(0.6)
    given = {"image": GIVEN.image, "ip_adapter_image": SHOWN}
    np.testing.assert_allclose(draw(ours, **given), draw(theirs, **given), atol=1e-5)


def test_beside_a_t2i_adapter_stable_diffusion_xls_takes_an_image_as_diffusers_own(
    pipelines: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pipelines("controlled-xl")
    adapter = ip_adapter(tmp_path / "models", folder)
    model = model_with(folder, adapter)
    engine = FloatEngine(model, T2I_ADAPTER)
    workspace = Workspace.create(tmp_path / "ws", model.source, Scheme.parse("w4a4", buckets=2))
    monkeypatch.setattr(Workspace, "require_recorded", lambda *_: None)
    monkeypatch.setattr(EngineUNet, "load", lambda *_: engine)
    monkeypatch.setattr("quest_deploy.serving.pipeline.load_signature", lambda _: None)
    monkeypatch.setattr("quest_deploy.serving.pipeline.added_inputs", lambda _: engine.added)
    net = load_control(t2i_adapter(tmp_path / "net", folder), model, T2I_ADAPTER)
    ours = load_pipeline(workspace, adapter=net)
    kind = diffusers.StableDiffusionXLAdapterPipeline
    assert type(ours) is kind
    theirs = diffusers_own(kind, folder, adapter, adapter=net)
    theirs.set_ip_adapter_scale(0.6)
    given = {"image": GIVEN.image, "ip_adapter_image": SHOWN}
    image = draw(ours, **given)
    np.testing.assert_allclose(image, draw(theirs, **given), atol=1e-5)
    ours.set_ip_adapter_scale(0.0)
    assert np.abs(image - draw(ours, **given)).max() > 1e-3


def test_what_one_scale_and_one_image_cannot_say_is_refused(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    model = model_with(
        pipelines("controlled"), ip_adapter(tmp_path / "models", pipelines("controlled"))
    )
    pipeline = pipeline_of(model)
    for scale in ({"up": {"block_0": [0.0, 1.0]}}, [0.5, 0.5], float("nan"), "much"):
        with refused("set_ip_adapter_scale", str(scale)):
            pipeline.set_ip_adapter_scale(scale)
    with refused("image_embeds", "[2, 2, 12]"):
        draw(pipeline, ip_adapter_image=[[SHOWN, SHOWN]])
    masks = {"ip_adapter_masks": [torch.ones(1, 1, 16, 16)]}
    with refused("cross_attention_kwargs"):
        draw(pipeline, ip_adapter_image=SHOWN, cross_attention_kwargs=masks)
    copy = type(pipeline)(**pipeline.components, requires_safety_checker=False)
    with pytest.raises(InputError, match=r"unet\.set_ip_adapter_scale"):
        copy.set_ip_adapter_scale(0.5)  # diffusers' own would change nothing
