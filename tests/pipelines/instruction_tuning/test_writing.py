"""Conversations as text, by chat templates of every kind: what is trained is what will be asked, with its answer."""

from dataclasses import replace

import pytest
import torch

from equipoise.errors import InputError
from equipoise.pipelines.instruction_tuning import writing
from equipoise.pipelines.instruction_tuning.config import InstructionTuningModel
from equipoise.pipelines.instruction_tuning.data import Turn, read_examples
from equipoise.pipelines.instruction_tuning.model import load_processor, model_type
from equipoise.pipelines.instruction_tuning.talk import IGNORED, Talk
from equipoise.pipelines.instruction_tuning.verify import endless, token_problems

FAMILIES = {  # and what each learns behind an answer
    "qwen2_5_vl": "<|im_end|>\n",
    "qwen3_vl": "<|im_end|>\n",
    "qwen3_5": "<|im_end|>\n",
    "qwen2_5_omni": "<|im_end|>\n",
    "gemma3": "<end_of_turn>\n",
    "gemma4": "<turn|>\n",
    "glm46v": "<|endoftext|>",
    "internvl": "<|im_end|>\n",
    "llava_onevision": "<|im_end|>",
    "aya_vision": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "smolvlm2": "<end_of_utterance>\n",
    "ovis2": "<|im_end|>\n",
}
# Reasoning in the last answer alone, which no option switches off, as Qwen3-VL-Thinking's.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>"
    "\n\n{% endif %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# Of texts alone, and with no mark after an answer.
TEXTS = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }} "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture
def talk(checkpoints):
    def get(kind: str) -> Talk:
        section = InstructionTuningModel(path=str(checkpoints(kind)))
        return Talk(load_processor(section), model_type(section))

    return get


@pytest.fixture
def examples(pictures):
    """One turn, and two."""
    return read_examples(pictures, None)[0][2:4]


def learnt(made: Talk, labels: torch.Tensor) -> str:
    return made.tokenizer.decode(labels[labels != IGNORED])


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_trained_is_what_will_be_asked_with_its_answer(kind, talk, examples):
    """Token for token, media included; and each answer with its end is learnt, and nothing else."""
    made = talk(kind)
    assert token_problems(made, examples) == []
    for example in examples:
        batch, asked = made.training_batch([example]), made.question_batch([example])
        ids, labels, prompt = batch["input_ids"][0], batch["labels"][0], asked["input_ids"][0]
        assert torch.equal(ids[: len(prompt)], prompt)
        wanted = "".join(f"{turn.answer}{FAMILIES[kind]}" for turn in example.turns)
        assert learnt(made, labels).replace(" ", "") == wanted.replace(" ", "")
        last = learnt(made, labels[len(prompt) :])
        assert last.strip(" ") == f"{example.turns[-1].answer}{FAMILIES[kind]}".strip(" "), "to the end"
        bos = made.tokenizer.bos_token_id
        assert bos is None or (ids == bos).sum() == 1


@pytest.mark.parametrize("kind", sorted(FAMILIES.keys() - {"glm46v"}))  # whose answers end only where we write it
def test_the_question_is_as_the_template_writes_it(kind, talk, examples):
    """With the earlier turns as they are when asked, not as they are when trained on."""
    made, (_, two) = talk(kind), examples
    first, second = two.turns
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": first.answer}]},
        {"role": "user", "content": [{"type": "text", "text": second.question}]},
    ]
    prompt = made.processor.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)
    assert made.text(two, asked=True) == prompt


def test_what_is_peculiar_to_some(talk, examples):
    one, two = examples
    texts = {kind: talk(kind).text(two) for kind in FAMILIES}
    assert "<|im_start|>assistant\n<think>\n\n</think>\n\nYes, quite sure.<|im_end|>" in texts["qwen3_5"]
    assert "<|im_start|>assistant\nred<|im_end|>" in texts["qwen3_5"], "without reasoning in earlier turns"
    assert "<|im_start|>assistant \nred<|im_end|>" in texts["llava_onevision"]
    assert "<|im_start|>assistant\nYes, quite sure.<|im_end|>" in texts["llava_onevision"], "as the prompt has it"
    assert "<think></think>\nred<|endoftext|><|user|>" in texts["glm46v"]
    assert texts["smolvlm2"].endswith("Assistant: Yes, quite sure.<end_of_utterance>\n")
    assert texts["qwen2_5_omni"].startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    with pytest.raises(InputError, match=r"talk.jsonl:3: the chat template of gemma3 fails: no system"):
        talk("gemma3").text(replace(one, system="Be brief."))


def test_reasoning_that_no_option_switches_off_is_learnt_as_empty(talk, examples):
    """Where the prompt begins it; else the model would go on to reason."""
    made = talk("llava")
    made.processor.chat_template = REASONING
    assert token_problems(made, examples) == []
    end = "<|im_end|>\n"
    for example in examples:
        labels = made.training_batch([example])["labels"][0]
        *earlier, last = [f"{turn.answer}{end}" for turn in example.turns]
        assert learnt(made, labels) == "".join(earlier) + "\n</think>\n\n" + last
        assert made.text(example, asked=True).endswith("<|im_start|>assistant\n<think>\n")


def test_reasoning_in_an_answer_is_refused_where_the_template_writes_its_own(talk, examples):
    turns = (Turn("<image>\nWhat colour?", "<think>It is bright.</think>red"),)
    example = replace(examples[0], turns=turns)
    (problem,) = talk("qwen3_5").problems(example)
    assert problem.startswith("has reasoning (</think>) in an answer")
    assert talk("llava").problems(example) == []


def test_a_template_that_the_tokenizer_alone_holds(talk, examples):
    """Also one of texts alone; each answer then has the tokenizer's end."""
    made = talk("llava")
    made.processor.chat_template, made.tokenizer.chat_template = None, TEXTS
    assert made.text(examples[1]) == (
        "USER: <image>\nWhat colour? ASSISTANT: red</s> USER: Sure? ASSISTANT: Yes, quite sure.</s>"
    )
    assert token_problems(made, examples) == []
    assert learnt(made, made.training_batch([examples[1]])["labels"]) == " red</s> Yes, quite sure.</s>"
    made = talk("llava")
    made.processor.chat_template, made.tokenizer.chat_template = None, made.processor.chat_template
    assert made.text(examples[1]) == talk("llava").text(examples[1]), "a list of texts and media, where it takes one"


def test_a_template_of_texts_that_would_write_a_list_as_python_has_it(talk, examples):
    made = talk("llava")
    made.processor.chat_template = None
    made.tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert made.text(examples[0]) == (
        "<|im_start|>user\n<image>\nWhat colour?<|im_end|>\n<|im_start|>assistant\nblue<|im_end|>\n"
    )


def test_a_template_that_takes_the_systems_words_as_a_text_and_questions_as_lists(talk, examples):
    made = talk("llava")
    made.processor.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'system' %}{{ m.content }}{% else %}"
        "{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert made.text(replace(examples[0], system="Be brief.")) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>What colour?<|im_end|>\n"
        "<|im_start|>assistant\nblue<|im_end|>\n"
    )


def test_a_template_that_closes_a_conversation_otherwise_than_its_turns(talk, examples):
    """As Phi's, with an end of all behind the last one's own; and as gpt-oss's, with another mark in its place."""
    made, two = talk("llava"), examples[1]
    turns = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{{ '<image>' if c.type == 'image' "
        "else c.text }}{% endfor %}CLOSE{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    )
    made.processor.chat_template = turns.replace("CLOSE", "<|im_end|>\n") + "{% else %}</s>{% endif %}"
    assert token_problems(made, examples) == []
    assert learnt(made, made.training_batch([two])["labels"]) == "red<|im_end|>\nYes, quite sure.<|im_end|>\n</s>"
    other = "{{ '</s>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}"
    made = talk("llava")
    made.processor.chat_template = turns.replace("CLOSE", other) + "{% endif %}"
    assert token_problems(made, examples) == []
    assert learnt(made, made.training_batch([two])["labels"]) == "redYes, quite sure.</s>", (
        "the one that ends an answer"
    )
    assert endless(made, examples) == (
        "Of talk.jsonl:4 the answers before the last are learnt without an end: the chat template of llava writes "
        "'</s>' after the last answer alone."
    ).replace("talk.jsonl:4", two.where)
    assert endless(talk("llava"), examples) == endless(made, examples[:1]) == ""


def test_earlier_answers_that_lose_their_ends_are_found(talk, examples, monkeypatch):
    made = talk("qwen2_5_vl")
    monkeypatch.setattr(writing, "_shared", lambda *_: 0)
    assert token_problems(made, examples[:1]) == []
    (problem,) = token_problems(made, examples)
    assert "the loss would be on 'redYes, quite sure.<|im_end|>" in problem and "not on 'red<|im_end|>" in problem


def test_a_template_of_texts_that_would_write_a_list_as_json(talk, examples):
    """As LFM2's: what is no text is no text's."""
    made = talk("llava")
    made.processor.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if m.content is string else m.content | tojson }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert made.text(examples[0]) == (
        "<|im_start|>user\n<image>\nWhat colour?<|im_end|>\n<|im_start|>assistant\nblue<|im_end|>\n"
    )


def test_what_a_template_has_answers_begin_with_is_no_part_of_what_is_answered(talk, examples):
    made = talk("llava")
    made.processor.chat_template = REASONING
    for text, answer in (
        ("\n</think>\n\nred", "red"),
        ("It is bright.\n</think>\n\nred", "red"),  # as an untuned model has it
        ("It is bright, and", "It is bright, and"),
    ):
        assert made.answered(examples[0], made.tokens(text)) == made.unreasoned(examples[0], text) == answer
    made = talk("llava")
    made.processor.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' to=user' if m.role == 'assistant' }}<image>"
        "{% for c in m.content %}{{ c.text }}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    text = replace(examples[0], kind="text", media=(), turns=(Turn("What colour?", "blue"),))
    assert made.frame(text).opening == " to=user<image>"
    for written in (" to=user<image>blue<|im_end|>", "blue<|im_end|>"):
        assert made.answered(text, made.tokens(written)) == "blue"
    own = "to=user is right"
    assert made.answered(text, made.tokens(own)) == made.unreasoned(text, f" {own}") == own
