"""Columns that one chooses, names of one's own, and a sweep as a scatter: what is known of runs by key."""

import json

import pytest
from gradio.components.plot import PlotData

from equipoise.errors import InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.ui import runs, runs_detail, runs_keys, runs_notes, runs_scatter

RATE = "optimizer.learning_rate"


@pytest.fixture
def two(site, run, finish):
    """Another run beside `one`, with a rank of its own, and results of both."""
    config = configs.load("text_to_image/demo", [f"runs={site.store.root}", "steps=5", "rank=8"])
    other = finish(site.store.create(config, id="two"))
    for one, loss in ((run, 0.5), (other, 0.25)):
        (one.result / "result.json").write_text(json.dumps({"loss_after": loss, "state": "done", "odd": True}))
    return other


def test_what_is_known_of_a_run(site, run, two):
    found = runs_keys.known(two.folder)
    assert (found["lora.rank"], found["optimizer.name"], found["seed"]) == (8, "adamw", 0)
    assert (found["last gradient_norm"], found["result loss_after"]) == (5.0, 0.25)
    assert "result odd" not in found and "last seconds" not in found and "runs" not in found
    (two.folder / "config.yaml").write_text("a: [")
    (two.result / "result.json").write_text("[1]")
    (two.folder / "metrics.jsonl").write_text('{"step": 1, "loss": "NaN"}\n{cut')
    assert runs_keys.known(two.folder) == {}


def test_the_table_has_the_columns_that_were_chosen(site, run, two):
    shown = runs.table(site, columns=["state", "lora.rank", "result loss_after", "<b>"])
    assert "<th>run</th><th>state</th><th>lora.rank</th><th>result loss_after</th><th>&lt;b&gt;</th>" in shown
    assert "<td data-name='lora.rank'>8</td><td data-name='result loss_after'>0.25</td>" in shown
    assert "<th>took" not in shown and "<b>" not in shown
    offered = runs.offered_columns(site)
    assert offered[: len(runs.COLUMNS)] == list(runs.COLUMNS) and {"lora.rank", "last loss"} <= set(offered)


def test_the_table_is_sorted_by_any_key(site, run, two):
    def order(sort: str) -> list[str]:
        shown = runs.table(site, sort=sort)
        return sorted(("one", "two"), key=lambda id: shown.index(f">{id}<"))

    assert order("lora.rank") == ["two", "one"] and order("result loss_after") == ["two", "one"]
    (two.result / "result.json").unlink()
    assert order("result loss_after") == ["one", "two"], "what has none is last"
    (run.result / "result.json").write_text('{"loss_after": NaN}')
    assert order("result loss_after") == order("newest"), "and NaN is none"


def test_whatever_a_browser_remembers_of_columns_the_table_is_drawn(site, run, ask):
    for sent in (None, [], ["lora.rank", "lora.rank"], ["x"] * 5000, [5, None], "state"):
        assert ">one<" in str(ask("select", "", "all", "newest", sent, 0, False, "loss", [], event={"id": "one"}))
    assert "lora.rank" in str(ask("offer_columns"))


def test_a_run_is_renamed_and_keeps_its_id(site, run, ask):
    ask("select", "", "all", "newest", None, 0, False, "loss", [], event={"id": "one"})
    assert "are saved" in str(ask("save_notes", "one", "", "", False, " my  <best> run ", None))
    shown = runs.table(site, "my <best>")
    assert "data-id='one'>my &lt;best&gt; run</button><small>one</small>" in shown and "<best>" not in shown
    heading = runs_detail.heading(site, "one")
    assert "data-shown='one'>my &lt;best&gt; run " in heading and "<p class='hint'>one</p>" in heading
    with pytest.raises(InputError, match="one line of at most"):
        runs_notes.write(run, "", "", False, "x" * 101)
    runs_notes.archive([run], True)
    assert runs_notes.read(run.folder).name == "my <best> run" and site.store.get("one").id == "one"
    (run.folder / runs_notes.FILE).write_text('{"note": "n", "tags": [], "archived": false}')
    assert runs_notes.read(run.folder).name == "", "as earlier versions wrote it"


def test_a_sweep_is_a_scatter_of_any_key_against_any_figure(site, swept, run):
    found = runs_scatter.rows(site, "grid", [])
    assert runs_scatter.differing(found) == ["optimizer.name", RATE]
    assert runs_scatter.figures(found)[0] == "compared score"
    made = runs_scatter.scatter(found, RATE, "compared score")
    points = {trace["name"]: list(zip(trace["x"], trace["y"], strict=True)) for trace in made["data"]}
    assert points == {"adamw": [(1e-4, 0.0), (1e-3, 0.25)], "scaled_adamw": [(1e-4, 0.5), (1e-3, 0.75)]}
    assert made["layout"]["xaxis"]["title"]["text"] == RATE and "type" not in made["layout"]["xaxis"], "one decade"
    wide = {**found, "more": {RATE: 1.0, "compared score": 1.0, "optimizer.name": "<b>"}}
    drawn = runs_scatter.scatter(wide, RATE, "compared score")
    assert drawn["layout"]["xaxis"]["type"] == "log" and "<b>" not in json.dumps(drawn)
    lines = runs_scatter.parallel(found, "compared score")["data"][0]
    assert [axis["label"] for axis in lines["dimensions"]] == ["name", "learning_rate", "compared score"]
    assert lines["dimensions"][0]["ticktext"] == ["adamw", "scaled_adamw"] and lines["line"]["color"][-1] == 0.75
    assert len(runs_scatter.rows(site, "grid", ["one", "../one"])) == 5


def test_what_cannot_be_a_scatter_says_what_to_choose(site, run, swept, ask):
    ask("select", "", "all", "newest", None, 0, False, "loss", [], event={"id": "one"})
    assert "Choose a sweep, or other runs" in str(ask("draw_scatter", None, [], "scatter", None, None))
    for cell in sweeps.cells(swept):
        (cell.folder / "config.yaml").write_text("a: 1")
    ask("select", "", "all", "newest", None, 0, False, "loss", [], event={"id": "grid"})
    assert "They differ in nothing" in str(ask("draw_scatter", None, [], "scatter", None, None))
    figure = runs_scatter.Figure.postprocess(None, {"data": []})
    assert isinstance(figure, PlotData) and (figure.type, figure.plot) == ("plotly", '{"data": []}')
