"""Answers by generation, and how right they are: the same words, VQA accuracy, or ROUGE-L."""

# transformers annotates too narrowly.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.pipelines.instruction_tuning.config import InstructionTuningSamples
from equipoise.pipelines.instruction_tuning.data import Conversation, without_marks
from equipoise.pipelines.instruction_tuning.talk import Talk

METRICS = {
    "exact": "share of answers that are the right words, whatever their case, articles and punctuation",
    "vqa": "VQA accuracy: an answer counts min(1, people who gave it / 3), over each ten with one left out",
    "rouge_l": "ROUGE-L: how much of the right text's longest common subsequence an answer has (F-measure)",
}
RIGHT = 0.5  # from which score on an answer is marked as right
_ARTICLES = re.compile(r"\b(a|an|the)\s+(?=\S)")  # the last word stays: A can be the answer
_GROUPS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # 1,000
_NUMERIC = re.compile(r"(?<=\d)[.,:/-](?=\d)|(?<![^\s(])(-\.|[-.])(?=\d)")  # 3.5, 12:30, -5, .5
_MEANT = "#%&"  # punctuation to Unicode, but C# is not C
_UNSPACED = re.compile(  # Han, kana, Thai, Lao, Burmese, Khmer: no spaces between words
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
)
_NUMBERS = {w: str(n) for n, w in enumerate("zero one two three four five six seven eight nine ten".split())}


@dataclass(frozen=True)
class Answer:
    example: Conversation
    question: str
    text: str
    wanted: tuple[str, ...]
    score: float | None  # 0 to 1; None where nobody knows the right answer

    @property
    def right(self) -> bool | None:
        return None if self.score is None else self.score >= RIGHT

    def record(self) -> dict[str, Any]:
        """What answers.jsonl has of it; media that are files by where they lie, wherever the reader stands."""
        return {
            "media": [os.path.abspath(path) if os.path.exists(path) else str(path) for path in self.example.media],
            "question": without_marks(self.question),
            "answer": self.text,
            "wanted": list(self.wanted),
            "score": self.score,
        }


@torch.no_grad()
def answer(
    model: nn.Module,
    talk: Talk,
    examples: Sequence[Conversation],
    samples: InstructionTuningSamples,
    tell: Callable[[int], object] = lambda count: None,  # called with how many were just answered
    precision: Callable[[], AbstractContextManager] = nullcontext,  # what is generated in; media are read outside of it
    together: bool = False,  # whether several processes answer the same at once, and none may end before the others
) -> list[Answer]:
    """The model's answers to each conversation's last question, without sampling."""
    device = next(model.parameters()).device
    model.eval()
    end, known = talk.end(examples[0]) if examples else None, known_stops(model)
    stops: dict[str, Any] = {} if end is None or end in known else {"eos_token_id": [*known, end]}
    stops |= {"synced_gpus": True} if together else {}
    found = []
    for start in range(0, len(examples), samples.batch):
        chosen = examples[start : start + samples.batch]
        batch = {name: value.to(device) for name, value in talk.question_batch(chosen).items()}
        with precision():
            ids = model.generate(**batch, max_new_tokens=samples.max_new_tokens, do_sample=False, **stops)
        written = _new(ids, batch["input_ids"]).tolist()
        found += [judged(e, talk.answered(e, row), samples.metric) for e, row in zip(chosen, written, strict=True)]
        tell(len(chosen))
    return found


def judged(example: Conversation, text: str, metric: str) -> Answer:
    """What was answered to a conversation's last question, with its score where the right answer is known."""
    wanted = example.turns[-1].accepted if example.turns else ()
    score = judge(text, wanted, metric) if any(wanted) else None
    return Answer(example, example.turns[-1].question, text.strip(), wanted, score)


def answer_loss(logits: Tensor, labels: Tensor, sample: Tensor) -> Tensor:
    """Cross-entropy averaged over each sample's answer tokens, then over samples, as the paper's L."""
    each = F.cross_entropy(logits.float(), labels, reduction="none")
    _, index, counts = sample.unique(return_inverse=True, return_counts=True)
    return (each / counts.to(each)[index]).sum() / len(counts)


def known_stops(model: Any) -> list[int]:
    """The tokens at which generation ends by itself."""
    # a Q-Former's model lets its language model generate
    inner = getattr(getattr(model, "language_model", None), "generation_config", None)
    ids = getattr(inner or model.generation_config, "eos_token_id", None)
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def _new(ids: Tensor, prompt: Tensor) -> Tensor:
    """What was generated; some models repeat the prompt before it."""
    width = prompt.shape[1]
    return ids[:, width:] if ids.shape[1] >= width and torch.equal(ids[:, :width], prompt) else ids


def judge(text: str, wanted: Sequence[str], metric: str) -> float:
    """How right an answer is, 0 to 1."""
    if metric == "rouge_l":
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"], tokenizer=Words())
        return max(scorer.score(right, text)["rougeL"].fmeasure for right in wanted)
    mine, theirs = plain(text), [plain(right) for right in wanted]
    if metric == "vqa" and len(theirs) > 1:
        each = [theirs[:index] + theirs[index + 1 :] for index in range(len(theirs))]
        return sum(min(1.0, others.count(mine) / 3) for others in each) / len(each)
    return float(mine in theirs)


def plain(text: str) -> str:
    """An answer without case, punctuation and articles, numbers as digits; signs and decimals stay, and so does what
    would leave nothing."""
    text = _GROUPS.sub("", unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")).strip()
    kept = {at for found in _NUMERIC.finditer(text) for at in range(*found.span())}
    bare = "".join(c for at, c in enumerate(text) if at in kept or not _is_punctuation(c)).strip()
    return " ".join(_NUMBERS.get(word, word) for word in _ARTICLES.sub("", bare or text).split())


def _is_punctuation(character: str) -> bool:
    kind = unicodedata.category(character)
    return (kind[0] == "P" or kind == "Sk") and character not in _MEANT


class Words:
    """ROUGE's words of any script: rouge-score's own, where the text is ASCII, and single characters where a script
    puts no spaces between words."""

    def tokenize(self, text: str) -> list[str]:
        text = unicodedata.normalize("NFC", text).lower()
        words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
        return _UNSPACED.sub(r" \1 ", words).split() or text.split()


def mean(answers: Sequence[Answer]) -> float:
    """The mean score of those that could be judged; NaN without any."""
    scores = [answer.score for answer in answers if answer.score is not None]
    return sum(scores) / len(scores) if scores else float("nan")
