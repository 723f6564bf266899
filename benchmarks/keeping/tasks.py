"""What is learnt in the study: two tasks for each pretrained base, one to choose settings on and one to test them on.

A task has three numbers, each lower where the model is better, but for the last:
    held_out   the loss on examples of the task that were not trained on
    general    the loss on what the base knew before: what a run forgets raises it
    right      the share of held-out examples that are right altogether, where that means something
"""

import ast
import copy
import random
import statistics
from collections.abc import Callable

import bases
import torch
from peft import PeftConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F

Adapter = Callable[[int, list[str]], PeftConfig]  # of a rank and the names of the layers


class Task:
    """A base with a fresh adapter, its training loss by step, and what it is judged by.

    Args:
        seed: Of the adapter's start and of the order of examples.
        rank: Of the adapter.
        adapter: Its configuration in PEFT, by rank and layers.
        batch: Examples in a step; None: the task's own number.
    """

    base: str  # the pretrained model
    chosen_on: bool  # whether settings were chosen by this task
    layers: list[str]
    steps: int
    batch: int
    model: nn.Module

    def __init__(self, seed: int, rank: int, adapter: Adapter, batch: int | None = None):
        self.seed, self.batch = seed, batch or self.batch
        frozen = copy.deepcopy(self.frozen())
        torch.manual_seed(seed)
        self.model = inject_adapter_in_model(adapter(rank, self.layers), frozen)

    def frozen(self) -> nn.Module:
        raise NotImplementedError

    def loss(self, step: int) -> Tensor:
        raise NotImplementedError

    def held_out(self) -> float:
        raise NotImplementedError

    def general(self) -> float:
        raise NotImplementedError

    def right(self) -> float | None:
        return None

    def generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000_003 * self.seed + step)


ITEMS = (
    "green tea,copper wire,oak planks,wool socks,glass jars,garden chairs,printer ink,rye flour,steel bolts,candle wax"
)
TOWNS = "Lisbon,Oslo,Graz,Porto,Turin,Ghent,Leeds,Bergen,Malaga,Krakow"
DAYS = "Monday,Tuesday,Wednesday,Thursday,Friday,Saturday"
NAMES = "Maria,Tomas,Ines,Lars,Petra,Hugo,Nadia,Owen"
MONTHS = "January,February,March,April,May,June,July,August,September,October,November,December"


class Orders(Task):
    """SmolLM2 rewrites orders into a house code that it has never seen."""

    base, chosen_on = "SmolLM2-135M", True
    layers, steps, batch = ["q_proj", "k_proj", "v_proj", "o_proj"], 60, 4
    question, answer = "Order", "Code"

    def frozen(self) -> nn.Module:
        return bases.smollm2()[0]

    @staticmethod
    def example(rng: random.Random) -> tuple[str, str]:
        count, (item, name, town, day) = (
            rng.randint(2, 99),
            (rng.choice(x.split(",")) for x in (ITEMS, NAMES, TOWNS, DAYS)),
        )
        form = rng.choice(
            [
                "Please send {count} boxes of {item} to {name} in {town} by {day}.",
                "{name} ({town}) needs {count} boxes of {item} no later than {day}.",
                "By {day}, {count} boxes of {item} have to reach {name}, {town}.",
                "We owe {name} in {town} {count} boxes of {item}; ship for {day}.",
            ]
        )
        said = form.format(count=count, item=item, name=name, town=town, day=day)
        code = f"<{town[:3].upper()}|{day[:2].lower()}> {item.replace(' ', '_')} x{count:03d} @{name.lower()}"
        return said, code

    def _rows(self, examples: list[tuple[str, str]]) -> dict[str, Tensor]:
        """Token ids, labels (-100 but for the answers) and attention mask, padded on the right."""
        tokenizer = bases.smollm2()[1]
        asked = [tokenizer(f"{self.question}: {said}\n{self.answer}:").input_ids for said, _ in examples]
        answers = [tokenizer(f" {answer}\n").input_ids for _, answer in examples]
        length = max(len(a) + len(b) for a, b in zip(asked, answers, strict=True))
        ids, labels = torch.zeros(len(examples), length, dtype=torch.long), torch.full((len(examples), length), -100)
        for row, (a, b) in enumerate(zip(asked, answers, strict=True)):
            ids[row, : len(a) + len(b)] = torch.tensor(a + b)
            labels[row, len(a) : len(a) + len(b)] = torch.tensor(b)
        lengths = torch.tensor([len(a) + len(b) for a, b in zip(asked, answers, strict=True)])
        return {"input_ids": ids, "labels": labels, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}

    def loss(self, step: int) -> Tensor:
        rng = random.Random(1_000_003 * (self.seed + 1) + step)
        return self.model(**self._rows([self.example(rng) for _ in range(self.batch)])).loss

    def held_out(self) -> float:
        rng = random.Random(123)
        rows = self._rows([self.example(rng) for _ in range(24)])
        out = self.model(**rows)
        found, labels = out.logits.argmax(-1)[:, :-1], rows["labels"][:, 1:]
        self._right = ((found == labels) | (labels == -100)).all(1).float().mean().item()  # of the answers, one pass
        return out.loss.item()

    def right(self) -> float | None:
        return self._right

    def general(self) -> float:
        text = bases.LICENSE.read_text()[2000:3500] + "\n\n" + bases.EVERYDAY
        ids = bases.smollm2()[1](text, return_tensors="pt").input_ids[:, :256]
        return self.model(input_ids=ids, labels=ids).loss.item()


class Bookings(Orders):
    """SmolLM2 rewrites payments into lines of a ledger."""

    chosen_on, question, answer = False, "Payment", "Entry"

    @staticmethod
    def example(rng: random.Random) -> tuple[str, str]:
        day, month, cents = rng.randint(1, 28), rng.choice(MONTHS.split(",")), rng.randint(100, 99_999)
        item, name, town = (rng.choice(x.split(",")) for x in (ITEMS, NAMES, TOWNS))
        paid = rng.random() < 0.5
        euros = f"{cents // 100}.{cents % 100:02d}"
        form = rng.choice(
            [
                "On {day} {month} {name} of {town} {verb} {euros} euros for {item}.",
                "{euros} euros {noun} {name}, {town}, on {month} {day}, for {item}.",
                "For {item}, {name} ({town}) {verb} {euros} euros on the {day}. of {month}.",
            ]
        )
        words = {"verb": "paid" if paid else "received", "noun": "came from" if paid else "went to"}
        said = form.format(day=day, month=month, name=name, town=town, euros=euros, item=item, **words)
        number = MONTHS.split(",").index(month) + 1
        return said, f"{number:02d}/{day:02d};{'+' if paid else '-'}{euros};{name[:2]}.{town[:2]};{item.split()[-1]}"


class Docstrings(Task):
    """MiniLM tells of which of twelve modules of the standard library a docstring is."""

    base, chosen_on = "MiniLM-L6", True
    layers, steps, batch = ["query", "key", "value"], 80, 16
    sharpness = 20.0  # cosine similarities are multiplied by it

    def __init__(self, *args):
        super().__init__(*args)
        texts = self._texts()
        kinds = sorted(texts, key=lambda name: (-len(texts[name]), name))[:12]
        with torch.no_grad():  # where the untouched encoder puts the names: the classes, never trained
            self.classes = self._embed([name.replace("_", " ") for name in kinds], self.frozen())
        rows = [(text, kind) for kind, name in enumerate(kinds) for text in texts[name][:80]]
        self.seen, self.unseen = rows[::2], rows[1::2]

    def frozen(self) -> nn.Module:
        return bases.minilm()[0]

    @staticmethod
    def _texts() -> dict[str, list[str]]:
        found = {}
        for path, source in bases.modules().items():
            texts = [text.split("\n\n")[0].replace("\n", " ") for text in bases.docstrings(source)]
            found[path] = list(dict.fromkeys(text for text in texts if len(text) > 20))
        return found

    def _embed(self, texts: list[str], model: nn.Module | None = None) -> Tensor:
        rows = bases.minilm()[1](texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
        hidden = (model or self.model)(**rows).last_hidden_state * rows.attention_mask[..., None]
        return F.normalize(hidden.sum(1) / rows.attention_mask.sum(1, keepdim=True), dim=-1)

    def _logits(self, texts: list[str]) -> Tensor:
        return self.sharpness * self._embed(texts) @ self.classes.T

    def loss(self, step: int) -> Tensor:
        which = torch.randint(0, len(self.seen), (self.batch,), generator=self.generator(step)).tolist()
        return F.cross_entropy(
            self._logits([self.seen[i][0] for i in which]), torch.tensor([self.seen[i][1] for i in which])
        )

    def held_out(self) -> float:
        logits, kinds = self._logits([text for text, _ in self.unseen]), torch.tensor([kind for _, kind in self.unseen])
        self._right = (logits.argmax(-1) == kinds).float().mean().item()
        return F.cross_entropy(logits, kinds).item()

    def right(self) -> float | None:
        return self._right

    def general(self) -> float:
        """How well the halves of 96 passages of Python's help find each other."""
        from pydoc_data.topics import topics

        words = [" ".join(text.split()).split() for _, text in sorted(topics.items())]
        passages = [text[40:100] for text in words if len(text) >= 100][:64]
        left, right = (self._embed([" ".join(p[half]) for p in passages]) for half in (slice(30), slice(30, 60)))
        return F.cross_entropy(self.sharpness * left @ right.T, torch.arange(len(passages))).item()


class DocstringsFew(Docstrings):
    """The same with an adapter on a third as many layers."""

    layers, chosen_on = ["query"], True


class DocstringsAll(Docstrings):
    """The same with an adapter on every linear layer, twice as many."""

    layers, chosen_on = ["query", "key", "value", "dense"], True


class Code(Docstrings):
    """MiniLM tells of which of twelve modules a line of code is."""

    chosen_on = False

    @staticmethod
    def _texts() -> dict[str, list[str]]:
        found = {}
        for path, source in bases.modules().items():
            lines = [" ".join(line.split()) for line in source.splitlines()]
            lines = list(dict.fromkeys(line for line in lines if len(line) > 40 and not line.startswith(("#", '"'))))
            found[path] = lines[:: max(1, len(lines) // 80)]
        return found


class Drawn(Task):
    """The embedded diffusion base learns an object from six drawings of it."""

    base, chosen_on = "drawn base", True
    layers, steps, batch = ["to_q", "to_k", "to_v", "to_out.0"], 120, 4

    def __init__(self, *args):
        super().__init__(*args)
        from equipoise.pipelines.demo import shapes

        self.alphas = bases.drawn()[4]
        grounds = ["white", "gray", "black"] * 6
        self.pictures = bases.encoded([(self.subject(), ground) for ground in grounds], 0)
        known = [shapes.shape(colour, name) for name in shapes.SHAPES for colour in list(shapes.COLOURS)[::2]]
        self.known = bases.encoded([(subject, ground) for subject, ground in zip(known, grounds, strict=True)], 1)

    def frozen(self) -> nn.Module:
        return bases.drawn()[0]

    @staticmethod
    def subject():
        from equipoise.pipelines.demo import shapes

        return shapes.OBJECT

    def _denoising(self, pictures: tuple[Tensor, Tensor, Tensor], which: Tensor, generator: torch.Generator) -> Tensor:
        clean, words = pictures[0][which], pictures[2][which]
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.randint(0, len(self.alphas), (len(which),), generator=generator)
        signal = self.alphas[times].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        return F.mse_loss(self.model(noisy, times, words).sample, noise)

    def loss(self, step: int) -> Tensor:
        generator = self.generator(step)
        which = torch.randint(0, 6, (self.batch,), generator=generator)
        return self._denoising(self.pictures, which, generator)

    def held_out(self) -> float:
        generator = torch.Generator().manual_seed(7)
        return statistics.fmean(self._denoising(self.pictures, torch.arange(6, 18), generator).item() for _ in range(8))

    def general(self) -> float:
        generator = torch.Generator().manual_seed(8)
        return statistics.fmean(self._denoising(self.known, torch.arange(18), generator).item() for _ in range(6))


class Emblem(Drawn):
    """The same with another object."""

    chosen_on = False

    @staticmethod
    def subject():
        from equipoise.pipelines.demo import shapes

        inner = shapes.SHAPES["star"] * 0.6
        parts = (shapes.Part(shapes.SHAPES["square"], 120.0), shapes.Part(inner, 285.0))
        return shapes.Subject(shapes.OBJECT.name, parts)


class Program(Task):
    """The byte-level GPT, which has read prose, learns the standard library's code."""

    base, chosen_on = "byte GPT", True
    layers, steps, batch = ["c_attn", "c_proj", "c_fc"], 150, 12

    def __init__(self, *args):
        super().__init__(*args)
        texts = bases.as_bytes(self._texts())
        self.seen, self.unseen = texts[::2], texts[1::2]

    def frozen(self) -> nn.Module:
        return bases.gpt()[0]

    @staticmethod
    def _texts() -> list[str]:
        return list(bases.modules().values())

    def loss(self, step: int) -> Tensor:
        rows = bases.windows(self.seen, self.batch, self.generator(step))
        return self.model(rows, labels=rows).loss

    def held_out(self) -> float:
        rows = bases.windows(self.unseen, 256, torch.Generator().manual_seed(7))
        return self.model(rows, labels=rows).loss.item()

    def general(self) -> float:
        rows = bases.windows(bases.gpt()[1], 256, torch.Generator().manual_seed(8))
        return self.model(rows, labels=rows).loss.item()


class Trees(Program):
    """The byte-level GPT learns how Python prints syntax trees."""

    chosen_on = False

    @staticmethod
    def _texts() -> list[str]:
        return [ast.dump(ast.parse(source))[:20_000] for source in bases.modules().values()]


TASKS = {
    task.__name__.lower(): task
    for task in (Orders, Bookings, Docstrings, DocstringsFew, DocstringsAll, Code, Drawn, Emblem, Program, Trees)
}
