"""Where tokens can go wrong in silence: padding, ends of answers, BOS, placeholders, and what is cut."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import processors

from equipoise.pipelines.instruction_tuning.config import InstructionTuningModel, InstructionTuningSamples
from equipoise.pipelines.instruction_tuning.data import Conversation, Turn
from equipoise.pipelines.instruction_tuning.evaluate import answer, known_stops
from equipoise.pipelines.instruction_tuning.model import load_model, load_processor
from equipoise.pipelines.instruction_tuning.talk import IGNORED, Talk


@pytest.fixture
def picture(tmp_path):
    def get(colour: str):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{colour}.png")
        return tmp_path / f"{colour}.png"

    return get


@pytest.fixture
def talk(checkpoints):
    return lambda kind, **options: Talk(
        load_processor(InstructionTuningModel(path=str(checkpoints(kind)))), kind, **options
    )


def asked(*turns, media=(), kind="image") -> Conversation:
    return Conversation(kind if media else "text", tuple(media), tuple(Turn(*turn) for turn in turns), "", "here:1")


def labelled(made: Talk, batch, row: int = 0) -> list[str]:
    """Each run of labelled tokens as text."""
    found, last = [], False
    for label in batch["labels"][row].tolist():
        if label != IGNORED:
            found = found if last else [*found, []]
            found[-1].append(label)
        last = label != IGNORED
    return [made.tokenizer.decode(run) for run in found]


def test_a_processor_that_pads_on_the_left_trains_on_the_answers(talk, picture):
    """And asks with the padding on the left."""
    made, red = talk("internvl"), picture("red")
    short = asked(("<image>\nIs it?", "Yes, it is."), media=[red])
    long = asked(("<image>\nIs it, after all that has been said about it?", "No."), media=[red])
    batch = made.training_batch([short, long])
    assert [labelled(made, batch, row) for row in (0, 1)] == [["Yes, it is.<|im_end|>\n"], ["No.<|im_end|>\n"]]
    assert batch["attention_mask"][0].tolist() == sorted(batch["attention_mask"][0].tolist(), reverse=True)
    mask = made.question_batch([short, long])["attention_mask"][0].tolist()
    assert mask == sorted(mask) and mask[0] == 0


@pytest.mark.parametrize(
    ("close", "wanted"),
    [("</s>", "Yes.</s>"), (" ", "Yes.</s>"), ("<|im_end|>\n", "Yes.<|im_end|>\n"), ("", "Yes.</s>")],
)
def test_every_answer_has_an_end(talk, picture, close, wanted):
    """The template's, or the tokenizer's where the template writes none, as LLaVA 1.5's."""
    made = talk("llava")
    made.processor.chat_template = (
        "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<image>\n{% else %}{{ c['text'] }}{% if m['role'] == 'assistant' %}CLOSE{% else %} {% endif %}{% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
    ).replace("CLOSE", close)
    for later in ("Sure?", "<image>\nAnd this?"):
        pictures = [picture("red"), picture("blue")][: 1 + later.count("<image>")]
        example = asked(("<image>\nIs it?", "Yes."), (later, "Yes."), media=pictures)
        assert labelled(made, made.training_batch([example])) == [wanted, wanted]
    assert made.tokenizer.decode([made.end(example)]) == wanted.removeprefix("Yes.").strip()


def test_generation_ends_where_answers_do(checkpoints, talk, picture):
    """Also at a mark that the model's generation_config does not know."""
    made, model = talk("llava"), load_model(InstructionTuningModel(path=str(checkpoints("llava"))), "no")
    example = asked(("<image>\nIs it?", "Yes."), media=[picture("red")])
    end = made.end(example)
    assert made.tokenizer.decode([end]) == "<|im_end|>" and end not in known_stops(model)
    head = model.get_output_embeddings()
    head.weight.data.zero_()
    model.lm_head = torch.nn.Linear(head.in_features, head.out_features)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data = torch.nn.functional.one_hot(torch.tensor(end), head.out_features).float()
    seen = []
    plain = model.generate
    model.generate = lambda **given: seen.append(plain(**given)) or seen[-1]
    (found,) = answer(model, made, [example], InstructionTuningSamples(max_new_tokens=20))
    width = made.question_batch([example])["input_ids"].shape[1]
    assert seen[0].shape[1] == width + 1 and found.text == ""


@pytest.mark.parametrize("own", [True, False])
def test_one_bos(talk, picture, own):
    """From the template or from the tokenizer: the tokens that apply_chat_template itself makes."""
    made = talk("idefics3")
    words = made.tokenizer
    words.add_special_tokens({"bos_token": "<bos>"})
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", words.bos_token_id)]
    )
    if own:
        made.processor.chat_template = "{{ bos_token }}" + made.processor.chat_template
    red = picture("red")
    example = asked(("<image>What?", "Red."), media=[red])
    content = [{"type": "image", "image": Image.open(red)}, {"type": "text", "text": "What?"}]
    theirs = made.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )["input_ids"]
    mine = made.question_batch([example])["input_ids"]
    assert torch.equal(mine, theirs) and mine[0].tolist().count(words.bos_token_id) == 1
    assert labelled(made, made.training_batch([example])) == ["Red.<|im_end|>\n"]


@pytest.mark.parametrize("kind", ["blip-2", "instructblip"])
def test_a_processor_that_does_not_know_its_number_of_query_tokens(kind, checkpoints, picture, tmp_path):
    """As those saved before transformers 4.46: the model's configuration knows it."""
    folder = shutil.copytree(checkpoints(kind), tmp_path / "older")
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(settings | {"num_query_tokens": None}))
    section = InstructionTuningModel(path=str(folder))
    made, model = Talk(load_processor(section), kind), load_model(section, "no")
    logits = []
    for colour in ("red", "green"):
        batch = made.question_batch([asked(("<image>\nWhat?", "x"), media=[picture(colour)])])
        assert (batch["input_ids"] == model.config.image_token_id).sum() == 4
        with torch.no_grad():
            logits.append(model(**batch).logits)
    assert not torch.equal(*logits)


@pytest.mark.parametrize("turns", ["<image>\nAnd this?", "And <image>?"])
def test_paligemmas_pictures_in_two_turns(talk, picture, turns):
    made = talk("paligemma")
    example = asked(("<image>\nWhat?", "A red one."), (turns, "Blue."), media=[picture("red"), picture("blue")])
    batch = made.training_batch([example, replace(example, turns=example.turns[:1], media=example.media[:1])])
    assert labelled(made, batch) == ["A red one.</s>", "Blue.</s>"] and labelled(made, batch, 1) == ["A red one.</s>"]


def test_paligemmas_first_picture_may_come_after_an_answer(talk, picture):
    made = talk("paligemma")
    example = asked(("Hello", "Hi."), ("<image>\nWhat?", "Red."), media=[picture("red")])
    assert labelled(made, made.training_batch([example])) == ["Hi.</s>", "Red.</s>"]


def test_what_is_as_wide_as_the_text_by_chance_is_not_cut(talk, tmp_path):
    """A sound of 100 frames beside a conversation of 100 tokens."""
    import soundfile

    soundfile.write(tmp_path / "tone.wav", 0.3 * np.sin(np.arange(8000) / 5), 8000)
    some = [asked(("<audio>\nWhat?", "a" * n), media=[tmp_path / "tone.wav"], kind="audio") for n in range(1, 90)]
    whole = talk("qwen2_audio")
    (example,) = [e for e in some if whole.full_length(e) == 100]
    batch = talk("qwen2_audio", max_tokens=90).training_batch([example])
    assert batch["feature_attention_mask"].shape[1] == 100
    assert {batch[name].shape[1] for name in ("input_ids", "attention_mask", "labels")} == {90}
