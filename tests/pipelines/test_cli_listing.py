"""The command line itself, and `equipoise list` and `equipoise show`."""

import json
import re
import subprocess
import sys

import pytest

from equipoise import __version__, registry
from equipoise.pipelines import cli
from equipoise.pipelines.config.builtin import shipped

OPTIMIZERS = "equipoise.optimizers"
BUILT_IN = {
    "optimizers": ["ada_sam", "alpha_adam", "bounded_adamw", "sam", "scaled_adamw", "scaled_gd"],
    "coordinators": ["commit", "commit_clr", "constant", "feature_cd", "language_cd", "language_lr_up", "vision_lr_up"],
    "objectives": """
        agm equal_weight gradient_blending info_reg joint lfm mgda mimo mla mmpareto mses mslr ogm_ge opm pmr
        recon_boost relearning unimodal
    """.split(),
    "pipelines": ["audio_visual", "instruction_tuning", "text_to_image"],
    "families": [
        "FluxPipeline",
        "StableDiffusion3Pipeline",
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "ZImagePipeline",
    ],
    "commands": """
        compare demo evaluate export list logs predict prepare reproduce resume run runs show stop sweep
        train ui wrap
    """.split(),
}


def equipoise(*words):
    """(exit code, stdout, stderr) of the command in a process of its own."""
    ended = subprocess.run([sys.executable, "-m", "equipoise.pipelines.cli", *words], capture_output=True, text=True)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["list"],
        ["list", "--json"],
        ["list", "--help"],
        ["list", "configs"],
        ["reproduce", "--help"],
    ],
)
def test_quick_commands_import_nothing_heavy(words):
    code = f"""
import sys
from equipoise.pipelines.cli import main
try:
    main({words!r})
except SystemExit as end:
    assert not end.code
print(sorted({{"torch", "numpy", "pydantic", "yaml", "diffusers", "transformers"}} & set(sys.modules)))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("[]\n")


def test_a_misspelt_key_is_refused_without_importing_torch():
    """Which takes seconds: only a plugin's options need it."""
    for words in (["stesp=1"], ["stesp=1", "optimizer.options={}"]):
        code = f"""
import sys
from equipoise.pipelines.cli import main
print(main(["train", "text_to_image/demo", *{words!r}]), "torch" in sys.modules)
"""
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert ended.stdout == "2 False\n" and "stesp: unknown key. Did you mean 'steps'" in ended.stderr


def test_importing_the_package_imports_nothing_heavy():
    code = "import equipoise, sys; print({'torch', 'numpy', 'inspect', 'importlib.metadata'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_the_command_line_ends_without_a_search_for_garbage():
    """Which takes more than a second where torch and diffusers are imported."""
    cycle = """
class Cycle:
    def __del__(self):
        print("searched")
import gc
gc.disable()
one = Cycle()
one.itself = one
del one
"""
    for code, printed in ((cycle, "searched\n"), (f"import equipoise.pipelines.cli\n{cycle}", "")):
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == printed


@pytest.mark.parametrize("module", [["equipoise.pipelines.cli", "list", "--json"], ["equipoise.hosts.swift"]])
def test_modules_of_the_current_folder_are_not_ours(module, tmp_path, monkeypatch):
    for name in ("argparse", "tempfile", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the current folder was imported')")
    monkeypatch.chdir(tmp_path)
    ended = subprocess.run([sys.executable, "-m", *module], capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout, ended.stderr


def test_help_names_every_command_and_its_module_exists(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    for entry in registry.entries("commands"):
        words = registry.load("commands", entry.name).__doc__
        (text,) = re.findall(rf"^`equipoise {entry.name}`: (.+)\.$", words, re.M)
        assert f"  {entry.name} " in shown and f"  {text}\n" in shown


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"equipoise {__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: equipoise COMMAND"),
        (["lst"], "no command 'lst'. Did you mean 'list'?"),
        (["list", "--chekc"], "unrecognized arguments: --chekc\n"),
        (["train", "x", "--learning_rate", "1e-4"], "is given without dashes: learning_rate=1e-4\n"),
        (["sweep", "x", "--samples.steps=9"], "is given without dashes: samples.steps=9\n"),
    ],
)
def test_wrong_usage_exits_with_2(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list", "planes"], f"no kind 'planes'. The kinds are {', '.join(registry.KINDS)}, configs.\n"),
        (["show", "adamwx"], "no plugin 'adamwx'. Did you mean 'adamw' or 'adamax'? `equipoise list` shows all."),
        (["show", "optimizer", "joint"], "no optimizer 'joint'. "),
        (["show", "a", "b", "c"], "show takes NAME or KIND NAME, got 'a b c'."),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(words, message, capsys):
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(message) and shown.err.count("\n") == 1 and shown.out == ""


@pytest.mark.parametrize("kind", registry.KINDS)
def test_list_one_kind(kind, capsys):
    assert cli.main(["list", kind]) == 0
    header, *rows = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert header.split() == ["NAME", "KIND", "DISTRIBUTION", "VERSION"]
    ours = [row.split() for row in rows if row.split()[2] == "equipoise"]
    assert ours == [[name, registry.KINDS[kind].one, "equipoise", __version__] for name in BUILT_IN[kind]]
    assert len(rows) == len(ours) or kind == "optimizers"


def test_list_configs(capsys):
    assert cli.main(["list", "configs"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name}  " in shown for name in shipped()) and "Teach the embedded base" in shown
    assert cli.main(["list", "configs", "--json"]) == 0
    assert [record["name"] for record in json.loads(capsys.readouterr().out)] == list(shipped())
    assert cli.main(["list", "configs", "--check"]) == 2


def test_list_as_json_has_every_entry(capsys):
    assert cli.main(["list", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["name"] for record in records] == [entry.name for entry in registry.entries()]
    assert all(record["error"] == "" for record in records)


def test_list_and_check_show_what_is_broken(distribution, capsys):
    distribution("absent", {OPTIMIZERS: {"absent": "no_such_module:X"}})
    distribution("late", {OPTIMIZERS: {"late": "late_module:X"}}, late_module="1 / 0\nX = 1")
    for number in (1, 2):
        distribution(f"plugin-{number}", {OPTIMIZERS: {"same": "module:Same"}})
    for words, code in ((["list", "optimizers"], 0), (["list", "optimizers", "--check"], 1)):
        assert cli.main(words) == code
        shown = capsys.readouterr().out
        assert "optimizer 'absent' of absent 1.0 cannot be used: no_such_module:X: ModuleNotFoundError" in shown
        assert "optimizer 'late' of late 1.0 cannot be used: late_module:X: ZeroDivisionError: division by" in shown
        assert shown.count("claimed by plugin-1 1.0 (module:Same) and plugin-2 1.0") == 2
        assert shown.count("    error: ") == 4
    for name in ("absent", "late", "same"):
        assert cli.main(["show", name]) == 2
        assert capsys.readouterr().err.startswith(f"optimizer '{name}' ")
    assert cli.main(["show", "adamw"]) == 0


def test_show_has_options_and_paper(capsys):
    assert cli.main(["show", "scaled_adamw"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"optimizer 'scaled_adamw' of equipoise {__version__} (equipoise.optimizers.scaled:")
    assert "OPTION" in shown and "damping_mode  " in shown and "'absolute', 'relative'" in shown
    assert "Riemannian Preconditioned LoRA" in shown
    assert "weight_decay" in shown  # an option of its base


def test_show_says_all_that_a_class_says_of_itself(capsys):
    """docs/objectives.md sends readers there for where authors' code and paper differ."""
    assert cli.main(["show", "agm"]) == 0
    shown = capsys.readouterr().out
    assert "\n\nThe authors' code differs from the paper, and so from this, in three ways: it scales the" in shown
    assert shown.index("in three ways") < shown.index("OPTION") and max(map(len, shown.splitlines())) <= 120
    assert cli.main(["show", "mla", "--json"]) == 0
    formula, authors = json.loads(capsys.readouterr().out)["description"]
    assert formula.startswith("A step's loss is that of one") and authors.startswith("The authors' code trains every")
    assert cli.main(["show", "command", "train"]) == 0 and "One run, in" not in capsys.readouterr().out


def test_keys_of_a_pipeline_are_shown_as_an_optimizers_options_are(capsys):
    """Their types in the same words, choices among them, and their short names."""
    assert cli.main(["show", "text_to_image"]) == 0
    header, *lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert header.split() == ["OPTION", "SHORT", "TYPE", "DEFAULT", "BOUNDS"]
    shown = {line.split()[0]: re.split(" {2,}", line)[1:] for line in lines if line[0] != " "}
    assert shown["optimizer.learning_rate"] == ["learning_rate", "a number", "0.0001", "> 0"]
    assert shown["data.crop"] == ["one of 'center', 'random'", "center"]
    assert shown["lora.alpha"][-3:] == ["a number or none", "none", "> 0"]
    assert shown["lora.targets"][-2:] == ["[text, …] or none", "none"]
    assert shown["schedule.name"] == ["schedule", "one of those below", "constant"]
    assert any(line.startswith("    One of 'constant', 'constant_with_warmup'") for line in lines)


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_built_in_says_what_it_is_and_what_its_options_do(kind, capsys):
    for name in BUILT_IN[kind]:
        assert cli.main(["show", kind, name, "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["summary"] and record["target"] and record["error"] == ""
        assert all(option["type"] and option["help"] for option in record["options"]), name
        assert record["references"] or kind in ("pipelines", "families", "commands")


def test_show_default_values_read_as_a_configuration_has_them(capsys):
    assert cli.main(["show", "adamw", "--json"]) == 0
    options = {option["name"]: option for option in json.loads(capsys.readouterr().out)["options"]}
    assert options["betas"]["default"] == "[0.9, 0.999]"
    assert options["amsgrad"]["default"] == "false"
    assert options["fused"]["default"] == "none"


def test_the_module_runs_and_returns_its_code():
    assert equipoise("show", "nothing")[0] == 2
    code, shown, errors = equipoise("list", "coordinators")
    assert (code, errors) == (0, "") and "constant" in shown


def test_a_reader_that_goes_away_is_no_traceback():
    with subprocess.Popen(
        [sys.executable, "-m", "equipoise.pipelines.cli", "list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert (process.stderr.read(), process.wait(30)) == ("", 141)


def test_interruption_is_130(monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("equipoise.pipelines.commands.listing.run", interrupted)
    assert cli.main(["list"]) == 130
