"""Judge adapters on the quantized embedded model: a LoRA that `quest-deploy lora` folds in, and a
ControlNet whose residuals the UNet gets; writes docs/adapters/ and its figures,
scripts/bench/results/adapters.json.

    python -m scripts.bench.compare_adapters -w quest-out/emoji-w4a8 -w quest-out/emoji-w4a4

The workspaces are what `quest-deploy run --model emoji --bits ...` makes, or `quest-deploy
calibrate --controlnet examples/adapters/edges` and `finetune`, which have rows of their own in the
ControlNet's table and none in the LoRA's; the adapters are those of examples/adapters/. All draw
the same prompts from the same noise, with the fake-quantized model, which `quest-deploy verify`
holds engines to. What is drawn is kept in ``--work`` under a hash of all that it was made from, so
that an interrupted run goes on with the next.

The LoRA draws in blue. An image's distance to its own blue form says how far it is from that, the
Frechet distance is to the real pictures in blue. The ControlNet follows the edges of the real
pictures, shifted and mirrored: the agreement is the F-measure of the drawn image's edges and those
that were given, which count as found within a pixel.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModelWithProjection

import quest_deploy as qd
from quest_deploy.artifacts.checkpoint import load_checkpoint
from quest_deploy.artifacts.workspace import Workspace, versions
from quest_deploy.backends.base import processor_name
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.evaluation.image_grid import save_comparison
from quest_deploy.evaluation.quality import SamplingOptions, draw, evaluate_images
from quest_deploy.evaluation.retrieval import BATCH, STATISTICS, Judge
from quest_deploy.evaluation.sampling import float_denoiser
from quest_deploy.files import atomic_file, read_json, sha256_of, write_json
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.pipeline_model import PipelineModel, quiet
from quest_deploy.models.registry import EMBEDDED
from quest_deploy.models.residuals import CONTROLNET
from quest_deploy.models.weights import load_part
from quest_deploy.quantization.model import QuantizedModel
from quest_deploy.stages import CALIBRATE
from quest_deploy.stages.evaluate import captions_of
from scripts.bench.methods.model import ComparedModel
from scripts.bench.methods.shared import IMAGES, shared
from scripts.make_emoji_adapters import EDGES, STYLE, blue_of, edges_of
from scripts.make_emoji_model import augmented, can_flip, draw_pictures, pictures_of, prompt_order

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from quest_deploy.evaluation.sampling import Denoiser

    Images = NDArray[np.float32]
    Figures = dict[str, float | None]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "scripts/bench/results/adapters.json"
DOCS = ROOT / "docs/adapters"
TABLE = "table.md"
ADAPTERS = ROOT / "examples/adapters"
DASH = "\N{EN DASH}"
SHOWN = 6
"""Images of each that the page shows."""
COPIES_SEED, ASKED_SEED = 7, 11
"""Of the shifted and mirrored pictures that are real to the judge, as where the judge was made, and
of those whose edges are asked for.
"""
PICTURES, WITHOUT, FLOAT = "the pictures", "FP32 without", "FP32"
"""Rows: the real pictures as the decoder leaves them; the float model without and with an
adapter.
"""


class Adapter(StrEnum):
    """A kind of adapter, and so a table."""

    LORA = "lora"
    CONTROLNET = "controlnet"


COLUMNS = {
    Adapter.LORA: {
        "distance_to_blue": ("distance to blue, of 255", "{:.2f}"),
        "frechet_distance": ("Fréchet distance to blue pictures", "{:.2f}"),
        "psnr": ("PSNR to FP32 with it, dB", "{:.2f}"),
        "ssim": ("SSIM to FP32 with it", "{:.3f}"),
    },
    Adapter.CONTROLNET: {
        "agreement": ("agreement with the edges", "{:.3f}"),
        "frechet_distance": ("Fréchet distance to the pictures", "{:.2f}"),
        "top5": ("prompt of the 5 nearest", "{:.1%}"),
        "psnr": ("PSNR to FP32 with it, dB", "{:.2f}"),
        "ssim": ("SSIM to FP32 with it", "{:.3f}"),
    },
}
"""Of each table, the figures that it shows, their headings and forms."""
PAGE = """# Adapters on quantized models

`python -m scripts.bench.compare_adapters` measures `scripts/bench/results/adapters.json` and makes
this page of it: the embedded model with each of the adapters in `examples/adapters/`, in FP32 and
quantized. The quantized rows are the fake-quantized model, which `quest-deploy verify` holds
engines to.

"The pictures" are the real ones, as the model's encoder and decoder leave them: the best that a row
can reach.

## A LoRA that draws in blue

Folded into each finetuned workspace by `quest-deploy lora`, which keeps the activation scales that
were calibrated without it.

{lora}

![Each row's first images](lora.png)

The distance to blue is the mean absolute difference of an image to its own blue form: 0 where it is
blue. The judge learned from the pictures in their own colours and tells few blue ones apart, so the
prompts are not looked for.

## A ControlNet that follows edges

Its residuals go into the UNet as they are, in float. The activation scales were calibrated and
finetuned without them, but in the rows that say so half of the samplings had them
(`calibrate --controlnet`).

{controlnet}

![The edges that were given, and each row's first images](controlnet.png)

The edges are those of the real pictures, shifted and mirrored, which the prompt does not tell. The
agreement is the F-measure of the drawn image's edges and the given ones, where an edge within a
pixel counts.
"""

CALIBRATED = ", calibrated with it"
"""Behind the name of a row."""
SAMPLING = (
    "{images} prompts, {steps} steps of {scheduler}, guidance {guidance:g}, the same noise in "
    "every row:"
)


class Sketched(PipelineModel):
    """The embedded model asked for by prompts and edges.

    Attributes:
        edges: float32 [labels, 3, 64, 64], 1 on an edge, else 0.
    """

    edges: Tensor

    @classmethod
    def load(cls, edges: Tensor) -> Self:
        """The model, with edges [labels, 64, 64] as ``edges_of`` gives them."""
        model = cls(resolve_source(EMBEDDED))
        model.edges = edges[:, None].expand(-1, 3, -1, -1) / 255
        return model

    @property
    def digest(self) -> str:
        """A hash of the edges."""
        return sha256(self.edges.numpy().tobytes()).hexdigest()

    def conditions(self, labels: NDArray[np.int64]) -> dict[str, Tensor]:
        """The states of the prompts, and the edges."""
        return {**super().conditions(labels), "edges": self.edges[torch.from_numpy(labels)]}


def steered(unet: Callable[..., Tensor], controlnet: nn.Module) -> Denoiser:
    """``unet`` with the residuals that ``controlnet`` makes of the condition ``edges``."""

    def denoise(sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        edges, states = conditions.pop("edges"), conditions["encoder_hidden_states"]
        down, middle = controlnet(
            sample, timestep, states, controlnet_cond=edges, return_dict=False
        )
        residuals = {"down_block_additional_residuals": down}
        return unet(
            sample, timestep, **conditions, **residuals, mid_block_additional_residual=middle
        )

    return denoise


def agreement(found: Tensor, asked: Tensor) -> float:
    """The F-measure of edges ``found`` and ``asked`` for, uint8 [N, H, W], within a pixel: how many
    of either have one of the other beside them.
    """
    hits = [
        ((one > 0) & _near(other)).sum() / (one > 0).sum().clamp(min=1)
        for one, other in ((found, asked), (asked, found))
    ]
    return float(2 * hits[0] * hits[1] / (hits[0] + hits[1]).clamp(min=1e-9))


def _near(edges: Tensor) -> Tensor:
    return F.max_pool2d(edges[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0


def distance_to_blue(images: Tensor) -> float:
    """The mean absolute difference of images [N, 3, H, W] in [-1, 1] to their own blue form, in
    levels of 255.
    """
    return float((images - blue_of(images)).abs().mean()) * 127.5


@torch.no_grad()
def judge_of(pictures: Tensor, folder: Path, work: Path) -> Judge:
    """The judge in ``folder`` to which ``pictures`` [N, 3, 64, 64] are the real ones."""
    with quiet():
        encoder = load_part(folder, CLIPVisionModelWithProjection)
    seen = torch.cat([encoder(pixel_values=x).image_embeds for x in pictures.split(BATCH)])
    made = work / "judge"
    made.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    names = load_file(folder / STATISTICS)["names"]
    statistics = {"mean": seen.double().mean(0), "covariance": seen.double().T.cov()}
    save_file({"names": names, **statistics}, made / STATISTICS)
    return Judge(made)


@dataclass(frozen=True)
class Case:
    """What is drawn with.

    Attributes:
        name: its row in the tables.
        unet: makes what predicts.
        made_from: the hashes of the files that ``unet`` reads, or of what stands for them.
    """

    name: str
    unet: Callable[[], Callable[..., Tensor]]
    made_from: dict[str, str]


def float_case(model: PipelineModel) -> Case:
    """The float model, its LoRAs fused."""
    hashes = {Path(lora.path).name: lora.sha256 for lora in model.source.loras}
    return Case(FLOAT, lambda: float_denoiser(model.load_unet()), hashes)


def row_of(workspace: Workspace) -> str:
    """What the row of a quantized model is called."""
    return workspace.scheme.name.upper() + (CALIBRATED if calibrated_with_it(workspace) else "")


def calibrated_with_it(workspace: Workspace) -> bool:
    """Whether ``workspace`` was calibrated with a ControlNet."""
    return bool(workspace.options_of(CALIBRATE.name).get(CONTROLNET))


def quantized_case(workspace: Workspace) -> Case:
    """The fake-quantized model of the checkpoint in ``workspace``."""
    workspace.require(workspace.checkpoint_stage)
    path = workspace.checkpoint_path

    def load() -> QuantizedModel:
        model = QuantizedModel.from_checkpoint(load_checkpoint(path)).eval()
        for layer in model.quantized_layers().values():
            layer.freeze()
        return model

    return Case(row_of(workspace), load, {"checkpoint": sha256_of(path)})


@dataclass
class Bench:
    """Draws and judges.

    Attributes:
        work: where drawings are kept.
        parts: the hashes of the model's parts.
    """

    work: Path
    sampling: SamplingOptions
    parts: Mapping[str, str]

    def drawn(self, case: Case, model: PipelineModel, controlnet: Path | None = None) -> Images:
        """What ``case`` draws, [N, 3, 64, 64] in [-1, 1], with the ControlNet in that folder."""
        files = [] if controlnet is None else sorted(controlnet.iterdir())
        made_from = {
            "model": dict(self.parts),
            "sampling": asdict(self.sampling),
            "case": case.made_from,
            "controlnet": {path.name: sha256_of(path) for path in files},
            "edges": model.digest if isinstance(model, Sketched) else None,
        }

        def draw_them() -> Images:
            print(f"{case.name} draws with {controlnet or ', '.join(case.made_from)}", flush=True)
            denoise = case.unet()
            if controlnet is not None:
                denoise = steered(denoise, _controlnet(controlnet))
            return draw(model, denoise, self.sampling)[0]

        return shared(self.work / "drawn", IMAGES, made_from, draw_them)[0]

    def judged(self, images: Images, fp32_images: Images, judge: Judge, asked: Tensor) -> Figures:
        """Every figure of a row, of either table; ``asked`` are edges by label."""
        labels = np.arange(len(images))
        quality = evaluate_images(images, labels, fp32_images, [], judge).to_json()
        tensor = torch.from_numpy(images)
        return {
            **{
                name: quality[name] for name in ("psnr", "ssim", "frechet_distance", "top1", "top5")
            },
            "distance_to_blue": distance_to_blue(tensor),
            "agreement": agreement(edges_of(tensor), asked[: len(images)]),
        }


def _controlnet(folder: Path) -> nn.Module:
    with quiet():
        made: nn.Module = ControlNetModel.from_pretrained(folder, torch_dtype=torch.float32)
    return made.eval()


@torch.no_grad()
def decoded(model: PipelineModel, pictures: Tensor) -> Images:
    """Pictures [N, 3, 64, 64] as the model's encoder and decoder leave them."""
    vae = model.load_decoder()
    latents = torch.cat([vae.encode(x).latent_dist.mean for x in pictures.split(BATCH)])
    return model.images((latents * vae.config.scaling_factor).numpy())


class Pictures:
    """The real pictures, in the order of the prompts.

    Attributes:
        plain, asked: float32 [N, 3, 64, 64] in [-1, 1]: as they are, and shifted and mirrored as
            those whose edges are asked for.
        copies: the same, as those that are real to the judge.
    """

    def __init__(self, folder: Path) -> None:
        """Read them from make_emoji_model's ``--work``, drawn there where they are not."""
        if not (folder / "names.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            draw_pictures(folder)
        real, entries = pictures_of(folder)
        order = torch.tensor(prompt_order(len(real)))
        self.plain, flips = real.cpu()[order], can_flip(entries)[order]
        self.asked, self.copies = (
            augmented(self.plain, flips, torch.Generator().manual_seed(seed))
            for seed in (ASKED_SEED, COPIES_SEED)
        )


def check_apart(workspaces: Sequence[Workspace]) -> None:
    """Raise InputError where two would share a row, or the folder of what a LoRA is folded into."""
    rows, folders = map(row_of, workspaces), (each.root.name for each in workspaces)
    for what, names in (("bits or calibration", list(rows)), ("folders' names", list(folders))):
        if len(set(names)) < len(names):
            raise InputError(f"-w: expected other {what} for each, found {', '.join(names)}")


def measure(
    table: Adapter,
    bench: Bench,
    roots: Sequence[Path],
    adapters: Path,
    pictures: Pictures,
    docs: Path,
) -> dict[str, Any]:
    """Draw and judge the rows of ``table``; save the page's picture of it.

    Returns:
        The figures by row, and what they depend on.
    """
    plain, asked = load_model(resolve_source(EMBEDDED)), edges_of(pictures.asked)
    assert plain.judge_folder is not None
    shown: dict[str, Images] = {}
    count = bench.sampling.images
    if table is Adapter.LORA:
        adapter = adapters / STYLE
        blue = load_model(resolve_source(EMBEDDED, loras=[str(adapter)]))
        workspaces = [
            qd.lora(workspace=root, lora=[str(adapter)], output=bench.work / f"{root.name}-blue")
            for root in roots
            if not calibrated_with_it(Workspace.open(root))
        ]
        cases = [float_case(blue), *map(quantized_case, workspaces)]
        rows = {PICTURES: decoded(plain, blue_of(pictures.plain[:count]))}
        drawn = {case.name: bench.drawn(case, blue) for case in cases}
        judge = judge_of(blue_of(pictures.copies), plain.judge_folder, bench.work)
    else:
        adapter = adapters / EDGES
        workspaces = [Workspace.open(root) for root in roots]
        cases = [float_case(plain), *map(quantized_case, workspaces)]
        rows = {PICTURES: decoded(plain, pictures.asked[:count])}
        drawn = {case.name: bench.drawn(case, Sketched.load(asked), adapter) for case in cases}
        judge = Judge(plain.judge_folder)
        shown = {"edges": (asked[:SHOWN, None].expand(-1, 3, -1, -1) / 127.5 - 1).numpy()}
    rows |= {WITHOUT: bench.drawn(float_case(plain), plain), **drawn}
    docs.mkdir(parents=True, exist_ok=True)
    shown |= {name: images[:SHOWN] for name, images in rows.items()}
    save_comparison(shown, captions_of(plain, np.arange(SHOWN)), docs / f"{table}.png")
    files = [adapter] if adapter.is_file() else sorted(adapter.iterdir())
    return {
        "sampling": asdict(bench.sampling),
        "adapter": {path.relative_to(adapters).as_posix(): sha256_of(path) for path in files},
        "checkpoints": {row_of(each): sha256_of(each.checkpoint_path) for each in workspaces},
        "environment": {"processor": processor_name(), **versions()},
        "rows": {
            name: bench.judged(images, rows[FLOAT], judge, asked) for name, images in rows.items()
        },
    }


def page(found: dict[str, Any]) -> str:
    """The page of the tables that are measured."""
    tables = {
        name: _table(found[name], name) if name in found else "Not measured yet."
        for name in COLUMNS
    }
    return PAGE.format(**tables)


def _table(measured: dict[str, Any], name: Adapter) -> str:
    """The rows, and what they were drawn with."""
    columns, rows = COLUMNS[name], measured["rows"]
    lines = [
        ["", *(heading for heading, _ in columns.values())],
        ["---", *("---:" for _ in columns)],
        *(
            [row, *(_cell(row, key, figures[key], form) for key, (_, form) in columns.items())]
            for row, figures in rows.items()
        ),
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{SAMPLING.format(**measured['sampling'])}\n\n{table}"


def _cell(row: str, key: str, figure: float | None, form: str) -> str:
    if row == PICTURES and key in ("psnr", "ssim"):  # which are of no noise
        return DASH
    return "same" if figure is None else form.format(figure)


def main(
    workspace: Annotated[list[Path], typer.Option("-w", "--workspace", help="Of emoji.")],
    adapters: Annotated[Path, typer.Option(help="Where they are.")] = ADAPTERS,
    pictures: Annotated[Path, typer.Option(help="make_emoji_model's --work.")] = Path(
        "build/emoji"
    ),
    work: Annotated[Path, typer.Option(help="Where drawings are kept.")] = Path("build/adapters"),
    images: Annotated[int, typer.Option(min=2, help="Of each row.")] = 256,
    only: Annotated[list[Adapter] | None, typer.Option(help="Not both tables.")] = None,
    results: Path = RESULTS,
    docs: Path = DOCS,
) -> None:
    """Draw, judge, and write the figures and the page."""
    try:
        check_apart([Workspace.open(root) for root in workspace])
        model = ComparedModel.load()
        bench = Bench(work, replace(model.sampling, images=images), model.parts)
        found = read_json(results) if results.exists() else {}
        for table in only or COLUMNS:
            found[table] = measure(table, bench, workspace, adapters, Pictures(pictures), docs)
            write_json(results, found)
    except QuestDeployError as e:
        typer.echo(f"error: {e}", err=True)
        raise typer.Exit(e.exit_code) from e
    with atomic_file(docs / TABLE) as temporary:
        temporary.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
