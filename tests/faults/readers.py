"""Every kind of file that the toolchain reads, with its reader and a sound example."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from exporters.graph_info import load_graph, load_signature
from quest_deploy.artifacts.checkpoint import load_checkpoint
from quest_deploy.artifacts.image_folder import ImageFolder
from quest_deploy.artifacts.reference import ReferenceIndex, load_reference
from quest_deploy.artifacts.workspace import CALIBRATED, TRAJECTORIES, Workspace
from quest_deploy.backends import exactness
from quest_deploy.backends.base import engine_info
from quest_deploy.calibration.training_state import TrainingState
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.files import write_json
from quest_deploy.finetuning.teacher_cache import TargetStream
from quest_deploy.importers.architecture import UNetConfig
from quest_deploy.importers.read import read
from quest_deploy.importers.settings import ImportSettings, Source
from quest_deploy.models import pipeline_model
from quest_deploy.models.image_inputs import made_image, read_image
from quest_deploy.models.ip_adapters import load_projection
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.quantization.model import QuantizedModel
from quest_deploy.serving.triton.package import FORMAT as PACKAGE_FORMAT
from quest_deploy.serving.triton.package import check_target
from quest_deploy.stages import calibrate
from quest_deploy.stages.options import CalibrateOptions, read_prompts
from tests import pipelines
from tests.quest_deploy.importers.cases import UNCONDITIONAL, Case

OFFICIAL = {
    **UNCONDITIONAL,
    "num_res_blocks": 1,
    "channel_mult": [1],
    "attention_resolutions": [1],
    "image_size": 4,
}


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        path: of the example, which is damaged in its place.
        read: reads it and what lies around it; gives what can be compared, or None.
        functions: those that open it, as ``module:function``, which a test holds against the code.
        guarded: whether a change of its content is noticed by the reader itself; those of a
            workspace's other files by the manifest's hashes.
    """

    path: Path
    read: Callable[[Path], Any]
    functions: tuple[str, ...]
    guarded: bool = False


def kinds(chain: Path, folder: Path) -> dict[str, Kind]:
    """The kinds by name, their examples below ``folder``; ``chain`` is a finished workspace."""
    root, model, official = folder / "workspace", folder / "model", folder / "official"
    shutil.copytree(chain, root, ignore=shutil.ignore_patterns("model.engine"))
    pipelines.text_to_image(model)
    official.mkdir()
    case = Case(OFFICIAL, per_channel=True)
    torch.save(case.state, official / "ckpt.pth")
    (official / "unet.json").write_text(json.dumps(OFFICIAL))
    settings = dataclasses.asdict(case.import_settings)
    del settings["source"]
    (official / "settings.json").write_text(json.dumps(settings))
    state = TrainingState("key", 3, {"a": torch.ones(20)}, {"state": {}, "param_groups": []})
    state.save(folder / "state.pt")
    targets = TargetStream(folder / "targets.bin", "key", 2**20)
    targets.write(0, 3, lambda step: [torch.full((2, 3), float(step))], lambda step: None)
    made_image(0, 16, 16).image.save(folder / "image.png")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    package = folder / "package"
    package.mkdir()
    (package / "package.json").write_text(json.dumps({"format": PACKAGE_FORMAT, "version": 1}))
    cache = folder / "exact-integers.json"
    cache.write_text(json.dumps({"a machine": {"conv int8 x int8": 64}}))
    pictures = folder / "pictures"
    pictures.mkdir()
    shutil.copyfile(folder / "image.png", pictures / "0.png")
    recorded = ImageFolder.of(pictures)
    save_file({"weight": torch.ones(3, 32)}, folder / "classes.safetensors")
    started = folder / "started"
    started.mkdir()
    for name in (TRAJECTORIES, CALIBRATED):
        shutil.copyfile(root / name, started / name)
    write_json(
        started / calibrate.MADE_FROM, {"made_from": {}, "sha256": calibrate._hashes(started)}
    )
    options = root / "calibrate-options.json"
    options.write_text(json.dumps(Workspace.open(root).stages["calibrate"].options))
    record = next((root / "reference").glob("buckets-*"))

    def whole_reference(_: Path) -> None:
        records, _tables = load_reference(root / "reference")
        for found in records:
            for name in found.tensors:
                found.tensors[name]

    def build(path: Path) -> None:
        QuantizedModel.from_checkpoint(load_checkpoint(path))

    def graph(path: Path) -> None:
        load_signature(path)
        for value in load_graph(path).graph.initializers.values():
            assert value.const_value is not None
            value.const_value.numpy()

    def load_parts(_: Path) -> None:
        made = load_model(resolve_source(str(model)))
        made.load_unet()
        made.load_scheduler("ddim")

    single = folder / "single.safetensors"
    save_file(
        {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)},
        single,
        metadata={"modelspec.prediction_type": "v"},
    )
    beside = folder / "single.yaml"
    beside.write_text("model: {params: {parameterization: v, linear_start: 0.001, timesteps: 50}}")

    def schedule(_: Path) -> Any:
        return load_model(resolve_source(str(single))).scheduler_config()

    def recorded_options(_: Path) -> Any:
        return CalibrateOptions.from_json(Workspace.open(root).options_of("calibrate"))

    shards = shutil.copytree(model, folder / "shards")
    weights = shards / "unet" / "diffusion_pytorch_model.safetensors"
    shard = weights.with_name("diffusion_pytorch_model-00001-of-00001.safetensors")
    weights.rename(shard)
    places = dict.fromkeys(load_file(shard), shard.name)
    weights.with_name(f"{weights.name}.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": places})
    )
    adapter = pipelines.ip_adapter(folder / "ip", model)

    def with_adapter(path: Path) -> None:
        source = resolve_source(str(model), ip_adapter=str(path))
        assert source.ip_adapter is not None
        load_model(source).load_unet()
        load_projection(source.ip_adapter)

    lora = folder / "style.safetensors"
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {"lora_A": torch.ones(2, 16), "lora_B": torch.ones(16, 2)}
    save_file({f"{layer}.{name}.weight": x for name, x in factors.items()}, lora)

    configuration = (
        "models.configurations:read_configuration",
        "models.networks.unet:check",
        "models.pipeline_model:__init__",
        "models.pipeline_model:_read_network",
        "models.pipeline_model:_read_schedule",
    )
    return {
        "manifest": Kind(
            root / "manifest.json",
            lambda path: Workspace.open(root).stages,
            ("artifacts.workspace:_read",),
            guarded=True,
        ),
        "stage options": Kind(options, recorded_options, ("artifacts.workspace:interrupted",)),
        "checkpoint": Kind(
            root / "checkpoint.safetensors", build, ("artifacts.checkpoint:load_checkpoint",)
        ),
        "trajectories": Kind(
            root / "trajectories.safetensors", Trajectories.load, ("calibration.trajectories:load",)
        ),
        "graph": Kind(
            root / "unet.onnx",
            graph,
            ("exporters.graph_info:load_graph", "exporters.graph_info:_signature"),
        ),
        "reference index": Kind(
            root / "reference" / "reference.json",
            lambda path: ReferenceIndex.read(path.parent),
            ("artifacts.reference:read",),
            guarded=True,
        ),
        "reference record": Kind(
            record,
            whole_reference,
            ("artifacts.reference:load_reference", "artifacts.reference:__init__"),
        ),
        "reference tables": Kind(
            root / "reference" / "tables.safetensors",
            whole_reference,
            ("artifacts.reference:load_reference",),
        ),
        "engine record": Kind(
            root / "engines" / "onnxruntime" / "engine.json",
            lambda path: engine_info(path.parent),
            ("backends.base:engine_info",),
            guarded=True,
        ),
        "interrupted calibration": Kind(
            started / calibrate.MADE_FROM,
            lambda path: calibrate._read_start(path.parent, {})[1].scheme,
            ("stages.calibrate:_read_start",),
            guarded=True,
        ),
        "training state": Kind(
            folder / "state.pt",
            lambda path: TrainingState.load(path, "key"),
            ("calibration.training_state:load",),
            guarded=True,
        ),
        "targets": Kind(
            folder / "targets.bin",
            lambda path: [targets.read(step) for step in range(3)],
            ("finetuning.teacher_cache:read",),
            guarded=True,
        ),
        "model index": Kind(
            model / "model_index.json", load_parts, ("models.configurations:read_index",)
        ),
        "UNet configuration": Kind(model / "unet" / "config.json", load_parts, configuration),
        "scheduler configuration": Kind(
            model / "scheduler" / "scheduler_config.json", load_parts, configuration
        ),
        "weights": Kind(
            model / "unet" / "diffusion_pytorch_model.safetensors",
            load_parts,
            ("models.weights:_elements",),
        ),
        "class table": Kind(
            folder / "classes.safetensors",
            lambda path: pipeline_model._class_table(path, 16),
            ("models.pipeline_model:_class_table",),
        ),
        "index of shards": Kind(
            shards / "unet" / "diffusion_pytorch_model.safetensors.index.json",
            lambda path: load_model(resolve_source(str(shards))).load_unet() and None,
            ("models.weights:_check_shards",),
        ),
        "single file": Kind(
            single, schedule, ("models.single_file:_said", "models.single_file:_read")
        ),
        "original configuration": Kind(
            beside, schedule, ("models.single_file:_original_configuration",)
        ),
        "LoRA": Kind(
            lora,
            lambda path: (
                load_model(resolve_source(str(model), loras=[str(path)])).load_unet() and None
            ),
            ("artifacts.model_source:_hash_of", "models.loras:_read"),
        ),
        "IP-Adapter": Kind(
            adapter,
            with_adapter,
            ("models.ip_adapters:_widths", "models.ip_adapters:_read"),
        ),
        "official checkpoint": Kind(
            official / "ckpt.pth",
            lambda path: read(path, case.config, case.import_settings),
            ("importers.read:_load",),
        ),
        "official UNet": Kind(
            official / "unet.json", UNetConfig.load, ("importers.architecture:_parse",)
        ),
        "official settings": Kind(
            official / "settings.json",
            lambda path: ImportSettings.gather(Source.QUEST, {}, path),
            ("importers.settings:gather",),
        ),
        "prompts": Kind(folder / "prompts.txt", read_prompts, ("stages.options:read_prompts",)),
        "image": Kind(folder / "image.png", read_image, ("models.image_inputs:read_image",)),
        "folder of images": Kind(
            pictures / "0.png",
            lambda path: ImageFolder.of(path.parent) and recorded.files(),
            ("artifacts.image_folder:_hash",),
            guarded=True,
        ),
        "package record": Kind(
            package / "package.json",
            lambda path: check_target(path.parent),
            ("serving.triton.package:check_target",),
        ),
        "exact integers": Kind(cache, exactness._kept, ("backends.exactness:_kept",)),
    }
