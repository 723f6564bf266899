"""A sweep while it trains: the newest samples of its cells, side by side."""

import re
import shutil

from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.ui import runs_curves, runs_detail, runs_live


def test_the_newest_samples_of_each_cell_stand_side_by_side_as_they_come(site, swept, ask):
    first, second, *_ = sweeps.cells(swept)
    shutil.rmtree(first.samples / "step-00000005")
    shutil.rmtree(second.samples)
    second.samples.mkdir()
    second.update(state="running", total=5)
    shown = runs_detail.samples(site, "grid")
    assert re.findall(r"<th scope='(?:col|row)'>([^<]*)", shown)[1:4] == ["1e-4", "1e-3", "adamw"]
    assert shown.count("<button class='cell'") == 4 and shown.count("<img") == 3
    assert f"{first.folder.name}/samples/step-00000002/00-0.png".replace("=", "%3D").replace(",", "%2C") in shown
    assert "step 2 of 5" in shown and shown.count("step 5 of 5") == 2 and shown.count("none yet") == 1
    shutil.copytree(first.samples / "step-00000002", second.samples / "step-00000004")
    assert "step 4 of 5" in (later := runs_detail.samples(site, "grid")) and "none yet" not in later
    opened = str(ask("select", "", "all", "newest", None, 0, False, "loss", [], event={"id": first.id}))
    assert f"data-shown='{first.id}'".replace("'", "\\'") in opened or f"data-shown='{first.id}'" in opened


def test_answers_are_seen_as_they_come(site, swept, answered):
    shown = runs_detail.samples(site, "grid")
    assert shown.count("<button class='cell'") == 4
    for cell in sweeps.cells(swept):
        shutil.rmtree(cell.samples / "step-00000005")
    assert runs_detail.samples(site, "grid").count("✗ blue") == 4


def test_a_sweep_whose_configurations_are_gone_is_shown_all_the_same(site, swept):
    for cell in sweeps.cells(swept):
        (cell.folder / "config.yaml").unlink()
    assert runs_live.grid(site, swept).count("<tr>") == 1 + 4
    for cell in sweeps.cells(swept):
        shutil.rmtree(cell.samples)
        cell.samples.mkdir()
    assert runs_live.grid(site, swept) == "" and "one of its cells" in runs_detail.samples(site, "grid")


def test_compare_shows_a_sweep_that_trains_still_and_then_its_comparison(site, swept, ask):
    (swept.folder / "comparison").rename(swept.folder / "hidden")
    first, *_ = sweeps.cells(swept)
    with swept.session(signals=False):
        opened = str(ask("pick", ["grid"]))
        assert "4 of 4 cells are trained, step 20 in all" in opened and opened.count("<button") == 4
        ask("follow_job", ["grid"], "")
        seen = str(ask("show_live", ["grid"], None))
        assert "button" not in str(ask("show_live", [], None)), "other runs were chosen meanwhile"
        assert seen.count("<button") == 4 and "step 5 of 5" in seen
        shutil.copytree(first.samples / "step-00000005", first.samples / "step-00000009")
        ask("follow_job", ["grid"], "another state")
        assert "step 9" in str(ask("show_live", ["grid"], None))
        for cell in sweeps.cells(swept):
            shutil.rmtree(cell.samples)
        assert "It trains still" in runs_live.of_refs(site, ["grid"])
    swept.finish("done", "", 20)
    ask("follow_job", ["grid"], None)
    assert "Not compared yet" in str(ask("show_live", ["grid"], None)), "no comparison came of it"
    assert runs_live.of_refs(site, ["grid"]) == runs_live.of_refs(site, [first.id]) == ""
    assert runs_live.of_refs(site, ["gone"]) == runs_live.of_refs(site, ["grid", first.id]) == ""


def test_before_the_first_step_of_a_sweep_no_metric_is_to_blame(site, swept):
    cells = sweeps.cells(swept)
    for cell in cells:
        (cell.folder / "metrics.jsonl").write_text("")
    assert "choose another metric" in runs_curves.charts(site, "grid")
    cells[0].update(state="queued")
    assert "Nothing measured yet" in runs_curves.charts(site, "grid")
    (cells[1].folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert "choose another metric" in runs_curves.charts(site, "grid", runs_curves.Wanted(metric="no such metric"))
