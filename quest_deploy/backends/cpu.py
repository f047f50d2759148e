"""What CPU backends share: integer kernels that are exact on some processors and not on others."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quest_deploy.backends.base import ENGINE_FILE, REPAIR, Backend, EngineRecord, require_package
from quest_deploy.backends.options import ANY_PROCESSOR, NATIVE_PROCESSOR, EngineOptions
from quest_deploy.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

    from exporters.exactness import Exactness


class CpuBackend(Backend):
    """A backend of CPUs, whose integer kernels are exact on some processors and not on others."""

    compile_only_checks = True
    package: str
    """The Python package of the runtime."""

    def check_build(self, options: EngineOptions) -> None:
        require_package(self.package, "cpu", f"the {self.name} backend")
        self.check_options(options)

    def check_run(self, options: EngineOptions) -> None:
        self.check_build(options)

    def on_cpu(self, options: EngineOptions) -> bool:
        """See :meth:`Backend.on_cpu`; a GPU's kernels add in 32 bits."""
        return True

    def exactness(self, options: EngineOptions) -> Exactness:
        """Return what holds on any processor, if that is asked for; else what the runtime answers
        on this one.
        """
        from exporters import exactness
        from quest_deploy.backends.exactness import measured

        if not self.on_cpu(options):
            return exactness.EXACT
        return exactness.EXACT_ANYWHERE if options.processor == ANY_PROCESSOR else measured(self)

    def lower(
        self, model: ir.Model, options: EngineOptions, *, frozen_bucket: int | None = None
    ) -> ir.Model:
        return self.lower_for(model, options, self.exactness(options), frozen_bucket=frozen_bucket)

    @abstractmethod
    def lower_for(
        self,
        model: ir.Model,
        options: EngineOptions,
        exactness: Exactness,
        *,
        frozen_bucket: int | None = None,
    ) -> ir.Model:
        """As :meth:`lower`, for a runtime that computes exactly what ``exactness`` says."""

    def answers(self, options: EngineOptions) -> dict[str, Any]:
        return {"exact_integers": dict(self.exactness(options).levels)}

    def record(self, options: EngineOptions) -> dict[str, Any]:
        from quest_deploy.backends.exactness import measurement_key

        asked = self.on_cpu(options) and options.processor == NATIVE_PROCESSOR
        return super().record(options) | ({"measured_on": measurement_key(self)} if asked else {})

    def kernels(self, lowered: ir.Model, options: EngineOptions) -> dict[str, int]:
        from exporters.exactness import kernel_needs

        return kernel_needs(lowered) if self.on_cpu(options) else {}

    def check_engine(self, record: EngineRecord) -> EngineOptions:
        """As of any backend; besides, the engine's integer products must be exact on this
        machine.
        """
        from exporters.exactness import Exactness
        from quest_deploy.backends.exactness import check_kernels, measurement_key

        options, kernels = super().check_engine(record), record.kernels
        if kernels is None:
            raise InputError(
                f"{ENGINE_FILE} does not say which integer kernels the engine needs, as earlier "
                f"versions' do not; {REPAIR}"
            )
        if not kernels:
            return options
        if record.measured_on == measurement_key(self):  # the same runtime and processor answered
            here = Exactness(record.exact_integers or {})
        else:
            # What was built for any processor, too: here is perhaps another runtime, or no x86-64.
            here = self.exactness(replace(options, processor=NATIVE_PROCESSOR))
        check_kernels(here, kernels, f"quest-deploy build-engine --backend {self.name}")
        return options
