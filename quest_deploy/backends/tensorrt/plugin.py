"""The library of the ``quest::TimestepQuantize`` plugins: where it is, and how TensorRT loads
it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import sha256_of

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME, VERSION, NAMESPACE = "TimestepQuantize", "1", "quest"
NAMES = (NAME, "GegluTimestepQuantize")
"""All that an engine may hold."""
LIBRARY = "libquest_trt_plugins.so"
ENVIRONMENT = "QUEST_DEPLOY_PLUGINS"
"""The environment variable that holds the library's path."""
BUILT = Path(__file__).parents[3] / "trt_plugins" / "build" / LIBRARY
"""Where trt_plugins/ is built by default."""
_BUILT_FOR = re.compile(rb"quest plugins for TensorRT (\d+);")
HINT = (
    "build it (trt_plugins/README.md) and give its path with --plugins, or in the environment "
    f"variable {ENVIRONMENT}"
)


def plugin_library(given: Path | None) -> Path | None:
    """The plugin library: ``given``, or the first there is; None where there is none.

    Looked for in the environment variable QUEST_DEPLOY_PLUGINS and in trt_plugins/build.

    Raises:
        InputError: a path was given, here or in the environment, and there is no file.
    """
    return next(iter(_libraries(given)), None)


def _libraries(given: Path | None) -> Iterator[Path]:
    for path, source in ((given, "--plugins"), (os.environ.get(ENVIRONMENT), ENVIRONMENT)):
        if path:
            if not Path(path).is_file():
                raise InputError(
                    f"{source}: there is no plugin library {path}; build it as "
                    "trt_plugins/README.md says"
                )
            yield Path(path).resolve()
    if BUILT.is_file():
        yield BUILT


def recorded_library(given: Path | None, sha256: str) -> Path:
    """The plugin library that an engine was built with.

    Args:
        given: where it was then.
        sha256: its hash, from the engine's record.

    Raises:
        InputError: none, or another one.
    """
    found = []
    for path in _libraries(given if given is not None and given.is_file() else None):
        if sha256_of(path) == sha256:
            return path
        found.append(path)
    others = f" (found {', '.join(map(str, found))}, which differs)" if found else ""
    raise InputError(
        f"the engine needs the plugin library with SHA-256 {sha256}{others}: give its path in the "
        f"environment variable {ENVIRONMENT}, "
        "or build the plugin and run `quest-deploy build-engine` again"
    )


def built_for(library: Path) -> int | None:
    """The major version of TensorRT whose headers the library was built with; None where it does
    not say, as another's does not.
    """
    found = _BUILT_FOR.search(library.read_bytes())
    return int(found[1]) if found else None


def load_plugin(registry: Any, library: Path | None, logger: Any) -> None:
    """Load ``library`` into a TensorRT plugin registry, as TensorRT's own tools do.

    Args:
        registry: an IPluginRegistry: a builder's, a runtime's, or the process's.
        logger: its ``problems`` are quoted.

    Raises:
        QuestDeployError: TensorRT cannot load it, or it does not offer all of ``NAMES``.
    """
    if library is None:
        raise QuestDeployError(f"no library of the plugin {NAMESPACE}::{NAME} was found: {HINT}")
    before = len(logger.problems)
    try:
        handle = registry.load_library(str(library))
    except (RuntimeError, ValueError, TypeError) as e:
        raise QuestDeployError(
            f"TensorRT cannot load the plugin library {library} ({e}): {HINT}"
        ) from e
    if handle is None:
        told = next(iter(logger.problems[before:]), "it gives no reason")
        raise QuestDeployError(
            f"TensorRT cannot load the plugin library {library} ({told}): {HINT}"
        )
    for name in NAMES:
        if registry.get_creator(name, VERSION, NAMESPACE) is None:
            raise QuestDeployError(
                f"{library} offers no {NAMESPACE}::{name} of version {VERSION}: {HINT}"
            )
