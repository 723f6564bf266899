"""The head of the tab Launch: the demo's six pictures, and one button that starts it."""

import base64
import io
import json
from dataclasses import dataclass
from functools import cache

import gradio as gr

from equipoise.errors import EquipoiseError
from equipoise.pipelines import config as configs
from equipoise.pipelines.demo import shapes
from equipoise.ui import draw
from equipoise.ui.launch import error_notice, launch, load_shipped, planned, ways_on
from equipoise.ui.safety import Site
from equipoise.ui.widgets import HIDDEN, PRIVATE, Updates, bound

NAME = "text_to_image/demo"
_LEAD = (
    "<b>Begin here: the demo.</b> A small model learns an object that it has never seen from six pictures, by two "
    "optimizers at four learning rates: eight runs, some minutes without a graphics card, no download. “sks” in their "
    "captions is a word that the model does not know yet, which becomes the object's name. See it in Compare."
)


@dataclass(frozen=True, eq=False)
class DemoPanel:
    site: Site
    workers: int
    message: gr.HTML


def build(site: Site, workers: int) -> None:
    """Draws the panel."""
    with gr.Row(elem_classes=["demo", "actions"]):
        gr.HTML(f"<div class='demo-pictures'>{''.join(_pictures())}</div><p class='hint'>{_LEAD}</p>", elem_id="demo")
        start = gr.Button("Start the demo", variant="primary", size="md", elem_id="start-demo")
    message = gr.HTML(elem_id="demo-message")
    at_once = draw.notice("Being started …")  # the server takes its time
    start.click(None, None, message, js=f"() => {json.dumps(at_once)}", **PRIVATE)
    start.click(bound(on_start_demo, DemoPanel(site, workers, message)), None, message, **HIDDEN)


@cache
def _pictures() -> list[str]:
    """The six pictures that it trains on, drawn as `demo.pictures_folder` draws them, within the page."""
    import numpy as np

    rng, images = np.random.default_rng(0), []
    for background in ("white", "gray", "black") * 2:
        file = io.BytesIO()
        shapes.draw_varied(shapes.OBJECT, background, rng).save(file, "PNG")
        words = shapes.caption(shapes.OBJECT.name, background)
        data = base64.b64encode(file.getvalue()).decode()
        images.append(f"<img src='data:image/png;base64,{data}' alt='{words}' title='{words}'>")
    return images


def on_start_demo(panel: DemoPanel) -> Updates:
    """Starts it as it is shipped, or says that it is at work already."""
    try:
        config = configs.set_keys(load_shipped(NAME), {"runs": str(panel.site.store.root)})
        made = planned(panel.site, config, NAME, panel.workers)
        id, words = launch(panel.site, made, panel.workers)
        return {panel.message: draw.notice(words, "good") + ways_on(id, sweep=True)}
    except EquipoiseError as error:
        return {panel.message: error_notice(error)}
