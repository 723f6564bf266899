"""The page in a real browser, over real runs of the embedded base. The pictures in docs/ui.md come from here.

EQUIPOISE_SCREENSHOTS=docs pytest tests/ui/test_browser.py
"""

import json
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from equipoise.pipelines import config as configs
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.runs.store import Store

playwright = pytest.importorskip("playwright.sync_api", reason="the extra dev brings it")
expect = playwright.expect
PATIENCE = 120_000  # milliseconds, for machines that are busy with other things
expect.set_options(timeout=PATIENCE / 2)
SHOTS = os.environ.get("EQUIPOISE_SCREENSHOTS")

pytestmark = pytest.mark.slow


@pytest.fixture
def look(browser):
    """Opens the page, and fails the test where the page fetches from elsewhere, or says an error to the console."""
    opened, said = [], []

    def at(url: str, width: int = 1280, height: int = 900, dark: bool = False, **more):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", **more
        )
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda m: said.append(m.text) if m.type == "error" and "ERR_" not in m.text else None)
        page.on("pageerror", lambda error: said.append(error.stack or str(error)))
        page.on("request", lambda r: said.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None)
        page.goto(url)
        page.get_by_role("tab", name="Launch").wait_for()
        opened.append(context)
        return page

    at.said = said

    yield at
    for context in opened:
        context.close()
    assert said == []


def shoot(page, name: str, full: bool = False) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"ui-{name}.png", full_page=full)


def tab(page, name: str) -> None:
    wanted = page.get_by_role("tab", name=name, exact=True)
    menu = page.get_by_role("button", name="More tabs").locator("visible=true")
    expect(wanted.locator("visible=true").or_(menu).first).to_be_visible()  # a page that loads has neither
    if not wanted.is_visible():  # on a phone the last ones are in a menu
        menu.click()
        wanted = page.locator(".overflow-dropdown button:visible").get_by_text(name, exact=True)
    wanted.click()


def reload(page, look) -> None:
    before = len(look.said)
    page.reload()
    page.get_by_role("tab", name="Launch").wait_for()
    del look.said[before:]  # what a page says of the requests that it leaves behind is no fault


def fits(page) -> bool:
    """Nothing makes the page wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")  # a pixel of rounding


def launch(page, **fields: str) -> str:
    """Fills in the form (a key's dots as __) and starts it; returns the id."""
    for key, value in fields.items():
        page.locator(f"#field-text_to_image-{key.replace('__', '-')}").locator("textarea, input").first.fill(value)
    page.locator("#start-text_to_image").click()
    started = page.locator(".message .good:visible")
    expect(started).to_contain_text("Started", timeout=PATIENCE)
    return started.inner_text().split()[1].rstrip(".")


def test_from_the_form_to_a_new_prompt(tmp_path, serve, look):
    """A sweep is launched, watched over a reload and a restart of the server, compared, asked for more, exported; all
    of it in a folder that is not there at first."""
    tmp_path = tmp_path / "runs"
    server = serve(tmp_path)
    page = look(server.url)
    expect(page.locator("#start-text_to_image")).to_be_visible()
    expect(page.get_by_text("Loading...", exact=True)).to_have_count(0)
    shoot(page, "launch")
    optimizer = page.locator("#field-text_to_image-optimizer-name input")
    optimizer.click()
    optimizer.press("Backspace")  # bounded_adamw, so that adamw is left
    optimizer.press("Escape")
    prompts = "a sks object on a white background"
    sweep = launch(page, optimizer__learning_rate="1e-3, 1e-2", train__steps="8", samples__prompts=prompts)
    tab(page, "Runs")
    row = page.locator("#runs-table tr", has_text=sweep)
    expect(row).to_contain_text("running", timeout=PATIENCE)

    page.reload()
    server.stop()
    server.start()
    page.goto(server.url)
    look.said.clear()  # what a page says while its server is away is no fault
    tab(page, "Runs")
    expect(row).to_be_visible(timeout=PATIENCE)
    row.get_by_role("button").click()
    expect(page.locator("#run-head h3")).to_contain_text(sweep)
    reload(page, look)
    expect(page.locator("#run-head h3")).to_contain_text(sweep)
    expect(row).to_contain_text("done", timeout=PATIENCE)
    tab(page, "Launch")
    rates = page.locator("#field-text_to_image-optimizer-learning_rate").locator("textarea, input").first
    expect(rates).to_have_value("1e-3, 1e-2")  # as it was before the reload
    page.go_back()
    expect(page.locator("#run-head h3")).to_be_visible()
    cell = page.locator("#run-head table button").first
    cell.click()
    expect(page.locator(".charts figcaption").first).to_have_text("loss", timeout=PATIENCE)
    read_a_chart(page)
    shoot(page, "runs", full=True)
    page.locator("#run-head button.link", has_text=sweep).click()
    page.get_by_role("tab", name="Scatter").click()
    expect(page.locator("#scatter .point")).to_have_count(2, timeout=PATIENCE)  # plotly, from gradio's own files
    page.get_by_role("tab", name="Samples").click()
    expect(page.locator("#samples")).to_contain_text("one of its cells")

    made = Store(tmp_path).get(sweep)
    assert [one.status().state for one in sweeps.cells(made)] == ["done", "done"]
    assert len(sweeps.cells(made)[0].metrics()) == 8, "nothing was trained twice, and nothing was lost"
    end = time.monotonic() + PATIENCE / 1000
    while not (made.folder / "comparison" / "table.json").is_file():
        assert time.monotonic() < end, made.log_file.read_text()
        time.sleep(0.2)
    tab(page, "Compare")
    page.locator("#compare-refs input").click()
    page.get_by_role("option", name=sweep).click()
    page.keyboard.press("Escape")
    cells = page.locator("#grid button.cell")
    expect(cells).to_have_count(3, timeout=PATIENCE)
    reload(page, look)
    expect(cells).to_have_count(3, timeout=PATIENCE)
    expect(page.locator("#grid img").first).to_have_js_property("complete", True)
    cells.nth(1).click()
    expect(page.locator("#cell-detail")).to_contain_text("learning_rate=0.001")
    cells.nth(2).click()
    slider = page.locator(".before-after input")
    slider.fill("25")
    assert page.locator(".before-after").evaluate("it => it.style.getPropertyValue('--at')") == "25%"
    expect(page.locator("#cell-detail")).to_contain_text("optimizer.learning_rate")
    shoot(page, "compare", full=True)
    zoom_together(page)
    vote(page)
    thumbnails = cells.nth(1).locator("img")
    key = thumbnails.last.get_attribute("data-picture")
    thumbnails.last.click()
    expect(page.locator(f".strip button[data-picture='{key}']")).to_have_attribute("aria-pressed", "true")

    page.locator("#new-prompt textarea").fill("a red <b>circle</b>")
    page.locator("#compare-scale input[type=range]").fill("0.7")
    page.locator("#new-count input").fill("1")
    page.locator("#generate").click()
    expect(page.locator("#compare-prompt-text")).to_contain_text("a red <b>circle</b>", timeout=PATIENCE)
    expect(page.locator("#grid button.cell")).to_have_count(3)
    expect(page.locator("#compare-which input")).to_have_value(re.compile("scale 0.7"))
    reload(page, look)
    expect(page.locator("#compare-which input")).to_have_value(re.compile("scale 0.7"), timeout=PATIENCE)
    expect(page.locator("#grid button.cell")).to_have_count(3)
    expect(page.locator("#grid .usable, #grid .unusable")).to_have_count(0)  # these pictures were not judged
    with page.expect_download() as download:
        page.get_by_role("link", name="Table (CSV)").click()
    assert "adamw" in Path(download.value.path()).read_text()
    if SHOTS:
        shoot_looks(look, server.url, sweep)


def read_a_chart(page) -> None:
    """Values under the pointer, a range of steps, a line hidden by its name: all of it outlives the chart's growth."""
    chart = page.locator("#curves figure.chart").first
    chart.locator("svg").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(chart.locator(".tip")).to_contain_text(re.compile(r"step 2\s*loss \d"))
    chart.locator("svg").scroll_into_view_if_needed()
    box = chart.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + 60)
    step = re.match(r"step (\d+)", chart.locator(".tip").inner_text())[1]
    assert int(step) > 2
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + 60, steps=3)
    page.mouse.up()
    expect(chart.locator("text.below").first).to_have_text(step)
    name = chart.locator("button[data-line]").first
    name.click()
    expect(name).to_have_attribute("aria-pressed", "false")
    expect(chart.locator("polyline").first).to_be_hidden()
    page.locator("#smooth input[type=range]").fill("0.5")  # drawn anew by the server
    expect(page.locator("#curves polyline.raw").first).to_be_attached()
    expect(name).to_have_attribute("aria-pressed", "false")
    expect(chart.locator("text.below").first).to_have_text(step)
    name.click()
    chart.locator("svg").dblclick(position={"x": 100, "y": 60})
    expect(chart.locator("text.below").first).to_have_text("1")
    page.locator("#smooth input[type=range]").fill("0")
    expect(page.locator("#curves polyline.raw")).to_have_count(0)


def zoom_together(page) -> None:
    """Both pictures under the slider; the next one is seen at the same spot."""
    zooms = page.locator("#cell-detail .zooms")
    zooms.scroll_into_view_if_needed()
    wide = zooms.bounding_box()["width"]

    def widths() -> list[int]:
        return [round(image.bounding_box()["width"] / wide) for image in zooms.locator("img").all()]

    assert widths() == [1, 1]
    zooms.dblclick(position={"x": wide / 4, "y": wide / 4})
    assert widths() == [3, 3]
    first = zooms.locator("img").first.bounding_box()
    page.mouse.down()
    page.mouse.move(first["x"] + wide, first["y"] + wide, steps=3)
    page.mouse.up()
    moved = [image.bounding_box() for image in zooms.locator("img").all()]
    assert moved[0] == moved[1] != first
    page.keyboard.press("-")
    assert 2 <= zooms.locator("img").first.bounding_box()["width"] / wide < 3
    page.locator("#cell-detail .strip button").last.click()
    expect(page.locator("#cell-detail .strip button").last).to_have_attribute("aria-pressed", "true")
    assert zooms.locator("img").first.bounding_box()["width"] / wide >= 2
    page.locator("#cell-detail").get_by_role("button", name="the whole picture").click()
    assert widths() == [1, 1]


def vote(page) -> None:
    """Whose the pictures are is not said before."""
    page.get_by_role("button", name="Blind vote").click()
    page.locator("#vote-begin").click()
    pair = page.locator("#vote-pair")
    expect(pair.locator("img")).to_have_count(2)
    assert "adamw" not in re.sub("base64,[^']*", "", pair.inner_html())
    page.wait_for_timeout(1000)  # a click at once would be a second one on the pair before
    page.locator("#vote-a").click()
    expect(page.locator("#vote-said")).to_contain_text("A was better: A was")
    expect(page.locator("#grid small", has_text="preferred").first).to_be_visible()


def shoot_looks(look, url: str, sweep: str) -> None:
    """Launch, Runs and Compare in the dark, and on a phone."""
    for name, width, height, dark in (("dark", 1280, 900, True), ("390", 390, 844, False)):
        page = look(url, width, height, dark)
        page.wait_for_timeout(3000)
        shoot(page, f"launch-{name}")
        for tab_name, address, part in (
            ("runs", f"?tab=Runs&run={sweep}", "#curves figure"),
            ("compare", f"?tab=Compare&compare={sweep}", "#grid button.cell"),
        ):
            before = len(look.said)
            page.goto(f"{url}/{address}")
            page.locator(part).first.wait_for()
            page.wait_for_timeout(3000)
            del look.said[before:]  # what a page says of the requests that it leaves behind is no fault
            page.locator(part).first.scroll_into_view_if_needed()
            page.evaluate("scrollTo(0, 0)")
            page.wait_for_timeout(500)
            shoot(page, f"{tab_name}-{name}", full=True)


def test_stop_resume_delete_on_a_phone_in_the_dark(tmp_path, serve, look):
    server = serve(tmp_path)
    page = look(server.url, 390, 844, dark=True)
    optimizer = page.locator("#field-text_to_image-optimizer-name input")
    optimizer.click()
    optimizer.press("Backspace")  # one run, no sweep
    optimizer.press("Escape")
    id = launch(page, optimizer__learning_rate="1e-3", train__steps="100000", name="long")
    tab(page, "Runs")
    page.locator("#runs-table").get_by_role("button", name=id).click()
    run = Store(tmp_path).get(id)
    expect(page.locator("#run-head .facts")).to_contain_text("loss", timeout=PATIENCE)  # it trains
    assert fits(page)
    page.locator("#stop").click()
    expect(page.locator("#run-head .badge")).to_have_text("stopped", timeout=PATIENCE)
    steps = run.status().step
    assert steps and list(run.checkpoints.iterdir())
    expect(page.locator("#stop")).to_be_disabled()
    page.locator("#resume").click()
    expect(page.locator("#run-head .badge")).to_have_text("running", timeout=PATIENCE)
    page.locator("#delete").click()
    page.locator("#delete-yes").click()
    expect(page.locator("#run-message")).to_contain_text("stop it first")

    page.locator("#duplicate").click()  # a second one waits for the first
    name = page.locator("#field-text_to_image-name").locator("textarea, input").first
    expect(name).to_be_visible()
    expect(name).to_have_value("long")
    name.fill("later")
    page.locator("#start-text_to_image").click()
    expect(page.locator(".message .good:visible")).to_contain_text(f"begins when {id} has ended", timeout=PATIENCE)
    tab(page, "Runs")
    second = page.locator("#runs-table").get_by_role("button", name="later")
    second.click()
    expect(page.locator("#run-head")).to_contain_text(f"waits for {id} to end", timeout=PATIENCE)
    expect(page.locator("#run-head .badge")).to_have_text("queued")
    page.locator("#runs-table").get_by_role("button", name=id).click()
    expect(page.locator("#run-head .badge")).to_have_text("running", timeout=PATIENCE)  # else the other one is stopped
    page.locator("#stop").click()
    expect(page.locator("#run-head .badge")).to_have_text("stopped", timeout=PATIENCE)
    second.click()
    expect(page.locator("#run-head .badge")).to_have_text("running", timeout=PATIENCE)
    page.locator("#stop").click()
    expect(page.locator("#run-head .badge")).to_have_text("stopped", timeout=PATIENCE)
    page.locator("#delete").click()
    page.locator("#delete-yes").click()
    expect(second).to_have_count(0, timeout=PATIENCE)
    page.locator("#runs-table").get_by_role("button", name=id).click()
    expect(page.locator("#run-head h3")).to_contain_text(id)
    page.locator("#delete").click()
    page.locator("#delete-yes").click()
    expect(page.locator("#runs-table")).to_contain_text("No runs yet", timeout=PATIENCE)
    assert not run.folder.exists()


def test_a_configuration_and_pictures_of_ones_own(tmp_path, serve, look):
    """Saved as YAML and loaded again; pictures captioned in place."""
    (tmp_path / "photos" / "cats" / "black").mkdir(parents=True)
    server = serve(tmp_path / "runs", f"--data=photos={tmp_path / 'photos'}")
    (tmp_path / "photos" / "cats" / "white").mkdir()  # since the server began
    page = look(server.url)
    data = page.locator("#field-text_to_image-data-folder input")
    for place in ("photos/cats/", "photos/cats/white/", "photos/", "photos/cats/", "photos/cats/black/"):
        option = page.get_by_role("option", name=place, exact=True)
        for _ in range(60):  # what the folder holds is listed soon after it was chosen, to whoever opens the list then
            page.get_by_role("heading", name="Launch").click()
            page.wait_for_timeout(1000)
            data.click()
            page.wait_for_timeout(300)
            if option.is_visible():
                break
        option.click()
        expect(data).to_have_value(place)
    optimizer = page.locator("#field-text_to_image-optimizer-name input")
    optimizer.click()
    expect(page.get_by_role("button", name="Remove bounded_adamw")).to_be_visible()
    entry = page.get_by_role("option", name="sam", exact=True)
    expect(entry).to_have_accessible_description(re.compile("worst nearby point"))
    assert "worst nearby point" in entry.evaluate("it => getComputedStyle(it, '::after').content")
    optimizer.fill("scaled_gd")  # the list is drawn anew, and what is for another entry is not left behind
    entry = page.get_by_role("option", name="scaled_gd", exact=True)
    expect(entry).to_have_accessible_description(re.compile("Riemannian"))
    optimizer.fill("")
    optimizer.press("Escape")
    rate = page.locator("#field-text_to_image-optimizer-learning_rate").locator("textarea, input").first
    rate.fill("1e-4, 1e-3")
    start = page.locator("#start-text_to_image")
    expect(start).to_have_text("Start 4 runs")  # of two optimizers
    rate.fill("0.007")
    expect(start).to_have_text("Start 2 runs")
    page.get_by_role("button", name="Options of what is chosen").click()
    expect(page.locator(".accordion, .block").get_by_text("term added to the denominator").first).to_be_visible()

    rate.fill("-1")
    page.locator("#check-text_to_image").click()
    fault = page.locator("#field-text_to_image-optimizer-learning_rate .fault")
    expect(fault).to_have_text("optimizer.learning_rate: must be > 0, got -1.")
    expect(rate).to_have_attribute("aria-invalid", "true")
    rate.fill("0.007")
    expect(fault).to_have_count(0)
    page.locator("#presets-text_to_image button").first.click()
    page.locator("#preset-name-text_to_image").locator("input, textarea").first.fill("mine")
    page.locator("#save-preset-text_to_image").click()
    expect(page.locator("#preset-message-text_to_image")).to_have_text("Saved.")
    rate.fill("0.5")
    page.locator("#own-text_to_image input").click()
    page.get_by_role("option", name="mine", exact=True).click()
    expect(rate).to_have_value("0.007")

    page.get_by_role("button", name="Pictures of your own").click()
    drop_a_folder(page, tmp_path / "dropped")
    for name, ink in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (64, 64), ink).save(tmp_path / f"{name}.png")
    (tmp_path / "no.png").write_text("words")
    page.locator("#pictures input[type=file]").set_input_files([tmp_path / f"{name}.png" for name in ("a", "no", "b")])
    left_out = "no.png: is not a picture that can be read (PNG, JPEG or WebP). It was left out."
    expect(page.locator("#pictures-message")).to_have_text(left_out)
    captions = ("a red square", "a <b>blue</b> square")
    for row, text in reversed(list(enumerate(captions))):
        cell = page.locator("#captions").get_by_test_id(f"cell-{row}-1")
        cell.dblclick()
        expect(page.locator("#captions :is(textarea, input):focus")).to_be_visible()  # what is typed sooner is lost
        page.keyboard.type(text)
        page.keyboard.press("Enter")
        expect(cell).to_contain_text(text)
    page.locator("#use-pictures").click()
    expect(page.locator("#pictures-message")).to_contain_text("2 pictures are ready")
    (folder,) = (tmp_path / "runs" / "uploads").iterdir()
    expect(data).to_have_value(f"uploads/{folder.name}")
    said = [json.loads(line)["text"] for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert said == list(captions)

    page.wait_for_timeout(2000)  # what was uploaded is still being listed, and a form that changes hides the plan
    page.locator("#check-text_to_image").click()
    plan = page.locator(".plan:visible")
    expect(plan).to_contain_text("An estimate from shapes", timeout=PATIENCE)
    with page.expect_download() as download:
        page.locator("#save-text_to_image").click()
    saved = Path(download.value.path()).read_text()
    assert configs.load(_file(tmp_path, saved)).data.folder == str(folder)
    rate.fill("0.008")
    expect(page.locator(".plan:visible")).to_have_count(0)  # it is not what would be started
    page.locator("#check-text_to_image").click()
    expect(plan).to_contain_text("An estimate from shapes", timeout=PATIENCE)
    mine = _file(tmp_path, saved.replace("0.007", "0.009"))
    with page.expect_file_chooser() as chooser:
        page.locator("#load-text_to_image").click()
    chooser.value.set_files(mine)
    expect(rate).to_have_value("0.009")
    expect(page.locator("#preset-text_to_image input")).to_have_value("")  # these are no preset's values
    expect(page.locator(".plan:visible")).to_have_count(0)
    broken = _file(tmp_path, saved.replace("0.007", "-1"))
    with page.expect_file_chooser() as chooser:
        page.locator("#load-text_to_image").click()
    chooser.value.set_files(broken)
    expect(page.locator(".message .bad:visible")).to_have_text(
        "mine.yaml: optimizer.learning_rate: must be > 0, got -1."
    )


def _file(folder: Path, text: str) -> Path:
    (folder / "mine.yaml").write_text(text)
    return folder / "mine.yaml"


def drop_a_folder(page, folder: Path) -> None:
    """As a hand does it; its captions come with it."""
    (folder / "more").mkdir(parents=True)
    for place, words in (("a", "a square"), ("more/b", "another")):
        Image.new("RGB", (64, 64), "green").save(folder / f"{place}.png")
        (folder / f"{place}.txt").write_text(words)
    upload = page.locator("#pictures")
    upload.scroll_into_view_if_needed()
    expect(upload.locator("input[type=file]")).to_be_attached()
    box, devtools = upload.bounding_box(), page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(folder)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        devtools.send("Input.dispatchDragEvent", {"type": kind, **at, "data": data})
    expect(page.locator("#captions")).to_contain_text("a square")
    expect(page.locator("#captions")).to_contain_text("another")
    upload.get_by_role("button", name="Clear").click()
    expect(page.locator("#captions")).to_be_hidden()


def only(page, words: str) -> None:
    """Filters the table to one run: again until the page hears it, which draws its boxes before it listens to them."""
    rows = page.locator("#runs-table tbody tr")
    for _ in range(10):
        page.get_by_label("Filter").fill("")
        page.get_by_label("Filter").fill(words)
        with suppress(AssertionError):
            return expect(rows).to_have_count(1, timeout=10_000)
    expect(rows).to_have_count(1)


def test_three_hundred_runs_on_a_screen_and_on_a_phone(site, run, swept, serve, look):
    for index in range(299):
        shutil.copytree(run.folder, site.store.root / f"old-{index:03d}")
    server = serve(site.store.root)
    assert server.seconds < 30  # five on a machine with nothing else to do
    for width, height, dark in ((1280, 900, False), (390, 844, True)):
        page = look(server.url, width, height, dark)
        assert fits(page)
        tab(page, "Runs")
        expect(page.locator("#runs-table tbody tr")).to_have_count(301)
        only(page, "grid")
        page.locator("#runs-table").get_by_role("button", name="grid").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#run-head h3")).to_contain_text("grid")
        assert fits(page)
        tab(page, "Compare")
        page.locator("#compare-refs input").fill("grid")
        page.get_by_role("option", name="grid").click()
        page.keyboard.press("Escape")
        expect(page.locator("#grid button.cell")).to_have_count(6)
        placed = page.locator("#grid tbody th").first.evaluate("it => getComputedStyle(it).position")
        assert placed == ("static" if width < 640 else "sticky"), "on a phone it would lie over the base"
        assert fits(page)
        cells = page.locator("#grid button.cell")
        cells.nth(1).click()
        cells.nth(2).click()  # at once: none of the clicks is lost
        page.locator(".before-after input").fill("25")
        assert page.locator(".before-after").evaluate("it => it.style.getPropertyValue('--at')") == "25%"
        step = page.locator("#compare-step")
        step.locator("input[type=range]").fill("2")  # while the page still fills itself in
        expect(page.locator("#grid img[src*='samples/step-00000002']")).to_have_count(4)
        step.locator("input[type=range]").press("End")
        expect(page.locator("#grid img[src*='samples/']")).to_have_count(0)
        step.locator("input[type=range]").press("ArrowLeft")  # to 4, which is nearer to 5
        expect(page.locator("#grid img[src*='samples/step-00000005']")).to_have_count(4)
        step.locator("input[type=number]").fill("3")
        step.locator("input[type=number]").press("Tab")
        expect(page.locator("#grid img[src*='samples/step-00000002']")).to_have_count(4)
        page.locator("#compare-scale input[type=range]").fill("0.7")
        expect(page.locator("#compare-message")).to_contain_text("Nothing is drawn at scale 0.7 yet")
        tab(page, "Plugins")
        page.locator(".plugins summary", has_text="scaled_adamw").click()
        expect(page.locator(".plugins details[open]")).to_contain_text("damping")
        assert fits(page)
        if width > 640:  # where all tabs are seen
            page.get_by_role("tab", name="Plugins", exact=True).press("ArrowLeft")
            expect(page.get_by_role("tab", name="Talk", exact=True)).to_have_attribute("aria-selected", "true")
            page.go_back()
            expect(page.get_by_role("tab", name="Plugins", exact=True)).to_have_attribute("aria-selected", "true")
        expect(page.locator("h1")).to_have_count(1)
