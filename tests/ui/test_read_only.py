"""A page that only shows does nothing else; and a tab in which a trained model and its base are asked."""

import asyncio
import json
import shutil
import time
from contextlib import suppress
from dataclasses import replace

import gradio as gr
import httpx
import pytest
import torch
from gradio.events import EventData
from gradio.state_holder import SessionState

from equipoise.pipelines.comparing.comparison import Comparison
from equipoise.pipelines.jobs import background
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.runs import checkpoints, status
from equipoise.ui import read_only, talk
from equipoise.ui.app import page

READS = {  # all other handlers: each new one must be put into one of the two
    *("offer", "offer_metrics", "offer_models", "offer_new", "pick", "open_another", "draw_grid", "by_scale", "follow"),
    *("choose_cell", "choose_picture", "choose_prompt", "choose_model", "follow_job", "use_rate", "differ", "restore"),
    *(
        "refresh",
        "select",
        "keep",
        "duplicate",
        "on_look",
        "on_page",
        "on_shape",
        "on_pipeline",
        "on_preset",
        "on_plugins",
        "on_count",
        "say_purposes",
    ),
    *("page", "_offered", "show_live", "asked_runs", "asked_comparison", "forget_pair", "show_tally"),
    *(
        "show_live",
        "search_log",
        "forget_search",
        "offer_columns",
        "draw_scatter",
        "offer_presets",
        "load_preset",
        "keep_preset",
    ),
}


def test_every_handler_is_known_to_read_or_to_change(site):
    async def names() -> set[str]:  # where no loop runs, gradio makes some that nobody closes
        return {event.name for event in page(site, 1).fns.values() if event.name}

    with asyncio.Runner() as loop:
        found = loop.run(names())
    assert found - READS == read_only.CHANGES and READS <= found


def held(site) -> dict:
    """What is in the runs folder but its index, and when it was written."""
    return {file: file.stat().st_mtime_ns for file in site.store.root.rglob("*") if "index" not in file.name}


def _sent(part) -> object:
    """What a browser sends of a part that nobody has touched."""
    value = getattr(part, "value", None)
    return "" if value is None and isinstance(part, gr.Textbox) else value


def test_what_a_page_that_only_shows_can_still_be_asked_writes_nothing(site, run, swept):
    """Every event that reads, with the demo's pictures, which were not drawn yet, to be looked at."""
    shows, before = replace(site, read_only=True), held(site)

    async def ask_all() -> list[str]:
        blocks = page(shows, 1)
        read_only.close(blocks)
        state, asked = SessionState(blocks), []
        for event in blocks.fns.values():
            if event.name not in READS:
                continue
            about = EventData(event.inputs[0] if event.inputs else None, {"id": "one"})
            sent = [_sent(part) for part in event.inputs]
            if event.name in ("on_look", "on_page"):
                sent[0] = "demo"
            with suppress(gr.Error):  # of a comparison that is not there
                request = gr.Request(query_params={})
                await blocks.process_api(event, sent, state=state, request=request, event_data=about)
            asked.append(event.name)
        return asked

    with asyncio.Runner() as loop:
        assert set(loop.run(ask_all())) == READS
    assert held(site) == before


def test_a_page_that_only_shows_changes_nothing(site, run, swept, serve):
    """Its buttons are gone, and whoever asks for what they did is refused; nothing is uploaded."""
    server = serve(site.store.root, "--read-only")
    before = held(site)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        config = client.get("/config").json()
        parts = {part["id"]: part for part in config["components"]}
        named = {
            part["props"].get("elem_id"): part["props"]["visible"]
            for part in parts.values()
            if "visible" in part["props"]
        }
        gone = ("stop", "resume", "delete", "generate", "start-text_to_image", "start-demo", "delete-yes", "save-notes")
        assert not any(named[id] for id in gone) and named["duplicate"] is True
        refused = 0
        for event in config["dependencies"]:
            if event["api_name"] not in {*read_only.CHANGES, "check"}:  # the last of asked_check
                continue
            data = [parts[id]["props"].get("value") for id in event["inputs"]]
            asked = {"data": data, "fn_index": event["id"], "session_hash": f"s{event['id']}"}
            assert client.post("/gradio_api/queue/join", json=asked).status_code == 200
            with client.stream("GET", f"/gradio_api/queue/data?session_hash=s{event['id']}") as stream:
                answer = next(line for line in stream.iter_lines() if "process_completed" in line)
            refused += not json.loads(answer.removeprefix("data:"))["success"]
        assert refused >= len(read_only.CHANGES)
        sent = client.post("/gradio_api/upload", files=[("files", ("a.png", b"x"))])
        assert (sent.status_code, sent.text) == (403, "Nothing is uploaded here.")
        assert client.get("/runs-file/one/log.txt").status_code == 200
    assert held(site) == before


def test_a_trained_model_and_its_base_stand_beside_each_other(site, swept, run):
    ids = talk.offered(site)
    assert ids[0] == "one" or set(ids) == {"one", *(cell.id for cell in sweeps.cells(swept))}
    shown = talk.shown_beside(site, "grid/comparison")
    assert shown.count("<section>") == 2 and "the untouched base" in shown and "adamw 1e-4" in shown
    assert shown.count("<img") == 4 and "a &lt;i&gt;cat" in shown


def test_what_was_asked_before_is_shown_at_once(site, swept, ask):
    place, name, cell = site.store.root / background.COMPARISONS, "20260101-000000-aaaa", sweeps.cells(swept)[0].id
    (swept.folder / "comparison").rename(swept.folder / "moved")
    place.mkdir()
    (swept.folder / "moved").rename(place / name)
    record = {"runs": [cell], "asked": {"prompts": ["a cat"], "count": 1, "scale": 1.0}, "created": time.time()}
    (place / f"{name}.json").write_text(json.dumps(record | status.process()))
    ask("offer_models")
    assert "the untouched base" in str(ask("say", cell, "a cat", 1, 1.0, ""))
    for id, prompt in ((None, "a cat"), (cell, " ")):
        assert "Choose a model" in str(ask("say", id, prompt, 1, 1.0, ""))
    assert len(background.jobs(site.store.root)) == 1


def test_without_a_run_there_is_nobody_to_ask(site):
    assert talk.offered(site) == []
    with pytest.raises(gr.Error, match="--read-only"):
        read_only._refuse()


def test_a_checkpoint_is_asked_beside_the_base(site, swept, ask):
    """All of a run's are drawn in one job, so that the next one that is asked for is there already."""
    cell = sweeps.cells(swept)[0]
    for step in (2, 4):
        checkpoints.save(cell.checkpoints, step, {"a": torch.zeros(1)}, {})
    offered = str(ask("choose_model", cell.id))
    assert offered.index("step 4") < offered.index("step 2")
    made = Comparison.read(swept.folder / "comparison")
    made.cells[0].row, made.cells[1].row = (f"one {folder.name}" for folder in checkpoints.complete(cell.checkpoints))
    made.folder = site.store.root / background.COMPARISONS / "20260101-000000-aaaa"
    shutil.copytree(swept.folder / "comparison", made.folder)
    made.write_tables()
    asked = {"prompts": ["a cat"], "count": 1, "scales": [1.0], "checkpoints": True}
    record = {"runs": [cell.id], "asked": asked, "created": time.time(), **status.process()}
    made.folder.with_suffix(".json").write_text(json.dumps(record))
    said = [str(ask("say", cell.id, "a cat", 1, 1.0, folder.name)) for folder in checkpoints.complete(cell.checkpoints)]
    assert "step-00000002" in said[0] and "step-00000004" in said[1] and "step-00000004" not in said[0]
    assert len(background.jobs(site.store.root)) == 1
