"""Whether the engine chooses each timestep's bucket as the scheme does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from exporters.graph_info import BUCKET
from exporters.passes.cut import cut_bucket

if TYPE_CHECKING:
    from quest_deploy.verification.checks.engine import CheckedEngine


def check_buckets(engine: CheckedEngine) -> list[float]:
    """The timesteps that get another bucket: of all whole ones, and of those around every edge."""
    scheme = engine.info.scheme
    edges = np.asarray(scheme.bucket_edges, np.float32)
    around = [edges, np.nextafter(edges, np.float32(-np.inf)), edges - 1, edges - 0.5, edges + 0.5]
    timesteps = np.unique(np.concatenate([np.arange(scheme.train_timesteps), *around])).astype(
        np.float32
    )
    expected = np.asarray([scheme.bucket_of(float(t)) for t in timesteps], np.int64)
    ((_, mine, theirs),) = engine.run(
        cut_bucket(engine.graph), [({"timestep": timesteps}, {BUCKET: expected})]
    )
    return [float(t) for t in timesteps[mine[BUCKET] != theirs[BUCKET]]]
