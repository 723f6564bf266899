"""`equipoise prepare`: a data set's files as what a pipeline trains on, or a look at conversations.

equipoise prepare SET DIR: manifests of audio-visual clips, questions about pictures and sounds, folders of pictures.
"""

# pydantic's sections are complete without arguments.
# pyright: reportCallIssue=false

import argparse
import csv
import hashlib
import io
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from equipoise.errors import InputError
from equipoise.pipelines.audio_visual.config import AudioVisualData
from equipoise.pipelines.audio_visual.data import SPLITS, held_out
from equipoise.pipelines.audio_visual.papers import RECIPES, configuration
from equipoise.pipelines.commands import conversations, pictures, question_sets
from equipoise.pipelines.commands.question_sets import table_of, text_of
from equipoise.pipelines.files import explained, user_path, write_atomic

Row = dict[str, str]  # a set's reader gives a str in its place for a clip that is left out: which, and why
_LISTED = 5  # of those
LOOKS = {conversations.NAME: conversations.show, pictures.NAME: pictures.show}  # into data sets of any name
VIDEOS = {".mp4", ".mkv", ".webm", ".avi", ".flv", ".mov"}
EMOTIONS = {"ANG": "anger", "DIS": "disgust", "FEA": "fear", "HAP": "happiness", "NEU": "neutral", "SAD": "sadness"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    asked = {name: read for name, (read, _) in question_sets.SETS.items()}
    readers = {**SETS, **asked, **LOOKS}
    known = "\n".join(f"  {name:<16} {(reader.__doc__ or '').splitlines()[0]}" for name, reader in readers.items())
    parser.epilog = f"Data sets, and what DIR holds:\n{known}"
    parser.add_argument("set", metavar="SET", help="The data set; see below.")
    parser.add_argument(
        "folder", metavar="DIR", type=user_path, help="The folder it was unpacked in; the conversations; the pictures."
    )
    parser.add_argument(
        "--output",
        type=user_path,
        metavar="CSV",
        help="The manifest to write (default: manifest.csv in DIR), or the folder of questions (default: DIR) or of "
        "pictures.",
    )
    conversations.add_arguments(parser)
    pictures.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.set in LOOKS:
        return LOOKS[args.set](args)
    if args.set not in SETS and args.set not in question_sets.SETS:
        known = [*SETS, *question_sets.SETS, *LOOKS]
        close = get_close_matches(args.set, known, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise InputError(f"prepare: no data set {args.set!r}. {hint}There are {', '.join(known)}.")
    if not args.folder.is_dir():
        raise InputError(f"prepare: {args.folder} is no folder. Give the one that {args.set} was unpacked into.")
    if args.set in question_sets.SETS:
        print(question_sets.write(args.set, args.folder.absolute(), (args.output or args.folder).absolute()))
        return 0
    output = (args.output or args.folder / "manifest.csv").absolute()
    with explained(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    found = list(SETS[args.set](args.folder.absolute(), output.parent))
    rows, left = [one for one in found if isinstance(one, dict)], [one for one in found if isinstance(one, str)]
    if not rows:
        wanted = (SETS[args.set].__doc__ or "").splitlines()[0]
        raise InputError(f"prepare: {args.folder} holds no clips of {args.set}. Expected are {wanted}")
    if odd := sorted({row["split"] for row in rows} - set(SPLITS)):
        raise InputError(f"prepare: {args.folder} has the split {', '.join(odd)}; there are {', '.join(SPLITS)}.")
    for row in rows:
        for column in ("audio", "frames", "video"):
            if row.get(column):
                row[column] = os.path.relpath(row[column], output.parent)
    columns = [
        c
        for c in ("clip", "audio", "frames", "video", "text", "start", "end", "label", "split")
        if any(c in row for row in rows)
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(output, text.getvalue())
    splits, labels = Counter(row["split"] for row in rows), {row["label"] for row in rows}
    counts = ", ".join(f"{count} {split}" for split, count in sorted(splits.items()))
    print(f"{len(rows)} clips of {len(labels)} classes ({counts}) in {output}")
    if left:
        more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
        print(f"  left out {len(left)} of {len(found)}: {'; '.join(left[:_LISTED])}{more}")
    if len(labels) != (most := RECIPES[args.set].classes):
        print(f"  {args.set} has {most} classes in the papers, and {len(labels)} here")
    file = output.with_suffix(".yaml")
    if os.path.lexists(file):
        print(f"  {file} is there already, and is left as it is")
    else:
        used = ", ".join(path.name for path in LISTS.get(args.set, lambda _: [])(args.folder)) or "folders and names"
        write_atomic(file, configuration(args.set, output, _trained(rows), used))
        print(f"  {file}: epochs, rate, seconds, fusion and objective as the papers have them")
    print(f"  next: equipoise train {shlex.quote(str(file))}")
    return 0


def _trained(rows: list[Row]) -> int:
    """The clips that training goes through: without a list to validate on, it holds some out."""
    labels = [row["label"] for row in rows if row["split"] == "train"]
    if any(row["split"] == "val" for row in rows):
        return len(labels)
    return len(labels) - sum(held_out(labels, AudioVisualData().validation).values())


def crema_d(folder: Path, output: Path) -> Iterator[Row | str]:
    """AudioWAV/ACTOR_SENTENCE_EMOTION_LEVEL.wav, and VideoFlash/ with the same names in .flv.

    In place of VideoFlash also Image-01-FPS/ with a folder of pictures per clip, as the code of OGM-GE extracts them.
    The data set comes without a split. Where train.csv and test.csv (lines of NAME,EMOTION, as in OGM-GE's repository;
    val.csv if there is one) lie in DIR, they are the split, and clips on neither are left out. Otherwise it is random
    over clips, a tenth each for val and test, by the name's digest, so that it is the same everywhere. In both, an
    actor is in several splits.
    """
    listed: dict[str, str] = {}
    for split in ("train", "val", "test"):
        listed |= {name: split for name, *_ in _lists(folder / f"{split}.csv", 2)}
    if listed and (absent := {"train", "test"} - set(listed.values())):
        there = " and ".join(f"{split}.csv" for split in dict.fromkeys(listed.values()))
        raise InputError(
            f"prepare: {folder} has {there} without {' and '.join(f'{split}.csv' for split in sorted(absent))}. "
            "Give train.csv and test.csv, or no list."
        )
    pictures = sorted(folder.glob("Image-*-FPS"))[:1]
    for audio in sorted((folder / "AudioWAV").glob("*.wav")):
        name = audio.stem
        parts = name.split("_")
        video = _named(folder / "VideoFlash", name)
        frames = next((folder / name for folder in pictures if (folder / name).is_dir()), None)
        visual = {"video": video} if video else {"frames": frames} if frames else None
        split = listed.get(name) if listed else {0: "test", 1: "val"}.get(_digest(name) % 10, "train")
        if len(parts) != 4 or parts[2] not in EMOTIONS:
            yield f"{audio.name} is not called ACTOR_SENTENCE_EMOTION_LEVEL"
        elif not visual:
            yield f"{name} has no video or pictures"
        elif not split:
            yield f"{name} is on no list"
        else:
            yield _row(name, EMOTIONS[parts[2]], split, audio=audio, **visual)


def ave(folder: Path, output: Path) -> Iterator[Row | str]:
    """AVE/ID.mp4, and trainSet.txt, valSet.txt and testSet.txt with lines of label&ID&quality&start&end.

    A video that is listed under two labels, as 45 are, is two clips. A clip is the event's own span.
    """
    for split in ("train", "val", "test"):
        for label, name, *more in _lists(folder / f"{split}Set.txt", 2, "&"):
            video = _named(folder / "AVE", name)
            if not video:
                yield f"{name} has no video"
                continue
            row = _row(f"{split}/{label}/{name}", label, split, video=video)
            yield {**row, "start": more[1], "end": more[2]} if len(more) >= 3 else row


def kinetics_sounds(folder: Path, output: Path) -> Iterator[Row | str]:
    """train/CLASS/*.mp4, val/CLASS/*.mp4 and test/CLASS/*.mp4."""
    for split in ("train", "val", "test"):
        for video in sorted((folder / split).glob("*/*")):
            if video.suffix.lower() in VIDEOS:
                yield _row(f"{split}/{video.parent.name}/{video.stem}", video.parent.name, split, video=video)


def vggsound(folder: Path, output: Path) -> Iterator[Row | str]:
    """vggsound.csv with lines of ID,start,label,split, and video/ID_START.mp4, the start in six digits or as it is."""
    for name, start, label, split in _lists(folder / "vggsound.csv", 4):
        clip = f"{name}_{start.zfill(6)}"
        video = _named(folder / "video", clip) or _named(folder / "video", f"{name}_{start}")
        yield _row(clip, label, split, video=video) if video else f"{clip} has no video"


def ur_funny(folder: Path, output: Path) -> Iterator[Row | str]:
    """urfunny2_videos/ID.mp4, and labels.csv with the columns id, text, label, split.

    The labels are published as pickle files, which can run any code when they are opened; docs/audio_visual.md has the
    lines that export them.
    """
    labels = folder / "labels.csv"
    if not labels.is_file() and (found := sorted(folder.rglob("humor_label_sdk.pkl"))):
        raise InputError(
            f"prepare: {found[0]} is a pickle file, which can run any code when it is opened, and {labels} is not "
            "there. Export the labels to it once, if you trust the files: docs/audio_visual.md has the lines."
        )
    for row in table_of(labels, "id", "text", "label", "split"):
        label = {"0": "serious", "1": "funny"}.get(row["label"], row["label"])
        if video := _named(folder / "urfunny2_videos", row["id"]):
            yield _row(row["id"], label, _split(row["split"]), row["text"], video=video)
        else:
            yield f"{row['id']} has no video"


def cmu_mosei(folder: Path, output: Path) -> Iterator[Row | str]:
    """Raw/VIDEO/CLIP.mp4, and label.csv with the columns video_id, clip_id, text, annotation, mode.

    That is the layout of MMSA's copy; the classes are its annotations: negative, neutral, positive.
    """
    for row in table_of(folder / "label.csv", "video_id", "clip_id", "text", "annotation", "mode"):
        name = f"{row['video_id']}/{row['clip_id']}"
        if video := _named(folder / "Raw" / row["video_id"], row["clip_id"]):
            yield _row(name, row["annotation"].lower(), _split(row["mode"]), row["text"], video=video)
        else:
            yield f"{name} has no video"


def av_mnist(folder: Path, output: Path) -> Iterator[Row | str]:
    """image/, audio/ with train_data.npy and test_data.npy, and train_labels.npy and test_labels.npy.

    That is the layout in which MultiBench has it: pictures of 28 × 28, of which PCA has taken three quarters of the
    energy, and spectrograms of 112 × 112. Both are written as files of their own; a tenth of the training clips,
    by the digest of their number, is val.
    """
    import numpy as np
    from PIL import Image

    for split in ("train", "test"):
        names = [f"image/{split}_data.npy", f"audio/{split}_data.npy", f"{split}_labels.npy"]
        if not all((folder / name).is_file() for name in names):
            return
        images, sounds, labels = (_array(folder / name) for name in names)
        if not len(images) == len(sounds) == len(labels) or sounds[0].size != 112**2 or images[0].size != 28**2:
            raise InputError(
                f"prepare: {folder}: wanted as many pictures of 28 × 28 as spectrograms of 112 × 112 and labels, got "
                f"{images.shape}, {sounds.shape} and {labels.shape}."
            )
        target = output / "av-mnist" / split
        with explained(target):
            target.mkdir(parents=True, exist_ok=True)
        scale = 255 if float(images.max()) <= 1 else 1
        for number, (image, sound, label) in enumerate(zip(images, sounds, labels, strict=True)):
            picture, audio = target / f"{number:05d}.png", target / f"{number:05d}.npy"
            with explained(picture):
                pixels = (scale * np.asarray(image, np.float64)).round().clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels.reshape(28, 28)).save(picture)
                np.save(audio, np.asarray(sound, np.float16).reshape(112, 112))
            part = "val" if split == "train" and _digest(str(number)) % 10 == 0 else split
            yield _row(f"{split}{number:05d}", str(int(label)), part, audio=audio, frames=picture)


def _array(file: Path) -> Any:
    """A NumPy file, read from disk as it is needed; never a pickled one, which could run code.

    Raises:
        InputError: It is none.
    """
    import numpy as np

    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"prepare: {file} cannot be read as a NumPy array ({error}).") from None


def spoken_digits(folder: Path, output: Path) -> Iterator[Row | str]:
    """fsdd/recordings/DIGIT_SPEAKER_INDEX.wav, and mnist/ with gzipped images and labels (IDX), in AV-MNIST's manner.

    Every recording gets a picture of its digit, and no picture is used twice; recordings 0 to 4 are the test split.
    """
    import gzip
    import zlib

    import numpy as np
    from PIL import Image

    def read(pattern: str, header: int):
        files = sorted((folder / "mnist").glob(pattern))
        try:
            return np.frombuffer(gzip.decompress(files[0].read_bytes()), np.uint8, offset=header) if files else None
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise InputError(f"prepare: {files[0]} is no gzipped file of IDX's ({error}).") from None

    pixels, labels = read("*images*.gz", 16), read("*labels*.gz", 8)
    if pixels is None or labels is None:
        return
    if len(pixels) != 784 * len(labels):
        raise InputError(f"prepare: {folder / 'mnist'} has {len(pixels) / 784:g} pictures and {len(labels)} labels.")
    pictures = {digit: list(np.flatnonzero(labels == digit)) for digit in range(10)}
    target = output / "mnist-pictures"
    with explained(target):
        target.mkdir(parents=True, exist_ok=True)
    for audio in sorted((folder / "fsdd" / "recordings").glob("*.wav")):
        digit, _, index = [*audio.stem.split("_"), "", ""][:3]
        if not index.isdecimal() or not pictures.get(int(digit) if digit.isdecimal() else -1):
            yield f"{audio.name} has no picture left, or is not called DIGIT_SPEAKER_INDEX"
            continue
        number = int(pictures[int(digit)].pop(0))
        picture = target / f"{number:05d}.png"
        with explained(picture):
            Image.fromarray(pixels[784 * number : 784 * (number + 1)].reshape(28, 28)).save(picture)
        yield _row(audio.stem, digit, "test" if int(index) < 5 else "train", audio=audio, frames=picture)


def spoken_written_digits(folder: Path, output: Path) -> Iterator[Row | str]:
    """As spoken-digits, with each digit's name in some language beside.

    The test is of what training has not met: the speaker that is last by name, LANGUAGES of its own, and of their names
    for digits those that are spelled otherwise than any in training; so is val, with the speaker before.
    """
    names = _digit_names()
    found = list(spoken_digits(folder, output))
    speakers = sorted({row["clip"].split("_")[1] for row in found if isinstance(row, dict)})
    if found and len(speakers) < 3:
        raise InputError(
            f"prepare: {folder / 'fsdd'} has {len(speakers)} speaker(s). Train, val and test need one each."
        )
    splits = dict.fromkeys(speakers, "train") | dict(zip(speakers[-2:], ("val", "test"), strict=True))
    used: Counter[tuple[str, str]] = Counter()  # clips of a split and a digit so far
    for row in found:
        if isinstance(row, str):
            yield row
            continue
        digit, speaker, *_ = row["clip"].split("_")
        split = splits[speaker]
        choice = names[split][int(digit)]
        yield {**row, "split": split, "text": choice[used[split, digit] % len(choice)]}
        used[split, digit] += 1


LANGUAGES = {  # in Latin letters, as num2words calls them; those of val and test have relatives in train
    "train": "az ca cs cy de en fi fr hu id is it lt pl ro sr sv tet vi".split(),
    "val": "da eo pt sl".split(),
    "test": "es lv nl no sk tr".split(),
}


def _digit_names() -> dict[str, list[list[str]]]:
    """Split → digit → its names."""
    from num2words import num2words

    every = {s: [[num2words(d, lang=name) for name in names] for d in range(10)] for s, names in LANGUAGES.items()}
    known = {name for names in every["train"] for name in names}
    unseen = {s: [[n for n in names if n not in known] for names in every[s]] for s in ("val", "test")}
    return every | unseen


SETS: dict[str, Callable[[Path, Path], Iterator[Row | str]]] = {
    "crema-d": crema_d,
    "ave": ave,
    "kinetics-sounds": kinetics_sounds,
    "vggsound": vggsound,
    "ur-funny": ur_funny,
    "cmu-mosei": cmu_mosei,
    "av-mnist": av_mnist,
    "spoken-digits": spoken_digits,
    "spoken-written-digits": spoken_written_digits,
}

LISTS: dict[str, Callable[[Path], list[Path]]] = {  # the files that splits come from, as far as they are there
    "crema-d": lambda folder: [file for s in SPLITS if (file := folder / f"{s}.csv").is_file()],
    "ave": lambda folder: [file for s in SPLITS if (file := folder / f"{s}Set.txt").is_file()],
    "vggsound": lambda folder: [folder / "vggsound.csv"],
    "ur-funny": lambda folder: [folder / "labels.csv"],
    "cmu-mosei": lambda folder: [folder / "label.csv"],
}


def _row(clip: str, label: str, split: str, text: str | None = None, /, **files: Path) -> Row:
    row = {"clip": clip, "label": label, "split": split, **{name: str(path) for name, path in files.items()}}
    return row if text is None else {**row, "text": text}


def _lists(file: Path, least: int, between: str = ",") -> Iterator[list[str]]:
    """The lines' cells, of which there are at least so many."""
    reader = csv.reader(io.StringIO(text_of(file), newline=""), delimiter=between)
    for cells in _sound(file, reader):
        if cells and len(cells) < least:
            raise InputError(f"prepare: {file}:{reader.line_num}: wanted {least} cells or more, got {len(cells)}.")
        if cells:
            yield [cell.strip() for cell in cells]


def _sound(file: Path, reader: Any) -> Iterator[Any]:
    try:
        yield from reader
    except csv.Error as error:
        raise InputError(f"prepare: {file}:{reader.line_num}: cannot be read as CSV ({error}).") from None


def _named(folder: Path, stem: str) -> Path | None:
    """The video of that name, whatever its format."""
    found = (folder / f"{stem}{suffix}" for suffix in sorted(VIDEOS))
    return next((path for path in found if path.is_file()), None)


def _split(name: str) -> str:
    return {"valid": "val", "validation": "val", "dev": "val"}.get(name.lower(), name.lower())


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2s(text.encode(), digest_size=4).digest(), "big")
