"""The head of Launch, which starts the demo, and its view of pictures and captions."""

import asyncio
import html
import json
import re
from pathlib import Path

import gradio as gr
import pytest
from PIL import Image

from equipoise.errors import ConfigError, InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines import demo
from equipoise.pipelines.jobs.epochs import in_steps
from equipoise.ui import launch, launch_data, launch_demo, launch_pictures, launch_tab


@pytest.fixture
def folder(site) -> Path:
    """Three pictures below the data root, two with captions of their own, beside what is no picture."""
    made = site.data["photos"] / "vases"
    made.mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (300, 200)).save(made / f"{name}.png")
    (made / "a.txt").write_text("a <b>vase</b>")
    (made / "b.txt").write_text("two vases")
    (made / "notes.pdf").write_text("no picture")
    return made


def test_the_demos_pictures_are_those_that_it_trains_on(site, tmp_path):
    import base64

    shown = [base64.b64decode(re.search(r"base64,([^']+)", image)[1]) for image in launch_demo._pictures()]
    files = sorted(demo.pictures_folder(tmp_path).glob("*.png"))
    assert shown == [file.read_bytes() for file in files] and len(shown) == 6


def test_one_button_starts_the_demo_once(site, ask):
    waiting = site.store.create(configs.load("audio_visual/demo", [f"runs={site.store.root}"]), id="first")
    with waiting.session(signals=False):  # so that the demo waits for its turn
        said = str(ask("on_start_demo"))
        assert "Queued " in said and "It is not started twice" in str(ask("on_start_demo"))
        (made,) = [item for item in site.store.list() if item.id != "first"]
        assert f"?tab=Compare&amp;compare={made.id}" in said and f"?tab=Runs&amp;run={made.id}" in said
        assert made.kind == "sweep" and made.pipeline == "text_to_image"
        site.store.get(made.id).request("stop")
    assert configs.load(site.store.root / made.id / "config.yaml").sweep == configs.load(launch_demo.NAME).sweep


def test_what_can_have_one_value_alone_is_out_of_sight(site):
    async def built() -> dict:  # where no loop runs, gradio makes some that nobody closes
        with gr.Blocks():
            return launch_tab.build(site, 1)[0]

    with asyncio.Runner() as loop:
        made = loop.run(built())
    seen = {
        name: {item.key.key: widget.visible for item, widget in zip(form.items, form.widgets, strict=True)}
        for name, form in made.items()
    }
    assert seen["text_to_image"]["objective.name"] is seen["text_to_image"]["coordinator.name"] is False
    assert seen["audio_visual"]["objective.name"] is seen["instruction_tuning"]["coordinator.name"] is True
    assert seen["text_to_image"]["optimizer.name"] is True


def test_a_folders_pictures_are_seen_with_their_captions_and_what_is_left_out(site, folder):
    found, writable = launch_data.folder_of(site, "photos/vases", "")
    shown = launch_data.view(site, found, 1)
    assert writable and shown.count("<img src='data:image/jpeg;base64,") == 3 and "a &lt;b&gt;vase" in shown
    assert "3 pictures" in shown and "1 .pdf" in shown and "c.png" in shown and str(site.data["photos"]) not in shown
    (folder / "d.png").write_text("no picture")
    assert "cannot be read: d.png" in launch_data.view(site, launch_data.folder_of(site, "photos/vases", "x")[0], 1)
    assert launch_data.folder_of(site, "demo", "")[1] is False


def test_captions_are_written_beside_their_pictures(site, folder):
    rows = [
        ["a.png", "a <b>vase</b>"],
        ["b.png", "three\n vases"],
        ["c.png", "one"],
        ["../../x.png", "y"],
        ["e.png", "z"],
    ]
    assert launch_data.save_captions(site, "photos/vases", "", rows) == 2
    texts = {file.name: file.read_text() for file in folder.glob("*.txt")}
    assert texts == {"a.txt": "a <b>vase</b>", "b.txt": "three vases\n", "c.txt": "one\n"}
    assert [example.caption for example in launch_data.folder_of(site, "photos/vases", "")[0].examples] == [
        *("a <b>vase</b>", "three vases", "one")
    ]
    assert not list(site.data["photos"].rglob("x.txt")) and not list(folder.glob("e.*"))


def test_captions_of_uploads_can_be_edited_and_those_of_a_table_cannot(site, folder):
    files = [str(folder / name) for name in ("a.png", "b.png")]
    made = launch_pictures.save_pictures(site, "mine", files, [["a.png", "one"], ["b.png", "two"]])
    assert launch_data.save_captions(site, made, "", [["001.png", "2"]]) == 2
    found, _ = launch_data.folder_of(site, made, "")
    assert [example.caption for example in found.examples] == ["one", "2"]
    (folder / "metadata.csv").write_text("file_name,text\na.png,x\nb.png,y\nc.png,z\n")
    with pytest.raises(InputError, match="a table in this folder holds its captions"):
        launch_data.save_captions(site, "photos/vases", "", [["a.png", "new"]])
    assert (folder / "a.txt").read_text() == "a <b>vase</b>"


@pytest.mark.parametrize("choice", ["/etc", "photos/../..", "photos/out", "../photos", "~", "PHOTOS"])
def test_nothing_outside_of_the_folders_is_read_or_written(site, folder, choice):
    if choice == "PHOTOS":  # which holds a link that leads out
        choice = str(site.data["photos"])
    for ask in (
        lambda: launch_data.folder_of(site, choice, ""),
        lambda: launch_data.save_captions(site, choice, "", []),
    ):
        with pytest.raises((ConfigError, InputError)):
            ask()


def test_a_caption_that_somebody_else_wrote_meanwhile_is_not_reverted(site, folder):
    """And one with line breaks that nobody has touched stays as it is."""
    (folder / "b.txt").write_text("two\nvases")
    before = [["a.png", "a <b>vase</b>"], ["b.png", "two\nvases"], ["c.png", ""]]
    (folder / "a.txt").write_text("another's")

    def save(*edited: list[str]) -> int:
        rows = [next((one for one in edited if one[0] == row[0]), row) for row in before]
        return launch_data.save_captions(site, "photos/vases", "", rows, before)

    assert save(["c.png", "mine"]) == 1
    with pytest.raises(InputError, match="png got another caption since it was shown"):
        save(["a.png", "mine, too"])
    assert [(folder / f"{name}.txt").read_text() for name in "abc"] == ["another's", "two\nvases", "mine\n"]
    assert save(["a.png", "another's"]) == 0


def test_captions_are_not_written_where_they_would_not_be_read(site, folder):
    with pytest.raises(InputError, match="the instance prompt is the caption of all"):
        launch_data.save_captions(site, "photos/vases", "a vase", [["a.png", "new"]])
    with pytest.raises(InputError, match="the demo's pictures stay"):
        launch_data.save_captions(site, "demo", "", [["00.png", "new"]])
    with pytest.raises(InputError, match="5001 characters"):
        launch_data.save_captions(site, "photos/vases", "", [["a.png", "x" * 5001]])


def test_a_run_by_epochs_is_not_started_twice(site, folder):
    config = configs.load("text_to_image/demo", [f"runs={site.store.root}", "sweep={}"])
    config = configs.set_keys(config, {"train.steps": None, "train.epochs": 2.0})
    made = launch.planned(site, config)
    item = site.store.create(in_steps(config)[0], id="one")
    assert launch.at_work(site, made).id == item.id


def test_the_data_view_says_how_many_pictures_each_bucket_has(site, ask):
    folder = site.data["photos"] / "mixed"
    folder.mkdir()
    for index, size in enumerate([(64, 64), (128, 64), (130, 64), (64, 100)]):
        Image.new("RGB", size).save(folder / f"{index}.png")
    shape = {"data.buckets": True, "data.resolution": "64", "data.bucket_step": "", "data.bucket_limit": "2"}
    shape |= {"model.path": "demo"}
    said = launch_data.buckets(site, launch_data.folder_of(site, "photos/mixed", "x")[0], shape)
    assert said in str(ask("on_shape", "photos/mixed", "x", 1, *shape.values())), "and says so when a field changes"
    assert "80 × 48: 2" in said and "64 × 64: 1" in said, said
    assert said in str(ask("on_look", "photos/mixed", "x", *shape.values()))
    for other in ({"data.buckets": False}, {"data.resolution": "x"}):
        assert "Buckets" not in str(ask("on_look", "photos/mixed", "x", *(shape | other).values()))


def test_a_preset_that_changes_folder_and_cut_shows_the_pictures_whose_captions_stand_below(site, ask, monkeypatch):
    monkeypatch.setattr(launch_data, "PAGE", 2)
    for name in ("before", "after"):
        folder = site.data["photos"] / name
        folder.mkdir()
        for index in range(4):
            Image.new("RGB", (64, 64)).save(folder / f"{name}-{index}.png")
            (folder / f"{name}-{index}.txt").write_text(f"{name} {index}")
    shape = (False, "64", "", "2", "demo")
    assert "before-0.png" in str(ask("on_look", "photos/before", "", *shape))
    assert "before-2.png" in str(ask("on_page", "photos/before", "", 2, *shape))
    assert "before-2.png" in str(ask("on_shape", "photos/before", "", None, *shape)), "the page stays"
    first = str(ask("on_shape", "photos/after", "", None, *shape))
    assert "after-0.png" in first and "after-2.png" not in first, "of another folder the first page"
    assert "after-0.png" in str(ask("on_look", "photos/after", "", *shape))
    later = str(ask("on_shape", "photos/after", "", None, *shape))
    assert "after-0.png" in later and "after-2.png" not in later, "whatever the slider has"


def test_what_each_entry_of_a_list_is_for(site, ask):
    (said,) = ask("say_purposes")
    words = json.loads(html.unescape(re.findall(r"data-words='([^']*)'", said)[0]))
    assert words["field-text_to_image-optimizer-name"]["bounded_adamw"].startswith("AdamW with bounds")
    assert words["field-audio_visual-objective-name"]["joint"] == "Trains on the joint loss alone (MML)."
    assert "constant" in words["field-instruction_tuning-coordinator-name"]
    assert words["preset-text_to_image"]["text_to_image/dreambooth"].startswith("Teach Stable Diffusion one subject")
