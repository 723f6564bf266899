"""The head of the tab Launch: the demo's six pictures, and one button that starts it."""

import base64
import io
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import gradio as gr

from equipoise.errors import EquipoiseError
from equipoise.pipelines import config as configs
from equipoise.pipelines.demo import shapes
from equipoise.ui import draw
from equipoise.ui.launch import error_notice, launch, load_shipped, planned, ways_on
from equipoise.ui.safety import Site
from equipoise.ui.widgets import HIDDEN, PRIVATE, Updates, bound

NAME = "text_to_image/demo"
EVERY = 160  # steps between pictures on the way, to be seen side by side: half of the training, and its end
_LEAD = (
    "<b>Begin here: the demo.</b> A small model learns an object that it has never seen from six pictures, by two "
    "optimizers at four learning rates: eight runs, some minutes without a graphics card, no download. “sks” in their "
    "captions is a word that the model does not know yet, which becomes the object's name."
)


@dataclass(frozen=True, eq=False)
class DemoPanel:
    site: Site
    workers: int
    message: gr.HTML


def build(site: Site, workers: int) -> None:
    """Draws the panel."""
    six = f"<div class='demo-pictures'>{''.join(_pictures())}</div>"
    with gr.Row(elem_classes=["demo", "actions"]):
        gr.HTML(f"{six}<p class='hint'>{_LEAD}</p>{_outcome()}", elem_id="demo")
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


@cache
def _outcome() -> str:
    """What it comes to, which docs/draw_ui_demo.py has drawn from a demo that was run."""
    picture = base64.b64encode(files("equipoise.ui").joinpath("demo.png").read_bytes()).decode()
    words = "One prompt, one noise, after training at 3e-3, 1e-1 and 1e0: AdamW above, bounded AdamW below."
    return (
        f"<figure class='outcome'><img src='data:image/png;base64,{picture}' alt='{words}'>"
        f"<figcaption>{words}</figcaption></figure>"
    )


def on_start_demo(panel: DemoPanel) -> Updates:
    """Starts it as it is shipped, with pictures on the way, or says that it is at work already."""
    try:
        config = configs.set_keys(load_shipped(NAME), {"runs": str(panel.site.store.root), "samples.every": EVERY})
        made = planned(panel.site, config, NAME, panel.workers)
        id, words = launch(panel.site, made, panel.workers)
        return {panel.message: draw.notice(words, "good") + ways_on(id, sweep=True)}
    except EquipoiseError as error:
        return {panel.message: error_notice(error)}
