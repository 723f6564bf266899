"""What of a conversation is trained on, in every architecture: the answers' tokens and no others."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from equipoise.errors import InputError
from equipoise.pipelines.instruction_tuning.config import InstructionTuningModel
from equipoise.pipelines.instruction_tuning.data import Turn, read_examples
from equipoise.pipelines.instruction_tuning.examples import too_long
from equipoise.pipelines.instruction_tuning.model import load_processor
from equipoise.pipelines.instruction_tuning.talk import IGNORED, Talk
from equipoise.pipelines.instruction_tuning.writing import content

PLAIN = {"blip-2": "Answer:", "instructblip": "?", "paligemma": "?\n"}  # without chat templates: a prompt's end


@pytest.fixture
def talk(checkpoints):
    return lambda kind, **options: Talk(
        load_processor(InstructionTuningModel(path=str(checkpoints(kind)))), kind, **options
    )


@pytest.fixture
def examples(pictures, sounds):
    def get(kind: str):
        found, problems = read_examples(sounds if kind == "qwen2_audio" else pictures, None)
        assert problems == [] and len(found) == 12
        return found

    return get


def test_the_labels_are_the_answers(kinds, talk, examples):
    for kind in kinds:
        _the_labels_are_the_answers(kind, talk(kind), examples(kind)[2:6])
    assert len(kinds) == 9


def _the_labels_are_the_answers(kind, made, some):
    batch = made.training_batch(some)
    assert batch["labels"].shape == batch["input_ids"].shape
    end = "</s>" if kind in PLAIN else "<|im_end|>\n"
    for row, example in enumerate(some):
        labels = batch["labels"][row]
        said = made.tokenizer.decode(labels[labels != IGNORED])
        space = " " if kind in ("blip-2", "instructblip") else ""
        assert said == "".join(f"{space}{turn.answer}{end}" for turn in example.turns)
        assert torch.equal(labels[labels != IGNORED], batch["input_ids"][row][labels != IGNORED])
    asked = made.question_batch(some)
    texts = [made.tokenizer.decode(ids) for ids in asked["input_ids"]]
    assert all(text.endswith(PLAIN.get(kind, "assistant\n")) for text in texts)
    assert all(example.turns[-1].question.split("\n")[-1] in text for example, text in zip(some, texts, strict=True))


def test_of_several_answers_the_commonest_is_trained_on(talk, pictures):
    """And all of them count when answers are judged; elsewhere than in CSV a | is a part of the text."""
    file = pictures.with_name("vqa.csv")
    file.write_text("image,question,answer\n0.png,Colour?,crimson|red | red\n1.png,Colour?,green\n2.png,Colour?, | \n")
    (first, second), problems = read_examples(file, None)
    assert problems == [f"{file}:4: has an empty answer."]
    assert sorted(first.turns[-1].accepted) == ["crimson", "red", "red"] and second.turns[-1].accepted == ("green",)
    made = talk("llava")
    labels = made.training_batch([first])["labels"]
    assert made.tokenizer.decode(labels[labels != IGNORED]) == "red<|im_end|>\n"
    pictures.write_text(pictures.read_text().replace('"red"', '"a|b"'))
    assert read_examples(pictures, None)[0][0].turns[-1].accepted == ("a|b",)


def test_paligemma_sees_no_answer_before_it_is_given(talk, examples, checkpoints):
    """Its layout, and that an answer's logits depend on no later token: not on its own, nor on a later turn's."""
    from transformers import AutoModelForMultimodalLM

    made, some = talk("paligemma"), examples("paligemma")[2:4]
    batch = made.training_batch(some)
    text = [made.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(*_both(batch), strict=True)]
    assert text[0] == "<image>" * 4 + "<bos>What colour?\nblue</s>"
    assert text[1] == "<image>" * 4 + "<bos>What colour?\nred</s>Sure?\nYes, quite sure.</s>"
    asked = made.question_batch(some)
    text = [made.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(*_both(asked), strict=True)]
    assert text[0] == "<image>" * 4 + "<bos>What colour?\n"
    assert text[1] == "<image>" * 4 + "<bos>What colour?\nred</s>Sure?\n"
    assert "labels" not in asked and asked["token_type_ids"].sum(1).tolist() == [0, len("red/Sure?\n")]

    model = AutoModelForMultimodalLM.from_pretrained(checkpoints("paligemma")).eval()
    labels = batch.pop("labels")
    with torch.no_grad():
        first = model(**batch).logits
        at = (labels[1] != IGNORED).nonzero()[:, 0]
        for position in (int(at[1]), int(at[-2])):
            ids = batch["input_ids"].clone()
            ids[1, position:] = 7
            then = model(**batch | {"input_ids": ids}).logits
            torch.testing.assert_close(then[1, :position], first[1, :position])
            assert not torch.allclose(then[1, position:], first[1, position:], atol=1e-4)
    without = type(some[0])("text", [], some[0].turns, "", "x:1")
    assert made.problems(without)[0] == "has no picture, but paligemma takes no text alone."


def _both(batch):
    return batch["input_ids"], batch["attention_mask"]


def test_a_picture_in_a_later_turn(talk, examples):
    made = talk("llava")
    first, second = examples("llava")[:2]
    both = type(first)("image", first.media + second.media, first.turns + second.turns, "", "here:1")
    batch = made.training_batch([both, first])
    said = [made.tokenizer.decode(row[row != IGNORED]) for row in batch["labels"]]
    assert said == ["red<|im_end|>\ngreen<|im_end|>\n", "red<|im_end|>\n"]
    assert len(batch["pixel_values"]) == 3


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "idefics3", "smolvlm"])
def test_the_first_picture_may_come_after_an_answer(kind, talk, examples):
    """And a conversation without any may be asked and trained on, alone and beside others."""
    made, first = talk(kind), examples(kind)[0]
    later = replace(first, turns=(Turn("Hello", "Hi."), Turn("<image>\nWhat colour?", "red")))
    alone = replace(first, kind="text", media=(), turns=(Turn("Hello", "Hi."),))
    end = "<|im_end|>\n"
    for some in ([later], [alone], [later, alone, first]):
        labels = made.training_batch(some)["labels"]
        said = [made.tokenizer.decode(row[row != IGNORED]) for row in labels]
        assert said == ["".join(f"{turn.answer}{end}" for turn in example.turns) for example in some]
        assert made.question_batch(some)["input_ids"].shape[0] == len(some)


def test_what_is_too_long_is_cut_at_its_end(talk, examples):
    made = talk("llava", max_tokens=60)
    example = examples("llava")[3]
    whole = talk("llava").training_batch([example])
    cut = made.training_batch([example])
    assert cut["input_ids"].shape[1] == 60 < whole["input_ids"].shape[1] == made.full_length(example)
    assert torch.equal(cut["labels"], whole["labels"][:, :60])


def test_pictures_of_sizes_that_were_met_take_as_many_tokens_as_those(kinds, talk, examples, tmp_path):
    """For all kinds of models, in one turn and two, and without processing them again."""
    for kind in kinds:
        made, first = talk(kind), examples(kind)
        same, path = [], tmp_path / f"{kind}.png"
        if first[0].kind == "image":
            for example in first[2:4]:  # of one turn, and of two
                Image.fromarray(255 - np.asarray(Image.open(example.media[0]))).save(path)
                longer = tuple(replace(turn, answer=f"{turn.answer} and so on.") for turn in example.turns)
                same.append(replace(example, media=(path,), turns=longer))
                assert made.measured_length(example) == made.full_length(example)
                processed = made._process
                made._process = None
                length = made.measured_length(same[-1])
                made._process = processed
                assert length == made.full_length(same[-1]) > made.full_length(example)
        else:
            assert made.measured_length(first[0]) == made.full_length(first[0])


def test_what_is_said_of_a_length_is_exact_where_lengths_are_measured_roughly(talk, examples, monkeypatch):
    made, two = talk("llava", max_tokens=10), examples("llava")[3]
    exact = made.full_length(two)
    monkeypatch.setattr(made, "measured_length", lambda example: exact + 1)
    problem, cut = too_long(two, made, None)
    assert f"has {exact} tokens, and data.max_tokens=10 cuts" in problem and cut
    both = replace(two, media=two.media * 2, turns=(Turn(f"<image>{two.turns[0].question}", "red"), *two.turns[1:]))
    exact = made.full_length(both)
    monkeypatch.setattr(made, "measured_length", lambda example: exact - 30)
    made.max_tokens = exact - 1
    assert too_long(both, made, None) == ("", True), "a picture may make 16 tokens' difference, each"


def test_half_a_picture_is_none(talk, examples):
    """A turn whose picture would be cut is left out whole; one that fits stays."""
    first, second = examples("llava")[:2]
    both = type(first)("image", first.media + second.media, first.turns + second.turns, "", "here:1")
    whole = talk("llava").training_batch([both])
    answers = (whole["labels"][0] != IGNORED).nonzero()[:, 0]
    place = int((whole["input_ids"][0] == talk("llava").tokenizer.convert_tokens_to_ids("<image>")).nonzero()[-1])
    cut = talk("llava", max_tokens=place).training_batch([both])
    assert len(cut["pixel_values"]) == 1 and cut["input_ids"].shape[1] <= place
    said = cut["labels"][0][cut["labels"][0] != IGNORED]
    assert talk("llava").tokenizer.decode(said) == "red<|im_end|>\n"
    kept = talk("llava", max_tokens=int(answers[-1])).training_batch([both])
    assert len(kept["pixel_values"]) == 2 and kept["input_ids"].shape[1] == int(answers[-1])


def test_marks_of_a_models_own_are_no_text(talk, examples):
    first = examples("llava")[0]
    for kind, turn, found in (
        ("llava", Turn("<image>\nWhat?", "see <image> here"), "<image>"),
        ("qwen2_vl", Turn("<image>\nWhat is <|image_pad|>?", "red</s>"), "<|image_pad|>, </s>"),
        ("blip-2", Turn("<image>\nWhat?", "red</s>"), "</s>"),
    ):
        (problem,) = talk(kind).problems(replace(first, turns=(turn,)))
        assert f"has {found} in its text, which {kind} reads as a mark of its own." in problem
    assert talk("qwen2_vl").problems(replace(first, turns=(Turn("<image>\nWhat?", "an <image> tag"),))) == []


def test_a_sound_longer_than_the_window_is_refused(talk, sounds):
    import soundfile

    soundfile.write(sounds.with_name("0.wav"), np.zeros(5 * 8000) + 0.1, 8000)
    long, right = read_examples(sounds, None)[0][:2]
    (problem,) = talk("qwen2_audio").problems(long)
    assert problem.endswith("0.wav lasts 5.0 s, and qwen2_audio takes only the first 1. Cut it into pieces.")
    assert talk("qwen2_audio").problems(right) == []


def test_a_medium_that_vanished_is_named_with_its_line(talk, examples):
    first = examples("llava")[0]
    first.media[0].unlink()
    with pytest.raises(InputError, match=r"talk.jsonl:1: image .*0.png does not exist"):
        talk("llava").training_batch([first])


def test_a_prompt_of_ones_own(talk, examples):
    assert talk("blip-2", prompt="Q {question} A").text(examples("llava")[0]) == "Q What colour? A red</s>"


def test_a_template_that_does_not_write_what_it_is_given_is_refused(talk, examples):
    made = talk("llava")
    made.processor.chat_template = "{{ messages | length }}{% if add_generation_prompt %}!{% endif %}"
    with pytest.raises(InputError, match=r"talk.jsonl:4: the chat template of llava does not write questions and answ"):
        made.spans(examples("llava")[3])


def test_what_a_model_cannot_take(talk, examples):
    assert talk("blip-2").problems(examples("llava")[0]) == []
    (problem,) = talk("llava").problems(examples("qwen2_audio")[0])
    assert problem == "has an audio, but llava takes image."
    (problem,) = talk("qwen2_audio").problems(examples("llava")[0])
    assert "has an image, but qwen2_audio takes audio." in problem
    first = examples("llava")[0]
    two = type(first)("image", first.media * 2, first.turns, "", "x:1")
    assert talk("blip-2").problems(two) == ["has 2 pictures, but blip-2 takes exactly one."]


def test_marks_become_content():
    assert content("<image>\nWhat?<image> And this?") == [
        {"type": "image"},
        {"type": "text", "text": "What?"},
        {"type": "image"},
        {"type": "text", "text": "And this?"},
    ]
