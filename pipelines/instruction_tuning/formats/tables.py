"""Tables of conversations: Parquet, Arrow, folders that `datasets` saved, and data sets of the Hugging Face hub.

Rows are read a few at a time, as they are stored: pictures and sounds stay the bytes that they are.
"""

import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.errors import InputError
from equipoise.pipelines.instruction_tuning.formats.rows import FileError, Row

if TYPE_CHECKING:
    import pyarrow

HUB = "hub:"  # before the name of a data set at the hub: a path that is mistyped asks no network
_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::([\w.:\[\]%-]+))?(?:@([\w./-]+))?")
_AT_ONCE = 32  # rows


def parquet(file: Path) -> Iterator[Row]:
    _needed("pyarrow")
    from pyarrow.parquet import ParquetFile

    def batches() -> Iterator["pyarrow.RecordBatch"]:
        with ParquetFile(file, memory_map=True) as opened:
            yield from opened.iter_batches(_AT_ONCE)

    yield from _rows(file, batches())


def arrow(file: Path) -> Iterator[Row]:
    """Either of Arrow's two formats: the stream, which `datasets` writes, and the file, Feather's."""
    _needed("pyarrow")
    from pyarrow import ipc, memory_map

    def batches() -> Iterator["pyarrow.RecordBatch"]:
        with memory_map(str(file)) as opened:
            if opened.read(6) == b"ARROW1":
                whole = ipc.open_file(opened)
                yield from (whole.get_batch(number) for number in range(whole.num_record_batches))
            else:
                opened.seek(0)
                yield from ipc.open_stream(opened)

    yield from _rows(file, batches())


def hub(name: str, streaming: bool = False) -> Iterator[Row]:
    """A data set of the hub, `hub:OWNER/NAME/CONFIGURATION:SPLIT@REVISION`, from this machine's cache if it is there;
    with `streaming` as it comes, without keeping it.

    Raises:
        InputError: it cannot be had.
    """
    if not (found := _NAME.fullmatch(name)):
        raise InputError("must be hub:OWNER/NAME, with /CONFIGURATION, :SPLIT and @REVISION behind it if wanted.")
    _needed("datasets")
    import datasets

    repository, configuration, split, revision = found.groups()
    try:
        options: dict[str, Any] = {"streaming": True} if streaming else {}
        made = datasets.load_dataset(repository, configuration, split=split or "train", revision=revision, **options)
        batches = made.with_format("arrow").iter(_AT_ONCE)  # as stored: nothing is decoded
    except Exception as error:  # of the network, of the hub, of a repository that holds something else
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise InputError(f"cannot be read from the hub ({reason}).") from None
    yield from _rows(name, batches)


def saved(folder: Path) -> list[Path] | None:
    """The files of a folder that `Dataset.save_to_disk` wrote, in their order; None where it is none.

    Raises:
        InputError: there are several splits in it, or it is damaged.
    """
    import json

    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        shown = " or ".join(str(folder / split) for split in splits) or "the folder of a split"
        raise InputError(f"holds the splits of a data set. Give {shown}.")
    if not (folder / "state.json").is_file():
        return None
    try:
        names = [part["filename"] for part in json.loads((folder / "state.json").read_text())["_data_files"]]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise InputError(f"is not as `datasets` saves it: state.json cannot be read ({error!r}).") from None
    if not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise InputError("is not as `datasets` saves it: state.json names files that are elsewhere.")
    return [folder / name for name in names]


def _rows(file: Path | str, batches: Iterable[Any]) -> Iterator[Row]:
    """The rows of batches of a table, counted from 1."""
    import pyarrow

    number = 0
    try:
        for batch in batches:
            for start in range(0, batch.num_rows, _AT_ONCE):
                for record in batch.slice(start, _AT_ONCE).to_pylist():
                    number += 1
                    yield Row(file, f"row {number}", record)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        yield Row(file, f"row {number + 1}", FileError(f"cannot be read from here on ({reason})."))


def _needed(package: str) -> None:
    if not find_spec(package):
        raise InputError(f"needs the package {package}, which is not installed. pip install 'equipoise[data]'.")
