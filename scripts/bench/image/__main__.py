"""Measure whole images on this CPU, row by row, and write docs/sd15/image.md.

    python -m scripts.bench.image [--size small] [--only 'nncf-*'] [--again ROW] [--list]

What a row measured is kept at once in scripts/bench/results/image-vnni.json or image-avx2.json, by
what this processor has, and is not measured again as long as what it depends on stays the same.
"""

from __future__ import annotations

import textwrap
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quest_deploy.backends.base import integer_instructions, processor_name
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import atomic_file, read_json, write_json
from scripts.bench.command import run
from scripts.bench.image.limits import limit_of
from scripts.bench.image.prepare import ROOT, SIZES, OurForm, Prepared
from scripts.bench.image.quality import IMAGES, quality_of
from scripts.bench.image.report import page
from scripts.bench.image.rows import AVX2, KINDS, VNNI, drawing, measure, rows_of
from scripts.bench.image.runner import Environments, MissingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scripts.bench.image.rows import Row

REVISION = 1
"""Part of what figures depend on. Raise it when a change of code changes what rows measure."""
RESULTS, DOCS = ROOT / "scripts" / "bench" / "results", ROOT / "docs" / "sd15"
PEERS = ROOT / ".venv" / "peers"
LONGEST = 300
"""Characters of a reason's line."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def kind_of_machine() -> str:
    """Whether the processor multiplies 8-bit integers exactly, in one instruction."""
    return VNNI if integer_instructions() else AVX2


class Kept:
    """The figures of one kind of machine, in their file: {"processor", "instructions", "rows":
    {name: {"definition", "date", "figures"} or {"definition", "date", "reason"}}, "quality":
    {form: {"psnr", "ssim", "revision", "images", "threads"}}, "limits": {form: {what
    :func:`scripts.bench.image.limits.limit_of` returns, "revision", "threads"}}}.
    """

    def __init__(self, path: Path) -> None:
        """Read the file; begin anew where it is another processor's."""
        self.path = path
        here = {"processor": processor_name(), "instructions": kind_of_machine()}
        found: dict[str, Any] = read_json(path) if path.exists() else {}
        if {name: found.get(name) for name in here} != here:
            found = {**here, "rows": {}}
        self.figures = {"quality": {}, "limits": {}, **found}

    def has(self, row: Row, definition: dict[str, Any]) -> bool:
        """Whether the row is measured under ``definition``."""
        entry = self.figures["rows"].get(row.name, {})
        return "figures" in entry and entry["definition"] == definition

    def keep(self, row: Row, definition: dict[str, Any], found: dict[str, Any]) -> None:
        """Keep the row's {"figures"}, or the {"reason"} why it has none; rows that were measured
        under another definition cannot stand beside it, and go.
        """
        date, rows = time.strftime("%Y-%m-%d", time.gmtime()), self.figures["rows"]
        rows = {name: entry for name, entry in rows.items() if entry["definition"] == definition}
        self.figures["rows"] = rows
        rows[row.name] = {"definition": definition, "date": date, **found}
        write_json(self.path, self.figures)

    def has_beside(self, part: str, form: str, made: dict[str, Any]) -> bool:
        """Whether the "quality" or the "limits" of a form are known, made so."""
        known: dict[str, Any] = self.figures[part].get(form, {})
        return made.items() <= known.items()

    def keep_beside(self, part: str, form: str, found: dict[str, Any]) -> None:
        """Keep the "quality" or the "limits" of a form."""
        self.figures[part][form] = found
        write_json(self.path, self.figures)


@app.command()
def bench(
    size: Annotated[str, typer.Option(help=f"The model: {', '.join(SIZES)}.")] = "full",
    only: Annotated[
        list[str] | None,
        typer.Option(help="Measure only rows whose name matches this glob; may be repeated."),
    ] = None,
    again: Annotated[
        list[str] | None,
        typer.Option(help="Measure rows again whose name matches this glob; may be repeated."),
    ] = None,
    list_rows: Annotated[
        bool, typer.Option("--list", help="List the rows and whether they are measured.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every program.")] = 2,
    images: Annotated[
        int, typer.Option(min=1, help="Images of the embedded model that are compared.")
    ] = IMAGES,
    folder: Annotated[
        Path, typer.Option(help="Where what the programs read is made; may be removed.")
    ] = ROOT / "quest-out" / "bench-image",
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
    docs: Annotated[Path, typer.Option(help="Where the page goes.")] = DOCS,
    peers: Annotated[Path, typer.Option(help="Where the peers' environments are.")] = PEERS,
) -> None:
    """Measure the missing rows and write the page; goes on where it was interrupted."""
    if size not in SIZES:
        raise InputError(f"--size: expected one of {', '.join(SIZES)}, not {size!r}")
    stem = "image" if size == "full" else f"image-{size}"
    kept = Kept(results / f"{stem}-{kind_of_machine()}.json")
    chosen = SIZES[size]
    asked = {"revision": REVISION, "size": size, "buckets": chosen.buckets}
    definition = asked | drawing(chosen, threads)
    rows = _matching(only or ["*"])
    redone = _matching(again) if again else []
    if list_rows:
        for row in rows:
            print(f"{row.name}: {'measured' if kept.has(row, definition) else 'not measured'}")
        return
    prepared, environments = Prepared(folder / size, chosen, threads), Environments(peers)
    failed = []
    for row in rows:
        if kept.has(row, definition) and row not in redone:
            continue
        print(row.name, flush=True)
        started, found = time.monotonic(), dict[str, Any]()
        try:
            if row.full_only and size != "full":
                raise MissingError("it knows Stable Diffusion's own sizes alone")
            found = {"figures": measure(row, prepared, environments)}
            print(f"{row.name}: an image in {found['figures']['image_s']:.2f} s", flush=True)
        except MissingError as e:
            found = {"reason": str(e)}
        except QuestDeployError as e:
            found = {"reason": in_one_line(e)}
            failed.append(f"{row.name}: {found['reason']}")
        spent = time.monotonic() - started
        kept.keep(row, definition, found | {"spent_s": spent})
    made = {"revision": REVISION, "threads": threads}
    known = [row for row in rows if row.quality and kept.has(row, definition)]
    for form in sorted({row.quality for row in known if row.ours}):
        if not kept.has_beside("limits", form, made):
            print(f"a step's limit, {form}", flush=True)
            found = limit_of(prepared.workspace(OurForm.of(form)))
            kept.keep_beside("limits", form, found | made)
    made["images"] = images
    for form in sorted({row.quality for row in known}):
        if not kept.has_beside("quality", form, made):
            print(f"images of the embedded model, {form}", flush=True)
            found = quality_of(prepared.folder, form, threads, images)
            kept.keep_beside("quality", form, found | made)
    machines = [
        read_json(path) for kind in KINDS if (path := results / f"{stem}-{kind}.json").exists()
    ]
    with atomic_file(docs / f"{stem}.md") as temporary:
        temporary.write_text(page(machines))
    print(docs / f"{stem}.md")
    if failed:
        raise QuestDeployError(f"{len(failed)} rows failed: {'; '.join(failed)}")


def in_one_line(error: Exception) -> str:
    """The message, of several lines the first and the last, each cut where it is long."""
    lines = [textwrap.shorten(line, LONGEST) for line in str(error).splitlines() if line.strip()]
    return " … ".join(dict.fromkeys((lines[0], lines[-1])))


def _matching(patterns: Sequence[str]) -> list[Row]:
    """This machine's rows that match one of the globs; raise InputError where one matches none."""
    rows = rows_of(kind_of_machine())
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            raise InputError(f"no row matches {pattern!r}; --list names them all")
    return [row for row in rows if any(fnmatchcase(row.name, x) for x in patterns)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run :func:`bench`."""
    run(app, arguments)


if __name__ == "__main__":
    main()
