"""The conversations of a configuration, the drawn ones too, as a model can take them."""

from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from equipoise.pipelines import demo
from equipoise.pipelines.instruction_tuning.config import InstructionTuningConfig
from equipoise.pipelines.instruction_tuning.data import Example, read_all
from equipoise.pipelines.instruction_tuning.talk import Talk


def load_examples(
    config: InstructionTuningConfig, talk: Talk, tell: Callable[[str], object] = print
) -> tuple[list[Example], list[Example], list[str]]:
    """(training examples, held-out ones, everything that is wrong, with file and line). `tell` hears warnings."""
    data = config.data
    if data.file == demo.NAME:
        data = data.model_copy(update={"file": str(demo.questions_file(Path(config.runs)))})
    kept, held, problems = read_all(data, decode=config.data.file != demo.NAME)
    if problems:
        return kept, held, problems
    problems = [sentence for example in [*kept, *held] for sentence in talk.problems(example)]
    return kept, held, problems or too_long([*kept, *held], talk, tell)


def too_long(examples: list[Example], talk: Talk, tell: Callable[[str], object]) -> list[str]:
    """Which conversations lose all their answers to data.max_tokens, a sentence each; `tell` hears of other losses."""
    most = talk.max_tokens
    if most is None:
        return []
    problems, cut = [], []
    for example in tqdm(examples, desc="measuring", unit="conversation", dynamic_ncols=True, disable=None):
        length = talk.full_length(example)
        if length <= most:
            continue
        cut.append(example)
        if length - talk.spans(example)[0][0] >= most:
            problems.append(
                f"{example.where}: has {length} tokens, and data.max_tokens={most} cuts its answers away entirely. "
                "Raise it, or shorten what comes before."
            )
    if cut and not problems:
        tell(f"{len(cut)} of {len(examples)} conversations are longer than {most} tokens and are cut at their ends.")
    return problems
