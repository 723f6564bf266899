"""The self-check before a run: passes what is right in every architecture, and refuses what would train wrongly."""

import json
import shutil

import pytest
import torch
from tokenizers import processors

from equipoise.errors import InputError
from equipoise.pipelines.cli import main
from equipoise.pipelines.instruction_tuning.config import InstructionTuningModel
from equipoise.pipelines.instruction_tuning.data import Conversation, Turn, read_examples
from equipoise.pipelines.instruction_tuning.model import load_model, load_processor
from equipoise.pipelines.instruction_tuning.talk import Talk
from equipoise.pipelines.instruction_tuning.verify import media_ids, token_problems, typical, verify

NAME = "instruction_tuning/demo"


@pytest.fixture
def loaded(checkpoints, pictures, sounds):
    def get(kind: str):
        section = InstructionTuningModel(path=str(checkpoints(kind)))
        examples, problems = read_examples(sounds if kind == "qwen2_audio" else pictures, None)
        assert problems == []
        return Talk(load_processor(section), kind), load_model(section, "no"), examples

    return get


def test_every_architecture_passes_and_nothing_is_changed(kinds, loaded):
    for kind in [*kinds, "internvl"]:
        talk, model, examples = loaded(kind)
        before = torch.get_rng_state()
        found = verify(talk, model, examples, batch=4)
        assert torch.equal(torch.get_rng_state(), before)
        end = "</s>" if talk.processor.chat_template is None else r"<|im_end|>\n"
        answer = examples[0].turns[0].answer
        assert found.startswith("labels of 2 rows: ") and f"{answer}{end}'; 2 of 2 media change" in found
        assert found.endswith("each row's loss in a batch is its own.")
        assert media_ids(model.config), kind


def test_the_rows_are_the_longest_the_shortest_and_those_with_most_media_and_none():
    turn = Turn("What?", "a")
    some = [Conversation("text", (), (Turn("What?", "a" * n),)) for n in (5, 9, 1, 3)]
    many = Conversation("image", ("a.png", "b.png"), (turn, turn))
    assert typical([*some, many]) == [some[1], some[2], many, some[0]]
    assert typical(some[:1]) == some[:1]


def test_labels_beside_the_answers_are_refused(loaded):
    """Of a tokenizer that puts an end of its own behind all."""
    talk, model, examples = loaded("llava")
    words = talk.tokenizer
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", words.eos_token_id)]
    )
    with pytest.raises(InputError, match=r"talk.jsonl:\d+: the loss would be on .*</s>' and not on 'red<|im_end|>"):
        verify(talk, model, examples, batch=2)


def test_two_bos_are_refused(loaded):
    talk, model, examples = loaded("llava")
    talk.tokenizer.add_special_tokens({"bos_token": "<bos>"})
    for count, found in ((1, []), (2, ["talk.jsonl:1: begins with two BOS tokens (<bos>)."])):
        talk.processor.chat_template = "{{ bos_token }}" * count + talk.processor.chat_template.replace(
            "{{ bos_token }}", ""
        )
        problems = token_problems(talk, examples[:1], media_ids(model.config))
        assert [problem.rpartition("/")[2] for problem in problems] == found


def test_a_picture_that_is_not_seen_is_refused(loaded):
    talk, model, examples = loaded("llava")
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.zeros_(parameter)
    with pytest.raises(InputError, match=r"talk.jsonl:\d+: the model does not see its image \d+.png: noise in place"):
        verify(talk, model, examples, batch=2)


def test_a_picture_without_a_token_is_refused(loaded):
    talk, model, examples = loaded("blip-2")
    talk.processor.num_query_tokens = None
    (problem,) = token_problems(talk, examples[:1], media_ids(model.config))
    assert "has an image, but the processor of blip-2 writes no token for it" in problem


def test_rows_that_change_each_other_are_refused_but_not_one_at_a_time(loaded):
    talk, model, examples = loaded("llava")

    def mixed(module, args, given):
        pixels = given["pixel_values"]
        return args, given | {"pixel_values": pixels + pixels.mean(0, keepdim=True)}

    model.lm_head.weight.data *= 50  # so that random weights care for what they see
    model.register_forward_pre_hook(mixed, with_kwargs=True)
    with pytest.raises(InputError, match=r"its loss is [\d.]+ alone and [\d.]+ in a batch of 2: llava does not take"):
        verify(talk, model, examples, batch=2)
    assert verify(talk, model, examples, batch=1)


def test_another_number_of_tokens_than_features_is_refused_in_a_sentence(short, checkpoints, tmp_path, capfd):
    folder = shutil.copytree(checkpoints("llava"), tmp_path / "odd")
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(settings | {"num_additional_image_tokens": 0}))
    assert main(["train", NAME, *short(), f"model={folder}", "--id", "odd"]) == 2
    error = capfd.readouterr().err
    assert "the model does not take what its processor makes of this (Image features and image tokens" in error
    assert "Traceback" not in error and not (tmp_path / "runs" / "odd").exists()


def test_a_run_says_what_it_learns(short, tmp_path):
    assert main(["train", NAME, *short(), "--id", "shown"]) == 0
    log = (tmp_path / "runs" / "shown" / "log.txt").read_text()
    assert "self-check: labels of 2 rows: " in log and "each row's loss in a batch is its own." in log
