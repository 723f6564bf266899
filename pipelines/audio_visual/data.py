"""The manifest: one CSV line per clip, with where its sound, pictures and text are, its label and its split.

Columns: `label` and `split` (train, val or test); `audio` (a sound file), `frames` (a folder of pictures, or one
picture), `video` (a file that gives what the other two do not), `text` or `text_file` (a file that holds it), each as
far as the modalities want it; `start` and `end`, the seconds of the files that the clip is; and `clip`, a name. Paths
start in the manifest's folder.
"""

import csv
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from equipoise.pipelines.audio_visual.config import AudioVisualData
from equipoise.pipelines.files import first_line

COLUMNS = ("clip", "audio", "frames", "video", "text", "text_file", "start", "end", "label", "split")
SPLITS = ("train", "val", "test")
NEEDED = {  # modality → any of these
    "audio": ("audio", "video"),
    "visual": ("frames", "video"),
    "text": ("text", "text_file"),
}


@dataclass(frozen=True)
class Clip:
    line: int  # in the manifest
    name: str
    label: str
    split: str
    audio: Path | None
    frames: Path | None
    video: Path | None
    text: str | None
    start: float | None = None  # seconds of the files, where the clip is not all of them
    end: float | None = None


@dataclass
class Manifest:
    path: Path
    columns: set[str] = field(default_factory=set)
    clips: list[Clip] = field(default_factory=list)  # those without a problem
    problems: list[str] = field(default_factory=list)  # of the manifest as a whole: nothing can be trained
    bad: dict[int, str] = field(default_factory=dict)  # line → what is wrong with its clip
    spoilt: list[Clip] = field(default_factory=list)  # the clips with a problem

    @property
    def classes(self) -> list[str]:
        return sorted({clip.label for clip in self.clips})

    def split(self, name: str) -> list[Clip]:
        return [clip for clip in self.clips if clip.split == name]

    @property
    def digest(self) -> str:
        """Of the clips' names, classes and splits: what decides which batches there are."""
        listed = [(clip.name, clip.label, clip.split) for clip in self.clips]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def sentences(self) -> list[str]:
        """Everything that is wrong, in the order of the lines."""
        return self.problems + [f"{self.path}:{line}: {text}" for line, text in sorted(self.bad.items())]

    def leave_out(self, wrong: dict[int, str]) -> None:
        """Clips by line, each with what is wrong with it, perhaps beside what was known."""
        self.bad |= {line: " ".join(filter(None, [self.bad.get(line), text])) for line, text in wrong.items()}
        self.spoilt += [clip for clip in self.clips if clip.line in self.bad]
        self.clips = [clip for clip in self.clips if clip.line not in self.bad]


def read_manifest(
    data: AudioVisualData,
    path: Path,
    needed: Sequence[str] = ("label", "split"),  # columns that there have to be; the other one is not judged
) -> Manifest:
    """The clips, and everything about them that can be said without decoding."""
    found = Manifest(path)
    if not os.path.isfile(path):  # unlike pathlib's, False also where no path can be so long
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        found.problems.append(
            f"data.manifest: {path} {what}. Give a CSV file, such as `equipoise prepare` writes, or demo."
        )
        return found
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restkey="")
            columns = [(column or "").strip() for column in reader.fieldnames or ()]
            reader.fieldnames = columns
            found.columns = set(columns)
            found.problems += _column_problems(path, columns, data, needed)
            rows = [(first_line(reader, row.values()), row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        found.problems.append(f"{path}: cannot be read as CSV in UTF-8 ({error}).")
        return found
    except OSError as error:
        found.problems.append(f"data.manifest: {path} cannot be read: {error.strerror or error}.")
        return found
    names: dict[str, int] = {}
    for line, row in rows:
        cells = {k: (v or "").strip() for k, v in row.items() if k}
        clip, problems = _read_row(path.parent, line, cells, row, data, needed)
        if clip.name in names:
            hint = "" if row.get("clip") else ", in a column clip"
            problems.append(
                f"The clip {clip.name} is on line {names[clip.name]} already; every clip needs a name of its own{hint}."
            )
        names.setdefault(clip.name, line)
        found.clips.append(clip)
        if problems:
            found.bad[line] = " ".join(dict.fromkeys(problems))
    found.leave_out({})
    return found


def _column_problems(path: Path, columns: Sequence[str], data: AudioVisualData, needed: Sequence[str]) -> list[str]:
    problems = []
    for column in columns:
        if column not in COLUMNS:
            close = get_close_matches(column, COLUMNS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" The columns are {', '.join(COLUMNS)}."
            problems.append(f"{path}:1: unknown column {column!r}.{hint}")
    if twice := [column for column, count in Counter(columns).items() if count > 1]:
        problems.append(f"{path}:1: the column {', '.join(twice)} is there twice.")
    problems += [f"{path}:1: there is no column {c!r}." for c in needed if c not in columns]
    for modality in data.modalities:
        if not set(NEEDED[modality]) & set(columns):
            wanted = " or ".join(map(repr, NEEDED[modality]))
            problems.append(
                f"{path}:1: the modality {modality} needs a column {wanted}; data.modalities leaves it out."
            )
    return problems


def _read_row(
    folder: Path, line: int, row: dict[str, str], raw: dict, data: AudioVisualData, needed: Sequence[str]
) -> tuple[Clip, list[str]]:
    """The clip, and what is wrong with its cells; columns that are not there at all are the manifest's problem."""

    def file(column: str) -> Path | None:
        return folder / row[column] if row.get(column) else None

    audio, frames, video = file("audio"), file("frames"), file("video")
    problems = []
    text, (start, end) = _text(folder, row, data, problems), _times(row, problems)
    name = row.get("clip") or next((str(row[c]) for c in ("video", "audio", "frames") if row.get(c)), f"line {line}")
    clip = Clip(line, name, row.get("label", ""), row.get("split", ""), audio, frames, video, text, start, end)
    if raw.get(""):
        problems.append("has more cells than there are columns.")
    if "label" in needed and row.get("label") == "":
        problems.append("has no label.")
    if "split" in needed and "split" in row and clip.split not in SPLITS:
        problems.append(f"the split must be train, val or test, got {clip.split or 'nothing'}.")
    if data.missing == "mask" and not any(row.get(column) for name in data.modalities for column in NEEDED[name]):
        problems.append(f"has nothing for any of the modalities {', '.join(data.modalities)}.")
    for modality in data.modalities:
        given = [column for column in NEEDED[modality] if row.get(column)]
        if not given and set(NEEDED[modality]) & row.keys() and data.missing == "refuse":
            problems.append(f"has nothing in {' or '.join(NEEDED[modality])} for the modality {modality}.")
        elif given and given[0] != "text" and not os.path.exists(folder / row[given[0]]):
            problems.append(f"{row[given[0]]} does not exist.")
    return clip, problems


def _text(folder: Path, row: dict[str, str], data: AudioVisualData, problems: list[str]) -> str | None:
    """The clip's text, from its cell or its file."""
    if row.get("text") or not row.get("text_file") or "text" not in data.modalities:
        return row.get("text") or None
    file = folder / row["text_file"]
    try:
        if text := file.read_text(encoding="utf-8-sig").strip():
            return text
        if data.missing == "refuse":
            problems.append(f"{row['text_file']} holds no text.")
    except FileNotFoundError:
        return None  # said with the files of the other modalities
    except UnicodeDecodeError:
        problems.append(f"{row['text_file']} is not text in UTF-8.")
    except OSError as error:
        problems.append(f"{row['text_file']} cannot be read: {error.strerror or error}.")
    return None


def _times(row: dict[str, str], problems: list[str]) -> tuple[float | None, float | None]:
    """Where the clip begins and ends in its files."""
    found: dict[str, float | None] = {}
    for column in ("start", "end"):
        try:
            found[column] = float(row[column]) if row.get(column) else None
            if not 0 <= (found[column] or 0) < math.inf:
                raise ValueError
        except ValueError:
            found[column] = None
            problems.append(f"{column} must be seconds from 0 on, got {row[column]}.")
    if found["end"] is not None and found["end"] <= (found["start"] or 0):
        problems.append(f"its end, {found['end']:g} s, is not after its start, {found['start'] or 0:g} s.")
    return found["start"], found["end"]


def settle(manifest: Manifest, skip_bad: bool) -> None:
    """What only the clips together can be wrong about, once those that cannot be used are known.

    Args:
        skip_bad: whether training goes on without those, so that what they have in common may be missing.
    """
    if not {"label", "split"} <= manifest.columns:
        return
    every = [*manifest.clips, *manifest.spoilt]
    counted = manifest.clips if skip_bad else every
    train = {clip.label for clip in counted if clip.split == "train" and clip.label}
    known = {clip.label for clip in every if clip.split == "train"}
    for split in ("val", "test"):
        wrong = {
            clip.line: f"its class {clip.label!r} has no usable clip in the split train."
            if clip.label in known
            else f"its class {clip.label!r} is in the split {split} and not in train."
            for clip in manifest.split(split)
            if clip.label not in train
        }
        if train:
            manifest.leave_out(wrong)
    for split in ("train", "test"):
        if not any(clip.split == split for clip in counted):
            manifest.problems.append(f"{manifest.path}: there is no usable clip in the split {split}.")
    if len(train) == 1:
        manifest.problems.append(
            f"{manifest.path}: there is one class only, {', '.join(train)}; nothing can be told apart."
        )


def lacking(
    manifest: Manifest,
    splits: Mapping[str, Sequence[Clip]],
    given: Mapping[int, frozenset[str]],  # line → the modalities of its clip
    modalities: Sequence[str],
) -> list[str]:
    """The modalities that no clip of a split has, where clips may lack some: nothing could be said of their losses."""
    drawn = "" if manifest.split("val") else " data.validation drew it by chance; name a split val that has some."
    return [
        f"{manifest.path}: no clip of the split {split} has the modality {modality}.{drawn * (split != 'test')}"
        for modality in modalities
        for split, clips in splits.items()
        if clips and not any(modality in given.get(clip.line, ()) for clip in clips)
    ]


def doubts(manifest: Manifest) -> list[str]:
    """Classes that are trained and never tested."""
    absent = sorted({c.label for c in manifest.split("train")} - {c.label for c in manifest.split("test")})
    return [f"{manifest.path}: {', '.join(absent[:5])}: trained, but not in the split test."] if absent else []


def held_out(labels: Sequence[str], share: float) -> dict[str, int]:
    """How many training clips of each class are taken to validate on, where no split is called val."""
    return {label: min(n - 1, max(1, round(share * n))) for label, n in Counter(labels).items() if n > 1}


def with_validation(manifest: Manifest, share: float, seed: int) -> dict[str, list[Clip]]:
    """The clips by split; where none is called val, every class gives a share of its training clips to it."""
    import torch

    splits = {name: manifest.split(name) for name in SPLITS}
    if splits["val"]:
        return splits
    order = torch.randperm(len(splits["train"]), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = held_out([clip.label for clip in splits["train"]], share)
    chosen = set()
    for index in order:
        label = splits["train"][index].label
        if wanted.get(label, 0):
            wanted[label] -= 1
            chosen.add(index)
    splits["val"] = [splits["train"][i] for i in sorted(chosen)] or splits["train"]
    splits["train"] = [clip for i, clip in enumerate(splits["train"]) if i not in chosen]
    return splits
