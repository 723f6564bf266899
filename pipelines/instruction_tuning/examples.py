"""The conversations of a configuration, the drawn ones too, as a model can take them."""

from collections.abc import Callable
from pathlib import Path

from equipoise.errors import InputError
from equipoise.pipelines import demo
from equipoise.pipelines.instruction_tuning.config import InstructionTuningConfig, InstructionTuningSamples
from equipoise.pipelines.instruction_tuning.data import MARKS, Conversation, Turn, read_all
from equipoise.pipelines.instruction_tuning.talk import Talk
from equipoise.pipelines.progress import progress


def load_examples(
    config: InstructionTuningConfig, talk: Talk, tell: Callable[[str], object] = print
) -> tuple[list[Conversation], list[Conversation], list[str]]:
    """(training examples, held-out ones, everything that is wrong, with file and line). `tell` takes warnings."""
    data = config.data
    if data.file == demo.NAME:
        data = data.model_copy(update={"file": str(demo.questions_file(Path(config.runs)))})
    kept, held, problems = read_all(data, decode=config.data.file != demo.NAME, judge=talk.problems)
    return kept, held, problems or (unusable([*kept, *held], talk, tell) if talk.max_tokens else [])


def unusable(examples: list[Conversation], talk: Talk, tell: Callable[[str], object]) -> list[str]:
    """Which conversations the processor refuses, or lose all their answers to data.max_tokens, a sentence each; `tell`
    is called with other losses. Processes each of them."""
    most = talk.max_tokens
    problems, cut = [], []
    for example in progress("measuring", "conversation", examples):
        try:
            length = talk.full_length(example)
            if most is None or length <= most:
                continue
            cut.append(example)
            if length - talk.spans(example)[0][0] >= most:
                problems.append(
                    f"{example.where}: has {length} tokens, and data.max_tokens={most} cuts its answers away entirely. "
                    "Raise it, or shorten what comes before."
                )
        except InputError as error:
            problems.append(str(error))
    if cut and not problems:
        tell(
            f"{len(cut)} of {len(examples)} conversations are longer than {most} tokens and are cut at their ends, "
            "before a picture or sound that does not fit."
        )
    return problems


def asked_of(held: list[Conversation], samples: InstructionTuningSamples, most: int) -> list[Conversation]:
    """Held-out conversations; or prompts of one's own asked of the first held-out media, about `most` in all, to be
    judged by eye."""
    if not samples.prompts:
        return held[: samples.count]
    few = ([e for e in held if e.media] or held)[: max(1, most // len(samples.prompts))]
    return [
        Conversation(
            e.kind, e.media, (Turn("\n".join([*(MARKS[e.kind] for _ in e.media), prompt]), ""),), e.system, e.where
        )
        for prompt in samples.prompts
        for e in few
    ]
