"""Help texts of commands and keys, which are also the form's tooltips, are whole sentences."""

import argparse

import pytest

from equipoise import registry
from equipoise.pipelines.config.keys import describe


def not_sentences(texts: list[str]) -> list[str]:
    return [text for text in texts if not (text[:1].isupper() or text[:1] in "`{") or text[-1:] != "."]


@pytest.mark.parametrize("command", [entry.name for entry in registry.entries("commands")])
def test_a_commands_options_explain_themselves_in_sentences(command):
    parser = argparse.ArgumentParser(add_help=False)
    parser.set_defaults(command=command)
    registry.load("commands", command).add_arguments(parser)
    given = [action.help for action in parser._actions if action.help != argparse.SUPPRESS]
    assert not_sentences([str(text) for text in given]) == []


@pytest.mark.parametrize("pipeline", ["audio_visual", "instruction_tuning", "text_to_image"])
def test_a_key_explains_itself_in_a_sentence(pipeline):
    keys = describe(registry.load("pipelines", pipeline).Config)
    assert len(keys) > 10
    assert not_sentences([key.help for key in keys]) == []
