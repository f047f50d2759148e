"""How `benchmark` prints what it measured; docs/results/ has the same tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.artifacts.workspace import ENGINES
from quest_deploy.cli.console import table
from quest_deploy.cli.precision import describe_summary
from quest_deploy.evaluation.benchmark import FP32, QUANTIZED
from quest_deploy.evaluation.pipeline_benchmark import DECODER, IMAGE_ENCODER, TEXT_ENCODER, UNET
from quest_deploy.files import size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.stages.results import Benchmark

    Rows = list[list[str]]

GAIN = "gain over FP32"


def benchmark(workspace: Workspace, details: Benchmark) -> str:
    """The details as tables, and the ratios in words."""
    gains = details["speedup_over_fp32"]
    lines = [
        f"backend {details['backend']}, {details['buckets']} buckets; medians of engines timed in "
        f"turn, in one process; {GAIN}: above 1x, faster or smaller",
        table(*timings("engine", details)),
        "",
        table(*footprints("engine", details)),
        "",
        *(f"batch {b}: {_speed(gain)}" for b, gain in gains.items()),
        *(
            f"batch {b}: choosing buckets takes {ratio:.2f}x the time of a static scale"
            for b, ratio in details["bucket_selection_cost"].items()
        ),
        *(
            f"batch {b}: {ratio:.2f}x the speed of native quantization"
            for b, ratio in details.get("plugin_speedup", {}).items()
        ),
        *sizes(details),
        *describe_summary(details["precision"]),
        *(["", *_whole_images(details["pipeline"])] if "pipeline" in details else []),
    ]
    if any(_worse(gain) for gain in gains.values()):
        engine = workspace.path(ENGINES, details["backend"])
        lines += [
            "",
            "why it is slower, a benchmark does not tell: look at what each layer runs in, and at "
            f"its multiply-adds, with `quest-deploy inspect {engine} --layers`; layers with few of "
            "them gain little from INT8",
        ]
    return "\n".join(lines)


def timings(title: str, details: Benchmark) -> tuple[list[str], Rows]:
    """The header, ``title`` first, and the rows of a table of the engines' times."""
    ordered = sorted(details["timings"], key=lambda t: t["batch"])
    fp32 = {t["batch"]: t["median_s"] for t in ordered if t["engine"] == FP32}
    return [title, "batch", "median ms", "p90 ms", "samples/s", GAIN], [
        [
            t["engine"],
            str(t["batch"]),
            f"{1e3 * t['median_s']:.2f}",
            f"{1e3 * t['p90_s']:.2f}",
            f"{t['samples_per_s']:.4g}",
            _gain(fp32[t["batch"]], t["median_s"]),
        ]
        for t in ordered
    ]


def footprints(title: str, details: Benchmark) -> tuple[list[str], Rows]:
    """The header, ``title`` first, and the rows of a table of the engines' files and memory; that
    of the GPU where all of them have it.
    """
    fp32 = _by_engine(details["footprints"])[FP32]
    columns = {"file_bytes": "files", "peak_memory_bytes": "peak memory"}
    if all(f.get("gpu_bytes") is not None for f in details["footprints"]):  # not in earlier records
        columns["gpu_bytes"] = "GPU memory"
    return [title, *(cell for name in columns.values() for cell in (name, GAIN))], [
        [
            f["engine"],
            *(cell for key in columns for cell in (size(f[key]), _gain(fp32[key], f[key]))),
        ]
        for f in details["footprints"]
    ]


def image_times(title: str, details: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """The header, ``title`` first, and the rows of a table of whole images, a column for each
    engine: the parts and the rest, which add up to the whole, and what else is known of it.
    """
    engines = _by_engine(details["engines"])
    network = details.get("network", "UNet")  # records of earlier versions do not name it
    fp32, quantized = engines[FP32], engines[QUANTIZED]
    parts = {
        TEXT_ENCODER: "Text encoder",
        IMAGE_ENCODER: "Image encoder",
        UNET: f"{network[0].upper()}{network[1:]}, {counted(fp32['unet_calls'], 'call')}",
        DECODER: "Decoder",
    }
    seconds = {
        **{
            name: {engine: x["parts"][part] for engine, x in engines.items()}
            for part, name in parts.items()
            if part in fp32["parts"]
        },
        "Rest (scheduler, copies)": {  # records of earlier versions do not name it
            engine: x["total_s"] - sum(x["parts"].values()) for engine, x in engines.items()
        },
        "Whole image": {engine: x["total_s"] for engine, x in engines.items()},
        f"One call of the {network}": {engine: x["unet_call_s"] for engine, x in engines.items()},
    }
    return [title, *engines, GAIN], [
        *(
            [
                name,
                *(f"{1e3 * x:.2f} ms" for x in taken.values()),
                _gain(taken[FP32], taken[QUANTIZED]),
            ]
            for name, taken in seconds.items()
        ),
        [
            "Images per second",
            *(f"{x['images_per_s']:.4g}" for x in engines.values()),
            _gain(quantized["images_per_s"], fp32["images_per_s"]),
        ],
        [
            "Peak memory",
            *(size(x["peak_memory_bytes"]) for x in engines.values()),
            _gain(fp32["peak_memory_bytes"], quantized["peak_memory_bytes"]),
        ],
    ]


def drawings(details: Mapping[str, Any]) -> str:
    """How whole images were drawn."""
    images, draws = details["images"], details["draws"]
    return (
        f"{counted(images, 'image')} of {details['height']}x{details['width']}"
        f"{' at once' if images > 1 else ''}, {counted(details['steps'], 'step')} of "
        f"{details['scheduler']}, guidance {details['guidance']:g}; "
        + ("1 drawing of each engine" if draws == 1 else f"medians of {draws} drawings in turn")
    )


def sizes(details: Benchmark) -> list[str]:
    """The lines that compare the engine's files and memory with FP32's."""
    peaks = {name: f["peak_memory_bytes"] for name, f in _by_engine(details["footprints"]).items()}
    return [
        files(details),
        f"peak memory {_compared(peaks[FP32] / peaks[QUANTIZED], 'lower', 'higher')}",
    ]


def files(details: Benchmark) -> str:
    """How the size of the engine's files compares with FP32's."""
    return f"files {_compared(details['size_ratio_to_fp32'], 'smaller', 'larger')}"


def speeds(details: Benchmark) -> str:
    """How the engine's speed compares with FP32's, in a line."""
    return ", ".join(
        f"{gain:.2f}x FP32{' (slower)' if _worse(gain) else ''} at batch {batch}"
        for batch, gain in details["speedup_over_fp32"].items()
    )


def counted(count: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "image"), counted(2, "image")
    ('1 image', '2 images')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _whole_images(details: dict[str, Any]) -> list[str]:
    return [
        drawings(details),
        table(*image_times("Module", details)),
        f"whole images: {_speed(details['speedup_over_fp32'])}",
    ]


def _by_engine(found: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {x["engine"]: x for x in found}


def _gain(above: float, below: float) -> str:
    """A ratio; none of the rest where it is lost in the noise of the parts."""
    return f"{above / below:.2f}x" if above > 0 and below > 0 else "-"


def _worse(gain: float) -> bool:
    """Whether it is below 1 as it is printed."""
    return round(gain, 2) < 1


def _speed(gain: float) -> str:
    return f"{gain:.2f}x the speed of FP32{', slower than FP32' if _worse(gain) else ''}"


def _compared(gain: float, better: str, worse: str) -> str:
    return (
        f"{1 / gain:.2f}x {worse} than FP32" if _worse(gain) else f"{gain:.2f}x {better} than FP32"
    )
