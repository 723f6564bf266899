"""Chat templates as models are published with them, of which trl ships many: what is learnt of each is the answers and
their ends. None of them is kept here."""

import re
from copy import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trl

from equipoise.errors import InputError
from equipoise.pipelines.instruction_tuning.config import InstructionTuningModel
from equipoise.pipelines.instruction_tuning.data import Conversation, Turn, read_examples
from equipoise.pipelines.instruction_tuning.model import load_processor, model_type
from equipoise.pipelines.instruction_tuning.talk import IGNORED, Talk
from equipoise.pipelines.instruction_tuning.verify import endless, token_problems

TEMPLATES = {
    path.stem: path.read_text() for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
}
MARK = re.compile(r"<[|｜]?[\w/▁]+[|｜]?>")
READ = {"<think>", "</think>", "<tool_call>", "</tool_call>", "<image>"}  # as text, or known already
OF_MEDIA = {  # small checkpoints, and the templates of their families
    "qwen2_5_vl": ["qwen2_5_vl", "qwen2_5_vl_training"],
    "qwen3_vl": ["qwen3_vl", "qwen3_vl_training"],
    "qwen3_5": ["qwen3_5_think", "qwen3_5_nothink", "qwen3_6"],
    "gemma3": ["gemma3", "gemma3_training"],
    "gemma4": ["gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4"],
    "smolvlm2": ["smolvlm", "smolvlm_training", "idefics3"],
    "llava": ["llava_next", "llava_next_training"],
}
THREE = Conversation(
    "text", (), (Turn("Why?", "Because."), Turn("Sure?", "Yes, quite."), Turn("And?", "No.\nOr so.")), where="talk:1"
)


@cache
def processor_of(folder: Path) -> tuple[Any, str]:
    """Of a checkpoint, with the marks of all templates as single tokens."""
    section = InstructionTuningModel(path=str(folder))
    processor = load_processor(section)
    known = READ | processor.tokenizer.get_added_vocab().keys()
    marks = dict.fromkeys(mark for text in TEMPLATES.values() for mark in MARK.findall(text) if mark not in known)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": [*marks], "bos_token": "<bos>"})
    return processor, model_type(section)


def talk_by(folder: Path, template: str) -> Talk:
    """Of a checkpoint with another template."""
    found, kind = processor_of(folder)
    processor = copy(found)
    processor.chat_template = TEMPLATES[template]
    return Talk(processor, kind)


def learnt(made: Talk, example: Conversation) -> str:
    labels = made.training_batch([example])["labels"][0]
    return made.tokenizer.decode(labels[labels != IGNORED])


def check(made: Talk, example: Conversation) -> None:
    """Answers are learnt with their ends, the last one's whole, and nothing between them but what opens them."""
    assert token_problems(made, [example]) == []
    frame, rest = made.frame(example), learnt(made, example)
    for number, turn in enumerate(example.turns):
        before, found, rest = rest.partition(turn.answer)
        end = before.removesuffix(frame.opening).strip()
        assert found and frame.closing.startswith(end) and bool(end) == (number > 0 and not endless(made, [example]))
    assert rest == frame.closing and made.end(example) is not None and made.end(example) != made.tokenizer.unk_token_id
    assert made.text(example).startswith(made.text(example, asked=True))


def test_trl_has_templates():
    assert len(TEMPLATES) > 50, "where did it put them?"


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_learnt_by_a_published_template_is_answers_and_their_ends(name, checkpoints):
    made = talk_by(checkpoints("llava"), name)
    check(made, THREE)
    assert bool(endless(made, [THREE])) == name.startswith("gptoss"), "which ends earlier answers otherwise"
    options = {"enable_thinking": False} if "enable_thinking" in made.processor.chat_template else {}
    turn = made.writer._content("Why?")
    prompt = made.processor.apply_chat_template(
        [{"role": "user", "content": turn}], add_generation_prompt=True, **options
    )
    assert made.text(replace(THREE, turns=THREE.turns[:1]), asked=True) == prompt, "as anybody else asks"
    try:
        check(made, replace(THREE, system="Be brief."))
        assert "Be brief." in made.text(replace(THREE, system="Be brief."))
    except InputError as error:
        assert "System role not supported" in str(error)
    if "_training" in name:
        check_marked(made)


def check_marked(made: Talk) -> None:
    """`{% generation %}`: of what is to be learnt a template marks the answers, and the end of the last as here."""
    words = [text for turn in THREE.turns for text in (turn.question, turn.answer)]
    messages = [
        {"role": role, "content": made.writer._content(text)}
        for role, text in zip(("user", "assistant") * 3, words, strict=True)
    ]
    own = made.tokenizer.apply_chat_template(
        messages, chat_template=made.processor.chat_template, return_assistant_tokens_mask=True, return_dict=True
    )
    marked = made.tokenizer.decode([t for t, on in zip(own["input_ids"], own["assistant_masks"], strict=True) if on])
    for turn in THREE.turns:
        _, found, marked = marked.partition(turn.answer)
        assert found
    assert marked.strip() == made.frame(THREE).closing.strip(), "the last one's end"


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in OF_MEDIA.items() for name in names])
def test_a_published_template_writes_pictures_where_its_processor_reads_them(kind, name, checkpoints, pictures):
    made = talk_by(checkpoints(kind), name)
    for example in read_examples(pictures, None)[0][2:4]:
        check(made, example)
        ids, asked = (made.training_batch([example])["input_ids"][0], made.question_batch([example])["input_ids"][0])
        assert ids[: len(asked)].equal(asked)
