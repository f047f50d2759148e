"""The configurations of a package's models, as Triton's ModelConfig has them;
:func:`quest_deploy.serving.triton.pbtxt.pbtxt` writes them.
"""

from __future__ import annotations

from typing import Any

from quest_deploy.serving.triton.pbtxt import Word

Tensors = dict[str, tuple[str, list[int]]]
"""Tensors by name: Triton's name of the type, and the dimensions without the batch, -1 for any."""
LATEST = {"latest": {"num_versions": 1}}


def plan_config(
    name: str,
    inputs: Tensors,
    outputs: Tensors,
    native: dict[str, list[int]],
    max_batch: int,
    *,
    queue_delay: int,
    max_queue: int,
    profiles: int,
) -> dict[str, Any]:
    """A model of the platform tensorrt_plan, batched dynamically and warmed up with its smallest
    and its largest batch.

    Args:
        inputs: one without dimensions gets one that Triton takes away again: it allows none that
            has only a batch.
        native: the inputs' dimensions to warm up with.
        queue_delay: microseconds that a batch waits for more requests.
        max_queue: requests that wait; more are refused.
        profiles: the plan's optimization profiles. Triton uses the first one alone unless told of
            the others, and picks among those it is told of by a batch's shape.
    """
    warm = [
        {
            "key": key,
            "value": {"data_type": Word(kind), "dims": native[key] or [1], "zero_data": True},
        }
        for key, (kind, _) in inputs.items()
    ]
    scalar = {"dims": [1], "reshape": {"shape": []}}
    group = (
        {"instance_group": [{"profile": [str(i) for i in range(profiles)]}]} if profiles > 1 else {}
    )
    return {
        "name": name,
        "platform": "tensorrt_plan",
        "max_batch_size": max_batch,
        "version_policy": LATEST,
        "input": [
            {"name": key, "data_type": Word(kind), **({"dims": d} if d else scalar)}
            for key, (kind, d) in inputs.items()
        ],
        "output": [
            {"name": key, "data_type": Word(kind), "dims": dims}
            for key, (kind, dims) in outputs.items()
        ],
        **group,
        "dynamic_batching": {
            "max_queue_delay_microseconds": queue_delay,
            "default_queue_policy": {"max_queue_size": max_queue},
        },
        "model_warmup": [
            {"name": f"batch {batch}", "batch_size": batch, "inputs": warm}
            for batch in dict.fromkeys((1, max_batch))
        ],
    }


def pipeline_config(
    name: str,
    inputs: dict[str, str],
    limits: dict[str, int],
    max_images: int,
    max_queue: int,
    *,
    stream: bool,
) -> dict[str, Any]:
    """`pipeline`, or `pipeline_stream`, which tells of every step.

    Args:
        inputs: Triton's name of the type of each; the pipeline itself says which are needed.
        limits: what it allows, as its ``generation.Limits``, and how many images are in flight.
    """
    outputs = {
        "image": ("TYPE_STRING", [1]),
        "pixels": ("TYPE_UINT8", [-1, -1, -1]),
        "seed": ("TYPE_INT64", [1]),
    }
    if stream:
        outputs |= {"step": ("TYPE_INT32", [1]), "steps": ("TYPE_INT32", [1])}
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": max_images,
        "version_policy": LATEST,
        "input": [
            {"name": key, "data_type": Word(kind), "dims": [1], "optional": True}
            for key, kind in inputs.items()
        ],
        "output": [
            {"name": key, "data_type": Word(kind), "dims": dims}
            for key, (kind, dims) in outputs.items()
        ],
        "instance_group": [{"kind": Word("KIND_CPU"), "count": 1}],
        "dynamic_batching": {"default_queue_policy": {"max_queue_size": max_queue}},
        "model_transaction_policy": {"decoupled": stream},
        "parameters": [
            {"key": key, "value": {"string_value": str(value)}} for key, value in limits.items()
        ],
    }
