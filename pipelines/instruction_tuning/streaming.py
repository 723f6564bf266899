"""Conversations that do not fit in the memory: read as they are trained on, some at a time, in an order that is known
from the seed, so that a run which is stopped goes on exactly."""

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import torch

from equipoise.errors import InputError
from equipoise.pipelines.instruction_tuning.config import InstructionTuningConfig, InstructionTuningData
from equipoise.pipelines.instruction_tuning.data import (
    NAMES,
    Conversation,
    Kind,
    Reading,
    beside,
    mixed_kinds,
    read_examples,
    rows_of,
    sets_of_kinds,
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
    readers = _readers(data, talk)
    count = -(-max(LEAST_HELD, config.samples.count) // len(readers))
    if data.validation is not None:
        count = 0
        left: list[str] | None = [] if data.skip_bad else None
        options = {"asked": data.question, "unpacked": unpacked}
        held, problems = read_examples(
            data.validation, data.folder, True, "data.validation", talk.problems, left, **options
        )
        wrong += left or []
    kept: list[Conversation] = []
    apart: list[list[Conversation]] = []
    for reader in readers:
        first = reader.read(reader.rows(), count + -(-data.buffer // len(readers)), MediaFolder(unpacked))
        problems += reader.problems
        wrong += reader.wrong
        if not first[count:] and not reader.problems and not reader.wrong:
            problems.append(
                f"data.streaming: {reader.name} has {len(first)} conversations, of which the first {count} are held "
                "out. Give data.validation, or leave data.streaming out."
            )
        kept += first[count:]
        apart.append(first[:count])
    problems += _several_kinds(readers)
    # one of each data set in turn, for often only the first are judged
    return kept, held or [e for e in chain(*zip_longest(*apart)) if e is not None], problems, wrong


def _readers(data: InstructionTuningData, talk: Talk, seed: int | None = None) -> list["Reader"]:
    return [Reader(data, talk, seed, source) for source in range(1 + len(data.more))]


def _several_kinds(readers: Sequence["Reader"]) -> list[str]:
    """A sentence where one data set has pictures and another one sounds, as far as they were read."""
    if any(reader.problems for reader in readers):
        return []
    return sets_of_kinds([kind for kind in NAMES if any(kind in reader.first for reader in readers)])


class Reader:
    """Reads one data set's conversations in order."""

    def __init__(self, data: InstructionTuningData, talk: Talk, seed: int | None = None, source: int = 0):
        self.data, self.talk, self.seed, self.source = data, talk, seed, source
        self.name = [data.file, *data.more][source]
        self.problems: list[str] = []
        self.wrong: list[str] = []  # with single conversations
        self.first: dict[Kind, Row] = {}  # the first row of each kind
        self.files: list[Path] | None = None
        try:
            self.files = None if sources.is_hub(self.name) else sources.files(self.name)
        except InputError as error:
            self.problems.append(f"data.{'more' if source else 'file'}: {self.name} {error}")

    def rows(self, epoch: int = 0) -> Iterator[Row]:
        """All rows; with a seed each epoch's files in an order of its own."""
        if self.problems:
            return
        files = self.files
        if files is not None and self.seed is not None:
            source = torch.Generator().manual_seed(mix(self.seed, "files", epoch, *self._own))
            files = [files[index] for index in torch.randperm(len(files), generator=source)]
        yield from rows_of(self.name, files, streaming=True)

    def read(self, rows: Iterator[Row], count: int, media: MediaFolder) -> list[Conversation]:
        """The next conversations that can be used, fewer at the end of the rows."""
        data, found = self.data, []
        root = Path(data.folder) if data.folder else beside(Path(self.name)) if self.files else Path()
        while len(found) < count:
            some = list(islice(rows, count - len(found)))
            if not some:
                break
            several = len(self.files or ()) > 1
            reading = Reading(root, media, data.question, self.source, self.talk.problems, several)
            for row in some:
                reading.take(row)
            found += reading.usable(shown=self.seed is None)
            self.first = reading.first | self.first
            self.problems += reading.general + mixed_kinds(self.name, self.first)
            self.wrong += reading.lines()
            if self.problems:
                break
        return found

    @property
    def _own(self) -> list[int]:
        """What tells it from the first data set."""
        return [self.source] if self.source else []

    @property
    def digest(self) -> str:
        """What tells these files from others."""
        files = [(path.name, path.stat().st_size) for path in self.files or ()]
        return hashlib.blake2b(repr((self.name, files, *self._own)).encode(), digest_size=16).hexdigest()


class Source:
    """One data set as it is read on, epoch after epoch."""

    def __init__(self, reader: Reader, held: set[str]):
        self.reader, self.held = reader, held
        self.start = 0, 0  # (epoch, rows of it that were read)
        self._rows: Iterator[Row] = iter(())

    def go_to(self, epoch: int, skipped: int = 0) -> None:
        self.start = epoch, skipped
        self._rows = self._counted(islice(self.reader.rows(epoch), skipped, None))

    def read(
        self,
        wanted: int,
        media: MediaFolder,
        fits: Callable[[Reader, Conversation], bool],
        refuse: Callable[[Reader], object],  # is called after each part that was read, and may raise
    ) -> list[Conversation]:
        """The next conversations.

        Raises:
            InputError: two epochs have none that `fits` takes.
        """
        found: list[Conversation] = []
        empty = 0
        while len(found) < wanted:
            missing = wanted - len(found)
            read = self.reader.read(self._rows, missing, media)
            more = [example for example in read if fits(self.reader, example)]
            refuse(self.reader)
            found += more
            empty = 0 if more else empty
            if len(read) < missing:  # the next epoch follows
                empty += 0 if more else 1
                if empty > 1:
                    raise InputError(f"{self.reader.name}: no conversation is left to train on.")
                self.go_to(self.start[0] + 1)
        return found

    def _counted(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Of an epoch, those that are not held out."""
        for row in rows:
            self.start = self.start[0], self.start[1] + 1
            if row.where not in self.held:
                yield row


class Stream:
    """Training batches' conversations by number, of which only those of the last blocks are held.

    A block is `data.buffer` conversations as they come, in an order that is known from the seed and its number; epochs
    follow each other without a gap. Of several data sets each conversation is one by chance, as `data.weights` has it,
    and each goes on where the block before left off. Numbers that go back begin anew.
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
        apart = set() if config.data.validation is not None else {example.where for example in held}
        self.each = max(1, config.data.buffer // size)  # batches of a block
        # blocks of which batches may still be made: of a step, which some optimizers evaluate twice, and ahead
        self.reading = 2 + (config.train.accumulate - 1 + config.train.workers) // self.each
        self.sources = [Source(reader, apart) for reader in _readers(config.data, talk, config.seed)]
        # block → of each data set (epoch, rows of it that were read before)
        self.starts: dict[int, list[tuple[int, int]]] = {0: [(0, 0)] * len(self.sources)}
        self._blocks: dict[int, list[list[Conversation]]] = {}
        self._media: dict[int, Callable[[], object]] = {}  # block → what deletes its media
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

    @property
    def digest(self) -> str:
        """What tells these files, and the weights, from others."""
        first, *more = [source.reader.digest for source in self.sources]
        known = repr((first, more, self.config.data.weights))
        return hashlib.blake2b(known.encode(), digest_size=16).hexdigest() if more else first

    def state(self) -> dict[str, Any]:
        starts = {str(block): [list(start) for start in each] for block, each in self.starts.items()}
        seen = [source.reader.first for source in self.sources]
        kinds = [{kind: [str(row.file), row.at] for kind, row in first.items()} for first in seen]
        return {"starts": starts, "kinds": kinds}

    def restore(self, state: dict[str, Any]) -> None:
        for block, each in state["starts"].items():
            self.starts[int(block)] = [(start[0], start[1]) for start in each]
        for source, kinds in zip(self.sources, state["kinds"], strict=True):
            source.reader.first |= {kind: Row(file, at, None) for kind, (file, at) in kinds.items()}

    def close(self) -> None:
        """Deletes what media there are of it."""
        self._blocks.clear()
        while self._media:
            self._media.popitem()[1]()

    def _go_to(self, block: int) -> None:
        self._next = block
        for source, start in zip(self.sources, self.starts[block], strict=True):
            source.go_to(*start)

    def _read(self) -> None:
        block, wanted = self._next, self.each * self.size
        folder, self._media[block] = self._folder()
        found: list[Conversation] = []
        for source, count in zip(self.sources, self._counts(block, wanted), strict=True):
            found += source.read(count, MediaFolder(folder), self._fits, self._refuse)
        self._blocks[block] = self._ordered(found, block)
        self._next = block + 1
        self.starts[self._next] = [source.start for source in self.sources]
        for old in [number for number in self._blocks if not block - self.reading < number <= block]:
            del self._blocks[old]
            self._media.pop(old)()
        for old in [number for number in self.starts if 0 < number < block - self.reading]:
            del self.starts[old]

    def _counts(self, block: int, wanted: int) -> list[int]:
        """How many of a block's conversations are of each data set."""
        if len(self.sources) == 1:
            return [wanted]
        chance = torch.Generator().manual_seed(mix(self.config.seed, "data sets", block))
        chosen = torch.tensor(self.config.data.weights).multinomial(wanted, True, generator=chance)
        return chosen.bincount(minlength=len(self.sources)).tolist()

    def _fits(self, reader: Reader, example: Conversation) -> bool:
        """Whether a conversation can be trained on, as far as only its processor knows."""
        if self.limit is None and self.talk.max_tokens is None and not self.config.data.skip_bad:
            return True
        problem, _ = too_long(example, self.talk, self.limit)
        if problem:
            reader.wrong.append(problem)
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

    def _refuse(self, reader: Reader) -> None:
        """
        Raises:
            InputError: a data set cannot be read, or a conversation cannot be used and data.skip_bad is not set.
        """
        general = reader.problems or _several_kinds([source.reader for source in self.sources])
        if problems := general + ([] if self.config.data.skip_bad else reader.wrong):
            way = [] if general else ["data.skip_bad=true leaves out what cannot be used."]
            raise InputError("\n".join([*problems[:5], *way]))
        if reader.wrong:
            more = f"\nand {len(reader.wrong) - 5} more" if len(reader.wrong) > 5 else ""
            self.tell("left out, for it cannot be used:\n" + "\n".join(reader.wrong[:5]) + more)
            reader.wrong.clear()
