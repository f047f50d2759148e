"""The report: what its page tells of a workspace at each stage, and that nothing of a workspace
runs or loads in it.
"""

from __future__ import annotations

import base64
import copy
import dataclasses
import hashlib
import platform
import re
import shutil
from collections.abc import Callable
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quest_deploy as qd
from quest_deploy.artifacts.checkpoint import (
    ActivationQuantizerData,
    Checkpoint,
    PerChannelQuantizerData,
    load_checkpoint,
    save_checkpoint,
)
from quest_deploy.artifacts.model_source import ModelSource
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.evaluation.report_page import facts
from quest_deploy.evaluation.report_page.render import render
from quest_deploy.files import sha256_of
from tests.helpers import assert_holds, hand_checkpoint, refused
from tests.quest_deploy.evaluation.page_reader import Page
from tests.quest_deploy.support import Chain, cli, flip_byte, snapshot

HOSTILE = "</script><script>alert(1)</script><img src=https://x.example onerror='a()'>\"&{{ 7*7 }}"
TIMES = "\N{MULTIPLICATION SIGN}"
SECTIONS = {
    "model": ("calibrate", "finetune"),
    "images": ("evaluate",),
    "verification": ("reference", "verify"),
    "ranges": ("calibrate",),
    "sensitivity": ("sensitivity",),
    "precision": ("export", "build-engine"),
    "speed": ("benchmark",),
}
"""The sections, and the commands that make them."""


def page_of(workspace: Workspace) -> Page:
    return Page(render(workspace)[0])


@pytest.fixture(scope="module")
def opened(mini_chain: Chain) -> Workspace:
    """The small chain's workspace, not to be changed."""
    return Workspace.open(mini_chain.root)


def tile_of(page: Page, title: str) -> str:
    """The text of the one card whose title begins so."""
    (found,) = (
        " ".join(x.text.split())
        for x in page.all("div")
        if x.attributes.get("class") == "tile" and x.text.split("\n")[0].startswith(title)
    )
    return found


def worse_of(page: Page) -> list[str]:
    """What the page marks as worse than FP32."""
    return [x.text for x in page.all("dd", "span") if "worse" in x.attributes.get("class", "")]


@pytest.fixture(scope="module")
def page(opened: Workspace) -> Page:
    """Its page."""
    return page_of(opened)


@pytest.fixture
def altered(opened: Workspace) -> Callable[..., Workspace]:
    """The workspace with other details of a stage, in memory alone."""

    def alter(stage: str, change: Callable[[dict[str, Any]], None]) -> Workspace:
        other = Workspace(opened.root, opened.source, opened.scheme, copy.deepcopy(opened.stages))
        change(other.stages[stage].details)
        return other

    return alter


def test_the_page_is_written_for_readers_and_their_tools(page: Page) -> None:
    (html,) = page.all("html")
    assert html.attributes["lang"] == "en"
    levels = [int(x.tag[1]) for x in page.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels)), levels
    assert [x for x in page.all("th") if x.attributes.get("scope") not in ("col", "row")] == []
    assert [x for x in page.all("img") if "alt" not in x.attributes] == []
    charts = [x for x in page.all("svg") if x.attributes.get("aria-hidden") != "true"]
    assert charts
    assert [x for x in charts if not x.attributes.get("aria-label")] == []
    controls = page.all("input", "select")
    labelled = [
        x
        for x in controls
        if x.attributes.get("aria-label") or "label" in [parent.tag for parent in x.parents]
    ]
    assert controls
    assert labelled == controls
    scrolling = [x for x in page.all("div") if "scroll" in x.attributes.get("class", "").split()]
    assert [x for x in scrolling if x.attributes.get("tabindex") != "0"] == []
    ids = [x.id for x in page.elements if x.id]
    assert len(ids) == len(set(ids))
    named = [x.attributes[key] for x in page.elements for key in NAMING if key in x.attributes]
    assert set(named) <= set(ids)


NAMING = ("aria-labelledby", "data-filters", "data-images")


def test_the_page_names_nothing_that_a_browser_would_load(page: Page) -> None:
    loading = ("src", "href", "srcset", "poster", "action", "formaction", "background", "data")
    targets = {
        value for x in page.elements for key, value in x.attributes.items() if key in loading
    }
    assert {x for x in targets if not x.startswith(("data:", "#"))} == set()
    styles = "".join(x.text for x in page.all("style"))
    assert "url(" not in styles
    assert "@import" not in styles
    assert [x for x in page.elements if "style" in x.attributes] == []
    assert [k for x in page.elements for k in x.attributes if k.startswith("on")] == []


def test_the_policy_lets_only_the_pages_own_style_and_script_through(page: Page) -> None:
    (meta,) = (x for x in page.all("meta") if "http-equiv" in x.attributes)
    policy = dict(x.strip().split(" ", 1) for x in meta.attributes["content"].split(";"))
    (style,), (script,) = (
        page.all("style"),
        [x for x in page.all("script") if x.attributes.get("type") is None],
    )
    for element, directive in ((style, "style-src"), (script, "script-src")):
        digest = base64.b64encode(hashlib.sha256(element.text.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'"
    assert policy["img-src"] == "data:"


def test_hostile_names_and_prompts_are_text(
    altered: Callable[..., Workspace], opened: Workspace, page: Page
) -> None:
    def spoil(details: dict[str, Any]) -> None:
        details["layers"][0]["layer"] = HOSTILE
        details["problems"] = [HOSTILE]
        details["coverage"]["unchecked"] = [HOSTILE]

    def spoil_captions(details: dict[str, Any]) -> None:
        details["captions"] = [HOSTILE] * len(details["captions"])
        details["results"] = {
            (HOSTILE if name == "PTQ" else name): x for name, x in details["results"].items()
        }
        details["images"] = {
            (HOSTILE if name == "PTQ" else name): x for name, x in details["images"].items()
        }

    def tags(found: Page) -> set[tuple[str, ...]]:
        return {(x.tag, *sorted(x.attributes)) for x in found.elements}

    spoilt = altered("evaluate/onnxruntime", spoil_captions)
    spoil(spoilt.stages["verify/onnxruntime"].details)
    spoilt.source = ModelSource(HOSTILE)
    spoilt.stages[HOSTILE] = copy.deepcopy(spoilt.stages["export"])
    spoilt.stages["export"].options["prompt"] = HOSTILE
    found = page_of(spoilt)
    for name in ("script", "style", "meta", "link"):
        assert len(found.all(name)) == len(page.all(name))
    assert len(found.all("img")) == len(page.all("img"))
    # Nothing but a list of problems and of what was not checked came to be.
    assert {x[0] for x in tags(found) - tags(page)} <= {"ul", "li", "div"}
    for section in ("verification", "images", "provenance"):
        assert HOSTILE in found.section(section)
    (title,) = found.all("h1")
    assert HOSTILE in title.text
    errors, _ = found.data("images")[0]["series"], found.data("ranges")
    assert HOSTILE in errors


def test_an_empty_workspace_has_every_section_with_the_command_that_makes_it(
    tmp_path: Path,
) -> None:
    made = Workspace.create(tmp_path / "w", "emoji", Scheme.parse("w4a4", buckets=2))
    found = page_of(made)
    for section, commands in SECTIONS.items():
        for command in commands:
            assert f"quest-deploy {command} -w WORKSPACE" in found.section(section), section
    assert found.section("provenance")
    assert found.data("ranges") == []


def test_each_stage_fills_its_section_and_its_command_goes(opened: Workspace) -> None:
    for count in range(1, len(opened.stages) + 1, 3):
        stages = dict(list(opened.stages.items())[:count])
        content, missing = render(Workspace(opened.root, opened.source, opened.scheme, stages))
        found = Page(content)
        done = {name.partition("/")[0] for name in stages}
        for section, commands in SECTIONS.items():
            for command in set(commands) - done:
                assert f"quest-deploy {command} -w" in found.section(section), (count, section)
            if set(commands) <= done and section not in ("verification", "speed"):
                assert missing[section] == [], (count, section)
                assert "Not here yet" not in found.section(section), (count, section)


def test_engines_that_were_not_verified_or_timed_are_named(page: Page) -> None:
    for section, command in (("verification", "verify"), ("speed", "benchmark")):
        assert "Not here yet" in page.section(section)
        for backend in ("openvino", "tensorrt-rtx"):
            assert f"{command} -w WORKSPACE --backend {backend}" in page.section(section)
        assert f"{command} -w WORKSPACE --backend onnxruntime" not in page.section(section)


def test_an_engine_that_was_not_verified_says_so_at_the_top(page: Page) -> None:
    tiles = [x.text for x in page.all("div") if x.attributes.get("class") == "tile"]
    verdicts = [" ".join(x.split()) for x in tiles if "Engine for" in x]
    assert len(verdicts) == 3
    assert [x for x in verdicts if "✓ Verified" in x] == [
        x for x in verdicts if "ONNX Runtime" in x
    ]
    for name in ("OpenVINO", "TensorRT-RTX"):
        (verdict,) = (x for x in verdicts if name in x)
        assert "Not verified" in verdict


def test_what_is_out_of_date_is_left_out_and_says_why(workspace: Path) -> None:
    flip_byte(workspace / "unet.onnx")
    found = page_of(Workspace.open(workspace))
    for section in ("precision", "verification", "images"):
        text = found.section(section)
        assert "out of date" in text
        assert "quest-deploy export -w WORKSPACE" in text
    assert "Coverage" not in found.section("verification")
    assert str(workspace) not in found.content
    assert found.data("ranges") != []


def test_the_page_of_an_outdated_workspace_begins_with_what_is_and_how_to_make_it_again(
    workspace: Path, page: Page
) -> None:
    def header(found: Page) -> str:
        return found.all("header")[0].text

    flip_byte(workspace / "unet.onnx")
    opened = Workspace.open(workspace)
    text = header(page_of(opened))
    outdated = [name for name, why in opened.states().items() if why and name != "report"]
    assert {"export", "verify/onnxruntime", "evaluate/onnxruntime"} <= set(outdated)
    places = []
    for name in outdated:
        command, _, backend = name.partition("/")
        chosen = f" --backend {backend}" if backend else ""
        places.append(text.index(f"quest-deploy {command} -w WORKSPACE{chosen}"))
        assert name in text
    assert places == sorted(places)
    assert "Out of date" in text
    assert "calibrate" not in text
    assert "Out of date" not in header(page)


def test_what_is_left_out_says_what_it_is_and_its_command_is_code(workspace: Path) -> None:
    flip_byte(workspace / "unet.onnx")
    found = page_of(Workspace.open(workspace))
    assert "Verification of ONNX Runtime: left out" in found.section("verification")
    assert "Benchmark of ONNX Runtime: left out" in found.section("speed")
    assert "`" not in "".join(x.text for x in found.all("section"))
    assert "quest-deploy export -w WORKSPACE" in {
        x.text for x in found.all("code") if "speed" in [each.id for each in x.parents]
    }


def test_layers_of_eight_bits_are_in_the_title_and_among_the_bits(opened: Workspace) -> None:
    for globs in ((), ("*.ff.net.2", "<b>*")):
        scheme = dataclasses.replace(opened.scheme, eight_bit_layers=globs)
        found = page_of(Workspace(opened.root, opened.source, scheme, opened.stages))
        (title,) = found.all("h1")
        share = opened.stages["calibrate"].details["weights_at_4_bits"]
        assert (f"{share:.0%} of the weights at 4 bits" in title.text) == bool(globs)
        assert all(glob in found.section("model") for glob in globs)
        assert found.all("b") == []


def test_branches_of_low_rank_are_shown_with_their_layers(opened: Workspace) -> None:
    chosen = {"low_rank": 6, "low_rank_layers": ("*.ff.net.2", "<b>*")}
    scheme = dataclasses.replace(opened.scheme, **chosen)
    for stages in ({}, opened.stages):  # before it is calibrated, and after
        found = page_of(Workspace(opened.root, opened.source, scheme, stages))
        assert_holds(found.section("model"), "rank 6", "FP16", "*.ff.net.2", "<b>*")
        assert found.all("b") == []
    assert "rank" not in page_of(opened).section("model")


def of_benchmark(ratio: float, bytes_: int) -> Callable[[dict[str, Any]], None]:
    """Sets all speeds over FP32's, and the bytes of files and memory beside FP32's 1000."""

    def change(details: dict[str, Any]) -> None:
        details["speedup_over_fp32"] = dict.fromkeys(details["speedup_over_fp32"], ratio)
        details["size_ratio_to_fp32"] = 1000 / bytes_
        for x in details["footprints"] + details.get("pipeline", {}).get("engines", []):
            of = 1000 if x["engine"] == "fp32" else bytes_
            x |= {"file_bytes": of, "peak_memory_bytes": of}
        if "pipeline" in details:
            details["pipeline"]["speedup_over_fp32"] = ratio

    return change


def test_an_engine_that_is_worse_than_fp32_is_said_to_be(
    opened: Workspace, altered: Callable[..., Workspace]
) -> None:
    (batch, *_) = opened.stages["benchmark/onnxruntime"].details["speedup_over_fp32"]
    found = page_of(altered("benchmark/onnxruntime", of_benchmark(0.8, 2000)))
    card = tile_of(found, "Speed of ONNX Runtime")
    section = found.section("speed")
    for text in (
        f"0.80{TIMES}",
        f"slower than FP32 at batch {batch}",
        "larger files",
        "higher peak memory",
    ):
        assert text in card
    for text in (f"slower at batch {batch}", "larger files: 2.00 kB", f"2.00{TIMES} larger than"):
        assert text in section
    assert f"0.80{TIMES}" in worse_of(found)


def test_an_engine_that_is_better_than_fp32_is_not_marked_as_worse(
    altered: Callable[..., Workspace],
) -> None:
    found = page_of(altered("benchmark/onnxruntime", of_benchmark(1.5, 500)))
    card = tile_of(found, "Speed of ONNX Runtime")
    assert f"1.50{TIMES} that of FP32 at batch" in card
    assert "Worse than FP32" not in found.section("speed")
    assert not {"slower", "larger", "higher"} & set(card.split())
    assert f"1.50{TIMES}" not in worse_of(found)


def test_an_engine_with_files_larger_than_fp32s_weights_says_so_though_it_was_not_timed(
    altered: Callable[..., Workspace],
) -> None:
    for fp32, larger in ((1, True), (10**12, False)):

        def change(details: dict[str, Any], fp32: int = fp32) -> None:
            details["fp32_weight_bytes"] = fp32

        found = page_of(altered("export", change))
        assert ("larger than" in tile_of(found, "Engine for TensorRT-RTX")) == larger
        assert ("larger than the" in found.section("precision")) == larger


def test_the_card_of_quality_names_its_engine_and_doubts_a_distance_of_few_images(
    altered: Callable[..., Workspace],
) -> None:
    for count, doubted in ((99, True), (100, False)):

        def change(details: dict[str, Any], count: int = count) -> None:
            details["sampling"]["images"] = count

        found = page_of(altered("evaluate/onnxruntime", change))
        card = tile_of(found, "Fréchet distance, ONNX Runtime")
        assert f"{count} images" in card
        assert ("so few images" in card) == doubted


def test_shares_have_their_standard_errors_in_points(altered: Callable[..., Workspace]) -> None:
    def change(details: dict[str, Any]) -> None:
        details["sampling"]["images"] = 256
        details["results"]["FP32"] |= {"top1": 0.5, "top5": 1.0}

    text = page_of(altered("evaluate/onnxruntime", change)).section("images")
    assert "50.0% ± 3.1" in text  # sqrt(0.25 / 256) = 1 / 32
    assert "100.0% ± 0.0" in text


def test_the_images_stand_before_the_tables_of_layers(page: Page) -> None:
    sections = [x.id for x in page.all("section")]
    tables = [x.parents for x in page.all("table")]
    (first, *_) = (each.id for parents in tables for each in parents if each.id in sections)
    assert first == "images"


def test_reasons_name_files_as_the_workspace_has_them_whatever_it_is_called(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_byte(workspace / "reports" / "verify-onnxruntime.json")
    page = render(Workspace.open(workspace))[0]
    assert "reports/verify-onnxruntime.json was changed" in page
    workspace.rename(tmp_path / "s")  # which "reports/" ends with
    monkeypatch.chdir(tmp_path)
    assert_same(render(Workspace.open(Path("s")))[0], page)


def test_an_interrupted_stage_is_told(workspace: Path) -> None:
    opened = Workspace.open(workspace)
    assert "interrupted" not in page_of(opened).section("provenance")
    opened.start("finetune", {})
    text = page_of(opened).section("provenance")
    assert "finetune was interrupted" in text
    assert "quest-deploy finetune -w WORKSPACE" in text


def test_the_table_of_parts_has_all_of_them_the_nearest_to_its_limit_first(
    opened: Workspace, page: Page
) -> None:
    details = opened.stages["verify/onnxruntime"].details
    rows = [x for x in page.all("tr") if x.attributes.get("data-kind")]
    assert len(rows) == len(details["layers"]) + len(details["segments"])
    used = [x["error"] / x["tolerance"] for x in details["layers"] + details["segments"]]
    cells = [x for x in page.all("td") if x.parents[-1] in rows and "data-v" in x.attributes]
    shown = [float(x.attributes["data-v"]) for x in cells[2::4]]
    assert shown == sorted(used, reverse=True)


def test_a_failed_verification_says_so_and_why(altered: Callable[..., Workspace]) -> None:
    def fail(details: dict[str, Any]) -> None:
        details |= {"passed": False, "problems": ["layer conv_in: wrong"]}

    found = page_of(altered("verify/onnxruntime", fail))
    assert "layer conv_in: wrong" in found.section("verification")
    assert [x.text for x in found.all("dd") if "bad" in x.attributes.get("class", "")] == [
        "✗ Failed"
    ]


def test_ranges_are_what_the_codes_stand_for(opened: Workspace, page: Page) -> None:
    (data,) = page.data("ranges")
    checkpoint = load_checkpoint(opened.root / "checkpoint.safetensors")
    assert [x["name"] for x in data["quantizers"]] == list(checkpoint.quantizers)
    assert data["edges"] == [0, *opened.scheme.bucket_edges, 1000]
    for shown in data["quantizers"]:
        quantizer = checkpoint.quantizers[shown["name"]]
        assert isinstance(quantizer, ActivationQuantizerData)
        low, high = shown["range"]["finetune"]
        for k in range(3):
            # What a quantizer does to values far outside and inside its range.
            far = np.float32([-1e30, 1e30])
            codes = np.clip(np.rint(far / quantizer.scale[k]), quantizer.low[k], quantizer.high[k])
            np.testing.assert_allclose((low[k], high[k]), codes * quantizer.scale[k], rtol=1e-3)


def test_the_range_of_a_per_channel_quantizer_spans_its_channels() -> None:
    scale = np.array([[0.5, -0.25], [1.0, 2.0]], np.float32)
    zero_point = np.array([[3, 0], [0, 15]], np.float32)
    quantizer = PerChannelQuantizerData("q", 4, 1, ("a",), scale, zero_point, 0, 15)
    low, high = facts.clip_range(quantizer)
    # Bucket 0: channel 0 from -1.5 to 6, channel 1 from -3.75 to 0.
    # Bucket 1: channel 0 from 0 to 15, channel 1 from -30 to 0.
    np.testing.assert_array_equal(low, [-3.75, -30])
    np.testing.assert_array_equal(high, [6, 15])


def of_checkpoint(made: Checkpoint, root: Path, stage: str = "calibrate") -> Workspace:
    """A workspace whose only stage made this checkpoint."""
    workspace = Workspace.create(root, "hand", made.scheme)
    shares = {"weights_at_4_bits": 0.5, "macs_at_4_bits": 0.5}
    counts = {"layers": 4, "sites": 3, "buckets": made.scheme.buckets}
    with workspace.locked():
        path = workspace.new("calibrated.safetensors")
        save_checkpoint(made, path)
        workspace.record(stage, inputs=(), options={}, files=[path], details={**counts, **shares})
    return workspace


def test_of_a_thousand_buckets_neighbours_share_a_column_of_their_widest_range(
    tmp_path: Path,
) -> None:
    made = hand_checkpoint(buckets=1000)
    found = page_of(of_checkpoint(made, tmp_path / "w"))
    (data,) = found.data("ranges")
    edges = data["edges"]
    assert len(edges) == 129
    assert set(edges) <= {0, *made.scheme.bucket_edges, 1000}
    assert (edges[0], edges[-1]) == (0, 1000)
    bounds = np.array([*made.scheme.bucket_edges, 1000])
    for shown in data["quantizers"]:
        low, high = facts.clip_range(made.quantizers[shown["name"]])
        for k, (first, last) in enumerate(pairwise(edges)):
            within = (first < bounds) & (bounds <= last)
            assert within.sum() in (7, 8)
            expected = low[within].min(), high[within].max()
            np.testing.assert_allclose([x[k] for x in shown["range"]["calibrate"]], expected, 1e-3)
    assert "1000 buckets are 128 columns" in found.section("ranges")


def test_the_heat_map_has_a_cell_for_each_tensor_and_bucket(opened: Workspace, page: Page) -> None:
    maps = [x for x in page.all("svg") if "data-first" in x.attributes]
    rows = [int(x.attributes["data-rows"]) for x in maps]
    assert [int(x.attributes["data-first"]) for x in maps] == [
        sum(rows[:i]) for i in range(len(rows))
    ]
    cells = [
        (maps.index(x.parents[-1]), *cell)
        for x in page.all("path")
        if x.parents[-1] in maps
        for cell in re.findall(r"M(\d+) (\d+)h1v1h-1z", x.attributes["d"])
    ]
    quantizers = opened.stages["calibrate"].details["sites"]
    assert len(cells) == len(set(cells)) == quantizers * opened.scheme.buckets == 3 * sum(rows)


def test_the_images_are_those_that_evaluate_kept(opened: Workspace, page: Page) -> None:
    details = opened.stages["evaluate/onnxruntime"].details
    kept = [path for paths in details["images"].values() for path in paths]
    embedded = [
        base64.b64decode(x.attributes["src"].partition(",")[2])
        for x in page.all("img")
        if x.attributes.get("src")
    ]
    assert embedded == [(opened.root / path).read_bytes() for path in kept]
    assert len(details["images"]) == 4
    alts = [x.attributes["alt"] for x in page.all("img") if x.attributes.get("src")]
    assert all(any(caption in alt for caption in details["captions"]) for alt in alts)


def test_a_page_holds_only_as_many_images_as_fit(
    opened: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "MOST_IMAGE_BYTES", 1)
    found = page_of(opened)
    assert len([x for x in found.all("img") if x.attributes.get("src")]) == 4
    assert "images/evaluate-onnxruntime" in found.section("images")


def test_an_image_that_the_manifest_has_no_hash_of_is_not_read(
    altered: Callable[..., Workspace],
) -> None:
    def spoil(details: dict[str, Any]) -> None:
        details["images"] = {name: ["manifest.json"] for name in details["images"]}

    found = page_of(altered("evaluate/onnxruntime", spoil))
    assert [x for x in found.all("img") if x.attributes.get("src")] == []


def test_every_file_has_its_hash_on_the_page(opened: Workspace, page: Page) -> None:
    text = page.section("provenance")
    for name, record in opened.stages.items():
        for path in record.files if name != "report" else ():
            assert path in text
            assert sha256_of(opened.root / path) in text


def test_equal_workspaces_have_equal_pages_wherever_they_lie(
    opened: Workspace, page: Page, tmp_path: Path
) -> None:
    copied = shutil.copytree(opened.root, tmp_path / "elsewhere")
    assert_same(render(Workspace.open(copied))[0], page.content)
    assert str(opened.root) not in page.content


def assert_same(found: str, expected: str) -> None:
    """Pages are equal: where they are not, the first differing line alone is shown, since pytest
    compares lines of a megabyte letter by letter.
    """
    pairs = zip_longest(found.splitlines(), expected.splitlines())
    assert next(((a, b) for a, b in pairs if a != b), None) is None


def test_a_failing_test_of_a_page_prints_no_more_than_where_its_elements_are(page: Page) -> None:
    # Each holds its parents and the page's text, the parents too: a list of them took 11 GB.
    assert max(len(repr(x)) for x in (page, *page.elements)) < 200


def test_the_page_tells_of_the_machine_its_family_alone(page: Page) -> None:
    assert platform.release() not in page.content
    assert f"{platform.system()} {platform.machine()}" in page.section("provenance")
    assert f"{platform.system()} {platform.machine()}" in page.section("precision")


@pytest.mark.parametrize(
    ("recorded", "told"),
    [
        (
            "Linux-5.15.167.4-microsoft-standard-WSL2-x86_64-with-glibc2.35",
            "Linux x86_64 glibc2.35",
        ),
        ("macOS-14.5-arm64-arm-64bit", "macOS arm64"),
        ("Windows-10-10.0.19045-SP0", "Windows"),
        ("", ""),
    ],
)
def test_a_platform_is_told_without_its_kernels_build(recorded: str, told: str) -> None:
    assert facts.system(recorded) == told


def test_a_page_of_its_own_place_leaves_the_workspace_as_it_is(
    workspace: Path, tmp_path: Path
) -> None:
    before = snapshot(workspace)
    target = tmp_path / "new folder" / "page.html"
    ended = cli("report", "-w", workspace, "--output", target, "--json")
    assert ended.code == 0, ended.err
    assert ended.json["page"] == str(target)
    assert ended.json["bytes"] == target.stat().st_size
    assert_same(target.read_text(encoding="utf-8"), render(Workspace.open(workspace))[0])
    assert snapshot(workspace) == before
    assert qd.report(workspace)["page"] == str(workspace / "reports" / "report.html")


@pytest.mark.parametrize("name", ["manifest.json", "reports/report.html", "new/page.html"])
def test_a_page_of_its_own_place_overwrites_nothing_of_the_workspace(
    workspace: Path, tmp_path: Path, name: str
) -> None:
    before = snapshot(workspace)
    (tmp_path / "link").symlink_to(workspace)
    for root in (workspace, tmp_path / "link"):
        cli("report", "-w", workspace, "--output", root / name).assert_refused("--output")
    assert snapshot(workspace) == before


def test_records_that_the_page_does_not_know_are_refused(
    altered: Callable[..., Workspace],
) -> None:
    for stage, key in (("verify/onnxruntime", "layers"), ("benchmark/onnxruntime", "footprints")):
        with refused("manifest.json", "run"):
            render(altered(stage, lambda details, key=key: details.pop(key)))
        with refused("manifest.json", "run"):
            render(altered(stage, lambda details, key=key: details.update({key: [3]})))


def test_a_page_of_an_imported_checkpoint_shows_its_ranges_and_says_what_it_cannot_have(
    tmp_path: Path,
) -> None:
    made = of_checkpoint(hand_checkpoint(), tmp_path / "w", "import")
    content, missing = render(made)
    found = Page(content)
    assert found.data("ranges")[0]["stages"] == ["import"]
    assert {name: [x["command"] for x in gaps] for name, gaps in missing.items()} == {
        "model": [],
        "images": [""],
        "verification": [f"quest-deploy {x} -w WORKSPACE" for x in ("reference", "verify")],
        "ranges": [],
        "sensitivity": [""],
        "precision": [f"quest-deploy {x} -w WORKSPACE" for x in ("export", "build-engine")],
        "speed": ["quest-deploy benchmark -w WORKSPACE"],
    }
    for section in ("images", "sensitivity"):
        assert "Not to be had here" in found.section(section)


@pytest.mark.slow
def test_the_page_of_the_embedded_model_is_light(chain: Chain) -> None:
    assert len(render(Workspace.open(chain.root))[0].encode()) < 1_000_000
