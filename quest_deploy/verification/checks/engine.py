"""The engine that is checked: its graph, and cuts of it, which are built and run as it was."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import onnx_ir as ir

from exporters.graph_info import graph_info, load_graph, save_graph
from quest_deploy.backends.base import LOWERED
from quest_deploy.progress import no_progress
from quest_deploy.verification.checks.value_types import ValueTypes
from quest_deploy.verification.runners import compare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from quest_deploy.artifacts.reference import Record
    from quest_deploy.backends.base import Backend, Runner
    from quest_deploy.backends.options import EngineOptions

    Arrays = dict[str, NDArray[Any]]
    Reads = dict[str, str]
    """The values of the graph that are given, each with the key of the record's tensor."""
    T = TypeVar("T")
    ByRecord: TypeAlias = dict[str, dict[int, T]]
    """Of a quantizer, layer or segment, by the record's number."""


class CheckedEngine:
    """An engine of ``backend``, in ``folder``, which was built with ``options``.

    Attributes:
        graph: the lowered graph.
        info: what it says about itself.
        types: of its values.

    Raises:
        InputError: there is no graph of ours in the folder.
    """

    def __init__(self, backend: Backend, options: EngineOptions, folder: Path) -> None:
        self.backend, self.options, self.folder = backend, options, folder
        self.graph = load_graph(folder / LOWERED)
        self.info = graph_info(self.graph)
        self.types = ValueTypes(self.graph, options.dtype)

    def groups(
        self,
        held: dict[str, dict[int, Record]],
        reads: Callable[[str], Reads],
        gives: Callable[[str], str],
    ) -> list[list[str]]:
        """Divide quantizers, layers or products, with the records that hold them, into what may be
        one cut: those that the same records hold, none of which reads what another gives, or
        another tensor of the reference under the same name.

        Most of the time of a small cut is its compilation. Where the backend builds ahead, each is
        a cut of its own: a builder may choose other kernels for more of them.

        Args:
            reads, gives: what one is given, and the value that it computes.
        """
        found: list[list[str]] = []
        latest: dict[tuple[int, ...], tuple[list[str], Reads, set[str]]] = {}
        for name, records in held.items():
            numbers, given = tuple(records), reads(name)
            group, read, computed = latest.get(numbers, ([], {}, set()))
            apart = (
                not self.backend.compile_only_checks
                or gives(name) in read.keys() | computed
                or computed & given.keys()
                or any(read.get(value, key) != key for value, key in given.items())
            )
            if apart or not group:
                group, read, computed = latest[numbers] = ([], {}, set())
                found.append(group)
            group.append(name)
            read.update(given)
            computed.add(gives(name))
        return found

    def run(
        self, cut: ir.Model, feeds: Iterable[tuple[Arrays, Arrays]]
    ) -> Iterator[tuple[Arrays, Arrays, Arrays]]:
        """(the feed, the engine's outputs, the reference's) for pairs of (feed, the reference's
        outputs), one at a time.
        """
        with ExitStack() as stack:
            runner = None
            for feed, expected in feeds:
                if runner is None:
                    folder = stack.enter_context(self._compiled(cut, feed))
                    runner = stack.enter_context(self.backend.open(folder, self.options))
                yield feed, *compare(self.backend.name, runner, feed, expected)

    @contextmanager
    def open_segments(self, cut: ir.Model, feed: Arrays) -> Iterator[Runner]:
        """The segments' graph, ready to run on feeds of this one's sizes."""
        with (
            self._compiled(cut, feed) as folder,
            self.backend.open_segments(folder, self.options) as runner,
        ):
            yield runner

    @contextmanager
    def _compiled(self, cut: ir.Model, feed: Arrays) -> Iterator[Path]:
        for value in cut.graph.inputs:  # some engines are built for some sizes only
            value.shape = ir.Shape(["batch", *feed[value.name or ""].shape[1:]])
        with tempfile.TemporaryDirectory(prefix="quest-deploy-") as name:
            folder = Path(name)
            save_graph(cut, folder / LOWERED)
            if not self.backend.compile_only_checks:  # half of the time of a verification
                self.backend.compile(folder / LOWERED, folder, self.options, no_progress)
            yield folder
