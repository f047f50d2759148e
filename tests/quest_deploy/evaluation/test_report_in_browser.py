"""The report in a real browser: what moves, sorts, filters and redraws, and what must not happen."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.evaluation.report_page.render import render
from tests.quest_deploy.support import Chain

pytestmark = pytest.mark.slow
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    if CHROMIUM is None:
        pytest.skip("no chromium: `apt-get install chromium`")
    with playwright.sync_playwright() as started:
        # Its sandbox needs namespaces that containers lack; the page is our own.
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def file(mini_chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small chain's page."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(Workspace.open(mini_chain.root))[0], encoding="utf-8")
    return path


@pytest.fixture
def show(browser: Any, file: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page as from a disk; at the end, nothing was said on the console or asked for."""
    said: list[str] = []
    contexts = []

    def show(width: int = 1200, **settings: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked(request.url))
        page.goto(file.as_uri())
        return page

    def asked(url: str) -> None:
        if url != file.as_uri() and not url.startswith("data:"):
            said.append(url)

    yield show
    for context in contexts:
        context.close()
    assert said == []


def pixels(page: Any) -> bytes:
    shot: bytes = page.locator(".stage").screenshot()
    return shot


def test_the_slider_moves_the_rule_over_the_picture(show: Callable[..., Any]) -> None:
    page = show(reduced_motion="reduce")
    slider = page.locator(".stage input")
    slider.focus()
    seen = {pixels(page)}
    for key, value in (("Home", 0), ("End", 100), ("ArrowLeft", 99)):
        page.keyboard.press(key)
        assert slider.input_value() == str(value)
        assert (
            page.locator(".stage").evaluate("x => x.style.getPropertyValue('--x')") == f"{value}%"
        )
        seen.add(pixels(page))
    assert len(seen) == 4
    box = page.locator(".stage").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    assert 20 <= int(slider.input_value()) <= 30


def test_the_choices_change_the_pictures(show: Callable[..., Any]) -> None:
    page = show()
    image, left, right = page.locator(".compare select").all()
    sources = [page.locator(f".stage img.{side}") for side in ("under", "over")]
    before = [x.get_attribute("src") for x in sources]
    grid = [x.get_attribute("src") for x in page.locator(".grid img").all()]
    columns = page.locator(".grid th[scope=col]").count()
    assert before == [grid[0], grid[-columns]]
    left.select_option(index=1)
    right.select_option(index=0)
    image.select_option(index=columns - 1)
    after = [x.get_attribute("src") for x in sources]
    assert after == [grid[2 * columns - 1], grid[columns - 1]]
    assert [x.text_content() for x in page.locator(".stage .tag").all()] == ["PTQ", "FP32"]


def test_a_header_sorts_its_column_up_and_down(show: Callable[..., Any]) -> None:
    page = show()
    header = page.locator("#parts thead th", has_text="Worst error")
    column = header.evaluate("x => x.cellIndex")

    def errors() -> list[float]:
        found: list[float] = page.locator("#parts tbody tr").evaluate_all(
            f"rows => rows.map(row => Number(row.cells[{column}].dataset.v))"
        )
        return found

    header.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    assert errors() == sorted(errors())
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert errors() == sorted(errors(), reverse=True)
    page.locator("#parts thead th", has_text="Name").get_by_role("button").click()
    assert header.get_attribute("aria-sort") is None


def test_every_header_sorts_its_own_column(show: Callable[..., Any]) -> None:
    page = show()
    unsorted = page.evaluate(UNSORTED)
    assert unsorted.pop("columns") > 40
    assert unsorted == {}


UNSORTED = """() => {
  const found = {columns: 0};
  for (const header of document.querySelectorAll("table.sortable thead th")) {
    header.querySelector("button").click();
    found.columns += 1;
    const cells = [...header.closest("table").tBodies[0].rows].map((row) => row.cells[header.cellIndex]);
    const texts = cells.map((cell) => cell.dataset.v ?? cell.textContent.trim());
    const expected = texts.some((x) => Number.isNaN(Number(x)))
      ? [...texts].sort((a, b) => a.localeCompare(b)) : [...texts].sort((a, b) => a - b);
    if (JSON.stringify(texts) !== JSON.stringify(expected)) found[header.textContent] = texts;
  }
  return found;
}"""
"""By header, the columns that a click did not sort up; and how many were clicked."""


def test_a_chart_of_any_numbers_has_few_ticks(show: Callable[..., Any]) -> None:
    page = show()
    for call, most in (
        ("ticks(0, 1)", 7),
        ("ticks(1e20, 1e20 + 5e4)", 7),  # one more is none more, to a float
        ("ticks(3, 3)", 7),
        ("ticks(Infinity, NaN)", 0),
        ("powers(1e-320, 1)", 400),
        ("powers(0, Infinity)", 700),
        ("powers(0.001, 10)", 7),
    ):
        assert page.evaluate(call + ".length") <= most, call


def test_the_filters_leave_the_rows_that_fit_and_count_them(show: Callable[..., Any]) -> None:
    page = show()
    controls, rows = page.locator("[data-filters=parts]"), page.locator("#parts tbody tr")
    total = rows.count()
    controls.locator("[name=kind]").select_option("layer")
    layers = page.locator("#parts tbody tr:visible")
    assert 0 < layers.count() < total
    assert set(layers.evaluate_all("rows => rows.map(row => row.dataset.kind)")) == {"layer"}
    controls.get_by_role("searchbox").fill("CONV_in")
    assert layers.count() == 1
    assert "conv_in" in layers.first.text_content()
    assert controls.locator("output").text_content() == f"1 of {total} rows"


def test_the_chosen_tensor_changes_the_chart_and_the_table(show: Callable[..., Any]) -> None:
    page = show()
    ranges = page.locator(".ranges")
    chart, values = ranges.locator(".chart"), ranges.locator(".values tbody")

    def state() -> tuple[str, str, str]:
        return chart.inner_html(), chart.get_attribute("aria-label"), values.text_content()

    first = state()
    ranges.locator("select").select_option(index=3)
    second = state()
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert ranges.locator("select option").nth(3).text_content() in second[1]
    lines = chart.locator("path.line")
    assert lines.count() == 4  # the low and the high end, deployed and before
    page.locator(".heat svg").first.click(position={"x": 5, "y": 2})
    assert ranges.locator("select").input_value() == "0"
    assert state() == first


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1200])
def test_the_page_never_scrolls_sideways(show: Callable[..., Any], scheme: str, width: int) -> None:
    page = show(width, color_scheme=scheme)
    page.locator("details").evaluate_all("all => all.forEach(x => { x.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_a_table_that_scrolls_sideways_shows_it_until_its_end(show: Callable[..., Any]) -> None:
    scrolling = show(360).locator("#images .scroll").first

    def edge() -> bytes:
        """The right edge of the table's last row."""
        box = scrolling.locator("tbody tr").last.bounding_box()
        place = scrolling.bounding_box()
        clip = {"x": place["x"] + place["width"] - 4, "y": box["y"] + 4, "width": 2, "height": 2}
        shot: bytes = scrolling.page.screenshot(clip=clip, full_page=True)
        return shot

    assert scrolling.evaluate("x => x.scrollWidth > x.clientWidth")
    before = edge()
    scrolling.evaluate("x => { x.scrollLeft = x.scrollWidth; }")
    assert edge() != before


def test_a_chart_with_a_logarithmic_axis_says_so(show: Callable[..., Any]) -> None:
    assert "logarithmic" in show().locator(".errors .unit").first.text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(show: Callable[..., Any], scheme: str) -> None:
    """WCAG 2.2's AA: a contrast of 4.5."""
    page = show(color_scheme=scheme)
    found = page.evaluate(CONTRASTS)
    assert len(found) > 50
    assert [x for x in found if x[0] < 4.5] == []


def test_the_two_schemes_differ(show: Callable[..., Any]) -> None:
    colours = [
        show(color_scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor")
        for scheme in ("light", "dark")
    ]
    assert colours[0] != colours[1]


def test_print_shows_all_rows_and_no_controls(show: Callable[..., Any]) -> None:
    page = show()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.locator("details:not([open])").count() == 0
    assert page.locator(".controls:visible").count() == 0
    tall = page.locator(".scroll.tall").evaluate_all(
        "all => all.map(x => x.scrollHeight - x.clientHeight)"
    )
    assert tall
    assert max(tall) <= 1


def test_without_a_script_the_facts_are_still_there(show: Callable[..., Any]) -> None:
    page = show(java_script_enabled=False)
    assert page.locator("#parts tbody tr").count() > 20
    assert page.locator(".grid img").count() == 16
    assert page.locator(".controls:visible").count() == 0


CONTRASTS = """() => {
  const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const [r, g, b] = rgba(colour).slice(0, 3).map((x) => x / 255)
      .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (rgba(colour)[3] === 255) return colour;
    }
    return "white";
  };
  return [...document.querySelectorAll("p, dt, dd, th, td, li, a, label, summary, caption, h1, h2, h3, code, option")]
    .filter((x) => x.textContent.trim() && x.checkVisibility())
    .map((x) => {
      const [a, b] = [light(getComputedStyle(x).color), light(behind(x))];
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), x.tagName, x.textContent.trim().slice(0, 40)];
    });
}"""
"""The contrast of each text, its tag and its beginning."""
