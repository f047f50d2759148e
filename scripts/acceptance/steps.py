"""What the acceptance of the GPU half runs: steps, each a list of commands, and the figures of each
command's answer.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scripts.bench import bench_sd15, measure_plugin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 2**20
OURS, LINKED = "headers of this tensorrt", "libnvinfer of this tensorrt"
"""What ``find`` calls headers that plugins can be built with, and a library that programs can be
linked with, to run with the TensorRT that Python has.
"""
MEMORY_AIM_GB, CONTEXT_GB = 24, 1
"""What finetuning at Stable Diffusion 1.5's size may need, so that it fits a common GPU, and what
CUDA's own context takes of it at most.
"""
_CODES = ("codes", "mismatches")

Answer = dict[str, Any]
"""What a command printed as JSON; where it printed anything else, its last lines, as "output"."""


@dataclass(frozen=True)
class Figure:
    """One line of the table: what, how much, and what was aimed at."""

    what: str
    value: str
    aim: str = ""


@dataclass(frozen=True)
class Command:
    """A command line, and what is read out of its answer.

    Attributes:
        line: words as a shell parses them; what is in braces is what ``Places.names`` has.
        reads: the JSON file that it writes, where it does not print it.
    """

    line: str
    figures: Callable[[Answer], list[Figure]] = lambda answer: []
    reads: str = ""


@dataclass(frozen=True)
class Step:
    """Commands that are measured together.

    Attributes:
        needs: what the machine must have, by the names that ``find`` gives.
        after: steps whose files it reads.
        minutes: what its commands may take together.
    """

    name: str
    commands: tuple[Command, ...]
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    minutes: float = 10.0


def engine_figures(answer: Answer) -> list[Figure]:
    """Of `build-engine`."""
    size = sum(answer["files"].values())
    how = answer.get("quantize", answer["backend"])
    made = f"{size / 1e6:.1f} MB in {answer['seconds']:.1f} s"
    if (refit := answer.get("refit")) is None:
        return [Figure(f"engine, {how}", made)]
    return [
        Figure(
            f"engine, {how}, by refit",
            f"{made}, {refit['weights']} weights changed",
            f"less than the build's {refit['seconds']:.1f} s",
        )
    ]


def lora_figures(answer: Answer) -> list[Figure]:
    """Of `lora`."""
    return [Figure("layers that the LoRA changes", str(answer["changed_layers"]))]


def verify_figures(answer: Answer) -> list[Figure]:
    """Of `verify`."""
    codes, wrong = (sum(bucket[key] for bucket in answer["buckets"]) for key in _CODES)
    verdict = "PASSED" if answer["passed"] else f"FAILED: {'; '.join(answer['problems'][:3])}"
    return [Figure("verify", f"{verdict}; {codes} codes, {wrong} differ", "PASSED")]


def benchmark_figures(answer: Answer) -> list[Figure]:
    """Of `benchmark`."""
    held = {each["engine"]: _held(each) for each in answer["footprints"]}
    timings = [
        Figure(
            f"{each['engine']}, batch {each['batch']}",
            f"{1e3 * each['median_s']:.3f} ms (p90 {1e3 * each['p90_s']:.3f}), "
            f"{held[each['engine']]}",
        )
        for each in answer["timings"]
    ]
    realised, asked = (answer["precision"][key] for key in ("int8_share", "asked_int8_share"))
    told = answer["precision"]["unavailable"] or "the runtime does not tell"
    share = told if realised is None else f"{realised:.1%}, {_kinds(answer['precision'])}"
    return [*timings, Figure("multiply-adds in INT8", share, f"{asked:.1%}")]


def _held(footprint: Answer) -> str:
    """What an engine takes; of the GPU's memory where that was told."""
    on_gpu = footprint["gpu_bytes"]
    return (
        f"files {footprint['file_bytes'] / 1e6:.1f} MB, "
        + ("" if on_gpu is None else f"GPU {on_gpu / MIB:.0f} MiB, ")
        + f"host {footprint['peak_memory_bytes'] / MIB:.0f} MiB"
    )


def _kinds(precision: Answer) -> str:
    return ", ".join(f"{kind} {share:.1%}" for kind, share in precision["shares"].items())


def bandwidth_figures(answer: Answer) -> list[Figure]:
    """Of trt_plugins/measure; raise ValueError where it has measured nothing."""
    if not answer["lines"]:
        raise ValueError("no kernel was measured")
    return [
        Figure(
            "kernels beside a copy",
            measure_plugin.summary(answer),
            f"{measure_plugin.AIM:.0%} of its bandwidth",
        )
    ]


def finetune_figures(answer: Answer) -> list[Figure]:
    """Of measure_finetune_cost.py; the first step of a stage also warms up."""
    last = {step["stage"]: step for step in answer["steps"]}
    seconds = [
        Figure(f"{stage} step", f"{step['seconds']:.2f} s, peak {step['peak_gib']:.1f} GiB")
        for stage, step in last.items()
    ]
    what = f"{answer['peak_gib']:.1f} GiB, where torch may hold {answer['limit_gb']:g} GB"
    return [*seconds, Figure("peak memory", what, f"a GPU of {MEMORY_AIM_GB} GB")]


def said(what: str, answer: Answer) -> list[Figure]:
    """The last lines of a test program, without those of single checks; raise ValueError where it
    says that it found no GPU, which it does not take for a failure.
    """
    if "no GPU is here" in answer["output"]:
        raise ValueError(answer["output"])
    lines = [line for line in answer["output"].split("; ") if not line.startswith("ok ")]
    return [Figure(what, "; ".join(lines))]


def denoise_figures(answer: Answer) -> list[Figure]:
    """Of compare_denoise.py."""
    return [
        Figure(
            "C++ images beside Python's",
            f"{answer['equal_pixels']:.2%} of pixels equal, largest difference "
            f"{answer['largest_difference']} of 255; {answer['said']}",
            "equal",
        )
    ]


def served_figures(answer: Answer) -> list[Figure]:
    """Of draw_served.py."""
    return [
        Figure(
            "Triton with the plan",
            f"{answer['seconds']:.2f} s an image alone, {answer['together_seconds']:.2f} s for "
            f"{answer['together']} together; {answer['equal']} of them equal it",
        )
    ]


def quest_deploy(
    arguments: str, figures: Callable[[Answer], list[Figure]] | None = None
) -> Command:
    """A command of quest-deploy that answers in JSON."""
    line = f"quest-deploy {arguments} --json"
    return Command(line) if figures is None else Command(line, figures)


def script(name: str, arguments: str, figures: Callable[[Answer], list[Figure]]) -> Command:
    """A script of scripts/bench that writes its figures to a file."""
    target = f"{{out}}/{name}.json"
    return Command(
        f"python -m scripts.bench.{name} {arguments} --json {target}", figures, reads=target
    )


@dataclass(frozen=True)
class Model:
    """A workspace, and the options of what makes it.

    Attributes:
        reference: of what verifies it.
        tensorrt: of TensorRT's engines: all are in the GPU's memory when they are timed, each with
            room for its largest batch.
        benchmark: the batches, and what is timed beside.
        minutes: of each step; a verification compiles some hundred parts and may take twice as
            long.
    """

    name: str
    calibrate: str
    reference: str = ""
    tensorrt: str = ""
    benchmark: str = "--batch 2 --batch 16"
    minutes: float = 10.0

    def steps(self) -> Iterator[Step]:
        """What every engine of it begins with, and then the engines."""
        where = f"-w {{out}}/{self.name}"
        stages = {
            "calibrate": f"calibrate {self.calibrate}",
            "export": "export",
            "reference": f"reference {self.reference}",
        }
        before: tuple[str, ...] = ()
        for stage, arguments in stages.items():
            yield Step(
                f"{self.name}-{stage}",
                (quest_deploy(f"{arguments} {where}"),),
                ("gpu",),  # without one nothing comes after it
                before,
                self.minutes,
            )
            before = (f"{self.name}-{stage}",)
        for engine in ENGINES:
            yield from self.engine_steps(engine, before)
        yield from self.refit_steps(before)

    def refit_steps(self, before: tuple[str, ...]) -> Iterator[Step]:
        """Fold a LoRA into it, and refit the refittable engines instead of building them again."""
        name = f"{self.name}-lora"
        file, where = f"{{out}}/{name}.safetensors", f"-w {{out}}/{name}"
        lora = f"lora -w {{out}}/{self.name} --lora {file} --output {{out}}/{name}"
        yield Step(
            name,
            (
                Command(f"python -m scripts.acceptance.random_lora {{out}}/{self.name} {file}"),
                quest_deploy(lora, lora_figures),
                quest_deploy(f"export {where}"),
                quest_deploy(f"reference {self.reference} {where}"),
            ),
            ("gpu",),
            before,
            2 * self.minutes,
        )
        for backend in REFITTING:
            refittable = f"{self.name}-{backend}-refittable"
            build = f"--refit-from {{out}}/{refittable}"
            engine = Engine(f"{backend}-refit", backend, build, ("gpu", backend))
            after = (name, f"{refittable}-build")
            yield from self.engine_steps(engine, after, source=name)

    def engine_steps(
        self, engine: Engine, before: tuple[str, ...], source: str = ""
    ) -> Iterator[Step]:
        """Build, verify and time an engine in a workspace of its own, a copy of ``source`` or of
        this model's: a workspace has one engine a backend.
        """
        name, backend = f"{self.name}-{engine.name}", f"--backend {engine.backend}"
        build = f"build-engine {backend} {engine.options}"
        if not source and engine.backend in REFITTING:  # a refit has its engine's options
            build += f" {self.tensorrt} {OF_THIS_GPU[engine.backend].format(name=name)}"
        stages = {
            "build": (
                # Hard links: quest-deploy never writes into a file that is there.
                Command(f"cp -alfT {{out}}/{source or self.name} {{out}}/{name}"),
                quest_deploy(f"{build} -w {{out}}/{name}", engine_figures),
            ),
            "verify": (quest_deploy(f"verify {backend} -w {{out}}/{name}", verify_figures),),
            "benchmark": (
                quest_deploy(
                    f"benchmark {backend} {self.benchmark} -w {{out}}/{name}",
                    benchmark_figures,
                ),
            ),
        }
        after = (*before, *engine.after)
        for stage, commands in stages.items():
            minutes = self.minutes * (2 if stage == "verify" else 1)
            yield Step(f"{name}-{stage}", commands, engine.needs, after, minutes)
            after = (f"{name}-build",)


@dataclass(frozen=True)
class Engine:
    """A backend with its options."""

    name: str
    backend: str
    options: str
    needs: tuple[str, ...]
    after: tuple[str, ...] = ()


_FP16 = "--dtype fp16"
REFITTING = ("tensorrt", "tensorrt-rtx")
OF_THIS_GPU = {
    # What was timed once is not timed again by `verify`, `benchmark`, or a second run.
    "tensorrt": "--timing-cache {{out}}/timing/{name}",
    "tensorrt-rtx": "--compute-capability {{capability}}",
}
FROM = {"tensorrt-gathered": "tensorrt 10.13", "tensorrt-attention": "tensorrt 10.14"}
"""The first version that builds such an engine."""
ENGINES = (
    *(
        Engine(
            f"{backend}-{name}",
            backend,
            f"{_FP16} {options}",
            ("gpu", FROM.get(f"{backend}-{name}", backend)),
        )
        for backend in REFITTING
        for name, options in (
            ("native", "--quantize native"),
            ("gathered", "--quantize gathered"),
            ("attention", "--quantize native --fused-attention"),
            ("refittable", "--quantize native --refittable"),
        )
    ),
    Engine(
        "tensorrt-plugin",
        "tensorrt",
        f"{_FP16} --quantize plugin --plugins {{out}}/plugins/libquest_trt_plugins.so",
        ("gpu", "tensorrt", OURS),
        ("plugins",),
    ),
    *(
        Engine(
            f"onnxruntime-{provider}",
            "onnxruntime",
            f"{_FP16} --provider {provider}",
            ("gpu", f"onnxruntime --provider {provider}"),
        )
        for provider in ("cuda", "tensorrt")
    ),
)
SMALL = 32
"""A side of the latents that are verified."""
MODELS = (
    Model("emoji", "--model emoji --bits w4a4"),
    Model(
        "sd15",
        shlex.join(bench_sd15.CALIBRATION),
        f"--sample-size {SMALL} --megabytes 200",
        # Its own size first, which is timed; the other is the reference's.
        f"--max-batch 2 --sample-size 64 --sample-size {SMALL}",
        "--batch 2 --no-static --runs 30",
        minutes=30,
    ),
)
_CMAKE = "cmake -S {root}/trt_plugins -DCMAKE_BUILD_TYPE=Release"
_FOR_THE_GPU = "-DCMAKE_CUDA_ARCHITECTURES={capability}"
_ON_THE_GPU = ("gpu", "nvcc", "cmake")
STEPS = (
    Step(
        "emulated",
        (
            # Any architecture: what is run is compiled for the CPU.
            Command(f"{_CMAKE} -B {{out}}/emulated -DCMAKE_CUDA_ARCHITECTURES=90"),
            Command("cmake --build {out}/emulated --parallel --target kernel_test_emulated"),
            Command(
                "{out}/emulated/tests/kernel_test_emulated --emulated",
                lambda answer: said("the kernels' source on the CPU", answer),
            ),
        ),
        ("nvcc", "cmake"),
    ),
    Step(
        "kernels",
        (
            Command(f"{_CMAKE} {_FOR_THE_GPU} -B {{out}}/kernels"),
            Command("cmake --build {out}/kernels --parallel --target kernel_test measure"),
            Command(
                "{out}/kernels/tests/kernel_test",
                lambda answer: said("the kernels on the GPU", answer),
            ),
        ),
        _ON_THE_GPU,
    ),
    Step(
        "bandwidth",
        (Command("{out}/kernels/measure 51", bandwidth_figures),),
        _ON_THE_GPU,
        ("kernels",),
    ),
    *(
        Step(
            f"sanitizer-{tool}",
            (
                Command(
                    f"compute-sanitizer --tool {tool} --error-exitcode 9 "
                    "{out}/kernels/tests/kernel_test",
                    lambda answer: said("compute-sanitizer", answer),
                ),
            ),
            (*_ON_THE_GPU, "compute-sanitizer"),
            ("kernels",),
            20,  # each access is looked at
        )
        for tool in measure_plugin.SANITIZER_TOOLS
    ),
    Step(
        "plugins",
        (
            Command(
                f"{_CMAKE} {_FOR_THE_GPU} -B {{out}}/plugins -DTENSORRT_INCLUDE_DIR={{headers}} "
                "-DTENSORRT_LIBRARY={library} -DNLOHMANN_JSON_INCLUDE_DIR={json}"
            ),
            Command("cmake --build {out}/plugins --parallel"),
            Command(
                "ctest --test-dir {out}/plugins --output-on-failure",
                lambda answer: said("plugins in TensorRT's registry", answer),
            ),
        ),
        (*_ON_THE_GPU, "tensorrt-headers"),
    ),
    Step(
        "finetune-sd15",
        (
            script(
                "measure_finetune_cost",
                f"--device cuda --precision bf16 --steps 3 --limit-gb {MEMORY_AIM_GB - CONTEXT_GB}",
                finetune_figures,
            ),
        ),
        ("gpu", "torch with CUDA"),
    ),
    *(step for model in MODELS for step in model.steps()),
    Step(
        "cpp-runtime",
        (
            script(
                "compare_denoise",
                "-w {out}/emoji-tensorrt-native --program {out}/plugins/apps/denoise/denoise",
                denoise_figures,
            ),
        ),
        ("gpu", "tensorrt", LINKED, "nlohmann-json"),
        ("plugins", "emoji-tensorrt-native-build"),
    ),
    Step(
        "triton",
        (
            quest_deploy("package -w {out}/emoji-tensorrt-native --triton {out}/triton"),
            script("draw_served", "{out}/triton", served_figures),
        ),
        ("gpu", "tensorrt", "tritonserver"),
        ("emoji-tensorrt-native-build",),
    ),
)
