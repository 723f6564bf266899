"""Draws ui-demo.png: what `make demo` made, in the page, in a real browser; and ui/demo.png, which Launch shows.

    make demo
    python docs/draw_ui_demo.py RUNS [--browser /usr/bin/chromium]

RUNS is the runs folder that the demo wrote into; the youngest sweep there with a row `adamw` and one `bounded_adamw
reach=0.2 trust=0.01` is shown, their cells at the largest learning rate under the slider.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from equipoise.pipelines.comparing.comparison import Comparison
from equipoise.pipelines.runs.store import Store

ROWS = ("adamw", "bounded_adamw reach=0.2 trust=0.01")
RATES, GAP = (3e-3, 1e-1, 1.0), 4  # columns of ui/demo.png, and pixels between its pictures
WIDTH, HEIGHT = 1200, 2380  # pixels
HERE = Path(__file__).parent


def chosen(runs: Path) -> tuple[str, Comparison]:
    """The sweep, and its comparison."""
    for item in Store(runs).list(kinds=("sweep",)):
        if (folder := runs / item.id / "comparison").is_dir():
            found = Comparison.read(folder)
            if set(ROWS) <= set(found.rows):
                return item.id, found
    sys.exit(f"{runs}: holds no sweep of {' and '.join(ROWS)} that was compared; `make demo` makes one.")


def draw_outcome(found: Comparison) -> None:
    """The first picture of the first prompt at three rates, AdamW above and the bounded one below."""
    pictures = [[found.at(row, rate)[0].pictures[0].file for rate in RATES] for row in ROWS]
    with Image.open(found.folder / pictures[0][0]) as first:
        side = first.width
    sheet = Image.new("RGBA", ((side + GAP) * len(RATES) - GAP, (side + GAP) * len(ROWS) - GAP))
    for down, some in enumerate(pictures):
        for across, name in enumerate(some):
            with Image.open(found.folder / name) as image:
                sheet.paste(image.convert("RGB"), ((side + GAP) * across, (side + GAP) * down))
    sheet.quantize(96, Image.Quantize.FASTOCTREE).save(HERE.parent / "ui" / "demo.png", optimize=True)


def draw(url: str, sweep: str, cells: list[str], browser: str) -> None:
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page(
            viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light"
        )
        page.set_default_timeout(120_000)  # milliseconds, for machines that are busy with other things
        page.goto(url)
        page.get_by_role("tab", name="Compare").click()
        page.locator("#compare-refs input").fill(sweep)
        page.get_by_role("option", name=sweep).click()
        page.keyboard.press("Escape")
        for cell in cells:
            page.locator(f'#grid button[data-id="{cell}"] img').first.click()
            page.locator(f'#grid button[data-id="{cell}"][aria-pressed=true]').wait_for()
        page.locator(".before-after img").last.wait_for()
        page.mouse.move(0, 0)
        page.wait_for_function("[...document.images].every(image => image.complete)")
        page.evaluate("window.scrollTo(0, 0)")
        page.screenshot(path=HERE / "ui-demo.png", clip={"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--browser", default="/usr/bin/chromium", help="(default: %(default)s)")
    given = parser.parse_args()
    sweep, found = chosen(given.runs)
    draw_outcome(found)
    cells = [found.at(row, found.rates[-1])[0].run for row in ROWS]
    command = [sys.executable, "-m", "equipoise.pipelines.cli", "ui", "--port=0", f"--runs={given.runs}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+:\d+", server.stdout.readline())
            assert found, "the server did not say where it is"
            draw(found[0], sweep, cells, given.browser)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
