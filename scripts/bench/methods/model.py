"""A compared model, recorded and drawn on any schedule of the comparison."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from quest_deploy.evaluation.quality import SamplingOptions
from quest_deploy.files import sha256_of, sha256_of_json
from quest_deploy.models.loading import resolve_source
from quest_deploy.models.pipeline_model import PipelineModel
from quest_deploy.models.registry import EMBEDDED
from scripts.bench.methods.cells import USUAL, Schedule

if TYPE_CHECKING:
    from collections.abc import Mapping


class ComparedModel(PipelineModel):
    """An embedded model; whatever scheduler is asked for, it has its schedule's."""

    schedule: Schedule = USUAL

    @classmethod
    def load(cls, name: str = EMBEDDED) -> Self:
        """The model on its usual schedule."""
        return cls(resolve_source(name))

    def on(self, schedule: Schedule) -> Self:
        """The same on another schedule."""
        other = copy.copy(self)
        other.schedule, other._conditions = schedule, self._asked  # encoded once for all
        return other

    def load_scheduler(self, name: str, **overrides: Any) -> Any:
        """The schedule's scheduler; ``overrides`` go before its options."""
        return super().load_scheduler(
            self.schedule.scheduler, **{**self.schedule.options, **overrides}
        )

    @property
    def timesteps(self) -> list[float]:
        """Where the schedule evaluates the network."""
        scheduler = self.load_scheduler(self.schedule.scheduler)
        scheduler.set_timesteps(self.schedule.steps)
        return [float(timestep) for timestep in scheduler.timesteps]

    @property
    def sampling(self) -> SamplingOptions:
        """How the judged images are drawn."""
        return SamplingOptions(
            images=self.evaluation_images,
            steps=self.schedule.steps,
            guidance=self.guidance,
            scheduler=self.schedule.scheduler,
        )

    @cached_property
    def parts(self) -> Mapping[str, str]:
        """A hash of each part's files, the judge's and the prompts' among them."""
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        hashes: dict[str, dict[str, str]] = {}
        for path in files:
            place = path.relative_to(self.folder)
            if place.suffix in (".json", ".safetensors", ".txt"):
                hashes.setdefault(place.parts[0], {})[place.as_posix()] = sha256_of(path)
        return {part: sha256_of_json(of_files) for part, of_files in hashes.items()}
