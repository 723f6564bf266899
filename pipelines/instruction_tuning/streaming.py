"""Conversations that do not fit in the memory: read as they are trained on, some at a time, in an order that is known
from the seed, so that a run which is stopped goes on exactly."""

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch

from equipoise.errors import InputError
from equipoise.pipelines.instruction_tuning.config import InstructionTuningConfig, InstructionTuningData
from equipoise.pipelines.instruction_tuning.data import (
    Conversation,
    Kind,
    Reading,
    beside,
    mixed_kinds,
    read_examples,
    rows_of,
)
from equipoise.pipelines.instruction_tuning.examples import too_long
from equipoise.pipelines.instruction_tuning.formats import sources
from equipoise.pipelines.instruction_tuning.formats.embedded import MediaFolder
from equipoise.pipelines.instruction_tuning.formats.rows import Row
from equipoise.pipelines.instruction_tuning.talk import Talk
from equipoise.pipelines.training.state import mix

LEAST_HELD = 64  # conversations at the beginning that are held out where no validation is given
_BATCHES = 50  # whose conversations are sorted by length together


def read_beginning(
    config: InstructionTuningConfig, talk: Talk, unpacked: Path
) -> tuple[list[Conversation], list[Conversation], list[str], list[str]]:
    """(the first conversations to train on, those that are held out, what is wrong with all, with single ones): all
    that is looked at before training."""
    data, wrong, problems, held = config.data, [], [], []
    count = max(LEAST_HELD, config.samples.count)
    if data.validation is not None:
        count = 0
        left: list[str] | None = [] if data.skip_bad else None
        options = {"asked": data.question, "unpacked": unpacked}
        held, problems = read_examples(
            data.validation, data.folder, True, "data.validation", talk.problems, left, **options
        )
        wrong += left or []
    reader = Reader(data, talk)
    first = reader.read(reader.rows(), count + data.buffer, MediaFolder(unpacked))
    problems += reader.problems
    held, kept = (held or first[:count]), first[count:]
    if not kept and not problems and not reader.wrong:
        problems.append(
            f"data.streaming: {data.file} has {len(first)} conversations, of which the first {count} are held out. "
            "Give data.validation, or leave data.streaming out."
        )
    return kept, held, problems, wrong + reader.wrong


class Reader:
    """Reads one data set's conversations in order."""

    def __init__(self, data: InstructionTuningData, talk: Talk, seed: int | None = None):
        self.data, self.talk, self.seed = data, talk, seed
        self.problems: list[str] = []
        self.wrong: list[str] = []  # with single conversations
        self.first: dict[Kind, Row] = {}  # the first row of each kind
        self.files: list[Path] | None = None
        try:
            self.files = None if sources.is_hub(data.file) else sources.files(data.file)
        except InputError as error:
            self.problems.append(f"data.file: {data.file} {error}")

    def rows(self, epoch: int = 0) -> Iterator[Row]:
        """All rows; with a seed each epoch's files in an order of its own."""
        if self.problems:
            return
        files = self.files
        if files is not None and self.seed is not None:
            source = torch.Generator().manual_seed(mix(self.seed, "files", epoch))
            files = [files[index] for index in torch.randperm(len(files), generator=source)]
        yield from rows_of(self.data.file, files, streaming=True)

    def read(self, rows: Iterator[Row], count: int, media: MediaFolder) -> list[Conversation]:
        """The next conversations that can be used, fewer at the end of the rows."""
        data, found = self.data, []
        root = Path(data.folder) if data.folder else beside(Path(data.file)) if self.files else Path()
        while len(found) < count:
            some = list(islice(rows, count - len(found)))
            if not some:
                break
            reading = Reading(root, media, data.question, 0, self.talk.problems, len(self.files or ()) > 1)
            for row in some:
                reading.take(row)
            found += reading.usable(shown=self.seed is None)
            self.first = reading.first | self.first
            self.problems += reading.general + mixed_kinds(data.file, self.first)
            self.wrong += reading.lines()
            if self.problems:
                break
        return found

    @property
    def digest(self) -> str:
        """What tells these files from others."""
        files = [(path.name, path.stat().st_size) for path in self.files or ()]
        return hashlib.blake2b(repr((self.data.file, files)).encode(), digest_size=16).hexdigest()


class Stream:
    """Training batches' conversations by number, of which only those of the last blocks are held.

    A block is `data.buffer` conversations as they come, in an order that is known from the seed and its number; epochs
    follow each other without a gap. Numbers that go back begin anew.
    """

    def __init__(
        self,
        config: InstructionTuningConfig,
        talk: Talk,
        held: list[Conversation],
        size: int,  # conversations of a batch, of all processes
        tell: Callable[[str], object],
        limit: int | None = None,  # the most tokens that the model has positions for
    ):
        self.config, self.talk, self.size, self.tell = config, talk, size, tell
        self.limit = limit
        self.held = set() if config.data.validation is not None else {example.where for example in held}
        self.each = max(1, config.data.buffer // size)  # batches of a block
        # blocks of which batches may still be made: of a step, which some optimizers evaluate twice, and ahead
        self.reading = 2 + (config.train.accumulate - 1 + config.train.workers) // self.each
        self.reader = Reader(config.data, talk, config.seed)
        self.starts: dict[int, tuple[int, int]] = {0: (0, 0)}  # block → (epoch, rows of it that were read before)
        self._blocks: dict[int, list[list[Conversation]]] = {}
        self._media: dict[int, Callable[[], object]] = {}  # block → what deletes its media
        self._rows: Iterator[Row] = iter(())
        self._next = -1  # the block that comes next; −1: nothing was read yet

    def batch(self, number: int) -> list[Conversation]:
        """The conversations of a batch, of all processes."""
        block, index = divmod(number, self.each)
        if block not in self._blocks:
            known = max(start for start in self.starts if start <= block)
            if not known <= self._next <= block:
                self._go_to(known)
            while block not in self._blocks:
                self._read()
        return self._blocks[block][index]

    def state(self) -> dict[str, list[int]]:
        return {str(block): list(start) for block, start in self.starts.items()}

    def restore(self, state: dict[str, list[int]]) -> None:
        self.starts |= {int(block): (start[0], start[1]) for block, start in state.items()}

    def close(self) -> None:
        """Deletes what media there are of it."""
        self._blocks.clear()
        while self._media:
            self._media.popitem()[1]()

    def _go_to(self, block: int) -> None:
        self._next = block
        self._epoch, skipped = self.starts[block]
        self._count = skipped
        self._rows = self._counted(islice(self.reader.rows(self._epoch), skipped, None))

    def _counted(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Of an epoch, those that are not held out."""
        for row in rows:
            self._count += 1
            if row.where not in self.held:
                yield row

    def _read(self) -> None:
        block, wanted = self._next, self.each * self.size
        folder, self._media[block] = self._folder()
        found: list[Conversation] = []
        empty = 0
        while len(found) < wanted:
            missing = wanted - len(found)
            read = self.reader.read(self._rows, missing, MediaFolder(folder))
            more = [example for example in read if self._fits(example)]
            self._refuse()
            found += more
            empty = 0 if more else empty
            if len(read) < missing:  # the next epoch follows
                empty += 0 if more else 1
                if empty > 2:
                    raise InputError(f"{self.config.data.file}: no conversation is left to train on.")
                self._epoch, self._count = self._epoch + 1, 0
                self._rows = self._counted(self.reader.rows(self._epoch))
        self._blocks[block] = self._ordered(found, block)
        self._next = block + 1
        self.starts[self._next] = (self._epoch, self._count)
        for old in [number for number in self._blocks if not block - self.reading < number <= block]:
            del self._blocks[old]
            self._media.pop(old)()
        for old in [number for number in self.starts if 0 < number < block - self.reading]:
            del self.starts[old]

    def _fits(self, example: Conversation) -> bool:
        """Whether a conversation can be trained on, as far as only its processor knows."""
        if self.limit is None and self.talk.max_tokens is None and not self.config.data.skip_bad:
            return True
        problem, _ = too_long(example, self.talk, self.limit)
        if problem:
            self.reader.wrong.append(problem)
        return not problem

    def _folder(self) -> tuple[Path, Callable[[], object]]:
        """A folder that goes with this object at the latest, and what deletes it sooner."""
        above = Path(self.config.runs) / ".cache"
        above.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="streamed-", dir=above))
        return folder, weakref.finalize(self, shutil.rmtree, folder, True)

    def _ordered(self, found: list[Conversation], block: int) -> list[list[Conversation]]:
        """Batches of similar length, in random order."""
        source = torch.Generator().manual_seed(mix(self.config.seed, "block", block))
        lengths = torch.tensor([self.talk.length(example) for example in found])
        order = torch.randperm(len(found), generator=source)
        parts = [part[lengths[part].argsort(stable=True)] for part in order.split(self.size * _BATCHES)]
        batches = [batch for part in parts for batch in part.split(self.size)]
        return [[found[i] for i in batches[at]] for at in torch.randperm(len(batches), generator=source).tolist()]

    def _refuse(self) -> None:
        """
        Raises:
            InputError: the data set cannot be read, or a conversation cannot be used and data.skip_bad is not set.
        """
        problems = self.reader.problems + ([] if self.config.data.skip_bad else self.reader.wrong)
        if problems:
            way = [] if self.reader.problems else ["data.skip_bad=true leaves out what cannot be used."]
            raise InputError("\n".join([*problems[:5], *way]))
        if self.reader.wrong:
            more = f"\nand {len(self.reader.wrong) - 5} more" if len(self.reader.wrong) > 5 else ""
            self.tell("left out, for it cannot be used:\n" + "\n".join(self.reader.wrong[:5]) + more)
            self.reader.wrong.clear()
