"""Configurations: what is read, what is refused, and in which words."""

from pathlib import Path

import pytest
import yaml

from equipoise import registry
from equipoise.errors import ConfigError, InputError, UnknownNameError
from equipoise.pipelines import config as configs
from equipoise.pipelines.config import yamlio
from equipoise.pipelines.config.records import trusting_options
from equipoise.pipelines.config.sections import TrainConfig
from equipoise.pipelines.runs.store import Store

SOURCE = (Path(__file__).parents[1] / "counting.py").read_text()
BASE = "pipeline: tuned\nname: vase\ndata: pictures\n"


@pytest.fixture
def file(distribution, tmp_path, monkeypatch):
    """Writes a configuration for the counting pipeline and returns its path."""
    distribution("counting", {"equipoise.pipelines": {"tuned": "counting:Tuned"}}, counting=SOURCE)
    monkeypatch.delenv("EQUIPOISE_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)

    def write(text: str = "", base: str = BASE) -> str:
        Path("vase.yaml").write_text(base + text)
        return "vase.yaml"

    return write


def problems(*args) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        configs.load(*args)
    return caught.value.problems


def test_sections_short_names_and_overrides_mean_the_same(file):
    plain = configs.load(file("train:\n  steps: 7\noptimizer:\n  name: sgd\n  learning_rate: 0.1\n"))
    short = configs.load(file("steps: 7\noptimizer: sgd\nlearning_rate: 1e-1\n"))
    over = configs.load(file(), ["steps=7", "optimizer=sgd", "optimizer.learning_rate=1e-1"])
    mapped = configs.load(file("steps: 9\n"), ["train={steps: 7}", "optimizer={name: sgd, learning_rate: .1}"])
    assert plain == short == over == mapped
    assert (plain.train.steps, plain.optimizer.name, plain.optimizer.learning_rate) == (7, "sgd", 0.1)
    assert configs.load(file()) != plain


def test_the_last_override_wins_and_an_option_joins_those_of_the_file(file):
    text = "optimizer:\n  options: {weight_decay: 0.5, eps: 1e-9}\ntrain:\n  # steps: 3\n"
    config = configs.load(file(text), ["steps=3", "optimizer.options.eps=1e-7", "steps=4"])
    assert config.train.steps == 4
    assert config.optimizer.options == {"weight_decay": 0.5, "eps": 1e-7}
    assert configs.load(file(text), ["optimizer.options={}"]).optimizer.options == {}


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("a vase: red # not blue", "a vase: red # not blue"),
        ("[V] vase", "[V] vase"),
        ("1e-4", "0.0001"),
        ("007", "007"),
        ("no", "no"),
        ("2024-01-01", "2024-01-01"),
        ("'12'", "12"),
        ("- x", "- x"),
        ("null", None),
        ("", None),
        ("a=b", "a=b"),
    ],
)
def test_words_from_the_command_line_stay_text(file, word, value):
    assert configs.load(file(), [f"note={word}"]).note == value


def test_all_errors_come_at_once_with_source_and_key(file):
    text = "mame: 3\nsteps: 0\noptimizer: adamwx\ncheckpoint: 7\nend: god\ntrain: {pause: [1]}\n"
    found = problems(file(text), ["optimizer.learning_rate=-1", "seed=x", "learning_rat=1", "prompts=a", "word"])
    with pytest.raises(UnknownNameError, match="Did you mean 'adamw'") as unknown:
        registry.find("optimizers", "adamwx")
    assert sorted(found) == sorted(
        [
            "command line: word: is not of the form key=value, such as train.steps=100.",
            "command line: seed: must be a valid integer, got 'x'.",
            "vase.yaml: train.steps: must be > 0, got 0.",
            "vase.yaml: train.pause: must be a valid number, got [1].",
            f"vase.yaml: optimizer.name: {unknown.value}",
            "command line: optimizer.learning_rate: must be > 0, got -1.",
            "vase.yaml: checkpoint: is a section, got 7. Its keys are checkpoint.every.",
            "command line: prompts: must be a valid list, got 'a'.",
            "vase.yaml: end: must be 'good', 'error', 'nan', 'bad input' or 'full disk', got 'god'.",
            "vase.yaml: mame: unknown key. Did you mean 'name'?",
            "command line: learning_rat: unknown key. Did you mean 'learning_rate'?",
        ]
    )


def test_what_is_missing_is_said_with_its_meaning_and_short_name(file):
    assert problems(file("seed: 1\n", base="pipeline: tuned\n")) == [
        "vase.yaml: name: is required: A word for this run; part of its id. Give name=…",
        "vase.yaml: data.folder: is required: A folder that must exist. Give data=…",
    ]


def test_a_misplaced_key_is_shown_its_place(file):
    assert problems(file("train: {learning_rate: 1}\n")) == [
        "vase.yaml: train.learning_rate: unknown key. Did you mean 'optimizer.learning_rate'?"
    ]


def test_options_are_checked_against_the_plugin(file):
    found = problems(file("optimizer:\n  options: {weight_decai: 1, lr: 1}\n"), ["optimizer.options.eps=x"])
    assert "vase.yaml: optimizer.options.lr: is set by the key 'optimizer.learning_rate'." in found
    assert any(
        line.startswith("vase.yaml: optimizer.options.weight_decai: ") and "'weight_decay'" in line for line in found
    )
    assert any(line.startswith("command line: optimizer.options.eps: must be a number, got 'x'") for line in found)
    assert len(found) == 3


@pytest.mark.parametrize("name", ["a b", "../x", "-x", "", "é", "x/y"])
def test_names_that_are_no_words(file, name):
    assert any("name: must be one word" in line for line in problems(file(), [f"name='{name}'"]))


def test_numbers_that_are_not_whole(file):
    assert "must be a whole number, got 1.5." in problems(file(), ["steps=1.5"])[0]
    assert "must be a whole number of fewer digits, got 1e+99." in problems(file(), ["seed=1e99"])[0]


@pytest.mark.parametrize(("word", "said"), [("nan", "finite number"), ("inf", "finite number"), ("1e400", "finite")])
def test_rates_are_finite(file, word, said):
    assert said in problems(file(), [f"learning_rate={word}"])[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"- a\n", "must be lines of `key: value`, got ['a']"),
        (b"a: 1\nb: [1\n", "line 3, column 1: "),
        (b"a:\n  b: 1\n  b: 2\n", "line 3, column 3: the key 'b' is there twice"),
        (b"a: &x 1\nb: *x\n", "line 2, column 4: anchors and aliases are not supported"),
        (b"a: !!python/object/apply:os.system [ls]\n", "line 1, column 4: could not determine a constructor"),
        (b"\x80\x02ccollections\n", "is not a text file in UTF-8"),
        (b"a: \x00\n", "is not a text file"),
        (b"[" * 10_000, "is nested too deeply"),
        (b"a: " + b"9" * 5000, "integer string"),
        (b"a" * 2_000_000, "is larger than 1000 kB"),
        (b"name: x\n", "pipeline: is required"),
        (b"pipeline: [1]\n", "pipeline: must be a pipeline's name, got [1]"),
        (b"pipeline: tunde\n", "no pipeline 'tunde'. Did you mean 'tuned'?"),
    ],
)
def test_files_that_are_no_configurations(file, content, said):
    Path(file()).write_bytes(content)
    (line,) = problems("vase.yaml")
    assert line.startswith("vase.yaml: ")
    assert said in line


def test_a_key_given_under_both_names(file):
    assert problems(file("steps: 3\ntrain: {steps: 4}\n")) == [
        "vase.yaml: train.steps: is given twice, once under its short name; keep one of them."
    ]


def test_sources_that_are_not_there(file, tmp_path):
    file()
    for source, said in [
        ("nothing.yaml", "is neither a file nor the name of a shipped configuration"),
        (tmp_path, "is a folder"),
        ("../../etc/passwd", "is neither a file nor"),
        ("x\0y", "is neither a file nor"),
    ]:
        with pytest.raises(InputError, match=said):
            configs.load(source)


def test_every_shipped_configuration_is_found_by_name_and_suggested():
    folder = Path(__file__).parents[3] / "configs"
    assert set(configs.shipped()) == {str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml")}
    for name in configs.shipped():
        assert configs.config_class(name)
        with pytest.raises(InputError, match=f"Did you mean '{name}'"):
            configs.load(f"configs/{name[:-1]}.yaml")


def test_a_dump_is_complete_and_replays(file):
    config = configs.load(
        file(), ["note=1e-4 'on' é: #", "prompts=['no', '1e-4', '007', \"a\\nb\"]", "learning_rate=1e-7"]
    )
    text = configs.dump(config)
    Path("again.yaml").write_text(text)
    assert configs.load("again.yaml") == config
    assert yaml.safe_load(text)["prompts"] == ["no", "1e-4", "007", "a\nb"]  # other readers of YAML agree on text
    assert set(configs.flat(config)) == {key.key for key in configs.describe(type(config))}


def test_set_keys_makes_a_checked_copy(file):
    config = configs.load(file())
    other = configs.set_keys(config, {"learning_rate": 0.5, "optimizer.name": "sgd", "train.steps": 3})
    assert (other.optimizer.learning_rate, other.optimizer.name, other.train.steps) == (0.5, "sgd", 3)
    assert config.optimizer.name == "adamw"
    with pytest.raises(ConfigError) as caught:
        configs.set_keys(config, {"learning_rate": -1, "stebs": 1}, "axes")
    assert [line[:30] for line in caught.value.problems] == [
        "axes: optimizer.learning_rate:",
        "axes: stebs: unknown key. Did ",
    ]


def test_describe_shows_types_bounds_and_choices(file):
    keys = {key.key: key for key in configs.describe(type(configs.load(file())))}
    assert list(keys)[:4] == ["pipeline", "name", "seed", "runs"]
    assert (keys["data.folder"].required, keys["data.folder"].short) == (True, "data")
    rate = keys["optimizer.learning_rate"]
    assert (rate.type, rate.bounds, rate.default, rate.short) == ("float or none", "> 0", 1e-3, "learning_rate")
    assert keys["train.pause"].bounds == ">= 0, < 60"
    assert keys["end"].choices == ("good", "error", "nan", "bad input", "full disk")


def test_the_runs_folder_follows_the_environment(file, monkeypatch):
    assert configs.load(file()).runs == "runs"
    monkeypatch.setenv("EQUIPOISE_RUNS", "elsewhere")
    assert configs.load(file()).runs == "elsewhere"
    assert configs.load(file(), ["runs=here"]).runs == "here"


def test_yaml_is_read_as_people_mean_it():
    text = "{a: 1e-4, b: no, c: 2024-01-01, d: 1_000, e: 1:30, f: true, g: ~, h: -.5, i: 0x1f, j: 010, k: +3}"
    expected = dict(a=1e-4, b="no", c="2024-01-01", d=1000, e="1:30", f=True, g=None, h=-0.5, i="0x1f", j="010", k=3)
    assert yamlio.parse(text) == expected
    assert yamlio.parse(yamlio.render(expected)) == expected


def test_options_may_be_trusted(tmp_path):
    """For showing: what is wrong is said when it is read without trust."""
    file = tmp_path / "a.yaml"
    file.write_text(configs.dump(configs.load("text_to_image/demo")).replace("options: {}", "options: {zebra: 1}", 1))
    with trusting_options():
        assert configs.load(file).optimizer.options == {"zebra": 1}
    with pytest.raises(ConfigError, match="zebra"):
        configs.load(file)


@pytest.mark.parametrize("key", ["runs", "data.folder", "model.path", "prior.folder", "lora.start", "judges.clip"])
def test_a_home_folder_is_meant_by_a_tilde_and_nothing_by_nothing(key, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    loaded = configs.load("text_to_image/demo", [f"{key}=~/mine"])
    assert configs.flat(loaded)[key] == f"{tmp_path}/mine"
    assert configs.load("text_to_image/demo", [f"{key}='~'"]) != loaded
    assert problems("text_to_image/demo", [f"{key}=''"]) == [
        f"command line: {key}: names no file or folder: it is empty; `.` is the current folder."
    ]
    assert "there is no such user" in problems("text_to_image/demo", [f"{key}=~nobody-of-that-name/x"])[0]


def test_runs_go_to_the_home_folder_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EQUIPOISE_RUNS", "~/a")
    assert configs.load("text_to_image/demo").runs == f"{tmp_path}/a"
    assert Store().root == tmp_path / "a" and Store("~/b").root == tmp_path / "b"


@pytest.mark.parametrize("name", ["text_to_image", "instruction_tuning", "audio_visual"])
def test_every_pipeline_has_the_keys_of_a_training_and_they_follow_its_own(name):
    cls = registry.load("pipelines", name).Config
    mine, shared = ({key.key: key for key in configs.describe(it)} for it in (cls, TrainConfig))
    for key, common in shared.items():
        assert (mine[key].short, mine[key].type) == (common.short, common.type)
        if (name, key) != ("audio_visual", "train.batch"):  # batch normalisation needs two
            assert mine[key].limits == common.limits
    sections = list(cls.model_fields)
    last = [section for section in sections if section in TrainConfig.model_fields and section not in sections[:5]]
    assert last == ["optimizer", "objective", "coordinator", "schedule", "train", "checkpoint", "trackers"]
    assert [section for section in sections if section != "samples"][-len(last) :] == last


@pytest.mark.parametrize(
    ("config", "word", "key"),
    [
        ("text_to_image/demo", "data=", "data.folder"),
        ("text_to_image/demo", "model= ", "model.path"),
        ("text_to_image/demo", "optimizer=", "optimizer.name"),
        ("instruction_tuning/demo", "data=", "data.file"),
        ("audio_visual/demo", "data=", "data.manifest"),
        ("audio_visual/demo", "objective=", "objective.name"),
    ],
)
def test_a_short_name_without_a_value_is_refused_and_not_passed_over(config, word, key):
    """As `data=$PHOTOS` is where the variable is not set."""
    (problem,) = problems(config, [word])
    assert problem.startswith(f"command line: {key}: ")
