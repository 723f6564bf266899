"""Data sets of questions and captions as conversations for instruction tuning: a JSONL file for each split."""

import csv
import hashlib
import io
import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from equipoise.errors import InputError
from equipoise.pipelines.files import explained, write_atomic

LISTED = 5  # of what is left out
SPLITS = ("train", "val", "test")
DESCRIBE = {"sound": "Describe the sound.", "music": "Describe the music."}


class Asked(NamedTuple):
    """A question about a medium, and what people answered."""

    split: str
    kind: str  # image or audio
    medium: Path
    question: str
    answers: list[str]


Found = Iterator[Asked | str]  # a str in place of what is left out: which, and why


def a_okvqa(folder: Path) -> Found:
    """aokvqa_v1p0_train.json and _val.json, and COCO's train2017/ and val2017/ (or below coco/); direct answers."""
    for split in ("train", "val"):
        for row in _json(folder / f"aokvqa_v1p0_{split}.json", []):
            picture = f"{split}2017/{row['image_id']:012}.jpg"
            yield _there(row["question_id"], split, "image", folder, (picture, f"coco/{picture}"), row["question"],
                         row["direct_answers"])  # fmt: skip


def iconqa(folder: Path) -> Found:
    """problems.json, pid_splits.json and iconqa/SPLIT/KIND/ID/image.png (or all of it below iconqa_data/).

    Blanks to fill in, and choices among texts, which the question then lists. Choices among pictures are left out:
    their answer is no text.
    """
    root = folder / "iconqa_data" if (folder / "iconqa_data").is_dir() else folder
    problems = _json(root / "problems.json", {})
    for split in SPLITS:
        for number in _json(root / "pid_splits.json", {}).get(split, ()):
            problem = problems[number]
            kind, question, answer = problem["ques_type"], problem["question"], problem["answer"]
            if kind == "choose_img":
                yield f"{number} is a choice among pictures"
                continue
            if kind == "choose_txt":
                question, answer = f"{question}\nChoices: {', '.join(problem['choices'])}", problem["choices"][answer]
            picture = f"iconqa/{split}/{kind}/{number}/image.png"
            yield _there(number, split, "image", root, (picture,), question, [str(answer)])


def textvqa(folder: Path) -> Found:
    """TextVQA_0.5.1_train.json and _val.json, and train_images/ID.jpg for both."""
    for split in ("train", "val"):
        for row in _json(folder / f"TextVQA_0.5.1_{split}.json", {"data": []})["data"]:
            picture = f"train_images/{row['image_id']}.jpg"
            yield _there(row["question_id"], split, "image", folder, (picture,), row["question"], row["answers"])


def clothoaqa(folder: Path) -> Found:
    """clotho_aqa_train.csv, _val.csv and _test.csv with the columns file_name, QuestionText, answer, and audio_files/.

    Three people answer each question, in a row each.
    """
    for split in SPLITS:
        rows = table_of(folder / f"clotho_aqa_{split}.csv", "file_name", "QuestionText", "answer")
        asked = sorted(rows, key=lambda row: (row["file_name"], row["QuestionText"]))  # stable: answers stay in order
        for (name, question), same in groupby(asked, key=lambda row: (row["file_name"], row["QuestionText"])):
            answers = [row["answer"] for row in same]
            yield _there(name, split, "audio", folder, (f"audio_files/{name}",), question, answers)


def macs(folder: Path) -> Found:
    """MACS.yaml, and audio/ of TAU Urban Acoustic Scenes 2019 (or TAU-urban-acoustic-scenes-2019-development/audio/).

    Captions, two to five of each sound. It comes without a split: a tenth each is for val and test, by the place that
    was recorded, which is in the name.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # of a file of 17 MB, in seconds
    try:
        found = yaml.load(text_of(folder / "MACS.yaml"), loader) or {"files": []}
        files = [(row["filename"], [str(one["sentence"]) for one in row["annotations"]]) for row in found["files"]]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(f"prepare: {folder / 'MACS.yaml'} is not as published ({error!r:.200}).") from None
    for name, captions in files:
        split = _split("-".join(name.split("-")[:3]))
        places = (f"audio/{name}", f"TAU-urban-acoustic-scenes-2019-development/audio/{name}")
        yield from _captioned(name, split, folder, places, DESCRIBE["sound"], captions)


def sdd(folder: Path) -> Found:
    """song_describer.csv with the columns caption, is_valid_subset, artist_id, path, and audio/NN/ID.2min.mp3.

    The captions of its valid subset. It was made to be judged by and comes without a split: a tenth each is for val and
    test, by artist. The excerpts last two minutes, which is longer than most models listen.
    """
    rows = table_of(folder / "song_describer.csv", "caption", "is_valid_subset", "artist_id", "path")
    valid = [row for row in rows if row["is_valid_subset"].strip().lower() == "true"]
    chosen = sorted(valid, key=lambda row: row["path"])
    for (name, artist), same in groupby(chosen, key=lambda row: (row["path"], row["artist_id"])):
        stem = name.removesuffix(".mp3").removesuffix(".2min")
        places = [f"{above}/{stem}{end}" for above in ("audio", "audio/audio") for end in (".2min.mp3", ".mp3")]
        captions = [row["caption"] for row in same]
        yield from _captioned(name, _split(artist), folder, places, DESCRIBE["music"], captions)


SETS: dict[str, tuple[Callable[[Path], Found], str]] = {  # with samples.metric
    "a-okvqa": (a_okvqa, "vqa"),
    "iconqa": (iconqa, "exact"),
    "textvqa": (textvqa, "vqa"),
    "clothoaqa": (clothoaqa, "exact"),
    "macs": (macs, "rouge_l"),
    "sdd": (sdd, "rouge_l"),
}


def write(name: str, folder: Path, output: Path) -> str:
    """Writes the splits of a data set into `output`, and gives what to say of it.

    Raises:
        InputError: there is nothing of it, or its files are not as published.
    """
    read, metric = SETS[name]
    try:
        found = list(read(folder))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"prepare: {folder} is not {name} as published ({error!r:.200}).") from None
    asked, left = [one for one in found if isinstance(one, Asked)], [one for one in found if isinstance(one, str)]
    if not asked:
        missing, wanted = f" ({left[0]})" if left else "", (read.__doc__ or "").splitlines()[0]
        raise InputError(f"prepare: {folder} holds nothing of {name}{missing}. Expected are {wanted}")
    lines: dict[str, list[str]] = {}
    for one in asked:
        record = {one.kind: os.path.relpath(one.medium, output), "question": one.question, "answers": one.answers}
        lines.setdefault(one.split, []).append(json.dumps(record, ensure_ascii=False) + "\n")
    if there := [name for split in lines if os.path.lexists(output / (name := f"{split}.jsonl"))]:
        raise InputError(
            f"prepare: {output} has {' and '.join(there)} already, and nothing is overwritten. Give another folder by "
            "--output, or move them away."
        )
    with explained(output):
        output.mkdir(parents=True, exist_ok=True)
    for split, some in lines.items():
        write_atomic(output / f"{split}.jsonl", "".join(some))
    counts = Counter(one.split for one in asked)
    text = f"{len(asked):,} questions ({', '.join(f'{counts[s]:,} {s}' for s in SPLITS if s in counts)}) in {output}"
    if left:
        more = f" and {len(left) - LISTED:,} more" if len(left) > LISTED else ""
        text += f"\n  left out {len(left):,} of {len(found):,}: {'; '.join(left[:LISTED])}{more}"
    words = [f"data={output / 'train.jsonl'}", f"samples.metric={metric}"]
    words[1:1] = [f"data.validation={output / 'val.jsonl'}"] if "val" in counts else []
    return f"{text}\n  next: equipoise train instruction_tuning/demo model=… {shlex.join(words)}"


def _there(
    name: str, split: str, kind: str, folder: Path, places: Sequence[str], question: str, answers: list[str]
) -> Asked | str:
    medium = next((folder / place for place in places if (folder / place).is_file()), None)
    given = [text for one in answers if (text := one.strip())]
    if medium is None:
        return f"{name} has no {places[0]}"
    return Asked(split, kind, medium, question.strip(), given) if given else f"{name} has no answer"


def _captioned(name: str, split: str, folder: Path, places: Sequence[str], question: str, captions: list[str]) -> Found:
    """To train on each caption, or to be judged by all of them."""
    for some in [[one] for one in captions] if split == "train" else [captions]:
        yield _there(name, split, "audio", folder, places, question, some)


def _split(group: str) -> str:
    """The same everywhere, and for all of a group."""
    digest = int.from_bytes(hashlib.blake2s(group.encode(), digest_size=4).digest(), "big")
    return {0: "test", 1: "val"}.get(digest % 10, "train")


def text_of(file: Path) -> str:
    """Nothing where there is no such file."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError:
        raise InputError(f"prepare: {file} is not text in UTF-8.") from None


def _json(file: Path, without: Any) -> Any:
    """What a file holds; where there is none, `without`."""
    try:
        return json.loads(text) if (text := text_of(file)) else without
    except (ValueError, RecursionError) as error:
        raise InputError(f"prepare: {file} is not JSON ({error}).") from None


def table_of(file: Path, *columns: str) -> Iterator[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(text_of(file), newline=""))
    if missing := [column for column in columns if reader.fieldnames and column not in reader.fieldnames]:
        raise InputError(f"prepare: {file}: has no column {', '.join(missing)}. It needs {', '.join(columns)}.")
    try:
        for row in reader:
            yield {column: row[column] or "" for column in columns}
    except csv.Error as error:
        raise InputError(f"prepare: {file}:{reader.line_num}: cannot be read as CSV ({error}).") from None
