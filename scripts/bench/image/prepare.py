"""What the programs read, made once in the bench's folder: the model, calibration inputs, the
inputs that predictions are compared on, and each program's own files. A file or folder is there as
a whole or not at all, so that an interrupted run makes it again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import quest_deploy as qd
from quest_deploy.artifacts.workspace import CALIBRATED, MANIFEST, Workspace
from quest_deploy.errors import QuestDeployError
from quest_deploy.models.registry import ARCHITECTURES
from quest_deploy.processes import in_own_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

ROOT = Path(__file__).parents[3]
GUIDANCE, SEED = 7.5, 0
PROMPT, OTHER_PROMPT = "a photo of a cat and a dog", "a red house"
COMPARED_STEPS = 4
"""Steps of the drawing whose predictions are compared; not the calibration's prompt or noise."""
TEXT_ENCODER, UNET, VAE = "text_encoder", "unet", "vae"
ATTENTION8, BF16 = "attention8", "bf16"
FLOAT, INT8, HYBRID = "float", "int8", "hybrid"
"""Forms of OpenVINO's UNet: of torch's weights, NNCF's INT8, and optimum-intel's hybrid one."""


@dataclass(frozen=True)
class Size:
    """A Stable Diffusion and how it is drawn with.

    Attributes:
        unet, text_encoder, vae: what differs from the registry's sd15, CLIPTextConfig's ViT-L/14
            and its autoencoder.
        steps: of an image, and of the cold drawing. warm_steps: of the warm one.
        buckets: of ours, each visited once in the calibration's sampling.
    """

    name: str
    unet: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    vae: Mapping[str, Any]
    steps: int
    warm_steps: int
    buckets: int


SIZES = {
    "full": Size("full", {}, {}, {}, steps=20, warm_steps=4, buckets=10),
    "small": Size(
        "small",
        {
            "sample_size": 16,
            "layers_per_block": 1,
            "block_out_channels": [32, 64],
            "cross_attention_dim": 32,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        },
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        {"block_out_channels": [32, 64], "layers_per_block": 1, "sample_size": 32},
        steps=3,
        warm_steps=2,
        buckets=2,
    ),
}


@dataclass(frozen=True)
class OurForm:
    """What a row of ours runs.

    Attributes:
        bits: of the layers, as ``--bits`` takes them.
        attention8: whether attention has 8 bits; its products are float otherwise.
        bf16: whether bf16 computes what is not quantized, text encoder and VAE among it.
    """

    bits: str
    attention8: bool = False
    bf16: bool = False

    @property
    def name(self) -> str:
        """Such as "w8a8-attention8"."""
        parts = {ATTENTION8: self.attention8, BF16: self.bf16}
        return "-".join((self.bits, *(name for name, has in parts.items() if has)))

    @classmethod
    def of(cls, name: str) -> OurForm:
        """The form of this name."""
        bits, *rest = name.split("-")
        return cls(bits, ATTENTION8 in rest, BF16 in rest)

    @property
    def calibration(self) -> dict[str, Any]:
        """Options of `calibrate` beside the bits."""
        return {"attention_bits": "8", "softmax_bits": "8"} if self.attention8 else {}

    @property
    def dtype(self) -> str:
        """``--dtype`` of the engines."""
        return BF16 if self.bf16 else "fp32"


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Give a path to write a file or folder to; it becomes ``target`` where nothing is raised."""
    partial = target.with_name(f"partial-{target.name}")
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    partial.rename(target)


class Prepared:
    """What is made of one size, in ``folder``; each method makes what is missing, in a process of
    its own, and returns where it is.
    """

    def __init__(self, folder: Path, size: Size, threads: int) -> None:
        self.folder, self.size, self.threads = folder, size, threads

    def _made(self, name: str, make: Callable[..., None], *arguments: Any) -> Path:
        """``name`` in the folder, by ``make(path, *arguments)``."""
        target = self.folder / name
        if not target.exists():
            print(f"preparing {name}", flush=True)
            with whole(target) as partial:
                in_own_process(make, partial, *arguments)
        return target

    def pipeline(self) -> Path:
        """The model with random weights, in diffusers' layout."""
        return self._made("pipeline", save_pipeline, self.size)

    def recorded(self) -> Path:
        """The trajectories that ours and NNCF's are calibrated on: one sampling, of a step for each
        bucket.
        """
        return self._made("recorded", record, self.pipeline(), self.size.buckets)

    def inputs(self) -> Path:
        """What predictions are compared on; see ``workers.measuring.predictions_error``."""
        return self._made("inputs", save_inputs, self.pipeline())

    def models(self, form: str = FLOAT) -> Path:
        """OpenVINO's models of the parts, ``<part>.xml``; of another form the UNet alone."""
        if form == FLOAT:
            return self._made("openvino-float", convert, self.pipeline())
        unet = self.models() / f"{UNET}.xml"
        return self._made(f"openvino-{form}", quantize, unet, self.recorded(), form)

    def workspace(self, form: OurForm) -> Path:
        """Our workspace, its engines built for these threads; goes on where it was interrupted."""
        folder = self.folder / f"ours-{form.name}-{self.threads}-threads"
        if not (folder / MANIFEST).exists() or (
            f"build-parts/{BACKEND}" not in Workspace.open(folder).stages
        ):
            calibrated = None
            if form.bf16:
                calibrated = self.workspace(replace(form, bf16=False)) / CALIBRATED
            print(f"preparing {folder.name}", flush=True)
            given = self.pipeline(), self.recorded(), form, self.threads, calibrated
            in_own_process(build_ours, folder, *given)
        return folder

    def optimum(self, python: Path, form: str = FLOAT) -> Path:
        """What optimum-intel exports, by its environment's ``python``; of another form with that
        UNet.
        """
        if form == FLOAT:
            return self._made("optimum-float", export_optimum, python, self.pipeline())
        unet = self.models(form) / f"{UNET}.xml"
        return self._made(f"optimum-{form}", with_unet, self.optimum(python), unet)

    def gguf(self, python: Path, kind: str) -> Path:
        """stable-diffusion.cpp's file of the ``kind`` "q8_0" or "q4_0", by its environment's
        ``python``.
        """
        return self._made(f"{kind}.gguf", convert_to_gguf, python, self.pipeline(), kind)


def bytes_of(paths: Sequence[Path]) -> int:
    """Of the files, and of all files in the folders."""
    return sum(file.stat().st_size for file in files_of(paths))


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The files, and all files in the folders."""
    found = [x for path in paths for x in ([path] if path.is_file() else path.rglob("*"))]
    return [file for file in found if file.is_file()]


def shapes_of(size: Size) -> dict[str, list[list[int]]]:
    """The inputs of each part's model in an image with guidance."""
    unet = _unet_config(size)
    latents = [unet["in_channels"], unet["sample_size"], unet["sample_size"]]
    tokens = TOKENS, unet["cross_attention_dim"]
    return {
        TEXT_ENCODER: [[1, TOKENS]],
        UNET: [[2, *latents], [1], [2, *tokens]],
        VAE: [[1, *latents]],
    }


def pixels(size: Size) -> int:
    """A side of the image."""
    levels = len({**VAE_CONFIG, **size.vae}["block_out_channels"])
    return int(_unet_config(size)["sample_size"] * 2 ** (levels - 1))


BACKEND = "openvino"
TOKENS = 77
TEXT_CONFIG = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": TOKENS,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
"""Of CLIP ViT-L/14's text encoder."""
VAE_CONFIG = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
"""Of Stable Diffusion 1's autoencoder."""
SCHEDULER_CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""Of Stable Diffusion 1, for DDIM: as many evaluations of the UNet as steps."""


def _unet_config(size: Size) -> dict[str, Any]:
    saved = json.loads((ARCHITECTURES / "sd15" / "unet" / "config.json").read_text())
    return {**saved, **size.unet}


def save_pipeline(folder: Path, size: Size) -> None:
    """Save a StableDiffusionPipeline with random weights. Its tokenizer knows the bytes alone: that
    changes no time.
    """
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    ends = ["<|startoftext|>", "<|endoftext|>"]
    entries = [*characters, *(f"{character}</w>" for character in characters), *ends]
    folder.mkdir()
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
    merges.write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(vocabulary), str(merges), model_max_length=TOKENS)
    vocabulary.unlink()
    merges.unlink()
    torch.manual_seed(SEED)
    vae = {**VAE_CONFIG, **size.vae}
    levels = len(vae["block_out_channels"])
    sides = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    text = {
        **TEXT_CONFIG,
        **size.text_encoder,
        "bos_token_id": len(entries) - 2,
        "eos_token_id": len(entries) - 1,
    }
    made: Any = StableDiffusionPipeline(
        vae=AutoencoderKL(**vae, **sides),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_config(_unet_config(size)),
        scheduler=DDIMScheduler(**SCHEDULER_CONFIG),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.save_pretrained(folder)


def _model(pipeline: Path) -> Any:
    from quest_deploy.models.loading import load_model, resolve_source

    return load_model(resolve_source(str(pipeline)))


def record(path: Path, pipeline: Path, steps: int) -> None:
    """Save the trajectories of one sampling without guidance."""
    from quest_deploy.artifacts.scheme import Scheme
    from quest_deploy.calibration.trajectories import record_trajectories

    model = _model(pipeline)
    record_trajectories(
        model,
        model.load_unet(),
        steps=steps,
        samples=1,
        seed=SEED,
        scheme=Scheme.parse("w8a8", buckets=steps),
        guidance=1.0,
    ).save(path)


def save_inputs(folder: Path, pipeline: Path) -> None:
    """Save what the UNet reads and predicts in torch, in a drawing of few steps."""
    import torch
    from diffusers import StableDiffusionPipeline

    drawing = StableDiffusionPipeline.from_pretrained(pipeline)
    drawing.set_progress_bar_config(disable=True)
    forward, found = drawing.unet.forward, []

    def noted(sample: Any, timestep: Any, encoder_hidden_states: Any, **options: Any) -> Any:
        output = forward(sample, timestep, encoder_hidden_states, **options)
        found.append(
            {
                "sample": sample.numpy().copy(),
                "timestep": np.full(len(sample), float(timestep), np.float32),
                "encoder_hidden_states": encoder_hidden_states.numpy(),
                "prediction": output[0].numpy(),
            }
        )
        return output

    drawing.unet.forward = noted
    drawing(
        OTHER_PROMPT,
        guidance_scale=GUIDANCE,
        num_inference_steps=COMPARED_STEPS,
        generator=torch.Generator().manual_seed(SEED + 1),
        output_type="latent",
    )
    folder.mkdir()
    for name in found[0]:
        np.save(folder / f"{name}.npy", np.stack([each[name] for each in found]))


def convert(folder: Path, pipeline: Path) -> None:
    """Save OpenVINO's float models of the parts."""
    import openvino
    import torch
    from diffusers import StableDiffusionPipeline

    loaded = StableDiffusionPipeline.from_pretrained(pipeline)
    unet_config = loaded.unet.config
    latents = torch.zeros(1, unet_config.in_channels, *[unet_config.sample_size] * 2)
    states = torch.zeros(1, TOKENS, unet_config.cross_attention_dim)

    class Part(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module: Any = module

    class TextEncoder(Part):
        def forward(self, input_ids: Any) -> Any:
            return self.module(input_ids, return_dict=False)[0]

    class UNet(Part):
        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
            return self.module(sample, timestep, encoder_hidden_states, return_dict=False)[0]

    class Decoder(Part):
        def forward(self, latent_sample: Any) -> Any:
            return self.module.decode(latent_sample, return_dict=False)[0]

    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    timestep = torch.ones(1, dtype=torch.int64)  # as GenAI's pipeline gives it
    examples: dict[str, tuple[torch.nn.Module, dict[str, Any]]] = {
        TEXT_ENCODER: (TextEncoder(loaded.text_encoder), {"input_ids": ids}),
        UNET: (
            UNet(loaded.unet),
            {"sample": latents, "timestep": timestep, "encoder_hidden_states": states},
        ),
        VAE: (Decoder(loaded.vae), {"latent_sample": latents}),
    }
    names = {TEXT_ENCODER: "last_hidden_state", UNET: "out_sample", VAE: "sample"}
    folder.mkdir()
    for part, (module, example) in examples.items():
        with torch.no_grad():
            model = openvino.convert_model(module.eval(), example_input=example)
        model.outputs[0].get_tensor().set_names({names[part]})
        openvino.save_model(model, folder / f"{part}.xml", compress_to_fp16=False)


def quantize(folder: Path, source: Path, recorded: Path, form: str) -> None:
    """Save NNCF's form of the UNet at ``source``, calibrated on what was recorded."""
    import openvino

    from quest_deploy.calibration.trajectories import Trajectories

    model = openvino.Core().read_model(source)
    batches = list(Trajectories.load(recorded).batches(1))
    feeds = [{name: value.numpy() for name, value in batch.items()} for batch in batches]
    for each in feeds:
        each["timestep"] = each["timestep"].astype(np.int64)
    model.reshape({name: [-1, *value.shape[1:]] for name, value in feeds[0].items()})
    folder.mkdir()
    openvino.save_model(nncf_form(model, form, feeds), folder / source.name, compress_to_fp16=False)


def nncf_form(model: Any, form: str, feeds: Sequence[Mapping[str, NDArray[Any]]]) -> Any:
    """NNCF's ``form`` of an OpenVINO model, which is changed, calibrated on ``feeds``.

    INT8 is its default for transformers. The hybrid form is optimum-intel's for UNets: weights
    alone in what is no convolution, then static INT8 of the rest, without SmoothQuant
    (``_get_hybrid_mixed_quantization_config`` in optimum/intel/openvino/quantization.py).
    """
    import nncf

    settings: dict[str, Any] = {
        "model_type": nncf.ModelType.TRANSFORMER,
        "subset_size": len(feeds),
    }
    if form == HYBRID:
        settings["ignored_scope"] = nncf.IgnoredScope(names=weighted_ops(model), validate=False)
        settings["advanced_parameters"] = nncf.AdvancedQuantizationParameters(
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1)
        )
        model = nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT8_ASYM,
            ignored_scope=nncf.IgnoredScope(types=["Convolution"]),
        )
    return nncf.quantize(model, nncf.Dataset(list(feeds)), **settings)


def weighted_ops(model: Any) -> list[str]:
    """The products and tables of an OpenVINO model that have weights."""
    weighted = {"MatMul": (0, 1), "Gather": (0,)}
    return [
        op.get_friendly_name()
        for op in model.get_ops()
        if any(_is_constant(op.input_value(i)) for i in weighted.get(op.get_type_name(), ()))
        and op.get_output_element_type(0).is_real()
    ]


def _is_constant(value: Any) -> bool:
    """Whether a constant is behind it, perhaps of another type or shape."""
    node = value.get_node()
    while node.get_type_name() in ("Convert", "FakeQuantize", "Reshape"):
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


def build_ours(
    folder: Path,
    pipeline: Path,
    recorded: Path,
    form: OurForm,
    threads: int,
    calibrated: Path | None = None,
) -> None:
    """Calibrate by min-max on what was recorded, or take the checkpoint ``calibrated`` of the same
    bits; export, and build all engines.
    """
    from quest_deploy.artifacts.checkpoint import load_checkpoint
    from quest_deploy.calibration import ptq
    from quest_deploy.calibration.trajectories import Trajectories
    from quest_deploy.stages import CALIBRATE
    from quest_deploy.stages.arguments import CalibrateArguments
    from quest_deploy.stages.calibrate import describe, save_calibrated
    from quest_deploy.stages.options import CalibrateOptions

    trajectories = Trajectories.load(recorded)
    chosen = CalibrateArguments(
        str(pipeline),
        workspace=folder,
        bits=form.bits,
        buckets=len(trajectories.timestep),
        method="minmax",
        **form.calibration,
    )
    workspace = chosen.opened()

    def calibrate(workspace: Workspace, options: Any, progress: Any) -> Any:
        if calibrated is not None:
            checkpoint = load_checkpoint(calibrated)
        else:
            checkpoint = ptq.calibrate(
                workspace.model,
                _model(pipeline).load_unet(),
                trajectories,
                workspace.scheme,
                ptq.CalibrationOptions(ptq.RangeMethod.MINMAX, batch=1),
                progress,
            )
        files = save_calibrated(workspace, trajectories, checkpoint)
        return files, describe(workspace, checkpoint)

    if CALIBRATE.name not in workspace.stages:
        CALIBRATE.run(workspace, chosen.of(CalibrateOptions), work=calibrate)
    if "export" not in workspace.stages:
        qd.export(workspace)
    if f"build-engine/{BACKEND}" not in workspace.stages:
        qd.build_engine(workspace, backend=BACKEND, threads=threads, dtype=form.dtype)
    qd.export_parts(workspace)
    qd.build_parts(workspace, backend=BACKEND, threads=threads, dtype=form.dtype)


def export_optimum(folder: Path, python: Path, pipeline: Path) -> None:
    """Have optimum-intel export the pipeline, as it does by default."""
    command = [python.with_name("optimum-cli"), "export", "openvino", "--task", "text-to-image"]
    run([*map(str, command), "--model", str(pipeline), str(folder)])


def with_unet(folder: Path, exported: Path, unet: Path) -> None:
    """Copy what optimum-intel exported, its files linked, but for the UNet."""
    shutil.copytree(exported, folder, copy_function=lambda a, b: Path(b).hardlink_to(a))
    for suffix in (".xml", ".bin"):
        target = folder / UNET / f"openvino_model{suffix}"
        target.unlink()
        target.hardlink_to(unet.with_suffix(suffix))


def convert_to_gguf(path: Path, python: Path, pipeline: Path, kind: str) -> None:
    """Have stable-diffusion.cpp convert the pipeline, from weights in FP16 and by their names in
    the hub's files: what it cannot quantize, convolutions, keeps the type that it has.
    """
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        half = Path(folder) / "pipeline"
        shutil.copytree(pipeline, half, ignore=shutil.ignore_patterns("*.safetensors"))
        for source in pipeline.glob("*/*.safetensors"):
            # transformers 5 saves a text encoder without it.
            prefix = "text_model." if source.parent.name == TEXT_ENCODER else ""
            named = {
                prefix + name.removeprefix(prefix): value.half()
                for name, value in load_file(source).items()
            }
            save_file(named, half / source.relative_to(pipeline))
        module = "scripts.bench.image.workers.convert_sdcpp"
        run([str(python), "-m", module, str(half), str(path), kind])


def run(command: list[str]) -> None:
    """Run another program; raise QuestDeployError with its last line where it fails."""
    done = subprocess.run(
        command, check=False, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        said = done.stdout.strip().splitlines() or ["it said nothing"]
        raise QuestDeployError(f"{' '.join(command)}: exit code {done.returncode}: {said[-1]}")
