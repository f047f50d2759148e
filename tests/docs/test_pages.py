"""The documentation says what the code is."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from quest_deploy.cli.main import app
from scripts.docs import faults, options

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("trt_plugins/**/*.md"))
    if "build" not in path.relative_to(ROOT).parts
)
COMMANDS = typer.main.get_command(app)
FOLDERS = ("docker", "exporters", "quest_deploy", "scripts", "tests", "trt_plugins")
MADE = ("trt_plugins/build", "scripts/bench/results/plugin.json")
"""What building and measuring make."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path) if path else page
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file.read_text()), target


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    for path in re.findall(
        rf"`((?:{'|'.join(FOLDERS)})/(?:[\w./-]*(?:/|\.\w+))?)`", page.read_text()
    ):
        assert (ROOT / path).exists() or path.startswith(MADE), path


def _command_lines(text: str) -> list[list[str]]:
    """What follows ``quest-deploy`` in blocks of code, a list of words a line."""
    joined = re.sub(r"\\\n\s+", "", text)
    lines = re.findall(r"^ +(?:\$ )?quest-deploy ([a-z].*)$", joined, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pages
def test_commands_in_blocks_of_code_exist_with_their_options(page: Path) -> None:
    for command, *words in _command_lines(page.read_text()):
        assert command in COMMANDS.commands, command
        known = {
            name for p in COMMANDS.commands[command].params for name in (*p.opts, *p.secondary_opts)
        }
        given = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert given <= {*known, "--help"}, (command, given - known)


def test_the_commands_page_is_up_to_date() -> None:
    """`make docs-pages` writes it."""
    utility = ["-m", "typer", "quest_deploy.cli.main", "utils", "docs", "--name", "quest-deploy"]
    made = subprocess.run([sys.executable, *utility], capture_output=True, text=True, check=True)
    assert (ROOT / "docs" / "cli.md").read_text().strip() == made.stdout.strip()


def test_the_table_of_an_engines_options_is_up_to_date() -> None:
    """`make docs-pages` writes it."""
    text = options.PAGE.read_text()
    assert "| `--threads` |" in text
    assert options.page(text) == text


def test_the_tables_of_faults_are_up_to_date() -> None:
    """`make docs-pages` writes them."""
    text, results = faults.PAGE.read_text(), json.loads(faults.RESULTS.read_text())
    assert faults.page(text, results) == text
    assert results.keys() == faults.CAMPAIGNS.keys()


def test_the_index_of_the_site_lists_every_page() -> None:
    listed = re.findall(r"- .*?([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    prose = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert {name for name in listed if "/" not in name} == prose
    # `make docs-results` writes it, and lists it.
    results = "results/README.md"
    assert (results in listed) == (ROOT / "docs" / results).exists()
