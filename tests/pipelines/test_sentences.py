"""Help texts of commands and keys, which are also the form's tooltips, are whole sentences."""

import argparse
from importlib import import_module

import pytest

from equipoise import registry
from equipoise.pipelines import cli
from equipoise.pipelines.config.keys import describe

SHARED = (
    "optimizer",
    "objective",
    "coordinator",
    "schedule",
    "train",
    "samples",
    "checkpoint",
)  # checked where they lie


def not_sentences(texts: list[str]) -> list[str]:
    return [text for text in texts if not (text[:1].isupper() or text[:1] in "`{") or text[-1:] != "."]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_command_and_its_options_explain_themselves_in_sentences(command):
    module, summary = cli.COMMANDS[command]
    parser = argparse.ArgumentParser(add_help=False)
    parser.set_defaults(command=command)
    import_module(f"equipoise.pipelines.commands.{module}").add_arguments(parser)
    given = [action.help for action in parser._actions if action.help != argparse.SUPPRESS]
    assert not_sentences([summary, *map(str, given)]) == []


@pytest.mark.parametrize("pipeline", ["audio_visual", "instruction_tuning", "text_to_image"])
def test_a_key_explains_itself_in_a_sentence(pipeline):
    keys = [
        key for key in describe(registry.load("pipelines", pipeline).Config) if key.key.partition(".")[0] not in SHARED
    ]
    assert len(keys) > 10
    assert not_sentences([key.help for key in keys]) == []
