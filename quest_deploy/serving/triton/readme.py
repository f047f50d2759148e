"""A package's README: the server's command, the pipelines' inputs, the limits."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from string import Template
from typing import TYPE_CHECKING, Any

from quest_deploy.serving.triton.layout import FILES
from quest_deploy.serving.triton.pipelines import (
    MODEL_TIMEOUT,
    PIPELINES,
    SCHEDULER,
    pipeline_inputs,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from quest_deploy.models.pipeline_model import PipelineModel
    from quest_deploy.serving.triton.layout import Layout
    from quest_deploy.serving.triton.plans import Plan

NO_PLAN = """\
**There is no plan in this package yet.** On the GPU machine, run
`quest-deploy build-engine --backend tensorrt` on the workspace and
`quest-deploy package --triton` again."""
INPUTS = {
    "prompt": "what to draw; needed",
    "negative_prompt": "what not to draw",
    "label": "the class to draw; needed",
    "init_image": "a PNG, JPEG, WebP or BMP file, resized to the height and width; needed",
    "mask_image": "the same, white where the image is drawn anew; needed",
    "image_guidance": "weight of the image, beside guidance; 1 or more",
    "control_image": "what the ControlNet is shown, such as edges, a file likewise; without it "
    "nothing is added",
    "control_scale": "scale of what the ControlNet adds; 1 unless given",
    "ip_adapter_image": "an image beside the prompt, a file likewise; without it nothing is added",
    "ip_adapter_scale": "scale of what the IP-Adapter adds; that of the calibration unless given",
    "seed": "the same seed draws the same image; the server chooses one if there is none",
    "steps": "denoising steps; $steps unless given",
    "scheduler": f"$schedulers; {SCHEDULER} unless given",
    "guidance": "guidance weight, $guidance unless given; $unguided",
    "height": "pixels",
    "width": "pixels",
}
"""The pipelines' inputs in words."""
EXAMPLES = {
    "prompt": (
        '("prompt", "BYTES", b"a lighthouse in a storm")',
        '--prompt "a lighthouse in a storm"',
    ),
    "label": ('("label", "INT32", np.int32(3))', "--label 3"),
    None: ('("seed", "INT64", np.int64(7))', ""),
}
"""By what an image is asked for by: an input of a request, and the client's option for it."""


def write_readme(
    layout: Layout,
    model: PipelineModel,
    scheme: str,
    models: Iterable[str],
    settings: dict[str, Any],
    weights: Mapping[str, str],
    states: int,
) -> None:
    """Write it, last of all files: the server's command is ``serve.py``'s own.

    Args:
        scheme: its name.
        models: the names of the models that the pipelines call.
        settings: the pipelines'.
        weights: how those of each part are stored, by the part's name.
        states: the bytes of what a prompt is encoded to, float32.
    """
    compressed = ", ".join(f"`{name}`" for name, kind in weights.items() if kind != "fp32")
    printed = subprocess.run(
        [sys.executable, layout.folder / "serve.py", "--print"],
        capture_output=True,
        text=True,
        check=True,
        env={name: x for name, x in os.environ.items() if name != "QUEST_DEPLOY_HTTP_KEY"},
    ).stdout
    # Keys that are to be nobody's: a shell draws its own.
    printed = re.sub(r"\b[0-9a-f]{32}\b", "RANDOM_KEY", printed)
    command = printed.strip().replace(str(layout.folder.resolve()), "/package")
    question, option = EXAMPLES[model.asked_for]
    inputs = pipeline_inputs(model, control=bool(settings["residuals"]))
    for name in sorted(
        inputs.keys() & {"init_image", "mask_image", "control_image", "ip_adapter_image"}
    ):
        question += f', ("{name}", "BYTES", open("{name}.png", "rb").read())'
        option += f" --{name.replace('_', '-')} {name}.png"
    defaults = settings["defaults"]
    words = {
        "schedulers": ", ".join(settings["schedulers"]),
        "steps": defaults["steps"],
        "guidance": f"{defaults['guidance']:g}",
        "unguided": "which the model embeds"
        if settings["embeds_guidance"]
        else "1 or less is none"
        if settings["guidable"]
        else "the model knows none above 1",
    }
    values = {
        **asdict(layout.options),
        "model": model.name,
        "scheme": scheme,
        "models": ", ".join(f"`{name}`" for name in (*models, *PIPELINES)),
        "compressed": f"The weights of {compressed} are INT8.\n\n" if compressed else "",
        "plan": NO_PLAN if layout.plan is None else _container(layout.plan),
        "command": " \\\n        ".join(shlex.split(command)).replace(
            "RANDOM_KEY", "$(openssl rand -hex 16)"
        ),
        "inputs": "\n".join(
            f"| `{name}` | {kind.removeprefix('TYPE_').replace('STRING', 'BYTES')} | "
            f"{Template(INPUTS[name]).substitute(words)} |"
            for name, kind in inputs.items()
        ),
        "question": question,
        "steps": defaults["steps"],
        "option": option,
        "delay": layout.options.queue_delay,
        "max_size": layout.max_size,
        "max_batch": layout.max_batch,
        "inner_queue": layout.inner_queue,
        "model_timeout": MODEL_TIMEOUT,
        "shared_memory": shared_memory(
            layout, settings["residuals"], states, 2 if defaults["image_guidance"] is None else 3
        ),
        "network": settings["network"],
        "sizes": ", ".join(f"{height}x{width}" for height, width in settings["sizes"])
        or f"multiples of {settings['size_factor']}",
    }
    template = Template((FILES / "README.md").read_text())
    (layout.folder / "README.md").write_text(template.substitute(values))


def shared_memory(
    layout: Layout, residuals: Mapping[str, tuple[int, int]], states: int, image_rows: int = 2
) -> int:
    """The GiB in which Python's processes give each other tensors: one, and what all rows of each
    image in flight of both pipelines are conditioned on, and what a ControlNet adds to them, from
    its model and on to the network's.

    Args:
        residuals: channels and divisor of each.
        states: the bytes of what a row is conditioned on, a prompt's states.
        image_rows: of an image with guidance.
    """
    side = layout.max_size // layout.pixels_per_latent
    row = sum(4 * channels * (side // divisor) ** 2 for channels, divisor in residuals.values())
    rows = image_rows * len(PIPELINES) * layout.options.max_in_flight
    return 1 + -(-rows * (2 * row + states) // 2**30)


def _container(plan: Plan) -> str:
    later = ", or a later one: the plan is version-compatible" * plan.options.version_compatible
    return (
        f"The plan was built with TensorRT {plan.tensorrt}; take the container that has it{later}."
    )
