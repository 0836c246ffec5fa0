"""The page in Chromium, driven by Playwright; both have to be installed."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hessfunc.app import report
from hessfunc.app.report import comparison
from hessfunc.training import history
from tests.app.report.cases import PARTS, RUN, SETTINGS, SUBJECT, TRAINED

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = report.Folder(tmp_path_factory.mktemp("report"), RUN, SUBJECT)
    for part in PARTS:
        folder.add(part)
    folder.close("complete")
    return folder.path


def opened(browser: Any, folder: Path, ready: str = "#plane image", **options: Any) -> Any:
    """The page, which fails the test where it logs, raises, or asks for anything but itself."""
    page = browser.new_context(**options).new_page()
    page.said = []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("requestfailed", lambda request: page.said.append(request.url))
    page.on("request", lambda request: asked.append(request.url))
    asked: list[str] = []
    address = (folder / "report.html").as_uri()
    page.goto(address)
    if options.get("java_script_enabled", True):
        page.wait_for_selector(ready)
    assert [url for url in asked if not url.startswith("data:")] == [address]
    return page


@pytest.fixture
def page(browser: Any, folder: Path) -> Iterator[Any]:
    page = opened(browser, folder, viewport={"width": 1200, "height": 900})
    yield page
    assert page.said == []
    page.context.close()


class Chart:
    """One figure, as a person sees and handles it."""

    def __init__(self, page: Any, name: str) -> None:
        self.page, self.figure = page, page.locator(f"#{name}")
        self.drawing = self.figure.locator(".plot > svg")
        self.drawing.scroll_into_view_if_needed()

    def settle(self) -> None:
        """Wait until what was asked for is drawn."""
        self.page.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")

    @property
    def shown(self) -> list[float]:
        """The ends of the range of each axis that zooms."""
        self.settle()
        words = self.figure.locator("output").inner_text().replace("\u2212", "-").replace(",", " ")
        return [float(word) for word in words.split() if word[-1].isdigit() and word != "1"]

    @property
    def ticks(self) -> list[str]:
        return self.figure.locator("text[text-anchor=middle]").all_inner_texts()

    @property
    def tip(self) -> str:
        self.settle()
        return self.figure.locator(".tip").inner_text().replace("\u2212", "-")

    def point(self, across: float, down: float = 0.4) -> tuple[float, float]:
        box = self.drawing.bounding_box()
        return box["x"] + across * box["width"], box["y"] + down * box["height"]

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.page.mouse.move(*self.point(*start))
        self.page.mouse.down()
        self.page.mouse.move(*self.point(*end), steps=4)
        self.page.mouse.up()

    def press(self, *keys: str) -> None:
        self.drawing.focus()
        for key in keys:
            self.page.keyboard.press(key)


def width(ends: list[float]) -> float:
    return ends[1] - ends[0]


def test_the_numbers_are_those_of_the_json(page: Any, folder: Path) -> None:
    content = json.loads((folder / "results.json").read_text())
    assert json.loads(page.locator("#content").inner_text()) == content
    shown = page.locator(".headlines dd:not(.sureness)").all_inner_texts()
    results = content["results"]
    expected = (
        *(content["subject"]["loss"], results["eigenvalues"]["values"][0]),
        *(results["smallest"]["values"][0], results["trace"]["value"]),
    )
    plain = [float(text.replace("\N{MINUS SIGN}", "-")) for text in shown]
    assert plain == pytest.approx(expected, rel=1e-4)
    assert (
        page.locator(".headlines").get_by_text("95 % interval \N{MINUS SIGN}2.353 to 10.35").count()
        == 1
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_quietly_in_both_schemes(browser: Any, folder: Path, scheme: str) -> None:
    page = opened(browser, folder, color_scheme=scheme)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") is (scheme == "light")
    assert page.said == []
    page.context.close()


def test_the_wheel_zooms_and_a_double_click_resets(page: Any) -> None:
    chart = Chart(page, "density")
    full, ticks = chart.shown, chart.ticks
    page.mouse.move(*chart.point(0.6))
    page.mouse.wheel(0, -400)
    sync_api.expect(chart.figure.get_by_label("show all")).to_be_enabled()
    assert width(chart.shown) < 0.7 * width(full)
    assert full[0] < chart.shown[0] < chart.shown[1] < full[1]
    assert chart.ticks != ticks
    page.mouse.dblclick(*chart.point(0.6))
    assert (chart.shown, chart.ticks) == (full, ticks)


def test_a_page_that_is_scrolled_down_is_not_caught(page: Any) -> None:
    chart = Chart(page, "density")
    page.mouse.move(*chart.point(0.5))
    before, full = page.evaluate("scrollY"), chart.shown
    page.mouse.wheel(0, 300)
    for _ in range(100):
        if page.evaluate("scrollY") > before:
            break
        page.wait_for_timeout(20)
    else:
        pytest.fail("the page does not scroll")
    assert chart.shown == full


def test_a_drag_selects(page: Any) -> None:
    chart = Chart(page, "density")
    full = chart.shown
    chart.drag((0.3, 0.4), (0.5, 0.6))
    assert width(chart.shown) == pytest.approx(0.2 * width(full), rel=0.15)
    assert page.locator(".selected").count() == 0


def test_keys_zoom_move_and_reset(page: Any) -> None:
    chart = Chart(page, "density")
    full = chart.shown
    chart.press("+", "+")
    near = chart.shown
    assert width(near) == pytest.approx(width(full) / 1.5**2, rel=1e-2)
    chart.press("ArrowRight")
    assert chart.shown[0] > near[0]
    assert width(chart.shown) == pytest.approx(width(near), rel=1e-2)
    chart.press("-")
    assert width(chart.shown) > width(near)
    chart.press("0")
    assert chart.shown == full


def test_buttons_zoom_and_reset(page: Any) -> None:
    chart = Chart(page, "line")
    full = chart.shown
    assert chart.figure.get_by_label("show all").is_disabled()
    chart.figure.get_by_label("zoom in").click()
    assert width(chart.shown) < width(full)
    chart.figure.get_by_label("show all").click()
    assert chart.shown == full


def test_the_plane_zooms_along_both_axes(page: Any) -> None:
    chart = Chart(page, "plane")
    full, picture = chart.shown, chart.figure.locator("image").get_attribute("href")
    assert full == [-0.5, 0.5, -0.5, 0.5]
    chart.drag((0.3, 0.2), (0.6, 0.5))
    near = chart.shown
    assert max(width(near[:2]), width(near[2:])) < 0.7
    assert chart.figure.locator("image").get_attribute("href") != picture
    chart.press("Escape")
    assert chart.shown == full


def test_the_pointer_tells_eigenvalues_and_losses(page: Any) -> None:
    chart = Chart(page, "density")
    head = chart.figure.locator(".plot .head").first.bounding_box()
    page.mouse.move(head["x"] + 3, head["y"] + 3)
    assert chart.tip.startswith("eigenvalue 1: 5\nresidual 1e-5\ndensity ")
    assert chart.figure.locator(".plot .hollow").count() == 1

    chart = Chart(page, "line")
    page.mouse.move(*chart.point(0.99))
    assert chart.tip == "at 0.5\nloss 0.875"
    chart = Chart(page, "plane")
    page.mouse.move(*chart.point(0.99, 0.01))
    assert chart.tip == "at 0.5, 0.5\nloss 0.625"


def test_less_smoothing_makes_peaks_narrower(page: Any) -> None:
    chart = Chart(page, "density")
    before = chart.figure.locator(".plot .curve").get_attribute("d")
    chart.figure.get_by_label("width of the Gaussians").fill("-1")
    chart.settle()
    assert chart.figure.locator("label span").inner_text() == "0.0075"
    assert chart.figure.locator(".plot .curve").get_attribute("d") != before


def test_a_phone_shows_it_without_scrolling_aside(browser: Any, folder: Path) -> None:
    options = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
    page = opened(browser, folder, **options)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    chart = Chart(page, "density")
    assert chart.drawing.bounding_box()["width"] > 300
    assert page.said == []
    page.context.close()


def test_pictures_take_the_place_of_scripts(browser: Any, folder: Path) -> None:
    page = opened(browser, folder, java_script_enabled=False)
    assert page.locator("figure img").count() == 3
    assert all(box["width"] > 300 for box in map(_box, page.locator("figure img").all()))
    page.context.close()


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_of_a_training_opens_quietly(browser: Any, tmp_path: Path, width: int) -> None:
    figure = Figure()
    figure.savefig(picture := io.BytesIO(), format="png")
    html = report.training(TRAINED, SETTINGS, RUN, picture.getvalue())
    (tmp_path / "report.html").write_text(html)
    page = opened(browser, tmp_path, ".series", viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("figure").count() == 4
    assert page.locator("#loss .plot .series.dashed").count() == 1
    assert page.locator("#loss figcaption").inner_text().split() == [
        *("training", "examples"),
        *("test", "examples"),
    ]
    assert page.locator(".headlines").get_by_text("62.5%").count() == 1
    assert page.said == []
    page.context.close()


def test_the_page_of_two_trainings_has_a_colour_for_each(browser: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        history.write(tmp_path / name / "history.json", SETTINGS, [TRAINED])
    runs = comparison.read([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "report.html").write_text(comparison.comparison(runs))
    page = opened(browser, tmp_path, ".series", viewport={"width": 360, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    strokes = "lines => new Set(lines.map(line => getComputedStyle(line).stroke)).size"
    assert page.locator("#loss .plot .series").evaluate_all(strokes) == 2
    assert page.said == []
    page.context.close()


def _box(element: Any) -> dict[str, float]:
    return element.bounding_box()
