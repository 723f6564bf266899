"""`equipoise prepare`: the manifest of a published data set, from the folders that it comes in."""

import argparse
import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path

from equipoise.errors import InputError
from equipoise.pipelines.files import explained, write_atomic

Row = dict[str, str]
VIDEOS = {".mp4", ".mkv", ".webm", ".avi", ".flv", ".mov"}
EMOTIONS = {"ANG": "anger", "DIS": "disgust", "FEA": "fear", "HAP": "happiness", "NEU": "neutral", "SAD": "sadness"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    known = "\n".join(f"  {name:<16} {(reader.__doc__ or '').splitlines()[0]}" for name, reader in SETS.items())
    parser.epilog = f"data sets, and what DIR holds:\n{known}"
    parser.add_argument("set", metavar="SET", help="which data set; see below")
    parser.add_argument("folder", metavar="DIR", type=Path, help="where it was unpacked")
    parser.add_argument("--output", type=Path, metavar="CSV", help="default: manifest.csv in DIR")


def run(args: argparse.Namespace) -> int:
    if args.set not in SETS:
        close = get_close_matches(args.set, SETS, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise InputError(f"prepare: no data set {args.set!r}. {hint}There are {', '.join(SETS)}.")
    if not args.folder.is_dir():
        raise InputError(f"prepare: {args.folder} is no folder. Give the one that {args.set} was unpacked into.")
    output = (args.output or args.folder / "manifest.csv").absolute()
    with explained(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    rows = list(SETS[args.set](args.folder.absolute(), output.parent))
    if not rows:
        wanted = (SETS[args.set].__doc__ or "").splitlines()[0]
        raise InputError(f"prepare: {args.folder} holds no clips of {args.set}. Expected are {wanted}")
    for row in rows:
        for column in ("audio", "frames", "video"):
            if row.get(column):
                row[column] = os.path.relpath(row[column], output.parent)
    columns = [
        c for c in ("clip", "audio", "frames", "video", "text", "label", "split") if any(c in row for row in rows)
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(output, text.getvalue())
    splits, labels = Counter(row["split"] for row in rows), {row["label"] for row in rows}
    counts = ", ".join(f"{count} {split}" for split, count in sorted(splits.items()))
    print(f"{len(rows)} clips of {len(labels)} classes ({counts}) in {output}")
    print(f"  next: equipoise train audio_visual/crema_d data={output}")
    return 0


def crema_d(folder: Path, output: Path) -> Iterator[Row]:
    """AudioWAV/ACTOR_SENTENCE_EMOTION_LEVEL.wav and VideoFlash/ with the same names in .flv.

    No split is published. As in the papers it is random over clips, a tenth each for val and test, here by the name's
    digest, so that it is the same everywhere; an actor may be in several.
    """
    for audio in sorted((folder / "AudioWAV").glob("*.wav")):
        parts = audio.stem.split("_")
        video = _named(folder / "VideoFlash", audio.stem)
        if len(parts) == 4 and parts[2] in EMOTIONS and video:
            split = {0: "test", 1: "val"}.get(_digest(audio.stem) % 10, "train")
            yield _row(audio.stem, EMOTIONS[parts[2]], split, audio=audio, video=video)


def ave(folder: Path, output: Path) -> Iterator[Row]:
    """AVE/ID.mp4, and trainSet.txt, valSet.txt and testSet.txt with lines of label&ID&quality&start&end."""
    for split in ("train", "val", "test"):
        for line in _lines(folder / f"{split}Set.txt"):
            label, name, *_ = [*line.split("&"), ""]
            if video := _named(folder / "AVE", name):
                yield _row(f"{split}-{name}", label, split, video=video)


def kinetics_sounds(folder: Path, output: Path) -> Iterator[Row]:
    """train/CLASS/*.mp4, val/CLASS/*.mp4 and test/CLASS/*.mp4."""
    for split in ("train", "val", "test"):
        for video in sorted((folder / split).glob("*/*")):
            if video.suffix.lower() in VIDEOS:
                yield _row(f"{split}/{video.parent.name}/{video.stem}", video.parent.name, split, video=video)


def vggsound(folder: Path, output: Path) -> Iterator[Row]:
    """vggsound.csv with lines of ID,start,label,split, and video/ID_START.mp4, the start in six digits."""
    for name, start, label, split in csv.reader(_lines(folder / "vggsound.csv")):
        clip = f"{name}_{int(start):06d}"
        if video := _named(folder / "video", clip):
            yield _row(clip, label, split, video=video)


def ur_funny(folder: Path, output: Path) -> Iterator[Row]:
    """urfunny2_videos/ID.mp4, and labels.csv with the columns id, text, label, split.

    The labels are published as pickle files, which can run any code when they are opened; export them once.
    """
    for row in csv.DictReader(_lines(folder / "labels.csv")):
        if video := _named(folder / "urfunny2_videos", row["id"]):
            label = {"0": "serious", "1": "funny"}.get(row["label"], row["label"])
            yield _row(row["id"], label, _split(row["split"]), video=video, text=row["text"])


def cmu_mosei(folder: Path, output: Path) -> Iterator[Row]:
    """Raw/VIDEO/CLIP.mp4, and label.csv with the columns video_id, clip_id, text, annotation, mode."""
    for row in csv.DictReader(_lines(folder / "label.csv")):
        if video := _named(folder / "Raw" / row["video_id"], row["clip_id"]):
            name = f"{row['video_id']}/{row['clip_id']}"
            yield _row(name, row["annotation"].lower(), _split(row["mode"]), video=video, text=row["text"])


def spoken_digits(folder: Path, output: Path) -> Iterator[Row]:
    """fsdd/recordings/DIGIT_SPEAKER_INDEX.wav, and mnist/ with gzipped images and labels (IDX), in AV-MNIST's manner.

    Every recording gets a picture of its digit, and no picture is used twice; recordings 0 to 4 are the test split.
    """
    import gzip

    import numpy as np
    from PIL import Image

    def read(pattern: str, header: int):
        files = sorted((folder / "mnist").glob(pattern))
        return np.frombuffer(gzip.decompress(files[0].read_bytes()), np.uint8, offset=header) if files else None

    pixels, labels = read("*images*.gz", 16), read("*labels*.gz", 8)
    if pixels is None or labels is None:
        return
    pictures = {digit: list(np.flatnonzero(labels == digit)) for digit in range(10)}
    place = output / "mnist-pictures"
    with explained(place):
        place.mkdir(parents=True, exist_ok=True)
    for audio in sorted((folder / "fsdd" / "recordings").glob("*.wav")):
        digit, _, index = audio.stem.split("_")
        if not pictures[int(digit)]:
            continue
        number = int(pictures[int(digit)].pop(0))
        picture = place / f"{number:05d}.png"
        with explained(picture):
            Image.fromarray(pixels[784 * number : 784 * (number + 1)].reshape(28, 28)).save(picture)
        yield _row(audio.stem, digit, "test" if int(index) < 5 else "train", audio=audio, frames=picture)


SETS: dict[str, Callable[[Path, Path], Iterator[Row]]] = {
    "crema-d": crema_d,
    "ave": ave,
    "kinetics-sounds": kinetics_sounds,
    "vggsound": vggsound,
    "ur-funny": ur_funny,
    "cmu-mosei": cmu_mosei,
    "spoken-digits": spoken_digits,
}


def _row(clip: str, label: str, split: str, text: str | None = None, **files: Path) -> Row:
    row = {"clip": clip, "label": label, "split": split, **{name: str(path) for name, path in files.items()}}
    return row if text is None else {**row, "text": text}


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError:
        return []
    except UnicodeDecodeError:
        raise InputError(f"prepare: {file} is not text in UTF-8.") from None


def _named(folder: Path, stem: str) -> Path | None:
    """The video of that name, whatever its format."""
    found = (folder / f"{stem}{suffix}" for suffix in sorted(VIDEOS))
    return next((path for path in found if path.is_file()), None)


def _split(name: str) -> str:
    return {"valid": "val", "validation": "val", "dev": "val"}.get(name.lower(), name.lower())


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2s(text.encode(), digest_size=4).digest(), "big")
