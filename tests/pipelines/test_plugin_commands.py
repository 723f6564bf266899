"""Commands that other distributions add to `equipoise`."""

import subprocess
import sys

import pytest

from equipoise import __version__
from equipoise.pipelines.cli import main

COMMANDS = "equipoise.commands"
GREET = '''"""`equipoise greet`: says hello to somebody."""
import torch


def add_arguments(parser):
    parser.add_argument("name")
    parser.add_argument("--loud", action="store_true")


def run(args):
    print(f"{args.command}: hello {args.name}{'!' if args.loud else ''}")
    return 3
'''


def help_lines(capsys) -> list[str]:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_a_plugins_command_is_in_the_help_with_its_distribution_and_works(distribution, capsys):
    distribution("greeting", {COMMANDS: {"greet": "greet_module"}}, version="2.1", greet_module=GREET)
    assert "greet      says hello to somebody (greeting 2.1)" in help_lines(capsys)
    assert main(["greet", "you", "--loud"]) == 3
    assert capsys.readouterr().out == "greet: hello you!\n"
    assert main(["list", "commands"]) == 0
    assert ["greet", "command", "greeting", "2.1"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert main(["show", "greet"]) == 0
    shown = capsys.readouterr().out
    assert "command 'greet' of greeting 2.1 (greet_module)" in shown and "`equipoise greet --help` shows" in shown
    with pytest.raises(SystemExit) as end:
        main(["greet", "--louder"])
    assert end.value.code == 2 and "usage: equipoise greet" in capsys.readouterr().err


def test_the_help_imports_no_plugin_and_no_torch(distribution):
    distribution("greeting", {COMMANDS: {"greet": "greet_module"}}, greet_module=GREET)
    code = """
import sys
from equipoise.pipelines.cli import main
try:
    main(["--help"])
except SystemExit:
    print({"torch", "greet_module"} & set(sys.modules))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "says hello to somebody (greeting 1.0)" in shown and shown.endswith("set()\n")


@pytest.mark.parametrize(
    ("target", "source", "problem"),
    [
        ("no_such_module", None, "ModuleNotFoundError: No module named 'no_such_module'"),
        ("odd", "1 / 0", "ZeroDivisionError"),
        ("odd", "def run(args): ...", "it needs `add_arguments(parser)` and `run(args)`; add_arguments is not there"),
        ("odd", "def f(:", "SyntaxError"),
        ("odd:Command", "class Command: ...", "this is no module's name"),
    ],
)
def test_a_broken_command_is_a_sentence_and_sinks_nothing(target, source, problem, distribution, capsys):
    distribution("bad", {COMMANDS: {"odd": target}}, **({"odd": source} if source else {}))
    assert {line.split()[0] for line in help_lines(capsys) if line} >= {"odd", "train", "list"}
    assert main(["odd"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"command 'odd' of bad 1.0 cannot be used: {target}: ") and problem in shown
    assert shown.count("\n") == 1
    assert main(["list", "objectives"]) == 0


def test_a_fault_in_a_plugins_command_is_the_plugins(distribution, capsys):
    distribution("greeting", {COMMANDS: {"greet": "greet_module"}}, greet_module=GREET.replace("return 3", "1 / 0"))
    assert main(["greet", "you"]) == 1
    assert capsys.readouterr().err.startswith("command 'greet' of greeting 1.0 has a fault: ZeroDivisionError")


def test_a_name_that_is_taken_is_refused_naming_both(distribution, capsys):
    distribution("rival", {COMMANDS: {"train": "greet_module"}}, greet_module=GREET)
    assert main(["train", "text_to_image/demo"]) == 2
    shown = capsys.readouterr().err
    assert shown == (
        f"command 'train' is claimed by equipoise {__version__} (equipoise.pipelines.commands.train) and rival 1.0 "
        "(greet_module). Uninstall all but one.\n"
    )
    assert f"train      {shown.strip()}" in help_lines(capsys)
    assert main(["list", "objectives"]) == 0
