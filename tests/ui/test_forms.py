"""A form says what the records say, and gives back what they hold; for every pipeline that is installed."""

import json
from pathlib import Path

import pytest
from PIL import Image

from equipoise import registry
from equipoise.errors import ConfigError, InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.cli import main
from equipoise.pipelines.config.builtin import shipped
from equipoise.pipelines.jobs.axes import expand
from equipoise.pipelines.runs.status import Status
from equipoise.ui import draw, forms, launch, launch_estimates, launch_pictures


def filled(name: str):
    """A shipped configuration, what its form shows, and its table of options."""
    config = configs.load(name)
    shown = forms.show(config)
    chosen = {item.key.key: shown[item.key.key] for item in forms.fields(type(config)) if item.kind == "plugin"}
    return config, shown, forms.option_rows(type(config), chosen, config)


@pytest.mark.parametrize("name", list(shipped()))
def test_there_and_back(name):
    """Unchanged, a form trains exactly the runs that the file does."""
    config, shown, rows = filled(name)
    again = configs.set_keys(config, forms.read(type(config), shown, rows), source="form")
    if not config.sweep:
        assert again == config
        return
    before, after = (
        {json.dumps(configs.flat(cell), sort_keys=True) for cell in expand(it).values()} for it in (config, again)
    )
    assert before == after and len(before) == forms.count(type(config), shown) > 1


def test_runs_are_counted_that_would_be_begun():
    config, shown, _ = filled("text_to_image/demo")
    many = {**shown, "optimizer.name": ["adamw", "scaled_adamw"]}
    for rate, count in (("1e-3, 1e-2", 4), ("1e-3, 1e-3", 1), ("fast", 1)):
        assert forms.count(type(config), {**many, "optimizer.learning_rate": rate}) == count


def test_every_pipeline_has_a_form_of_all_its_keys():
    found = 0
    for entry in registry.entries("pipelines"):
        cls = registry.load("pipelines", entry.name).Config
        asked = {item.key.key for item in forms.fields(cls)}
        options = {f"{key.rpartition('.')[0]}.options" for key in asked if forms.plugin_kind(cls, key)}
        keys = {key.key for key in configs.describe(cls)}
        assert keys == asked | options | keys.intersection(forms.NOT_ASKED) and not asked.intersection(forms.NOT_ASKED)
        assert all(item.key.help in item.info or item.key.help.endswith(".") for item in forms.fields(cls))
        found += 1
    assert found >= 3


def test_lists_within_a_list_come_back_and_single_entries_beside_them():
    for sources in ([["a.png", "b c.png"], ["d.png", "e.png"]], ["a.png", "[b] c.png"], []):
        config = configs.set_keys(configs.load("text_to_image/demo"), {"samples.sources": sources, "sweep": {}})
        assert forms.read(type(config), forms.show(config), [])["samples.sources"] == sources


def test_options_reach_the_cells():
    config, shown, rows = filled("text_to_image/demo")
    for row in rows:
        if row[:2] == ["bounded_adamw", "trust"]:
            row[2] = "2e-2"
    shown |= {"optimizer.learning_rate": "1e-3", "lora.rank": "4, 8"}
    values = forms.read(type(config), shown, rows)
    assert values["sweep"]["optimizer"][1] == {"name": "bounded_adamw", "options": {"trust": 0.02, "reach": 0.2}}
    cells = expand(configs.set_keys(config, values)).values()
    assert {(cell.optimizer.name, cell.optimizer.options.get("trust"), cell.lora.rank) for cell in cells} == {
        (name, trust, rank) for name, trust in (("adamw", None), ("bounded_adamw", 0.02)) for rank in (4, 8)
    }


AXES = [
    {"schedule": ["constant", "cosine"], "learning_rate": [1e-4, 1e-3]},
    {"samples.negative": ["", "blurred"], "optimizer": ["adamw", "scaled_adamw"]},
    {"lora.text_encoder": [True, False]},
    {"lora.targets": [["to_q"], ["to_k", "to_v"]]},
    {"lora.alpha": [None, 8]},
    {"optimizer.name": ["adamw"], "optimizer.options": [{}, {"weight_decay": 0.1}]},
    {"optimizer": ["adamw", {"name": "adamw", "options": {"weight_decay": 0.5}}]},
]


@pytest.mark.parametrize("axes", AXES)
def test_axes_that_have_no_field_are_kept(axes):
    """Of choices, truths, texts, lists, and of one plugin with other options."""
    config = configs.set_keys(configs.load("text_to_image/demo"), {"sweep": axes})
    shown = forms.show(config)
    chosen = {item.key.key: shown[item.key.key] for item in forms.fields(type(config)) if item.kind == "plugin"}
    values = forms.read(type(config), shown, forms.option_rows(type(config), chosen, config))
    again = configs.set_keys(config, values, source="form")
    before, after = (
        {json.dumps(configs.flat(cell), sort_keys=True) for cell in expand(it).values()} for it in (config, again)
    )
    assert before == after and len(before) > 1


def test_other_axes_are_checked():
    config, shown, rows = filled("text_to_image/demo")
    for text, words in (
        ("{optimizer: [adamw]}", "in its own field too"),
        ("{seed: 3}", "list of values"),
        ("[1]", "must be a mapping"),
    ):
        with pytest.raises(ConfigError, match=words):
            forms.read(type(config), shown | {"sweep": text}, rows)


def test_all_problems_at_once(site):
    _, shown, rows = filled("text_to_image/demo")
    with pytest.raises(ConfigError) as error:
        launch.plan(
            site,
            "text_to_image",
            "text_to_image/demo",
            {**shown, "train.steps": "x", "seed": "", "optimizer.name": []},
            rows,
        )
    assert len(error.value.problems) == 3
    with pytest.raises(ConfigError) as error:
        wrong = {**shown, "train.steps": "0", "lora.dropout": "2", "optimizer.name": ["adamw"]}
        launch.plan(site, "text_to_image", "text_to_image/demo", wrong, [["adamw", "lr", "1", "", "", ""]])
    text = str(error.value)
    assert "train.steps: must be >= 1" in text and "lora.dropout: must be < 1" in text and "learning_rate" in text
    assert "form:" not in launch.error_notice(error.value)
    with pytest.raises(ConfigError) as error:  # of a form that began with no configuration of Equipoise's own
        launch.plan(site, "text_to_image", "", {**shown, "name": "two words", "seed": "-1"}, rows)
    assert [line.partition(": must")[0] for line in error.value.problems] == ["form: name", "form: seed"]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1e-4", [1e-4]),
        ("1, 2.5", [1, 2.5]),
        ("1e-4 .. 1e-2 : 3", [1e-4, 1e-3, 1e-2]),
        ("", []),
        ("1..16:5", [1, 2, 4, 8, 16]),
    ],
)
def test_numbers(text, numbers):
    assert forms.read_numbers(text) == numbers


@pytest.mark.parametrize("text", ["a", "true", "1;2", "0..1", "2..1", "1..2:1", "1..2:99", "[1]", "1e-4 .. b"])
def test_what_is_no_number(text):
    with pytest.raises(ValueError, match="got"):
        forms.read_numbers(text)


@pytest.mark.parametrize("text", ["0,001", "0,5", "1,05", "0,001, 0,01", "0,001 .. 0,1"])
def test_a_decimal_comma_is_answered_in_a_sentence(text):
    """And not taken for two numbers; where whole numbers are wanted, it can be nothing else than two."""
    with pytest.raises(ValueError, match=r"decimals are written with a point, 0\.001"):
        forms.read_numbers(text)
    assert forms.read_numbers("0,1", whole=True) == [0, 1] and forms.read_numbers("4,8") == [4, 8]
    config, shown, rows = filled("text_to_image/demo")
    cls = type(config)
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate: decimals are written with a point"):
        forms.read(cls, shown | {"optimizer.learning_rate": "0,001"}, rows)
    assert forms.read(cls, shown | {"seed": "0,1"}, rows)["sweep"]["seed"] == [0, 1]


def test_plugins_that_cannot_be_loaded_are_not_offered(distribution):
    distribution("shelf", {"equipoise.optimizers": {"broken": "shelf_of:Nothing"}}, shelf_of="raise ValueError('no')")
    field = next(
        item for item in forms.fields(registry.load("pipelines", "text_to_image").Config) if item.kind == "plugin"
    )
    assert field.key.key == "optimizer.name" and "adamw" in field.choices and "broken" not in field.choices


def test_the_command_does_the_same(site, capsys):
    """What the page says one can type makes the same configuration."""
    import shlex

    _, shown, rows = filled("text_to_image/demo")
    shown |= {
        "optimizer.name": ["adamw"],
        "optimizer.learning_rate": "2e-3",
        "samples.prompts": "a cat, sitting\na dog",
    }
    made = launch.plan(site, "text_to_image", "text_to_image/demo", shown, rows)
    words = shlex.split(made.command)
    assert words[:3] == ["equipoise", "train", "text_to_image/demo"] and len(made.runs) == 1
    assert main([*words[1:], "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert configs.flat(configs.load("text_to_image/demo"))["sweep"]  # which `train` leaves alone
    before, after = made.yaml.replace("sweep: {}\n", ""), printed
    assert [line for line in before.splitlines() if line not in after.splitlines()] == []
    assert "--workers" not in made.command, "one run has no use for it"
    shown["optimizer.learning_rate"] = "1e-3, 2e-3"
    for preset, last in (("text_to_image/demo", None), ("", "FILE.yaml")):
        words = launch.plan(site, "text_to_image", preset, shown, rows, 3).command
        assert words.startswith("equipoise sweep") and " --workers=3" in words and (last is None or last in words)


def test_a_plan_without_a_preset(site):
    shown = forms.show(configs.load("audio_visual/demo"))
    made = launch.plan(
        site, "audio_visual", "", {**shown, "objective.name": ["mimo"], "optimizer.learning_rate": "1e-3"}, []
    )
    assert made.config.pipeline == "audio_visual" and len(made.runs) == 1
    assert made.command.startswith("equipoise train FILE.yaml")


def test_the_estimate_measures(site, run):
    _, shown, rows = filled("text_to_image/demo")
    made = launch.plan(site, "text_to_image", "text_to_image/demo", shown, rows)
    assert "s per step, measured here" in launch_estimates.estimate(site, made, 2)
    assert "measured here, 2 of them at a time" in launch_estimates.memory(site, made, 2)
    more = {**shown, "train.steps": "10", "optimizer.learning_rate": "1", "samples.prompts": ""}
    assert "measured here" in launch_estimates.estimate(
        site, launch.plan(site, "text_to_image", "text_to_image/demo", more, rows), 2
    )
    other = launch.plan(site, "text_to_image", "text_to_image/demo", {**shown, "train.batch": "1"}, rows)
    assert "not known yet" in launch_estimates.estimate(site, other, 2)
    assert "An estimate from shapes" in launch_estimates.memory(site, other, 2)


def test_the_estimate_adds_up_runs_of_different_lengths(site, monkeypatch):
    _, shown, rows = filled("text_to_image/demo")
    lone = {**shown, "optimizer.name": ["adamw"], "optimizer.learning_rate": "1e-3", "train.steps": "10, 20, 30"}
    made = launch.plan(site, "text_to_image", "text_to_image/demo", lone, rows)
    assert "3 runs of 10 to 30 steps each" in launch_estimates.estimate(site, made, 1)
    monkeypatch.setattr(
        launch_estimates, "alike", lambda *_: [Status(id="a", step=10, seconds=10.0, started=1.0, ended=11.0)]
    )
    assert "about 0:01:00 in all" in launch_estimates.estimate(site, made, 1)
    assert "about 0:00:40 in all" in launch_estimates.estimate(site, made, 2), (
        "the first worker takes the third run too"
    )


def test_epochs_take_the_place_of_steps(site):
    _, shown, rows = filled("text_to_image/demo")
    lone = {**shown, "optimizer.name": ["adamw"], "optimizer.learning_rate": "1e-3", "train.epochs": "2"}
    with pytest.raises(ConfigError, match="steps and epochs are both given"):
        launch.plan(site, "text_to_image", "text_to_image/demo", lone, rows)
    made = launch.plan(site, "text_to_image", "text_to_image/demo", {**lone, "train.steps": ""}, rows)
    assert made.config.train.epochs == 2 and "train.steps=null" in made.command
    assert "  steps: null\n  epochs: 2.0\n" in made.yaml
    assert launch_estimates.estimate(site, made, 1) == "How many steps the epochs are is counted when it starts."


def test_loading_and_samples_are_no_part_of_a_step(site, run, monkeypatch):
    """A step of 0.1 s, whose run took a minute longer."""
    _, shown, rows = filled("text_to_image/demo")
    made = launch.plan(site, "text_to_image", "text_to_image/demo", {**shown, "train.steps": "1000"}, rows)
    with open(run.folder / "metrics.jsonl", "w") as file:
        for step, seconds in enumerate((40.0, 0.1, 0.1, "x", 0.1), 1):
            file.write(json.dumps({"step": step, "seconds": seconds}) + "\n")
    run.update(seconds=60.5)
    said = launch_estimates.estimate(site, made, 1)
    assert "0.1 s per step, and 60 s for the rest of each run, measured here" in said
    assert draw.span(len(made.runs) * (1000 * 0.1 + 60)) in said


def test_captions_that_would_stay_unread_are_told_before(site, tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (64, 64)).save(picture)
    folder = launch_pictures.save_pictures(site, "mine", [str(picture)], [["a.png", "a caption"]])
    config = configs.load("text_to_image/dreambooth", ["model=demo"])
    shown = forms.show(config) | {"data.folder": folder}
    made = launch.plan(site, "text_to_image", "text_to_image/dreambooth", shown, [])
    assert "the captions of" in "\n".join(launch.doubts(made))
    shown[launch.PROMPT] = ""  # as `Use these pictures` leaves it
    made = launch.plan(site, "text_to_image", "text_to_image/dreambooth", shown, [])
    assert "caption files" not in "\n".join(launch.doubts(made))


def test_a_picture_without_a_caption_gets_the_one_that_all_share_and_never_the_folders_name(site, tmp_path):
    files = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for file in files:
        Image.new("RGB", (64, 64)).save(file)
    rows = [["a.png", "a vase"], ["b.png", " "]]
    with pytest.raises(InputError, match=r"^b\.png has no caption: write what is seen there"):
        launch_pictures.save_pictures(site, "mine", files, rows)
    assert not (site.store.root / "uploads").exists()
    kept = Path(launch_pictures.save_pictures(site, "mine", files, rows, "a photo of sks object"))
    texts = [json.loads(line)["text"] for line in (kept / "metadata.jsonl").read_text().splitlines()]
    assert texts == ["a vase", "a photo of sks object"]


def test_captions_outlive_the_choice_of_another_picture():
    before = [["a.png", "one"], ["b.png", "two"]]
    assert launch_pictures.caption_rows(["/x/b.png", "/x/c.png"], before) == [["b.png", "two"], ["c.png", ""]]


@pytest.mark.parametrize("name", ["text_to_image/demo", "instruction_tuning/demo", "audio_visual/demo"])
def test_memory_is_reasoned_where_nothing_has_run(site, name):
    config, shown, rows = filled(name)
    made = launch.plan(site, config.pipeline, name, shown, rows)
    said = launch_estimates.memory(site, made, 2)
    for words in ("about", "weights and data", "gradients and optimizer", "activations of a batch", "Python and"):
        assert words in said


def test_a_file_of_another_pipeline(site, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(configs.dump(configs.load("audio_visual/demo")))
    assert launch.read_yaml(str(file), "audio_visual").name == "demo"
    with pytest.raises(InputError, match="audio_visual"):
        launch.read_yaml(str(file), "text_to_image")


@pytest.mark.parametrize("pipeline", ["text_to_image", "instruction_tuning", "audio_visual"])
def test_the_first_page_starts_what_its_preset_says(site, pipeline):
    """With the options of its plugins, which the table holds before it is ever opened."""
    cls = registry.load("pipelines", pipeline).Config
    (preset, *_), (shown, rows) = launch.presets()[cls], launch.beginning(cls)
    made = launch.plan(site, pipeline, preset, shown, rows)
    wanted = configs.set_keys(configs.load(preset), {"runs": str(site.store.root)})
    before, after = ({repr(cell) for cell in expand(it).values()} for it in (wanted, made.config))
    assert before == after and len(before) > 1


def test_edited_options_outlive_the_choice_of_another_plugin():
    cls = registry.load("pipelines", "audio_visual").Config
    rows = forms.option_rows(cls, {"optimizer.name": ["sgd", "adamw"]}, None)
    edited = [
        ["sgd", "momentum", 0.9, "", "", ""],
        ["gone", "momentum", "1", "", "", ""],
        ["adamw", "eps", float("nan")],
    ]
    found = {(row[0], row[1]): row[2] for row in forms.kept(rows, edited)}
    assert found["sgd", "momentum"] == "0.9" and found["adamw", "eps"] == "" and ("gone", "momentum") not in found


def test_an_option_that_is_a_mapping_is_asked_for_and_read(site):
    _, shown, _ = filled("audio_visual/demo")
    shown |= {"objective.name": ["mslr"], "optimizer.learning_rate": "1e-3", "train.baselines": ""}
    (row,) = [
        r for r in forms.option_rows(configs.config_class("audio_visual/demo"), {"objective.name": ["mslr"]}, None)
    ]
    assert row[:5] == ["mslr", "factors", "", "required", "{name: a number, …} each >= 0"] and "{audio: 0.3" in row[5]
    for text in ("{audio: 0.1}", '{"audio": 1e-1}'):
        made = launch.plan(site, "audio_visual", "audio_visual/demo", shown, [[*row[:2], text, *row[3:]]])
        assert made.config.objective.options == {"factors": {"audio": 0.1}}
        given = forms.option_rows(type(made.config), {"objective.name": ["mslr"]}, made.config)
        assert given[0][2] == '{"audio": 0.1}'
    for text, words in (("0.1", "got 0.1."), ("{audio: -1}", "got {'audio': -1}."), ("audio: 1", "got 'audio: 1'.")):
        with pytest.raises(ConfigError) as error:
            launch.plan(site, "audio_visual", "audio_visual/demo", shown, [[*row[:2], text, *row[3:]]])
        assert error.value.problems == [
            f"form: objective.options.factors: must be {{name: a number, …}}, each >= 0, {words}"
        ]
    with pytest.raises(ConfigError, match=r"objective\.options\.factors: missing; must be \{name: a number, …\}"):
        launch.plan(site, "audio_visual", "audio_visual/demo", shown, [])


def test_a_rate_left_empty_stays_empty_and_says_what_it_means(site):
    cls = configs.config_class("text_to_image/dreambooth")
    _, shown, rows = filled("text_to_image/dreambooth")
    assert shown["optimizer.learning_rate"] == shown["optimizer.outside_learning_rate"] == ""
    (item,) = [item for item in forms.fields(cls) if item.key.key == "optimizer.learning_rate"]
    assert item.placeholder == "empty: its own, or 0.0001"

    def means(*names: str) -> str:
        return forms.empty_means(cls, {"optimizer.name": names})["optimizer.learning_rate"]

    assert (means("adamw"), means("bounded_adamw"), means()) == ("empty: 0.0001", "empty: 1", "")
    assert means("adamw", "bounded_adamw") == "each its own: 0.0001, 1"
    assert means("adamw", "scaled_adamw") == "empty: 0.0001"

    def planned(preset: str, *names: str, **more: str) -> launch.Plan:
        given = {**shown, "model.path": "demo", "data.folder": "demo", "optimizer.name": list(names), **more}
        return launch.plan(site, "text_to_image", preset, given, rows)

    made = planned("text_to_image/dreambooth", "bounded_adamw")
    assert made.runs[0].optimizer.learning_rate == 1.0 and "  learning_rate: 1.0\n" in made.yaml
    assert "learning_rate" not in made.command
    several = planned("text_to_image/dreambooth", "adamw", "bounded_adamw")
    assert [run.optimizer.learning_rate for run in several.runs] == [1e-4, 1.0]
    assert "  learning_rate: null\n" in several.yaml
    emptied = planned("text_to_image/demo", "bounded_adamw")  # whose file gives a rate
    assert "optimizer.learning_rate=null" in emptied.command and emptied.runs[0].optimizer.learning_rate == 1.0
    given = planned("text_to_image/dreambooth", "bounded_adamw", **{"optimizer.learning_rate": "0.01"})
    assert "optimizer.learning_rate=0.01" in given.command and given.runs[0].optimizer.learning_rate == 0.01
    (doubt,) = [
        line
        for line in launch.doubts(planned("", "bounded_adamw", **{"optimizer.learning_rate": "1e-4"}))
        if "own is 1" in line
    ]
    assert doubt.startswith("optimizer.learning_rate: 0.0001 is small")
