"""Fill in the page: one file with its style, script and images inside.

Everything that comes from a workspace may be hostile: it is escaped as text, or as JSON between
script tags, and the page's policy lets nothing run or load but the style and the script of its own
hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from markupsafe import Markup, escape

from quest_deploy.artifacts.workspace import MANIFEST
from quest_deploy.errors import InputError
from quest_deploy.evaluation import FEW_IMAGES
from quest_deploy.evaluation.benchmark import FP32, QUANTIZED
from quest_deploy.evaluation.report_page.facts import HEAT_LEVELS, gather
from quest_deploy.files import size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quest_deploy.artifacts.workspace import Workspace

MOST_OPTION = 60
"""Characters of an option's value; the manifest has the rest."""
_FOLDER = Path(__file__).parent
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def render(workspace: Workspace) -> tuple[str, dict[str, list[dict[str, str]]]]:
    """Return the page and, by its section, the commands that make what it lacks; equal workspaces
    give equal pages.

    Raises:
        InputError: the manifest's records are not what this version writes.
    """
    try:
        facts = gather(workspace)
        return _environment().get_template("page.html").render(facts), facts["missing"]
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        UndefinedError,
        ValueError,
    ) as e:
        raise InputError(
            f"{workspace.path(MANIFEST)}: expected results as this version records them, found "
            f"others ({type(e).__name__}: {e}); run `quest-deploy run` again"
        ) from e


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (
        (_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_integrity(style)}'; script-src '{_integrity(script)}'"
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}  # and the order as it is
    environment.globals.update(
        style=Markup(style),
        script=Markup(script),
        policy=policy,
        heat_levels=2 * HEAT_LEVELS + 1,
        few_images=FEW_IMAGES,
    )
    environment.filters.update(
        size=size,
        share="{:.1%}".format,
        times="{:.2f}\N{MULTIPLICATION SIGN}".format,
        count="{:,}".format,
        power=_power,
        share_error=_share_error,
        worse=_worse,
        coded=_coded,
        breakable=_breakable,
        chosen=_chosen,
        heat=_heat,
        ratio_rows=_ratio_rows,
    )
    return environment


def _integrity(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


def _power(value: float) -> str:
    """A number as a power of ten, such as 1.2×10⁻⁵."""
    if not value:
        return "0"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}\N{MULTIPLICATION SIGN}10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def _share_error(share: float, count: int) -> str:
    """The standard error of a share of ``count`` images, in points."""
    return f"{100 * math.sqrt(share * (1 - share) / count):.1f}"


def _worse(details: dict[str, Any]) -> dict[str, list[str]]:
    """In what a benchmark found the engine worse than FP32's, in words: of its speed and bytes."""
    speeds = [(f"at batch {batch}", ratio) for batch, ratio in details["speedup_over_fp32"].items()]
    found = {x["engine"]: x for x in details["footprints"]}
    compared = [
        ("larger files", "file_bytes", found),
        ("higher peak memory", "peak_memory_bytes", found),
    ]
    if "pipeline" in details:
        speeds.append(("for whole images", details["pipeline"]["speedup_over_fp32"]))
        whole = {x["engine"]: x for x in details["pipeline"]["engines"]}
        compared.append(("higher peak memory for whole images", "peak_memory_bytes", whole))
    sizes = [(words, of[QUANTIZED][key], of[FP32][key]) for words, key, of in compared]
    return {
        "speed": [
            f"slower {where}: {ratio:.2f}\N{MULTIPLICATION SIGN} the speed of FP32"
            for where, ratio in speeds
            if round(ratio, 2) < 1
        ],
        "bytes": [
            f"{words}: {size(own)}, FP32\N{RIGHT SINGLE QUOTATION MARK}s {size(other)}"
            for words, own, other in sizes
            if own > other
        ],
    }


def _coded(text: str) -> Markup:
    """The text, with what stands between backticks as code."""
    pieces = map(escape, text.split("`"))
    return Markup("").join(
        Markup("<code>{}</code>").format(x) if i % 2 else x for i, x in enumerate(pieces)
    )


def _breakable(path: str) -> Markup:
    """A module's or a file's path, which a narrow column breaks behind a dot, a slash or a line."""
    return Markup("<wbr>").join(re.split(r"(?<=[._/])", path))


def _chosen(options: dict[str, Any]) -> str:
    """What was chosen of the options, as JSON has it; what is off, empty or left open is not."""
    shown = {k: v for k, v in options.items() if v not in (None, [], (), {}) and v is not False}
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in shown.items()}
    return ", ".join(
        f"{name}={text if len(text) <= MOST_OPTION else text[:MOST_OPTION] + '…'}"
        for name, text in texts.items()
    )


def _heat(rows: Sequence[Sequence[int]]) -> list[tuple[int, str]]:
    """The cells of each colour as one path, a unit square each: (level, the path)."""
    paths: dict[int, list[str]] = defaultdict(list)
    for y, row in enumerate(rows):
        for x, level in enumerate(row):
            paths[level].append(f"M{x} {y}h1v1h-1z")
    return [(level, "".join(paths[level])) for level in sorted(paths)]


def _ratio_rows(verifications: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The layers and segments of all verifications, the nearest to its limit first."""
    rows = [
        {
            "kind": kind,
            "name": part[kind],
            "backend": backend,
            "error": part["error"],
            "tolerance": part["tolerance"],
            "bucket": part["bucket"],
            "used": part["error"] / part["tolerance"],
            "informative": part.get("informative", True),
        }
        for backend, details in verifications.items()
        for kind, parts in (("layer", details["layers"]), ("segment", details["segments"]))
        for part in parts
    ]
    return sorted(rows, key=lambda x: (-x["used"], x["backend"], x["kind"], x["name"]))
