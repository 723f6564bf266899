"""What Compare says of pictures: verdicts of those that were judged alone, and the picture that was asked for."""

import json
import re
import shutil
import time

import pytest
from PIL import Image

from equipoise.errors import InputError
from equipoise.pipelines.comparing.comparison import Comparison, Picture
from equipoise.pipelines.comparing.report import render_html
from equipoise.pipelines.demo import shapes
from equipoise.pipelines.jobs import background
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.runs import status
from equipoise.pipelines.text_to_image.generate import Sample
from equipoise.pipelines.text_to_image.metrics import measure
from equipoise.ui import compare, compare_cell, compare_grid, compare_numbers, draw, runs_curves

OWN = "grid/comparison"
PROMPTS = [f"prompt {index}" for index in range(6)]


@pytest.fixture
def keeping(swept) -> Comparison:
    """The sweep's comparison of six prompts with two noises each; what learnt most forgot most, another is best."""
    made = Comparison.read(swept.folder / "comparison")
    made.prompts, made.kept, made.beside = PROMPTS, "kept", {"kept": "what is left"}
    figures = ((0.0, 1.0), (0.0, 1.0), (0.7, 0.9), (0.8, 0.1), (-8.15, 0.0))
    for cell, (score, kept) in zip([made.base, *made.cells], figures, strict=True):
        cell.metrics = {"score": score, "kept": kept, "black": 0.0, "noise": 0.25}
        place = f"cells/{cell.run.rpartition('/')[2] or 'base'}"
        cell.pictures = [
            Picture(prompt, seed, f"{place}/{prompt:02d}-{seed}.png", f"{place}/{prompt:02d}-{seed}.png")
            for prompt in range(6)
            for seed in (0, 1)
        ]
        for picture in cell.pictures:
            Image.new("RGB", (8, 8)).save(made.folder / picture.file)
    made.cells[-1].state = "diverged"
    made.write_tables()
    return made


def job(site, swept, asked: dict, name: str = "20260101-000000-aaaa", state: str = "done") -> str:
    """A comparison that was made in the background by an earlier version, which judged whatever it drew; its id."""
    place = site.store.root / background.COMPARISONS
    if state == "done":
        (place / name).mkdir(parents=True)
        (place / name / "table.json").write_text((swept.folder / "comparison" / "table.json").read_text())
    place.mkdir(exist_ok=True)
    record = {"runs": ["grid"], "asked": asked, "created": time.time(), **status.process()}
    (place / f"{name}.json").write_text(json.dumps(record))
    return f"{background.COMPARISONS}/{name}"


@pytest.mark.parametrize("asked", [{"prompts": ["a zebra"]}, {"scale": 0.0}, {"prompts": ["a"], "scale": 1.0}])
def test_pictures_that_were_not_judged_have_no_frame_and_no_score(site, swept, keeping, asked):
    id = job(site, swept, asked)
    shown = compare_grid.grid(site, id)
    assert "usable'" not in shown and "class='verdict'" not in shown and "data-best" not in shown
    assert "70%" not in shown and "-815%" not in shown and "kept 90%" in shown
    assert "Nothing is judged here" in compare_numbers.answer(site, id) and compare_numbers.best_run(site, id) == ""
    assert "verdict</dt>" not in compare_cell.cell_detail(site, id, [keeping.cells[1].run], 0)
    assert "usable'" in compare_grid.grid(site, OWN)


def test_more_of_the_same_pictures_are_judged(site, swept, keeping):
    assert "class='cell usable'" in compare_grid.grid(site, job(site, swept, {"count": 8}))


def test_a_step_of_the_training_is_not_judged(site, swept, keeping):
    shown = compare_grid.grid(site, OWN, step=2)
    assert "usable'" not in shown and "data-best" not in shown and "70%" not in shown
    detail = compare_cell.cell_detail(site, OWN, [keeping.cells[1].run], 0, step=2)
    assert "verdict" not in detail and "not judged" in detail and "<dt>kept" not in detail


def test_score_and_what_was_kept_stand_in_every_cell_and_the_best_is_marked(site, keeping):
    """The best is the usable one, not the one with the highest score; a cell that diverged counts as the base."""
    shown = compare_grid.grid(site, OWN)
    for words in ("<div>70%</div>", ">kept 90%<", "<div>80%</div>", ">kept 10%<"):
        assert shown.count(words) == 1
    assert "-815%" not in shown and shown.count("<div>0%</div>") == 4
    best = keeping.cells[1].run
    assert re.findall(r"data-id='([^']+)'[^>]*data-best", shown) == [best] and shown.count("★ best") == 1
    assert compare_numbers.best_run(site, OWN) == best
    assert "Best: adamw at 1e-3: 70% learnt, 90% kept" in compare_numbers.answer(site, OWN)


def test_what_pictures_are_made_of_stands_beside_the_base_and_cannot_be_chosen(site, swept, keeping):
    plain = compare_grid.grid(site, OWN)
    keeping.sources = [Picture(0, None, "cells/base/00-0.png", "cells/base/00-0.png")]
    keeping.write_tables()
    shown = compare_grid.grid(site, OWN)
    assert "<th scope='col'>source</th><th scope='col'>base</th>" in shown
    assert shown.count("<button") == plain.count("<button") and shown.count("<div class='cell'") == len(keeping.rows)
    assert "00-0.png" in shown.partition("<div class='cell'")[2].partition("</td>")[0]


def test_all_prompts_are_in_the_overview(site, keeping):
    shown = compare_grid.grid(site, OWN)
    assert shown.count("<img") == 6 * 6 and shown.count("title='6: prompt 5'") == 6
    assert compare_numbers.prompts(site, OWN).count("<li>") == 6
    other = compare_grid.grid(site, OWN, noise=2)
    assert "00-1.png" in other and "00-0.png" not in other


def test_the_picture_that_was_chosen_is_opened(site, keeping):
    """In full size, of the cell and of the one before it, and at a step of the training that step's."""
    first, second = (cell.run for cell in keeping.cells[:2])
    shown = compare_cell.cell_detail(site, OWN, [first, second], 0, picture="2-1")
    large = shown.split("class='strip'")[0]
    assert re.findall(r"src='[^']*/(\d\d-\d)\.png'", large) == ["02-1", "02-1"]
    assert "<dt>noise seed</dt><dd>1</dd>" in shown and "<dt>prompt</dt><dd>prompt 2</dd>" in shown
    assert "<dt>pictures of noise</dt><dd>0.25</dd>" in shown
    at_step = compare_cell.cell_detail(site, OWN, [first], 0, step=2)
    assert "samples/step-00000002/00-0.png" in at_step and "comparison/cells" not in at_step


def test_every_picture_of_a_cell_can_be_reached(site, keeping):
    strip = compare_cell.cell_detail(site, OWN, [keeping.cells[0].run], 0).split("class='strip'")[1]
    assert re.findall(r"data-picture='([^']+)'", strip) == [
        f"{prompt}-{seed}" for prompt in range(6) for seed in (0, 1)
    ]


def test_a_click_on_a_thumbnail_opens_it_and_another_prompt_lets_go_of_it(site, swept, keeping, ask):
    ask("pick", ["grid"])
    run = keeping.cells[0].run
    looked_at = [OWN, "row", "optimizer.learning_rate", 0, 5, None, 1, None]
    shown = str(ask("choose_cell", *looked_at, event={"id": run, "picture": "3-1"}))
    assert "Large" not in shown and re.search(r"<a href='[^']*03-1\.png'", shown)
    assert re.search(
        r"<a href='[^']*04-0\.png'", str(ask("choose_picture", *looked_at, event={"id": run, "picture": "4-0"}))
    )
    looked_at[3] = 2
    assert re.search(r"<a href='[^']*01-0\.png'", str(ask("draw_grid", *looked_at)))
    assert ask("choose_prompt", 0, event={"id": "2"}) == [2]


def test_columns_that_are_all_zero_are_left_out(site, keeping):
    shown = compare_numbers.table(site, OWN)
    assert ">black</th>" not in shown and ">noise</th>" in shown and "0 in every cell: black." in shown


def test_the_same_twice_is_one_job(site, swept, keeping, monkeypatch):
    begun = []
    monkeypatch.setattr(background, "compare", lambda root, refs, asked: begun.append(asked) or "name")
    job(site, swept, {"prompts": ["a zebra"], "scale": 1.0}, state="running")
    with pytest.raises(InputError, match="is being made already"):
        compare.generate(site, ["grid"], "a zebra", 0, 1.0)
    job(site, swept, {"prompts": ["a cat"], "scale": 1.0}, name="20260101-000001-aaaa")
    with pytest.raises(InputError, match="is there already: choose it"):
        compare.generate(site, ["grid"], "a cat", 0, 1.0)
    compare.generate(site, ["grid"], "another", 0, 1.0)
    assert begun == [{"prompts": ["another"], "scale": 1.0}]


def test_a_comparison_can_be_deleted(site, swept, keeping, ask):
    id = job(site, swept, {"prompts": ["a zebra"]})
    assert [item.id for item in compare.made(site, ["grid"])] == [OWN, id]
    with pytest.raises(InputError, match="belongs to its runs"):
        compare.discard(site, OWN)
    for wrong in ("comparisons/../grid", "comparisons/..", "comparisons/", ""):
        with pytest.raises(InputError):
            compare.discard(site, wrong)
    ask("pick", ["grid"])
    said = str(ask("delete_comparison", id, ["grid"]))
    assert "is deleted" in said and "class='answer'" in said, "the one that is left is shown"
    assert [item.id for item in compare.made(site, ["grid"])] == [OWN]
    assert list((site.store.root / background.COMPARISONS).iterdir()) == []


def test_a_job_at_work_is_ended_and_taken_away(site, swept):
    name = compare.generate(site, ["grid"], "a cat", 1, 1.0)
    (found,) = background.jobs(site.store.root)
    record = json.loads((site.store.root / background.COMPARISONS / f"{name}.json").read_text())
    assert found.state == "running" and compare.pending(site, ["grid"]) == f"{background.COMPARISONS}/{name}"
    compare.discard(site, compare.pending(site, ["grid"]))
    assert background.jobs(site.store.root) == [] and compare.pending(site, ["grid"]) == ""
    assert status.gone(**{key: record[key] for key in ("host", "pid", "pid_started")})


def test_files_are_offered_from_the_folders_that_may_be_read(site, swept, monkeypatch):
    """And compared by strength beside the runs; others are refused."""
    begun = []
    monkeypatch.setattr(background, "compare", lambda root, refs, asked: begun.append(asked) or "name")
    cell = sweeps.cells(swept)[0]
    for file in (cell.result / "lora.safetensors", site.data["photos"] / "mine.safetensors"):
        file.write_bytes(b"")
    outside = site.store.root.parent / "secret.safetensors"
    outside.write_bytes(b"")
    (site.data["photos"] / "link.safetensors").symlink_to(outside)
    own = f"{cell.id}/result/lora.safetensors"
    assert [choice for _, choice in compare.lora_files(site)] == [
        "photos/link.safetensors",
        "photos/mine.safetensors",
        own,
    ]
    compare.generate_from_files(site, ["grid"], "a cat", 0, "0.5, 1", True, [own, "photos/mine.safetensors"])
    files = [str(cell.result / "lora.safetensors"), str(site.data["photos"] / "mine.safetensors")]
    assert begun == [{"prompts": ["a cat"], "scales": [0.5, 1.0], "checkpoints": True, "files": files}]
    for name in (str(outside), "photos/../../secret.safetensors", "../secret.safetensors", "photos/link.safetensors"):
        with pytest.raises(InputError):
            compare.generate_from_files(site, ["grid"], "", 0, "1", False, [name])
    for strengths, words in (("0", "above 0"), ("11", "at most 10"), ("much", "are numbers"), ("nan", "above 0")):
        with pytest.raises(InputError, match=words):
            compare.generate_from_files(site, ["grid"], "", 0, strengths, False, [])
    assert len(begun) == 1


def test_files_of_the_hub_are_left_to_the_job_and_named_by_reference_alone(site, swept, monkeypatch):
    begun: list[dict] = []
    monkeypatch.setattr(background, "compare", lambda root, refs, words: begun.append(words) or "name")
    compare.generate_from_files(site, ["grid"], "", 0, "1", False, [], " a/b \n\nhub:a/b/c.safetensors")
    assert begun[0]["files"] == ["hub:a/b", "hub:a/b/c.safetensors"]
    for wrong in ("/etc/passwd", "a/b\n../x", "--out=/tmp/x", "http://a/b", "a/b\n" * 9):
        with pytest.raises(InputError):
            compare.generate_from_files(site, ["grid"], "", 0, "1", False, [], wrong)
    assert len(begun) == 1


def test_the_best_rate_fills_launch(site, swept, keeping, ask):
    ask("pick", ["grid"])
    updates = str(ask("use_rate", OWN))
    assert "'launch'" in updates and "0.001" in updates and "'adamw'" in updates


def test_a_comparison_of_somebody_else_brings_no_markup_into_the_page(site, swept, keeping):
    keeping.column = "learning <script>x</script><i>rate</i>"
    keeping.write_tables()
    shown = [compare_numbers.curve(site, OWN), compare_numbers.table(site, OWN), compare_grid.grid(site, OWN)]
    for cell in keeping.cells:
        cell.metrics["score"] = 0.0
    keeping.write_tables()
    shown.append(compare_numbers.curve(site, OWN))
    assert not any("<script>" in page or "<i>" in page for page in shown)


def test_the_last_comparison_goes_from_the_screen_when_it_is_deleted(site, swept, keeping, ask):
    id = job(site, swept, {"prompts": ["a zebra"]})
    shutil.rmtree(swept.folder / "comparison")
    ask("pick", ["grid"])
    said = str(ask("delete_comparison", id, ["grid"]))
    assert "is deleted" in said and "Not compared yet" in said and "class='cell" not in said


def test_the_runs_own_prompts_given_again_are_judged(site, swept, keeping):
    """As the report has it: what was compared says so itself."""
    for own, judged in ((True, True), (False, False), (None, False)):
        keeping.own = own
        if own is False:
            keeping.forget_scores()
        keeping.write_tables()
        id = job(site, swept, {"prompts": PROMPTS}, name=f"20260101-000000-{own}")
        assert compare.read(site, id).judged is judged


def test_files_by_strength_are_none_of_the_comparisons_at_a_scale(site, swept, keeping, ask):
    job(site, swept, {"scales": [0.5, 1.0], "checkpoints": False}, name="20260101-000001-aaaa")
    drawn = job(site, swept, {"scale": 0.5})
    ask("pick", ["grid"])
    shutil.rmtree(swept.folder / "comparison")
    assert "is drawn at scale 1 yet" in str(ask("by_scale", ["grid"], drawn, 1.0))


def test_the_files_of_the_newest_runs_are_offered_where_there_are_many(site, swept, run, monkeypatch):
    monkeypatch.setattr(compare, "MOST_FILES", 2)
    for made in (run, sweeps.cells(swept)[0]):
        (made.result / "lora.safetensors").write_bytes(b"")
    (site.data["photos"] / "mine.safetensors").write_bytes(b"")
    newest = site.store.list()[0].id
    found = [choice for _, choice in compare.lora_files(site)]
    assert found[0] == "photos/mine.safetensors" and len(found) == 2 and found[1].startswith(f"{newest}/")


def test_on_other_axes_a_cell_shows_its_own_score_and_the_way_to_the_others(site, keeping):
    """0.7 and 0 of two rates are no mean over seeds."""
    shown = compare_grid.grid(site, OWN, columns="optimizer.name")
    first, second = (cell.run for cell in keeping.cells[:2])
    assert "<div>0% · 1 of 2</div>" in shown and "35%" not in shown and " to 70%" not in shown
    others = shown.split("class='others'")[1].split("</div>")[0]
    assert f"data-id='{second}'" in others and first not in others


def test_a_rate_is_offered_only_where_it_is_usable(site, keeping):
    keeping.cells[1].metrics["kept"] = 0.1
    keeping.write_tables()
    assert "No rate is usable" in compare_numbers.answer(site, OWN) and compare_numbers.best_run(site, OWN) == ""


def test_where_files_lie_is_not_served(site, swept):
    id = job(site, swept, {"scales": [1.0], "files": ["/srv/private/lora.safetensors"]})
    assert site.file(f"{id}/table.json").is_file()
    with pytest.raises(InputError, match="no such file"):
        site.file(f"{id}.json")


def test_what_a_cells_figures_are_stands_with_them(site, keeping):
    plain = Image.new("RGB", (64, 64))
    asked = (shapes.caption(shapes.OBJECT.name, "white"), "a red circle on a white background")
    measured, _, _ = measure([Sample(prompt, 0, plain, True) for prompt in asked], True, 8)
    known = {"score": 1.0, "loss_before": 1.0, "loss_after": 1.0, "seconds": 1.0, "step": 5.0, **measured}
    keeping.cells[0].metrics = known | {"somebody's own": 1.0}
    keeping.write_tables()
    shown = compare_cell.cell_detail(site, OWN, [keeping.cells[0].run], 0)
    explained = re.findall(r"<li><b>([^<]+)</b>: [\w:]", shown)
    assert explained == [{"noise": "pictures of noise"}.get(name, name) for name in known] and "kept" in known
    assert "<th title='share of pictures that are black'>black" in compare_numbers.table(site, OWN)


def test_a_thumbnail_that_was_drawn_anew_is_in_the_next_report(keeping):
    before = render_html(keeping)
    Image.new("RGB", (8, 8), "red").save(keeping.folder / keeping.base.pictures[0].thumbnail)
    assert render_html(keeping) != before


def test_a_row_has_the_same_colour_in_curves_and_in_runs(site, swept):
    shown = compare_numbers.curve(site, OWN)
    assert "#" not in re.sub(r"&#\w+;", "", shown) and draw.INKS[0] in shown and draw.INKS[1] in shown
    inks = runs_curves.inks({one.folder.name: one for one in sweeps.cells(swept)})
    hues = {re.findall(r"hsl\((\d+)", ink)[0] for name, ink in inks.items() if "=adamw," in name}
    assert hues == {str(runs_curves.HUES[0])}
