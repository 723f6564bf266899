"""A form saved under a name; and errors that stand at their fields."""

import asyncio

import gradio as gr
import pytest

from equipoise.errors import ConfigError, EquipoiseError, InputError
from equipoise.pipelines import config as configs
from equipoise.ui import forms, launch, launch_presets, launch_tab

KIND = "text_to_image"


@pytest.fixture
def plan(site):
    """A form of the demo with one field changed, as a plan."""

    def make(rate: str = "0.003, 0.004") -> launch.Plan:
        shown = forms.show(configs.load("text_to_image/demo")) | {"optimizer.learning_rate": rate}
        return launch.plan(site, KIND, "text_to_image/demo", shown, [])

    return make


def test_a_form_is_saved_loaded_and_deleted(site, plan):
    assert launch_presets.names(site, KIND) == []
    launch_presets.save(site, KIND, "my best", plan())
    launch_presets.save(site, KIND, "my best", plan("0.005"))
    assert launch_presets.names(site, KIND) == ["my best"] and launch_presets.names(site, "audio_visual") == []
    assert forms.show(launch_presets.load(site, KIND, "my best"))["optimizer.learning_rate"] == "0.005"
    launch_presets.save(site, KIND, "sweep", plan())
    assert forms.show(launch_presets.load(site, KIND, "sweep"))["optimizer.learning_rate"] == "0.003, 0.004"
    launch_presets.delete(site, KIND, "my best")
    assert launch_presets.names(site, KIND) == ["sweep"]
    for act in (launch_presets.load, launch_presets.delete):
        with pytest.raises(InputError, match="my best"):
            act(site, KIND, "my best")
    assert site.store.list() == [], "presets are no runs"


@pytest.mark.parametrize("name", ["", None, "../x", "/etc/x", ".x", "a/b", "x" * 61, "a\n", "a.b", "é"])
def test_no_name_leads_out(site, plan, name):
    for act in (launch_presets.load, launch_presets.delete):
        with pytest.raises(InputError, match="is called by letters"):
            act(site, KIND, name)
    with pytest.raises(InputError, match="is called by letters"):
        launch_presets.save(site, KIND, name, plan())
    assert not (site.store.root / "presets").exists()


def test_links_are_not_followed(site, plan, tmp_path):
    outside = tmp_path / "outside"
    (outside / KIND).mkdir(parents=True)
    (outside / "x.yaml").write_text("secret")
    site.store.root.mkdir(exist_ok=True)
    link = site.store.root / "presets"
    link.symlink_to(outside)
    with pytest.raises(InputError, match="leads out"):
        launch_presets.save(site, KIND, "x", plan())
    assert launch_presets.names(site, KIND) == [] and not list((outside / KIND).iterdir())
    link.unlink()
    (link / KIND).mkdir(parents=True)
    (link / KIND / "x.yaml").symlink_to(outside / "x.yaml")
    assert launch_presets.names(site, KIND) == []
    with pytest.raises(InputError, match="no preset"):
        launch_presets.load(site, KIND, "x")
    launch_presets.save(site, KIND, "x", plan())
    assert (outside / "x.yaml").read_text() == "secret", "the link was replaced"


def test_a_preset_of_somebody_else_is_checked_as_any_file(site, plan):
    launch_presets.save(site, KIND, "x", plan())
    file = site.store.root / "presets" / KIND / "x.yaml"
    file.write_text(file.read_text().replace("rank: 16", "rank: -1"))
    with pytest.raises(ConfigError, match=r"^x.yaml: lora.rank: must be"):
        launch_presets.load(site, KIND, "x")
    file.write_text("pipeline: audio_visual\nname: x\ndata: {manifest: demo}\n")
    with pytest.raises(EquipoiseError):
        launch_presets.load(site, KIND, "x")


def test_the_page_saves_and_loads(site, ask):
    async def built() -> launch_tab.Form:  # where no loop runs, gradio makes some that nobody closes
        with gr.Blocks():
            return launch_tab.build(site, 1)[0][KIND]

    with asyncio.Runner() as loop:
        form = loop.run(built())
    values = [widget.value for widget in form.widgets]
    assert "Saved." in str(ask("save_preset", "mine", "text_to_image/demo", None, *values))
    assert "is called by" in str(ask("save_preset", "../mine", "text_to_image/demo", None, *values))
    ask("offer_presets")
    loaded = str(ask("load_preset", "mine"))
    assert "is called by" not in loaded and "bounded_adamw" in loaded
    assert "data-shown='mine'" in str(ask("ask_delete_preset", "mine"))
    assert "Deleted." in str(ask("delete_preset", "mine")) and launch_presets.names(site, KIND) == []
    assert "cannot be deleted: No such file" in str(ask("delete_preset", "mine"))


def test_an_error_knows_its_field(site):
    cls = configs.config_class("text_to_image/demo")
    for line, key in (
        ("optimizer.learning_rate: must be > 0, got -1.", "optimizer.learning_rate"),
        ("rank: must be a number", "lora.rank"),
        ("optimizer.options.beta: no such option", "optimizer.name"),
        ("optimizer: choose at least one.", "optimizer.name"),
        ("sweep.learning_rate: is there twice", "optimizer.learning_rate"),
        ("sweep: must be a mapping", "sweep"),
        ("nothing: of the kind", None),
        ("no key at all", None),
    ):
        assert forms.field_of(cls, line) == key, line
    error = ConfigError(["form: lora.rank: must be >= 1, got <0>.", "cell a=1: train.steps: is empty.", "more: x"])
    marked = launch.error_notice(error, lambda line: f"field-{line.partition(':')[0]}" if "." in line[:10] else "")
    assert marked.count("<li data-field=") == 2 and "<li data-field='field-lora.rank'>lora.rank: " in marked
    assert "got &lt;0&gt;" in marked and "<li>more: x</li>" in marked
