"""What the tabs' functions return, without a page; and the page's own programming interface."""

import asyncio
import json
import math
import re
import shutil
import subprocess
import sys
import time
from itertools import pairwise

import gradio as gr
import httpx
import pytest
from gradio_client import Client
from PIL import Image

from equipoise.errors import InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.comparing.comparison import RATE, Comparison
from equipoise.pipelines.files import append
from equipoise.pipelines.jobs import background
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.jobs.axes import expand
from equipoise.pipelines.runs import status
from equipoise.pipelines.runs.store import Store
from equipoise.ui import (
    compare,
    compare_cell,
    compare_grid,
    compare_numbers,
    draw,
    launch,
    launch_tab,
    plugins,
    runs,
    runs_curves,
    runs_detail,
    runs_tab,
    talk,
)


def test_the_table_filters_and_sorts(site, run, finish):
    assert runs.table(site).count("<tr") == 2
    config = configs.load("text_to_image/demo", [f"runs={site.store.root}"])
    finish(site.store.create(config, id="two"), "diverged", message="the loss was not finite at step 3 of 5.")
    assert "diverged" in runs.table(site, state="diverged") and ">one<" not in runs.table(site, state="diverged")
    assert ">two<" in runs.table(site, words="FINITE loss") and ">one<" not in runs.table(site, words="FINITE loss")
    by_state = runs.table(site, sort="state")
    assert by_state.index(">one<") < by_state.index(">two<")
    assert "Nothing matches" in runs.table(site, words="zebra")
    assert "No runs yet" in runs.table(type(site)(type(site.store)(site.store.root / "none")))


def test_three_hundred_runs_in_a_blink(site, run):
    for index in range(300):
        shutil.copytree(run.folder, site.store.root / f"old-{index:03d}")
    runs.table(site)
    started = time.process_time()
    assert runs.table(site).count("<tr") == 302
    assert time.process_time() - started < 0.2


def test_one_run(site, run):
    heading, curves, samples, log, config, files = runs_detail.detail(site, "one", None)
    assert "5 of 5" in heading and "done" in heading
    for name in ("loss", "rate", "κ", "gradient norm"):
        assert f"<figcaption>{name}</figcaption>" in curves
    assert curves.count("rate_<wbr>encoder") == 1, "one chart has the rates of all components"
    assert "step-00000005/00-0.png" in samples
    assert "step-00000002/00-0.png" in runs_detail.samples(site, "one", 3)
    assert configs.load(run.folder / "config.yaml").name in config and "nothing" in log
    assert "metrics.jsonl" in files and "result/result.json" in files


def test_damaged_lines_of_metrics_are_left_out(site, run):
    before = run.metrics()
    with open(run.folder / "metrics.jsonl", "ab") as file:
        file.write(b'{bad\n[1]\n{"loss": 1}\n\xff\xfe\n')
    assert run.metrics() == before and "<figcaption>loss" in runs_detail.detail(site, "one", None)[1]
    run.rewind_metrics(3)
    assert [record["step"] for record in run.metrics()] == [1, 2, 3]


def test_curves_grow_and_are_rewound(site):
    """As another process writes them, a line sometimes cut in the middle: what is kept is what the file has."""
    made = site.store.create(configs.load("text_to_image/demo", [f"runs={site.store.root}"]), id="some")

    def agree(steps: int) -> None:
        wanted = [(record["step"], record["loss"]) for record in made.metrics()]
        assert runs_curves.read_curves(made).get("loss", []) == wanted and len(wanted) == steps

    agree(0)
    with made.session(signals=False):
        for step in range(1, 400):
            made.metric(step, loss=1 / step)
            if step % 100 == 0:
                agree(step)
        with open(made.folder / "metrics.jsonl", "a") as file:
            file.write('{"step": 400, "lo')
            file.flush()
            agree(399)
            file.write('ss": 0.5}\n')
        agree(400)
        made.rewind_metrics(50)
        agree(50)
        made.rewind_metrics(20)
        for step in range(21, 90):
            made.metric(step, loss=2 / step)
        agree(89)
        made.rewind_metrics(0)
        agree(0)


def test_what_is_left_is_told_by_the_steps_alone(site):
    """Loading came before them, and another session's before that."""
    made = site.store.create(configs.load("text_to_image/demo", [f"runs={site.store.root}"]), id="some")
    now = time.time()
    with made.session(signals=False):
        made.update(total=100, started=now - 600)
        for step, ended in ((1, now - 9000), (2, now - 8000), (3, now - 20)):
            append(made.folder / "metrics.jsonl", json.dumps({"step": step, "time": ended}) + "\n")
            made.update(step=step)
        assert runs.left(site, made.status()) == "", "not known yet"
        append(made.folder / "metrics.jsonl", json.dumps({"step": 5, "time": now}) + "\n")
        made.update(step=5)
        assert runs.left(site, made.status()) == draw.span(95 * 10)


def test_what_is_left_of_a_sweep_is_told_by_its_cells(site, swept):
    """Two are done and took 50 s each, one has 40 s to go, one waits: 90 s by one worker."""
    now = time.time()
    first, second, third, fourth = sweeps.cells(swept)
    for cell in (first, second):
        cell.update(seconds=50.0)
    third.update(state="queued", step=0)
    (third.folder / "metrics.jsonl").unlink()
    fourth.update(state="queued", step=0, started=None)
    swept.update(state="running", total=20, step=0, **status.process())
    with third.session(signals=False):
        third.update(total=11, step=6, started=now - 60)
        for step, ended in ((1, now - 40), (6, now)):
            append(third.folder / "metrics.jsonl", json.dumps({"step": step, "time": ended}) + "\n")
        assert runs.left(site, swept.status()) == draw.span(40 + 50)
        assert runs.together(swept, swept.status()).step == 5 + 5 + 6
    heading = runs_detail.heading(site, "grid")
    swept.update(state="stopped")
    assert "not begun" not in heading and "not begun" in runs_detail.heading(site, "grid")
    assert "not begun" in runs_detail.heading(site, fourth.id)


def test_a_run_that_was_asked_to_stop_says_so(site):
    made = site.store.create(configs.load("text_to_image/demo", [f"runs={site.store.root}"]), id="some")
    with made.session(signals=False):
        made.request("stop")
        assert ">running<" in runs_detail.heading(site, "some")
        assert "stop" in made.requested() and ">stopping<" in runs_detail.heading(site, "some")
        made.finish("stopped")
    assert ">stopped<" in runs_detail.heading(site, "some")


def test_the_same_twice_is_refused_while_it_is_at_work(site):
    config = configs.load("text_to_image/demo", [f"runs={site.store.root}"])
    site.store.create(config, id="some")
    id, words = launch.launch(site, launch.Plan(config, [config], "text_to_image/demo", None))
    assert id == "some" and words.startswith("Started some already, which is queued. It is not started twice;")
    assert len(site.store.list()) == 1


def test_a_runs_folder_that_is_not_there_yet_is_empty(tmp_path):
    assert Store(tmp_path / "runs").at_work() == [] and not (tmp_path / "runs").exists()


def test_a_sweep_that_was_killed_can_be_resumed_and_its_workers_stopped(site, swept):
    """Its cells go on: what they have done is shown, and none of them is said not to begin any more."""
    last = sweeps.cells(swept)[-1]
    last.update(state="queued", started=None, step=0)
    swept.update(state="running", total=20, step=3, **status.process())
    file = swept.folder / "status.json"
    file.write_text(file.read_text().replace(f'"pid": {swept.status().pid}', '"pid": 4194300'))
    stop, _, resume = runs_detail.possible(site, "grid")
    assert swept.status().state == "dead" and stop["interactive"] and resume["interactive"]
    heading = runs_detail.heading(site, "grid")
    assert "15 of 20" in heading and "not begun" not in heading
    last.update(state="stopped")
    stop, _, resume = runs_detail.possible(site, "grid")
    assert not stop["interactive"] and resume["interactive"] and "not begun" in runs_detail.heading(site, "grid")


def test_a_job_tells_its_bar_in_words():
    bar = "grid:  40%|████      | 2/5 [00:10<00:15,  5.00s/cell]"
    assert compare._progress(bar) == "grid 2 of 5, 00:15 left" and compare._progress("loading") == "loading"


def test_curves_that_are_measured_now_and_then(site):
    made = site.store.create(configs.load("text_to_image/demo", [f"runs={site.store.root}"]), id="some")
    with made.session(signals=False):
        for step in range(1, 6):
            made.metric(step, loss=1.0, **({"kappa": 0.5, "val_accuracy_joint": step / 9} if step in (2, 4) else {}))
    assert "<figcaption>κ" in (shown := runs_curves.charts(site, "some")) and "<figcaption>validation accuracy" in shown


def test_live_samples_follow_until_one_is_chosen():
    assert runs_tab.followed([], 1, 1) == (None, 0, 1), "the last, whatever it will be"
    assert runs_tab.followed([5], 1, 1) == (None, 5, 5)
    assert runs_tab.followed([5, 10], 5, 5) == (None, 5, 10), "at the slider's end one stays at the end"
    assert runs_tab.followed([5, 10, 15], 5, 10) == (5, 5, 15), "elsewhere one stays there"


def test_a_dead_run_says_its_last_words(site, run):
    run.log("the very last line")
    text = (run.folder / "status.json").read_text()
    (run.folder / "status.json").write_text(
        text.replace('"done"', '"running"').replace(f'"pid": {run.status().pid}', '"pid": 4194300')
    )
    heading = runs_detail.heading(site, "one")
    assert "badge dead" in heading and "the very last line" in heading and "may be resumed" in heading


def test_only_what_changed_is_sent(site, run):
    first, digests = runs_tab.unchanged(runs_detail.detail(site, "one", None), [])
    assert len(first) == 6 and gr.skip() not in first
    again, same = runs_tab.unchanged(runs_detail.detail(site, "one", None), digests)
    assert again == [gr.skip()] * 6 and same == digests
    run.log("news")
    third, _ = runs_tab.unchanged(runs_detail.detail(site, "one", None), digests)
    assert [part != gr.skip() for part in third[:5]] == [False, False, False, True, False]


def test_what_can_be_done_to_a_run(site, run, swept):
    with pytest.raises(InputError, match="not at work"):
        runs_detail.act(site, "one", "stop", 1)
    with pytest.raises(InputError, match="nothing to resume"):
        runs_detail.act(site, "one", "resume", 1)
    cell = sweeps.cells(swept)[0]
    for what in ("resume", "delete"):
        with pytest.raises(InputError, match="is a cell"):
            runs_detail.act(site, cell.id, what, 1)
    with run.session(signals=False), pytest.raises(InputError, match="stop it first"):
        runs_detail.act(site, "one", "delete", 1)
    assert "saves its state" in (said := _stopped(site)) and said
    runs_detail.act(site, "grid", "delete", 1)
    assert not swept.folder.exists() and [item.id for item in site.store.list()] == ["waiting", "one"]


def _stopped(site) -> str:
    made = site.store.create(configs.load("text_to_image/demo", [f"runs={site.store.root}"]), id="waiting")
    with made.session(signals=False):
        said = runs_detail.act(site, "waiting", "stop", 1)
        assert "stop" in made.requested()
        made.finish("stopped")
    return said


def test_a_comparison_can_be_read_back(site, swept):
    folder = swept.folder / "comparison"
    read = Comparison.read(folder)
    before = (folder / "table.json").read_text()
    read.write_tables()
    assert (folder / "table.json").read_text() == before
    assert read.cells[3].pictures[1].note == "<b>seen</b>" and read.line is not None
    (folder / "table.json").write_text("{}")
    with pytest.raises(InputError, match="compare anew"):
        Comparison.read(folder)


def test_the_grid(site, swept):
    id = compare.made(site, ["grid"])[0].id
    shown = compare_grid.grid(site, id)
    assert shown.count("<button class='cell") == 2 * 3 and shown.count("class='cell usable'") == 1
    assert shown.index("base") < shown.index("1e-4") < shown.index("1e-3")
    assert "aria-pressed='true'" not in shown
    one = compare_grid.grid(site, id, prompt=2)
    assert one.count("<img") == 6 and "01-0.png" in one
    assert "samples/step-00000002/00-0.png" in compare_grid.grid(site, id, step=2)
    turned = compare_grid.grid(site, id, rows=RATE, columns="optimizer.name")
    assert turned.count("<button class='cell") == 2 * 3 and "<th scope='row'>1e-4</th>" in turned
    assert ("optimizer.name", "optimizer.name") in compare_grid.axes(compare.read(site, id))


def test_a_rate_that_kept_too_little_is_named_so_in_the_page(site, swept):
    """The one with the highest score; and nothing is named as the best that is not usable."""
    read = Comparison.read(swept.folder / "comparison")
    read.kept = "left"
    for cell, left in zip([read.base, *read.cells], (1.0, 1.0, 1.0, 0.9, 0.2), strict=True):
        cell.metrics["left"] = left
    read.write_tables()
    id, last = "grid/comparison", read.cells[-1]
    shown = compare_grid.grid(site, id)
    assert shown.count("class='cell unusable'") == 4 and "class='cell usable'" not in shown
    assert shown.count("<small class='verdict'>kept too little</small>") == 1
    assert f"aria-label='{last.row}, 1e-3, 75%, kept too little, " in shown
    curve = compare_numbers.curve(site, id)
    said = compare_numbers.answer(site, id)
    assert "No rate is usable. Nearest: scaled_adamw at 1e-4: 50% learnt, 90% left" in said and "Nearest" not in curve
    assert 'class="kept"' in curve and "Thin dashed lines: left." in curve
    assert "<td>done</td><td class='verdict'>kept too little</td>" in compare_numbers.table(site, id)
    assert "<dt>verdict</dt><dd>kept too little</dd>" in compare_cell.cell_detail(site, id, [last.run], 0)


def test_answers_are_read_in_the_grid(site, swept, answered):
    """Right and wrong, and what was wanted; while training too."""
    id = "grid/comparison"
    shown = compare_grid.grid(site, id)
    assert shown.count("✓ red") == 3 * 2 and shown.count("✗ &lt;two&gt; <s>three or 3</s>") == 3 * 2
    assert "<img" not in shown, "cards with words on them cannot be read that small"
    one = compare_grid.grid(site, id, prompt=2)
    assert one.count("<img") == 6 and "✓ red" not in one and one.count("✗") == 6
    while_training = compare_grid.grid(site, id, step=2)
    assert while_training.count("✗ blue") == 4 and while_training.count("right</small>") == 2, "the base's"
    assert "step 2" in (drawn := runs_detail.samples(site, sweeps.cells(swept)[0].id, 2)) and "blue" in drawn
    assert ">question<" in drawn and "/data/" not in drawn and "✗" in drawn


def test_all_answers_stand_beside_each_other_with_their_pictures_page_by_page(site, swept, answered, tmp_path):
    mine, secret = site.data["photos"] / "a.png", tmp_path / "secret.png"
    for file in (mine, secret):
        Image.new("RGB", (300, 300)).save(file)
    for place in (swept.folder / "comparison" / "cells").iterdir():
        lines = [
            {"media": [str(mine), str(secret), "/no/such.wav"], "question": f"<q{index}>", "answer": place.name}
            for index in range(45)
        ]
        (place / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    id, first = "grid/comparison", sweeps.cells(swept)[0].id
    shown = compare_cell.cell_detail(site, id, ["base", first], 0)
    assert "<th>base</th><th>adamw 1e-4</th>" in shown and shown.count("<p>&lt;q") == 45
    assert re.findall("Questions [0-9]+ to [0-9]+", shown) == ["Questions 21 to 40", "Questions 41 to 45"]
    assert shown.count("data:image/jpeg;base64,") == 20 and shown.count("<small>secret.png</small>") == 45
    assert shown.count("<small>a.png</small>") == 25, "pictures of pages that are folded up are not decoded"
    assert shown.count("<small>such.wav</small>") == 45 and "and 41 more" in compare_grid.grid(site, id)
    assert (said := talk.shown_beside(site, id)).count("<p>&lt;q") == 45 and "<th>the untouched base</th>" in said


def test_odd_records_stop_nothing(site, run, swept, answered):
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "": 1.0, "_": 2.0, "val_": 3.0, "loss": "x"}\n')
    assert runs_curves.charts(site, "one").count("<figcaption>") > 4
    for place in (swept.folder / "comparison" / "cells").iterdir():
        odd = [{"answer": 5, "score": "x"}, {"answer": "no", "score": 0, "wanted": 7}, {"score": [], "wanted": "y"}]
        (place / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in odd))
    assert ">5</span>" in compare_cell.cell_detail(site, "grid/comparison", ["base"], 0)
    assert "✗ no <s>7</s>" in (shown := compare_grid.grid(site, "grid/comparison")) and ">5</span>" in shown


def test_what_a_comparison_can_be_told(site, run, finish):
    """By the pipeline's own record: what draws has a scale, what answers has prompts, what classifies has neither."""
    assert set(compare.accepted(site, ["one"])) == {"prompts", "count", "scale", "seed"}
    for pipeline, wanted in (("instruction_tuning", {"prompts", "count"}), ("audio_visual", set())):
        config = configs.load(f"{pipeline}/demo", [f"runs={site.store.root}"])
        finish(site.store.create(config, id=pipeline))
        assert set(compare.accepted(site, [pipeline])) == wanted
    assert compare.accepted(site, []) == compare.accepted(site, ["../one"]) == {}
    compare.generate(site, ["audio_visual"], "a cat", 3, 0.7)
    (job,) = background.jobs(site.store.root)
    assert job.asked == {}
    while background.jobs(site.store.root)[0].state == "running":
        time.sleep(0.1)


def test_what_is_possible_now(site, run, swept):
    def can(id: str) -> list[bool]:
        return [update["interactive"] for update in runs_detail.possible(site, id)]

    assert can("") == can("nobody") == [False] * 3
    assert can("one") == [False] * 3, "it is done"
    assert can("grid") == [False] * 3, "all its cells are done"
    sweeps.cells(swept)[0].update(state="failed")
    assert can("grid") == [False, False, True], "although the sweep is done, something is left"
    run.update(state="stopped")
    assert can("one") == [False, False, True]
    with run.session(signals=False):
        assert can("one") == [True, True, False]


def test_charts_of_every_kind(site):
    """Modalities' accuracies apart from their losses, and α by its sign."""
    made = site.store.create(configs.load("audio_visual/demo", [f"runs={site.store.root}"]), id="av")
    names = (
        "val_accuracy_joint",
        "val_accuracy_audio",
        "val_loss_joint",
        "weight_audio",
        "joint_weight_audio",
        "alpha",
    )
    with made.session(signals=False):
        for step in (1, 2):
            made.metric(step, loss=1.0, rate=0.1, **{name: step / 2 for name in names})
    shown = runs_curves.charts(site, "av")
    for title in ("validation accuracy", "validation loss joint", "weight audio", "α, the joint gradient", "α<"):
        assert f"<figcaption>{title}" in shown


def test_long_curves_keep_their_spikes_and_little_else(site):
    """A million steps of a run: a few thousand points, and of the drawing a few hundred."""
    made = site.store.create(configs.load("text_to_image/demo", [f"runs={site.store.root}"]), id="long")
    values = [1.0] * 100_000
    values[77_777] = 9.0
    lines = (f'{{"step": {step}, "time": {step}, "loss": {value}}}\n' for step, value in enumerate(values, 1))
    (made.folder / "metrics.jsonl").write_text("".join(lines))
    points = runs_curves.read_curves(made)["loss"]
    assert len(points) <= runs_curves.MOST_POINTS and (77_778, 9.0) in points and points[-1] == (100_000, 1.0)
    steps = [step for step, _ in points]
    assert steps == sorted(set(steps)) and max(b - a for a, b in pairwise(steps)) < 200, "evenly"
    path = draw.chart("loss", {"loss": points}).split('points="')[1].split('"')[0].split()
    assert len(path) < 1000 and len({place.split(",")[1] for place in path}) == 2, "the spike is drawn"


def test_numbers_beside_an_axis_have_the_room_that_they_need():
    points = {"rate": [(1, 0.0009986), (2, 0.0009991)]}
    drawn = draw.chart("rate", points)
    numbers = re.findall(r'<text x="([\d.]+)"[^>]*text-anchor="end">([\d.e-]+)</text>', drawn)[:-1]
    assert max(len(number) for _, number in numbers) >= 8
    for x, number in numbers:
        assert float(x) >= 7.5 * len(number), "at 13 units, a digit takes 7.5 across"


def test_the_loss_of_a_run_is_a_mean_of_its_last_steps_and_says_so(site, run, finish):
    """And its rate the one that was configured, whatever the schedule has made of it."""
    finish(site.store.create(configs.load("text_to_image/demo", [f"runs={site.store.root}"]), id="two"), steps=40)
    mean = sum(1 / step for step in range(21, 41)) / 20
    shown = runs.table(site)
    assert f">{draw.number(mean)}<" in shown and "<th>loss, mean of the last steps</th>" in shown
    assert runs.recent_loss(run.folder, run.status()) == pytest.approx(sum(1 / step for step in range(1, 6)) / 5)
    two = site.store.get("two")
    two.update(learning_rate=0.005, rate=1.54e-8)
    assert ">5e-3<" in runs.table(site) and "1.54e-8" not in runs.table(site)
    heading = runs_detail.heading(site, "two")
    assert "<dt>rate</dt><dd>5e-3</dd>" in heading and "<dt>rate of the last step</dt><dd>1.54e-8</dd>" in heading
    by_loss = runs.table(site, sort="loss")
    assert by_loss.index(">two<") < by_loss.index(">one<")


def test_when_a_run_started_does_not_move_when_it_goes_on(site, finish):
    made = finish(
        site.store.create(configs.load("text_to_image/demo", [f"runs={site.store.root}"]), id="two"), "stopped"
    )
    made.update(started=1e9, first_started=1e9)
    began = runs.table(site)
    with made.session(signals=False):
        made.finish("done")
    assert made.status().started > 1e9 and "09 Sep" in began and "09 Sep" in runs.table(site)


def test_a_button_acts_on_the_run_that_is_shown(site, run, finish, ask):
    """Not on one that was chosen before or since: the browser says whose heading it shows."""
    made = site.store.create(configs.load("text_to_image/demo", [f"runs={site.store.root}"]), id="two")
    ask("select", "", "all", "newest", None, 0, False, "loss", [], event={"id": "one"})
    with made.session(signals=False):
        assert "two: saves its state" in str(ask("stop", "two"))
        assert "stop" in made.requested()
        made.finish("stopped")
    assert "data-shown='one'" in runs_detail.heading(site, "one")
    assert "data-shown='one'" in str(ask("ask_delete", "one"))
    ask("delete", "one")
    assert [item.id for item in site.store.list()] == ["two"]


def test_marks_beside_an_axis_are_round():
    for low, high, log, wanted in (
        (0.009, 0.377, False, ["0.1", "0.2", "0.3"]),
        (-2.05, -0.43, True, ["0.01", "0.03", "0.1", "0.3"]),
        (-9, 3, True, ["1e-9", "1e-6", "1e-3", "1e0", "1e3"]),
        (-4.2, -3.8, True, ["1e-4", "1.5e-4"]),
        (0.95, 1.05, False, ["0.95", "1", "1.05"]),
    ):
        assert draw.labels(draw.marks(low, high, log), log) == wanted
    once = draw.chart("a", {"b": [(5, 1.0)]})
    assert once.count("<circle") == 1 and once.count(">5<") == 1


def test_two_cells_under_a_slider(site, swept):
    id = "grid/comparison"
    first, second = (cell.id for cell in sweeps.cells(swept)[:2])
    alone = compare_cell.cell_detail(site, id, [first], 0)
    assert "before-after" not in alone and "5 steps." in alone
    both = compare_cell.cell_detail(site, id, [first, second], 0)
    large, strip = both.split("class='strip'")
    assert (
        large.count("<img") == strip.count("<img") == 2
        and "<td>optimizer.learning_rate</td><td>1e-3</td><td>1e-4</td>" in both
    )
    assert "optimizer.name" not in both, "they have the same one"
    assert "learning rates that worked" in compare_numbers.curve(site, id) and "Table (CSV)" in compare_numbers.export(
        site, id
    )


def test_a_comparison_of_runs_that_drew_once_is_opened(site, swept, ask):
    for cell in sweeps.cells(swept):
        shutil.rmtree(cell.samples / "step-00000002")
    opened = ask("pick", ["grid"])
    assert sum("<button class='cell" in str(part) for part in opened) == 1
    slider = next(part for part in opened if isinstance(part, dict) and part.get("maximum") == 5)
    assert slider["minimum"] == 0 and not slider["visible"]


def test_numbers_out_of_bounds_are_taken_for_the_nearest(site, run, swept, ask):
    """An event may be of before the bounds changed, and boxes take what is typed, or are emptied."""
    ask("pick", ["grid"])
    for step, drawn in ((1, "step-00000002"), (-5, "step-00000002"), (99, "cells/"), (None, "cells/"), ("x", "cells/")):
        shown = str(ask("draw_grid", "grid/comparison", "row", RATE, 0, step, None, 1, None))
        assert drawn in shown and "<button class='cell" in shown
    for prompt, seen in ((77, "01-0.png"), (-1, "00-0.png"), (None, "00-0.png"), (math.nan, "00-0.png")):
        assert seen in str(ask("draw_grid", "grid/comparison", "row", RATE, prompt, 5, None, 1, None)), prompt
    for scale in (99, -1, None):
        assert "drawn at scale" in (said := str(ask("by_scale", ["grid"], "grid/comparison", scale))) or scale is None
        assert scale != 99 or "scale 10 yet" in said
    ask("select", "", "all", "newest", None, 0, False, "loss", [], event={"id": "one"})
    assert "step 2<" in str(ask("refresh", "", "all", "newest", None, 0, False, "loss", [], None, 1, None, None))


def test_count_is_a_whole_number_of_some_size(site, swept, ask, monkeypatch):
    told: list[dict] = []
    monkeypatch.setattr(background, "compare", lambda root, refs, words: told.append(words) or "name")
    for count in (-3, 1e9, 0.5, math.inf):
        assert "Count must be a whole number from 0 to 1000" in str(ask("start", ["grid"], "a cat", count, 1))
    assert not told
    for count in (None, 0, 2):
        ask("start", ["grid"], "a cat", count, None)
    assert [words.get("count") for words in told] == [None, None, 2] and told[0]["scale"] == 1


@pytest.fixture
def drawn_anew(site, swept) -> str:
    """A comparison of the sweep with a prompt of its own; its id."""
    name, place = "20260101-000000-aaaa", site.store.root / background.COMPARISONS
    shutil.copytree(swept.folder / "comparison", place / name)
    record = {"runs": ["grid"], "asked": {"prompts": ["a zebra"], "scale": 0.7}, "created": time.time()}
    (place / f"{name}.json").write_text(json.dumps(record | status.process()))
    return f"{background.COMPARISONS}/{name}"


def test_samples_stand_under_the_prompt_and_step_that_they_are_of(site, swept, drawn_anew):
    assert compare.steps(site, compare.read(site, "grid/comparison")) == [2, 5]
    assert compare.steps(site, compare.read(site, drawn_anew)) == [], "that prompt was not drawn while training"
    first = sweeps.cells(swept)[0]
    (first.samples / "step-00000002").rename(first.samples / "step-00000004")
    shown = compare_grid.grid(site, "grid/comparison", step=3)
    assert shown.count(">step 2<") == 3 and shown.count(">step 4<") == 1 and "step 3" not in shown


def test_only_what_is_new_is_shown_unasked(site, swept, drawn_anew):
    own = "grid/comparison"
    assert compare.newest(site, ["grid"], [own, drawn_anew]) is None
    assert compare.newest(site, ["grid"], [own]) == compare.newest(site, ["grid"], []) == drawn_anew
    assert compare.newest(site, ["grid"], [drawn_anew]) == own
    assert compare.newest(site, [], []) is None


def test_the_scale_begins_where_the_runs_have_it(site, finish, monkeypatch):
    told = {}
    monkeypatch.setattr(background, "compare", lambda root, refs, words: told.update(words) or "name")
    config = configs.load("text_to_image/demo", [f"runs={site.store.root}", "samples.scale=0.7"])
    finish(site.store.create(config, id="weak"))
    assert compare.own_scale(site, ["weak"]) == 0.7 and compare.own_scale(site, []) == 1
    compare.generate(site, ["weak"], "", 0, 0.7)
    assert told == {}, "that is how the run is set"
    compare.generate(site, ["weak"], "", 0, 1.0)
    assert told == {"scale": 1.0}


def test_what_a_cell_has_and_others_have(site, swept):
    shown = compare_cell.cell_detail(site, "grid/comparison", [sweeps.cells(swept)[0].id], 0)
    assert "<td>optimizer.name</td><td>adamw</td><td>scaled_adamw</td>" in shown


def test_a_job_that_comes_to_nothing_says_why(site, swept):
    shutil.rmtree(sweeps.cells(swept)[0].result)
    name = compare.generate(site, ["grid"], "a cat", 1, 0.7)
    (job,) = background.jobs(site.store.root)
    assert (job.name, job.runs, job.asked) == (name, ("grid",), {"prompts": ["a cat"], "count": 1, "scale": 0.7})
    end = time.monotonic() + 120
    while background.jobs(site.store.root)[0].state == "running":
        assert time.monotonic() < end
        time.sleep(0.2)
    assert "The last comparison failed" in compare.working(site, ["grid"])


def test_what_cannot_be_is_not_promised(site, run, swept, finish):
    config = configs.load("audio_visual/demo", [f"runs={site.store.root}"])
    heard = site.store.create(config, id="heard")
    for made in (finish(heard), run):
        shutil.rmtree(made.samples)
        made.samples.mkdir()
    for id, words in (("grid", "one of its cells"), ("heard", "draws none"), ("one", "Compare draws")):
        assert words in (shown := runs_detail.samples(site, id)) and "Sample now" not in shown
    seen = {id: runs_detail.possible(site, id)[1]["visible"] for id in ("one", "grid", "heard")}
    assert seen == {"one": True, "grid": False, "heard": False}


def test_what_is_missing_is_named(site, run, swept):
    """By the run's id and the file's name, and never by where on the server it lies."""
    (run.folder / "config.yaml").unlink()
    heading, curves, *_, config, _ = runs_detail.detail(site, "one", None)
    assert "5 of 5" in heading and "<svg" in curves and "one/config.yaml cannot be read: No such file" in config
    shutil.rmtree(run.folder)
    gone = runs_detail.detail(site, "one", None)[0]
    assert "no run &#x27;one&#x27;" in gone and str(site.store.root) not in gone
    (swept.folder / "comparison" / "table.json").write_text("{}")
    with pytest.raises(InputError, match=r"^grid/comparison: holds no comparison"):
        compare.read(site, "grid/comparison")


def test_a_comparison_speaks_of_its_own_pictures(site, swept, finish):
    """Of classification these are confusion matrices, of which the base has none."""
    assert compare.pictured(site, compare.read(site, "grid/comparison"))["label"] == "Prompt"
    config = configs.load("audio_visual/demo", [f"runs={site.store.root}"])
    finish(site.store.create(config, id="heard"))
    file = swept.folder / "comparison" / "table.json"
    table = json.loads(file.read_text()) | {"prompts": ["confusion, joint", "confusion, audio"]}
    for cell in table["cells"]:
        cell["run"] = "heard" if cell["run"] else ""
        cell["pictures"] *= bool(cell["run"])
    file.write_text(json.dumps(table))
    said = compare.pictured(site, compare.read(site, "grid/comparison"))
    assert said == {"label": "Picture", "info": "0 shows the first of each. 1: confusion, joint; 2: confusion, audio"}
    assert compare_grid.grid(site, "grid/comparison").count("the base has none") == 2
    for chosen in (["base"], ["heard", "base"], ["base", "heard"]):
        assert "no picture of the untouched base" in compare_cell.cell_detail(site, "grid/comparison", chosen, 0)


def test_all_that_a_comparison_wrote_is_linked(site, swept):
    links = compare_numbers.export(site, "grid/comparison")
    for name in ("grid.png", "grid-00.png", "grid-01.png", "report.html", "table.csv", "table.json"):
        assert (swept.folder / "comparison" / name).is_file() and f"/{name}?download=1" in links


def test_unfinished_runs_are_not_compared(site, run):
    with run.session(signals=False), pytest.raises(InputError, match="not finished yet"):
        compare.generate(site, ["one"], "", 1, 1.0)
    with pytest.raises(InputError, match="Choose a sweep"):
        compare.generate(site, [], "a", 1, 1.0)
    with pytest.raises(InputError, match="characters"):
        compare.generate(site, ["one"], "a" * 5000, 1, 1.0)


def test_plugins_and_what_is_broken(distribution):
    distribution(
        "shelf", {"equipoise.optimizers": {"broken": "shelf_of:Nothing"}}, shelf_of="raise ValueError('<b>no</b>')"
    )
    page = plugins.page()
    assert "scaled_adamw" in page and "2402.02347" in page and "text_to_image" in page
    assert "<a href='https://arxiv.org/abs/2402.02347' target='_blank' rel='noreferrer'>arXiv 2402.02347</a>" in page
    assert "cannot be used" in page and "shelf" in page and "<b>no</b>" not in page


@pytest.fixture(scope="module")
def server(site_of_all, serve_all):
    return serve_all(site_of_all.store.root)


def test_the_programming_interface(site_of_all, server):
    """What is named only reads."""
    run = site_of_all.store.get("one")
    client = Client(server.url, verbose=False)
    try:
        named = client.view_api(return_format="dict")["named_endpoints"]
        assert sorted(named) == ["/check", "/comparison", "/plugins", "/runs"]
        assert "scaled_adamw" in client.predict(api_name="/plugins")
        yaml = configs.dump(run.config())
        said = client.predict(yaml, api_name="/check")
        assert said["runs"] == len(expand(run.config())) and "measured here" in said["time"] and said["yaml"] == yaml
        secret = yaml.replace("folder: demo", "folder: /etc")
        odd = [(None, "must be the text"), (5, "must be the text"), ({"a": 1}, "must be the text")]
        for text, words in (*odd, ("a: [", "config.yaml"), (secret, "may read"), ("pipeline: nobody", "no pipeline")):
            with pytest.raises(Exception, match=words):
                client.predict(text, api_name="/check")
        stands = {item["id"]: item["state"] for item in client.predict(api_name="/runs")}
        assert stands == {"one": "done", "grid": "done"}
        table = client.predict("grid", api_name="/comparison")
        assert len(table["cells"]) == 5 and table["prompts"][0] == "a <i>cat</i>"
        for id in ("one", "../grid", "/etc", "grid/comparison/..", ""):
            with pytest.raises(Exception, match="no such file"):
                client.predict(id, api_name="/comparison")
    finally:
        client.close()
    assert run.status().state == "done"


def test_what_is_not_named_does_nothing_to_crafted_ids(site_of_all, server):
    """Every event of the page, asked for as the browser does, with a path in every field, and a chosen id too."""
    site = site_of_all
    secret = site.store.root.parent / "secret"
    secret.mkdir()
    (secret / "log.txt").write_text("the secret")
    before = {file: file.stat().st_mtime_ns for file in site.store.root.rglob("*") if "index" not in file.name}
    answers = []
    with httpx.Client(base_url=server.url, timeout=60) as client:
        events = client.get("/config").json()
        parts = {part["id"]: part for part in events["components"]}
        free = {id for id, part in parts.items() if part["type"] in ("textbox", "file", "uploadbutton", "html")}
        for event in events["dependencies"]:
            named = ("check", "comparison", "plugins", "runs")
            starts = ("on_start_demo", "say")  # the demo, and pictures of the run that Talk begins with: nobody's field
            if not event["backend_fn"] or event["api_name"] in (*named, *starts):
                continue
            data = ["../secret" if id in free else parts[id]["props"].get("value") for id in event["inputs"]]
            asked = {"data": data, "fn_index": event["id"], "session_hash": f"s{event['id']}"}
            asked["event_data"] = {"id": "../secret"}
            joined = client.post("/gradio_api/queue/join", json=asked)
            assert joined.status_code == 200, joined.text
            with client.stream("GET", f"/gradio_api/queue/data?session_hash=s{event['id']}") as stream:
                answers.append(next(line for line in stream.iter_lines() if "process_completed" in line))
    assert len(answers) > 20 and not [answer for answer in answers if "the secret" in answer]
    reached = [answer for answer in answers if "is not the id of a run" in answer or "got &#x27;../secret" in answer]
    assert len(reached) >= 4, "the handlers themselves refused it"
    drawn = site.store.root / ".demo"  # the demo's six pictures, which are looked at on Launch
    kept = {file for file in site.store.root.rglob("*") if file != drawn and drawn not in file.parents}
    after = {file: file.stat().st_mtime_ns for file in kept if "index" not in file.name}
    assert after == before and (secret / "log.txt").exists()


def test_the_page_is_put_together_without_torch(tmp_path):
    """Whose import takes as long as all the rest that this project adds to gradio's."""
    code = f"""
import sys
from equipoise.ui.quick import import_gradio
import_gradio()
from equipoise.ui.app import application
from equipoise.ui.safety import Site
from equipoise.pipelines.runs.store import Store
application(Site(Store({str(tmp_path)!r})), 1)
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_choosing_an_optimizer_says_what_an_empty_rate_means(site):
    async def built() -> launch_tab.Form:  # where no loop runs, gradio makes some that nobody closes
        with gr.Blocks():
            return launch_tab.build(site, 1)[0]["text_to_image"]

    with asyncio.Runner() as loop:
        form = loop.run(built())
    (rate,) = form.following.values()
    assert rate.placeholder == "empty: its own, or 0.0001"
    chosen = {"optimizer.name": ["bounded_adamw"], "objective.name": ["joint"], "coordinator.name": ["constant"]}
    updates = launch_tab.on_plugins(form, [], *(chosen[key] for key in form.plugins))
    assert updates[rate]["placeholder"] == "empty: 1" and form.options in updates
    filled = launch_tab.on_preset(form, "text_to_image/dreambooth")
    assert (filled[rate]["value"], filled[rate]["placeholder"]) == ("", "empty: 0.0001")
