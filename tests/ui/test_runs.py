"""What the tab Runs does beyond showing how runs stand: curves, notes, several at once, exports."""

import html
import json
import os
import re

import psutil
import pytest

from equipoise.errors import InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.runs import status
from equipoise.pipelines.text_to_image import TextToImage
from equipoise.ui import draw, runs, runs_curves, runs_detail, runs_log, runs_more, runs_notes, runs_several
from equipoise.ui.guard import make_room
from equipoise.ui.runs_curves import Wanted


@pytest.fixture
def two(site, run, finish):
    """Another run beside `one`, with a rate of its own."""
    config = configs.load("text_to_image/demo", [f"runs={site.store.root}", "steps=5", "rank=8", "name=second"])
    return finish(site.store.create(config, id="two"))


def lines(shown: str) -> list[str]:
    return re.findall(r'<polyline points="([^"]+)"', shown)


def test_a_smoothed_curve_keeps_the_raw_one_behind_it():
    points = [(step, float(step % 2)) for step in range(100)]
    smooth = draw.smoothed(points, 0.9)
    assert smooth[0] == (0, 0.0) and all(abs(value - 0.5) < 0.06 for _, value in smooth[-20:])
    assert draw.smoothed([(0, 3.0), (1, 3.0)], 0.99) == [(0, 3.0), (1, pytest.approx(3.0))], "no lower at first"
    plain, shown = draw.chart("a", {"b": points}), draw.chart("a", {"b": points}, smooth=0.9)
    assert shown.count('<polyline class="raw"') == 1 and shown.count("<polyline") == 2
    assert lines(plain)[0] in shown and lines(shown)[0] != lines(plain)[0]


def test_a_chart_has_its_values_for_whoever_points_at_it():
    """And a button with each line's name, by which the browser hides it."""
    points = [(1, 0.123456), (2, 3.0), (1_234_567, 2e-5)]
    shown = draw.chart("a <b>", {"x <i>": points, "y": [(1, 1.0)]}, smooth=0.5)
    values = re.findall(r'<polyline class="raw"[^>]* data-values="([^"]+)"', shown)
    assert values == ["1:0.12346 2:3 1234567:2e-05", "1:1"]
    assert shown.count('<button data-line="x &lt;i&gt;" aria-pressed="true"') == 1 and "<i>" not in shown
    assert shown.count('data-line="y"') == 4, "both polylines, the dot and the button"
    plot = json.loads(html.unescape(re.search(r'data-plot="([^"]+)"', shown)[1]))
    assert (plot["first"], plot["last"], plot["log"]) == (1, 1_234_567, True)
    assert 'data-chart="a &lt;b&gt;"' in shown


def test_the_memory_that_a_run_holds_and_its_devices_load_are_curves(site, run):
    with run.session(signals=False):
        run.metric(6, **status.held(), load_device=87.0)
    memory = run.metrics()[-1]["memory_host"]
    assert memory == pytest.approx(psutil.Process().memory_info().rss / 1e9, rel=0.2)
    shown = runs_curves.charts(site, "one")
    assert "<figcaption>memory host, GB</figcaption>" in shown and "<figcaption>load device, %</figcaption>" in shown


def test_any_runs_are_laid_over_each_other_by_any_metric(site, run, two, swept):
    beside = runs_curves.charts(site, "one", Wanted(beside=("two", "gone", "../two")))
    assert "<figcaption>loss of each run" in beside and len(lines(beside)) == 2
    assert len(lines(runs_curves.charts(site, "one", Wanted(beside=("grid",))))) == 1 + 4
    other = runs_curves.charts(site, "grid", Wanted(metric="gradient_norm"))
    assert "<figcaption>gradient norm of each cell" in other and len(lines(other)) == 4
    assert {"loss", "rate", "kappa", "gradient_norm"} <= set(runs_curves.metrics(site, "grid"))
    assert "choose another metric" in runs_curves.charts(site, "grid", Wanted(metric="<b>"))
    linear = runs_curves.charts(site, "one", Wanted())
    assert lines(linear) != lines(runs_curves.charts(site, "one", Wanted(log=True)))


def test_rates_are_coloured_in_order_one_hue_for_each_optimizer(site, swept):
    cells = {cell.folder.name: cell for cell in sweeps.cells(swept)}
    for cell in cells.values():
        cell.update(learning_rate=cell.config().optimizer.learning_rate)
    found = runs_curves.inks(cells)
    hues = {name: re.fullmatch(r"hsl\((\d+) 65% (\d+)%\)", ink) for name, ink in found.items()}
    by_row: dict[str, list] = {}
    for name, cell in sorted(cells.items(), key=lambda item: item[1].status().learning_rate):
        by_row.setdefault(cell.config().optimizer.name, []).append((hues[name][1], int(hues[name][2])))
    (first, second), (third, fourth) = by_row["adamw"], by_row["scaled_adamw"]
    assert first[0] == second[0] != third[0] == fourth[0] and first[1] > second[1] and third[1] > fourth[1]


def test_notes_and_tags_are_kept_searched_and_escaped(site, run, two):
    runs_notes.write(run, "the <b>good</b> one", "keep, best , keep", False)
    assert runs_notes.read(run.folder) == runs_notes.Notes("the <b>good</b> one", ("keep", "best"))
    shown = runs.table(site, words="best GOOD")
    assert ">one<" in shown and ">two<" not in shown and "<b>good" not in shown and ">keep</span>" in shown
    assert ">two<" in (found := runs.table(site, words="name: second")) and ">one<" not in found, "by its configuration"
    for note, tags, words in (("x" * 10_001, "", "10000"), ("", "y" * 41, "40 characters"), ("", "a," * 50, "")):
        if words:
            with pytest.raises(InputError, match=words):
                runs_notes.write(run, note, tags, False)
    (run.folder / runs_notes.FILE).write_text("[1")
    assert runs_notes.read(run.folder) == runs_notes.Notes() and ">one<" in runs.table(site)


def test_runs_that_are_put_away_are_shown_when_they_are_asked_for(site, run, two):
    assert "1 run put away" in runs_several.archive(site, ["one"])
    assert ">one<" not in (shown := runs.table(site)) and ">two<" in shown
    assert ">one<" in (shown := runs.table(site, state=runs.ARCHIVED)) and ">two<" not in shown
    assert "2 runs put away" in runs_several.archive(site, ["one", "two"]), "one of them was not"
    assert "2 runs back" in runs_several.archive(site, ["one", "two"])
    assert ">one<" in runs.table(site)


def test_several_runs_are_deleted_but_none_at_work(site, run, two, ask):
    with two.session(signals=False):
        assert "tick" in str(ask("delete_several", ["one", "two"], False)) and len(site.store.list()) == 2
        said = str(ask("delete_several", ["one", "two"], True))
    assert "1 of 2 runs deleted" in said and "two: is at work; stop it first" in said
    assert [item.id for item in site.store.list()] == ["two"]
    for ids in (["../two"], ["gone"], []):
        with pytest.raises(InputError):
            runs_several.delete(site, ids)


def test_configurations_are_compared_key_by_key(site, run, two):
    shown = runs_several.differences(site, ["one", "two"])
    assert "<td>lora.rank</td><td>16</td><td>8</td>" in shown and "<td>name</td>" not in shown
    assert "lora.alpha" not in shown and "the same but for" in runs_several.differences(site, ["one", "one"])
    for ids in (["one"], ["one", "../two"]):
        with pytest.raises(InputError):
            runs_several.differences(site, ids)


def test_samples_stand_under_their_prompts_step_by_step(site, run):
    prompt = run.config().samples.prompts[0]
    shown = runs_detail.samples(site, "one")
    assert re.findall(r"<h4>step (\d+)</h4>", shown) == ["5", "2"], "the one that is looked at, and the others below"
    assert shown.count(f"<p class='hint'>{prompt}</p>") == 2


def test_checkpoints_can_be_downloaded(site, run):
    folder = run.checkpoints / "step-00000005"
    folder.mkdir()
    for name in ("weights.safetensors", "state.json", "private.pkl"):
        (folder / name).write_bytes(b"x")
    shown = runs_detail.files(site, "one")
    assert "one/checkpoints/step-00000005/weights.safetensors?download=1" in shown and "private.pkl" not in shown
    assert site.file("one/checkpoints/step-00000005/weights.safetensors").is_file()


def test_an_export_is_refused_where_there_is_none(site, run, ask):
    for id, format in (("one", "kohya"), ("one", "../x"), ("../one", "kohya")):
        assert "bad" in str(ask("make_export", id, format))


def test_notes_that_somebody_else_wrote_meanwhile_are_not_reverted(site, run, ask):
    ask("select", "", "all", "newest", None, 0, False, None, [], event={"id": "one"})
    runs_notes.write(run, "another's", "", False)  # in another tab
    assert "are saved" in str(ask("save_notes", "one", "", "mine", False, "", None)), "only the tags were edited here"
    assert runs_notes.read(run.folder) == runs_notes.Notes("another's", ("mine",))
    runs_notes.write(run, "another's again", "mine", True)
    assert "edited elsewhere meanwhile" in str(ask("save_notes", "one", "and mine", "mine", False, "", None))
    assert runs_notes.read(run.folder) == runs_notes.Notes("another's again", ("mine",), True)


def test_runs_that_are_all_put_away_are_said_to_be(site, run):
    runs_several.archive(site, ["one"])
    assert "All runs are put away" in runs.table(site) and "Nothing matches" in runs.table(site, words="zebra")


def test_a_run_without_a_rate_comes_last_by_rate(site, run, two):
    run.update(learning_rate=None, rate=None)
    two.update(learning_rate=1e-3)
    shown = runs.table(site, sort="rate")
    assert shown.index(">two<") < shown.index(">one<")


def test_runs_that_are_gone_do_not_keep_the_others_from_being_deleted(site, run, two):
    said = runs_several.delete(site, ["gone", "one", "two"])
    assert "2 of 3 runs deleted" in said and "no run 'gone'" in said and site.store.list() == []


def test_an_export_takes_the_place_of_the_one_before_and_none_of_the_uploads_room(
    site, run, ask, tmp_path, monkeypatch
):
    place = tmp_path / "uploaded"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(place))
    monkeypatch.setattr(TextToImage, "export", lambda result, format, file: file.write_bytes(b"x" * 1000))
    format = next(iter(TextToImage.formats))
    for _ in range(2):
        assert "Download" in str(ask("make_export", "one", format))
    (made,) = (place / "exports").rglob("*.safetensors")
    (place / "a.png").write_bytes(b"x" * 10)
    assert make_room(place) == 10
    older = place / "exports" / "older"
    older.mkdir()
    (older / "b.safetensors").write_bytes(b"x" * 1000)
    os.utime(older, (1, 1))
    monkeypatch.setattr(runs_more, "ROOM_FOR_EXPORTS", 1500)
    ask("make_export", "one", format)
    assert made.is_file() and not older.exists()


def test_the_whole_log_is_searched(site, run, ask, monkeypatch):
    run.log_file.write_text(
        "Begin\n" + "".join(f"\rbar {step}" for step in range(9)) + "\n<b>Loss</b> of step 1\nend\n"
    )
    seen = str(ask("search_log", "one", "STEP loss"))
    assert "1 line<" in seen and "&lt;b&gt;Loss&lt;/b&gt; of step 1" in seen and "Begin" not in seen
    assert "bar 8" in str(ask("search_log", "one", "bar")) and "bar 7" not in str(ask("search_log", "one", "bar"))
    assert "0 lines" in str(ask("search_log", "one", "nothing so"))
    monkeypatch.setattr(runs_log, "MOST_FOUND", 1)
    assert "3 lines, the last 1 of them" in (last := runs_log.found_lines(site, "one", "e")) and "end" in last
    assert ask("search_log", "one", " ") == ask("search_log", "", "bar") == [""]
    assert "no log" in str(ask("search_log", "../one", "bar"))


def test_cells_are_called_as_in_comparisons():
    names = {
        "optimizer=adamw,learning_rate=0.003": "adamw at 3e-3",
        "optimizer=bounded_adamw+reach=0.2+trust=0.01,learning_rate=1": "bounded_adamw reach=0.2 trust=0.01 at 1e0",
        "learning_rate=1e-05": "learning rate 1e-5",
        "one/optimizer=sam,optimizer.learning_rate=0.1,seed=1": "one/sam,seed=1 at 1e-1",
        "20261201-a=b": "20261201-a=b",
        "text_encoder_learning_rate=1e-05": "text_encoder_learning_rate=1e-05",
        "text_encoder_learning_rate=1e-05,learning_rate=0.001": "text_encoder_learning_rate=1e-05 at 1e-3",
        "seed=1": "seed=1",
    }
    assert runs_curves.cell_names(names) == names
    alike = ["learning_rate=0.1", "learning_rate=0.10"]
    assert runs_curves.cell_names(alike) == dict(zip(alike, alike, strict=True)), "each has a name of its own"


def test_marks_of_a_logarithmic_axis_have_one_notation():
    assert draw.labels([0.1, 0.01, 1e-5], True) == ["1e-1", "1e-2", "1e-5"]
    assert draw.labels([0.1, 0.03, 0.01], True) == ["0.1", "0.03", "0.01"]
    assert draw.labels([0.001, 0.0003], True) == ["1e-3", "3e-4"]
    assert draw.labels([0.0, 2e-5], False) == ["0", "2e-5"]
    assert [draw.number(value) for value in (2.41e-06, 3e10, 0.5)] == ["2.41e-6", "3e10", "0.5"]
