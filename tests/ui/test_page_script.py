"""What page.js does in a browser to charts and pictures, on a page of its own without a server."""

import base64
import io
import re

import pytest
from PIL import Image

from equipoise.ui import compare_cell, draw, launch_tab, theme

playwright = pytest.importorskip("playwright.sync_api", reason="the extra dev brings it")
expect = playwright.expect
pytestmark = pytest.mark.slow
LOSS = {
    "train": [(step, 1 / step) for step in range(1, 11)],
    "test": [(step, 20_000.0 / step) for step in range(1, 11)],
}


@pytest.fixture
def static(browser):
    """Opens HTML as the page has it, and fails the test where its script fails. `touch`: with a finger."""
    opened, said = [], []

    def show(body: str, touch: bool = False):
        context = browser.new_context(viewport={"width": 900, "height": 900}, has_touch=touch)
        context.set_default_timeout(30_000)
        opened.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: said.append(error.stack or str(error)))
        page.set_content(f"<html><head><style>{theme.css()}</style>{theme.head(['Runs'])}</head><body>{body}</body>")
        page.evaluate("document.querySelectorAll('#curves').forEach(it => equipoise.charts(it))")
        return page

    yield show
    for context in opened:
        context.close()
    assert said == []


def charts(lines=LOSS, log: bool = False) -> str:
    return draw.chart("loss", lines, log) + draw.chart("rate", {"rate": [(1, 0.1), (2, 0.2)]})


def curves(static, drawn: str, touch: bool = False):
    return static(f"<div id='run-head'><b data-shown='one'></b></div><div id='curves'>{drawn}</div>", touch)


def redraw(page, drawn: str) -> None:
    """As the server does every two seconds, with nothing left of what was there."""
    page.locator("#curves").evaluate("(it, drawn) => it.innerHTML = drawn", drawn)


def at(chart, share: float) -> tuple[float, float]:
    """A spot of a chart in the window, from the left to the right of its lines."""
    box, plot = chart.locator("svg").evaluate(
        "it => [it.getBoundingClientRect().toJSON(), JSON.parse(it.dataset.plot)]"
    )
    unit = box["width"] / plot["width"]
    return box["x"] + unit * (plot["left"] + share * (plot["right"] - plot["left"])), box["y"] + box["height"] / 2


def range_of(chart) -> list[str]:
    return chart.locator("text.below").all_text_contents()


def test_a_range_that_is_drawn_while_the_chart_grows_is_the_one_that_was_meant(static):
    page = curves(static, charts())
    chart = page.locator("figure.chart").first
    page.mouse.move(*at(chart, 1 / 9))
    page.mouse.down()
    page.mouse.move(*at(chart, 4 / 9))
    expect(chart.locator(".drawn")).to_be_attached()
    redraw(page, charts())
    page.mouse.up()
    expect(chart.locator("text.below").first).to_have_text("2")
    assert range_of(chart) == ["2", "5"]
    redraw(page, charts())
    expect(chart.locator("text.below").first).to_have_text("2")
    chart.locator("svg").dblclick()
    assert range_of(chart) == ["1", "10"]


def test_what_is_read_and_where_the_focus_is_outlive_a_chart_that_grows(static):
    page = curves(static, charts())
    chart = page.locator("figure.chart").first
    chart.locator("svg").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(chart.locator(".tip")).to_contain_text("step 3")
    redraw(page, charts({"train": [(3, 0.75), (9, 0.5)]}))
    expect(chart.locator(".tip")).to_have_text(re.compile(r"step 3\s*train 0\.75"))
    page.keyboard.press("ArrowRight")
    expect(chart.locator(".tip")).to_contain_text("step 9")
    page.mouse.click(5, 895)
    expect(chart.locator(".tip")).to_have_count(0)
    redraw(page, charts())
    expect(chart.locator("svg")).to_be_attached()
    assert chart.locator(".tip").count() == 0 and page.evaluate("document.activeElement.tagName") == "BODY"
    button = chart.locator("button[data-line=train]")
    button.click()
    redraw(page, charts())
    expect(button).to_be_focused()
    expect(button).to_have_attribute("aria-pressed", "false")
    expect(chart.locator("polyline[data-line=train]")).to_be_hidden()
    button.click()
    expect(chart.locator("polyline[data-line=train]")).to_be_visible()


def test_a_range_is_zoomed_by_keys_and_by_buttons_around_what_is_read(static):
    page = curves(static, charts({"train": [(step, 1 / step) for step in range(1, 18)]}))
    chart = page.locator("figure.chart").first
    chart.locator("svg").focus()
    page.keyboard.press("ArrowRight")
    for wanted in (["1", "9"], ["1", "5"], ["1", "3"]):
        page.keyboard.press("+")
        assert range_of(chart) == wanted
    expect(chart.locator(".tip")).to_contain_text("step 1")
    page.keyboard.press("-")
    assert range_of(chart) == ["1", "5"]
    page.keyboard.press("0")
    assert range_of(chart) == ["1", "17"]
    page.mouse.move(*at(chart, 0.5))
    chart.get_by_role("button", name="fewer steps").click()
    assert range_of(chart) == ["5", "13"]
    chart.get_by_role("button", name="all steps").click()
    assert range_of(chart) == ["1", "17"]


AXES = {
    "plain": ((0.009, 0.377), False),
    "negative": ((-3.1, 2.2), False),
    "thousands": ((9_000.0, 12_340.0), False),
    "millions": ((1_234_567.0, 9_876_543.0), False),
    "rates": ((1e-6, 3e-5), False),
    "one decade": ((0.0089, 0.37), True),
    "twelve decades": ((1e-9, 1000.0), True),
    "ten decades": ((1e-10, 1.0), True),
    "within a decade": ((6.3e-5, 1.58e-4), True),
    "nearly constant": ((1.0, 1.0002), True),
    "constant": ((0.5, 0.5), False),
}


def test_the_browser_writes_the_same_marks_as_the_server(static):
    drawn = [
        draw.chart(title, {"a": list(zip((1, 1_234_567), ends, strict=True))}, log)
        for title, (ends, log) in AXES.items()
    ]
    page = curves(static, "".join(drawn))
    for chart in page.locator("figure.chart").all():
        words = "it => [...it.querySelectorAll('.beside, .below')].map(one => one.textContent)"
        lines = (
            "it => [...it.querySelectorAll('polyline, .beside')]"
            ".map(one => one.getAttribute('points') ?? one.getAttribute('x'))"
        )
        marks, spots = chart.evaluate(words), chart.evaluate(lines)
        chart.evaluate("it => Chart.of(it).apply(true)")
        assert chart.evaluate(words) == marks and len(marks) > 2
        assert sorted(chart.evaluate(lines)) == sorted(f"{float(x):g}" if "," not in x else x for x in spots)


def test_the_numbers_beside_a_chart_have_room_when_a_line_is_hidden(static):
    few = {"large": [(1, 0.0), (2, 9.0)], "small": [(1, 1.23e-7), (2, 1.2301e-7)]}
    page = curves(static, draw.chart("loss", few))
    page.locator("button[data-line=large]").click()
    page.wait_for_function("document.querySelector('.beside').textContent.includes('e-7')")
    assert all(x >= 0 for x in page.locator(".beside").evaluate_all("all => all.map(one => one.getBBox().x)"))


def test_a_finger_reads_a_chart_by_a_tap(static):
    page = curves(static, charts(), touch=True)
    chart, other = page.locator("figure.chart").all()
    page.touchscreen.tap(*at(chart, 4 / 9))
    expect(chart.locator(".tip")).to_contain_text("step 5")
    page.touchscreen.tap(*at(other, 1))
    expect(other.locator(".tip")).to_contain_text("step 2")
    expect(chart.locator(".tip")).to_have_count(0)
    page.touchscreen.tap(5, 895)
    expect(other.locator(".tip")).to_have_count(0)


def picture(ink: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), ink).save(buffer, "PNG")
    return f"<img src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def pair() -> str:
    return compare_cell.zooms(picture("red")) + compare_cell.zooms(picture("blue")) + compare_cell.zoom_buttons()


def test_two_pictures_are_zoomed_and_moved_together_and_a_drag_outlives_their_being_drawn_anew(static):
    page = static(f"<div class='viewed'>{pair()}</div>")
    images = page.locator("img")

    def boxes() -> list[tuple[float, ...]]:
        found = [
            (image.bounding_box(), frame.bounding_box())
            for image, frame in zip(images.all(), frames.all(), strict=True)
        ]
        return [(round(b["width"] / f["width"], 1), round(b["x"] - f["x"]), round(b["y"] - f["y"])) for b, f in found]

    frames = page.locator(".zooms")
    assert boxes() == [(1, 0, 0)] * 2
    frames.first.focus()
    page.mouse.move(100, 100)
    page.mouse.wheel(0, -300)
    page.wait_for_function("document.querySelector('.viewed').classList.contains('zoomed')")
    first, second = boxes()
    assert first == second and first[0] == pytest.approx(2.7, abs=0.1) and first[1] < 0
    page.keyboard.press("ArrowRight")
    moved, beside = boxes()
    assert moved == beside and moved[1] < first[1]
    page.mouse.down()
    page.locator(".viewed").evaluate("(it, drawn) => it.innerHTML = drawn", pair())
    page.mouse.move(150, 150)
    page.mouse.up()
    assert boxes() == [moved] * 2
    page.locator("button[data-zoom='0']").click()
    assert boxes() == [(1, 0, 0)] * 2


def test_fields_are_found_by_words_of_their_section_their_name_and_their_explanation(static):
    fields = {"data-crop": "crop: how pictures are cut", "data-flip": "flip: mirrors them", "ema": "decay: of the mean"}
    section = "<div class='section'><h4>{}</h4>{}</div>".format
    drawn = {name: f"<div id='field-x-{name}'><input>{words}</div>" for name, words in fields.items()}
    data = section("data", drawn["data-crop"] + drawn["data-flip"])
    page = static(f"<div class='rest'>{launch_tab.SEEK}{data}{section('ema', drawn['ema'])}</div>")
    box, seen = page.locator(".seek input"), page.locator("[id^=field-]:visible")
    for words, found in (("DATA mirrors", ["data-flip"]), ("data", ["data-crop", "data-flip"]), ("nothing so", [])):
        box.fill(words)
        assert [one.get_attribute("id") for one in seen.all()] == [f"field-x-{name}" for name in found]
        expect(page.locator(".seek [role=status]")).to_have_text(f"{len(found)} found")
        assert page.locator(".section:visible").count() == bool(found)
    box.fill("")
    assert seen.count() == 3
    fault = "<p class=fault id=field-x-ema-fault>ema: bad</p>"
    page.locator("#field-x-ema").evaluate("(field, fault) => field.innerHTML += fault", fault)
    box.fill("ema")
    expect(page.locator(".seek [role=status]")).to_have_text("1 found")


def test_a_plan_is_hidden_by_another_value_and_not_by_the_same_ones_again(static):
    page = static("<div id='plan-x'>the plan</div>")
    page.evaluate("equipoise.checked('x', ['a', [1]])")
    page.evaluate("equipoise.keep('x', ['a', [1]])")
    expect(page.locator("#plan-x")).to_be_visible()
    page.evaluate("equipoise.keep('x', ['b', [1]])")
    expect(page.locator("#plan-x")).to_be_hidden()
    page.evaluate("equipoise.checked('x', ['b', [1]])")
    expect(page.locator("#plan-x")).to_be_visible()
