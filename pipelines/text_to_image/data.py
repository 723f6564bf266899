"""The pictures of a folder and their captions: which are trained on, with what words, how often, and what is left out.

Captions come from, in this order: `data.instance_prompt` for all; a table, as in `text_to_image.tables`; a `.txt` or
`.caption` file beside each picture; the name of its folder, where that is a number and words (`10_sks vase`), as
kohya's scripts have it: the number says how often its pictures come in an epoch, and 0 leaves them out.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from equipoise.pipelines import demo
from equipoise.pipelines.media.pictures import NAMED, of_systems, suffixes
from equipoise.pipelines.media.pictures import open_picture as open_picture
from equipoise.pipelines.media.reading import content
from equipoise.pipelines.text_to_image.config import TextToImageConfig, TextToImageData
from equipoise.pipelines.text_to_image.tables import ENCODING, listed, read_tables, tables_among

CAPTIONS = (".txt", ".caption")  # of the files beside pictures, the first counts
DECODED = 200  # pictures of a folder that a check decodes; the others are looked at beside the first steps
_RUN = {"config.yaml", "status.json", "environment.json"}  # a folder that holds all of these is a run's
_SPLITS = {"train", "validation", "valid", "val", "test", "eval"}
_PACKED = (".parquet", ".arrow", ".tar")  # what data sets keep pictures in
_REPEATED = re.compile(r"(\d{1,3})_(.+)")  # more digits are a year or a date


@dataclass(frozen=True)
class Example:
    path: Path
    caption: str
    repeats: int = 1  # times in an epoch


@dataclass
class Folder:
    """What a folder of pictures holds."""

    path: Path
    examples: list[Example] = field(default_factory=list)  # in a fixed order
    problems: list[str] = field(default_factory=list)  # what has to be mended first, a sentence each
    doubts: list[str] = field(default_factory=list)  # what may be meant, and should be known, a sentence each
    sources: Counter[str] = field(default_factory=Counter)  # where captions come from → how many
    others: Counter[str] = field(default_factory=Counter)  # files that are read by nobody: suffix → how many

    @property
    def summary(self) -> str:
        """What will be trained on, in a sentence."""
        pictures = len({example.path for example in self.examples})
        times = sum(example.repeats for example in self.examples)
        epoch = f", {times} in an epoch" if times != pictures else ""
        parts = [f"{self.path}: {pictures} picture{'s' * (pictures != 1)}{epoch}"]
        if self.sources:
            parts.append("captions: " + ", ".join(f"{count} from {source}" for source, count in self.sources.items()))
        if self.others:
            parts.append(
                "no pictures: " + ", ".join(f"{count} {suffix}" for suffix, count in self.others.most_common())
            )
        return "; ".join(parts) + "."


def drawn_if_demo(data: TextToImageData, runs: Path) -> TextToImageData:
    """The data, with a folder in place of `demo`, whose pictures are drawn into the folder of runs."""
    return data.model_copy(update={"folder": str(demo.pictures_folder(runs))}) if data.folder == demo.NAME else data


def read_examples(data: TextToImageData) -> tuple[list[Example], list[str]]:
    """The folder's examples in a fixed order, and all that is wrong with it. Decodes no picture."""
    found = read_folder(data)
    return found.examples, found.problems


def read_folder(data: TextToImageData) -> Folder:
    """All that a folder holds, and what is wrong with it. Decodes no picture."""
    made = Folder(Path(data.folder))
    folder = made.path
    if not os.path.isdir(folder):  # unlike pathlib's, False also where no path can be so long
        what = "is a file" if os.path.isfile(folder) else "does not exist"
        made.problems.append(f"data.folder: {folder} {what}. Give a folder of pictures.")
        return made
    files = _walk(folder, made.doubts)
    pictures = sorted(path for path in files if path.suffix.lower() in suffixes())
    tables = tables_among(files)
    beside = {path.with_suffix(suffix) for path in pictures for suffix in CAPTIONS} & files
    made.others = Counter(file.suffix.lower() or file.name for file in files.difference(pictures, tables, beside))
    if odd := [path for path in pictures if _odd(str(path))]:
        names = ", ".join(ascii(path.relative_to(folder).as_posix()) for path in odd[:3])
        made.problems.append(f"data.folder: {len(odd)} names in {folder} are not UTF-8, such as {names}. Rename them.")
        return made
    kept = _without_zeros(pictures, data, made)
    if not kept:
        inside = ", ".join(suffix for suffix in _PACKED if made.others[suffix])
        advice = (
            f" `equipoise prepare pictures {folder} --output FOLDER` takes them out of its {inside}." if inside else ""
        )
        made.problems.append(f"data.folder: {folder} holds no pictures ({NAMED}).{advice}")
        return made
    if data.instance_prompt is not None:
        made.examples = [Example(path, data.instance_prompt) for path in kept]
        made.sources["data.instance_prompt"] = len(kept)
        made.doubts += _unread(kept, tables, beside, folder)
    else:
        _caption(made, kept, tables, beside, set(pictures).difference(kept))
    folders = {path.relative_to(folder).parent.as_posix() for path in kept}
    for name in data.repeats.keys() - folders:
        there = ", ".join(sorted(folders - {"."})) or "no folders"
        made.problems.append(f"data.repeats: {name} is no folder with pictures in {folder}. There are {there}.")
    if len(splits := sorted(_SPLITS & {name.split("/")[0].lower() for name in folders})) > 1:
        made.doubts.append(
            f"data.folder: {folder} has the folders {' and '.join(splits)}, and the pictures of all are trained on; "
            f"data.folder={folder / splits[0]} takes one."
        )
    made.examples = [replace(example, repeats=_repeats(example.path, folder, data)) for example in made.examples]
    return made


def read_class(config: TextToImageConfig) -> tuple[list[Example], list[str]]:
    """The class pictures of `prior.folder`, if it is given, and all that is wrong with the section."""
    prior = config.prior
    if not prior.prompt:
        return [], ["prior.folder: needs prior.prompt, what the class is called."] if prior.folder else []
    if not prior.folder:
        prompts = 1 + len(prior.more_prompts)
        few = f"prior.count: {prior.count} pictures are too few for {prompts} prompts, which share them. Give at least "
        return [], [few + f"{prompts}."] if prior.count < prompts else []
    data = TextToImageData(folder=prior.folder, instance_prompt=prior.prompt)  # pyright: ignore[reportCallIssue]
    examples, problems = read_examples(data)
    return examples, [problem.replace("data.folder", "prior.folder") for problem in problems]


def read_held(data: TextToImageData) -> Folder | None:
    """What `data.validation` holds, if it is given; each of its pictures counts once."""
    if data.validation is None:
        return None
    found = read_folder(data.model_copy(update={"folder": data.validation, "repeats": {}}))
    found.examples = [replace(example, repeats=1) for example in found.examples]
    for sentences in (found.problems, found.doubts):
        sentences[:] = [s.replace("data.folder", "data.validation").replace("trained on", "used") for s in sentences]
    return found


def in_both(trained: Iterable[Example], held: Iterable[Example]) -> list[Path]:
    """The held-out pictures that are trained on too, by their content; files of sizes of their own are not read."""
    paths = sorted({example.path for example in held})
    sizes = {path.stat().st_size for path in paths}
    alike = {path for path in {example.path for example in trained} if path.stat().st_size in sizes}
    contents = {content(path) for path in alike}
    return [path for path in paths if content(path) in contents]


def _walk(folder: Path, doubts: list[str]) -> set[Path]:
    """All files below a folder, links followed, but for what systems and programs put there for themselves and for
    what runs have drawn."""
    files: set[Path] = set()
    seen: set[str] = set()

    def closed(error: OSError) -> None:
        doubts.append(f"data.folder: {error.filename} cannot be read ({error.strerror}); it is left out.")

    for place, folders, names in os.walk(folder, onerror=closed, followlinks=True):
        where, real = Path(place), os.path.realpath(place)
        if real in seen:
            doubts.append(f"data.folder: {where} is a link to a folder that is read already; it is passed over.")
            folders.clear()
            continue
        seen.add(real)
        if where != folder and {*names} >= _RUN:
            doubts.append(f"data.folder: {where} is the folder of a run; its pictures are left out.")
            folders.clear()
            continue
        folders[:] = [name for name in folders if not of_systems(name)]
        for path in (where / name for name in names if not of_systems(name)):
            if path.is_file():
                files.add(path)
            elif path.is_symlink():
                doubts.append(f"data.folder: {path} is a link that leads nowhere; it is passed over.")
    return files


def _odd(name: str) -> bool:
    """Whether a name holds bytes that are no text, for which Python has halves of pairs."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    return False


def _without_zeros(pictures: list[Path], data: TextToImageData, made: Folder) -> list[Path]:
    """The pictures without those of folders such as `0_old`, which kohya's scripts leave out."""
    kept = [path for path in pictures if _repeats(path, made.path, data)]
    zero = sorted({path.parent for path in pictures} - {path.parent for path in kept})
    if zero:
        count = len(pictures) - len(kept)
        made.doubts.append(
            f"data.folder: {count} picture{'s' * (count > 1)} of {listed(zero, made.path)} "
            f"{'are' if count > 1 else 'is'} left out: the folder's name asks for 0 repeats."
        )
    return kept


def _named(path: Path, folder: Path) -> tuple[int, str] | None:
    """The repeats and words in the name of the nearest folder above a picture that has such a name."""
    for name in reversed(path.relative_to(folder).parent.parts):
        if found := _REPEATED.fullmatch(name):
            return int(found[1]), found[2]
    return None


def _repeats(path: Path, folder: Path, data: TextToImageData) -> int:
    named = _named(path, folder)
    return data.repeats.get(path.relative_to(folder).parent.as_posix(), named[0] if named else 1)


def _unread(pictures: Sequence[Path], tables: Sequence[Path], beside: Iterable[Path], folder: Path) -> list[str]:
    """A sentence if the folder has captions that an instance prompt leaves unread."""
    files = [*tables, *beside]
    words = {named[1] for path in pictures if (named := _named(path, folder))}
    found = (
        [f"the {len(files)} caption files of {folder}" if len(files) > 1 else f"the captions of {files[0]}"]
        if files
        else []
    )
    found += [f"the words of its folders ({', '.join(sorted(words))})"] if words else []
    if not found:
        return []
    return [
        f"data.instance_prompt is the caption of every picture: {' and '.join(found)} are not read. "
        "data.instance_prompt=null reads them."
    ]


def _caption(made: Folder, pictures: list[Path], tables: list[Path], beside: set[Path], left_out: set[Path]) -> None:
    """Finds each picture's caption: in its table, in the file beside it, or in its folder's name."""
    captions = read_tables(tables, pictures, left_out)
    made.problems += captions.problems
    made.doubts += captions.doubts
    made.examples = [Example(path, text) for path, text in captions.found]
    if captions.found:
        made.sources[" and ".join(dict.fromkeys(table.name for table in tables))] = len(captions.found)
    missing: list[Path] = []
    for path in (path for path in pictures if path not in captions.governed):
        file = next((file for suffix in CAPTIONS if (file := path.with_suffix(suffix)) in beside), None)
        if file is not None:
            _read_file(made, path, file)
        elif named := _named(path, made.path):
            made.examples.append(Example(path, named[1]))
            made.sources["the folders' names"] += 1
        else:
            missing.append(path)
    if missing:
        name = missing[0].relative_to(made.path).as_posix()
        made.problems.append(
            f"data.folder: {made.path} has no captions for {listed(missing, made.path)}. Set data.instance_prompt, "
            f'add metadata.jsonl (lines such as {{"file_name": "{name}", "text": "…"}}), or put a .txt file beside '
            "each picture."
        )
    made.doubts += _doubtful(made, beside)


def _read_file(made: Folder, path: Path, file: Path) -> None:
    try:
        made.examples.append(Example(path, file.read_text(encoding=ENCODING).strip()))
        made.sources[f"{file.suffix} files"] += 1
    except UnicodeDecodeError:
        made.problems.append(f"{file}: is not UTF-8 text.")
    except OSError as error:
        made.problems.append(f"{file}: cannot be read: {error.strerror or error}.")


def _doubtful(made: Folder, beside: set[Path]) -> list[str]:
    """What captions may not be meant: empty ones, one file for two pictures, two files for one."""
    found, folder = [], made.path
    if empty := [example.path for example in made.examples if not example.caption.strip()]:
        count = len(empty)
        found.append(
            f"data.folder: the caption{'s' * (count > 1)} of {listed(empty, folder)} "
            f"{'are' if count > 1 else 'is'} empty, and trained on as {'such' if count > 1 else 'it is'}."
        )
    stems = Counter(path.with_suffix("") for path in dict.fromkeys(example.path for example in made.examples))
    shared = sorted(stem for stem, count in stems.items() if count > 1)
    if shared := [stem for stem in shared if any(stem.with_name(stem.name + suffix) in beside for suffix in CAPTIONS)]:
        found.append(
            f"data.folder: several pictures are called {listed(shared, folder)}, but for their endings; they share "
            "one caption file, and each is trained on with it."
        )
    if both := sorted(file for file in beside if file.suffix == ".txt" and file.with_suffix(".caption") in beside):
        found.append(
            f"data.folder: {listed(both, folder)} {'have' if len(both) > 1 else 'has'} a .caption file beside "
            f"{'them' if len(both) > 1 else 'it'}, which is not read."
        )
    return found
