"""The embedded model from calibration to a verified, timed engine and a picture, on a CPU.

Run it with a folder to work in: ``python examples/quickstart.py quickstart``. It takes minutes;
what is finished is kept, and ``qd.run`` would go on from there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import quest_deploy as qd

BACKEND = "openvino"


def quickstart(
    folder: Path,
    *,
    samples: int | None = None,
    temporal_steps: int | None = None,
    sensitive_steps: int | None = None,
    runs: int = 50,
) -> Path:
    """Go through the stages; return the picture.

    Args:
        folder: of the workspace, new or empty.
        samples: samplings to calibrate on; None for the model's own number.
        temporal_steps, sensitive_steps: of finetuning; None for the model's own numbers.
        runs: timed inferences.
    """
    workspace = qd.calibrate(bits="w4a4", workspace=folder, samples=samples)
    qd.finetune(workspace, temporal_steps=temporal_steps, sensitive_steps=sensitive_steps)

    graph = qd.export(workspace)
    print(f"{graph['layers']} layers, {graph['buckets']} scales for each tensor")

    qd.reference(workspace)
    qd.build_engine(workspace, backend=BACKEND)
    verified = qd.verify(workspace, backend=BACKEND)
    if not verified["passed"]:
        raise SystemExit(f"the engine computes something else: {verified['problems'][0]}")

    timed = qd.benchmark(workspace, backend=BACKEND, batch=[2], runs=runs)
    print(f"{timed['speedup_over_fp32']['2']:.2f}x the speed of FP32")

    drawn = qd.generate(workspace, backend=BACKEND, prompt=["red apple"])
    print(drawn["picture"])
    return Path(drawn["picture"])


if __name__ == "__main__":
    quickstart(Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart"))
