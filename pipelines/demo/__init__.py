"""The embedded demo: a small base model, a new object to train it on, and what its pictures should look like."""

import fcntl
import json
import shutil
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

from equipoise.pipelines.files import explained

NAME = "demo"  # stands for the embedded base as `model`, and for the drawn object as `data`
QUESTIONS = 3000  # drawn for instruction tuning; every tenth is held out
_BACKGROUNDS = ("white", "gray", "black")


def base_folder() -> Path:
    """The embedded Stable Diffusion checkpoint, in diffusers' layout."""
    with as_file(files("equipoise.pipelines.demo") / "base") as folder:
        return folder


def pictures_folder(runs: Path) -> Path:
    """Six drawn, captioned pictures of the object, written below the runs folder once, whoever else wants them too."""
    return once(runs / ".demo" / "object", _whole, _draw)


def has_pictures(runs: Path) -> bool:
    """Whether `pictures_folder` has drawn them already."""
    return _whole(runs / ".demo" / "object")


def questions_file(runs: Path) -> Path:
    """Drawn scenes with a question and its answer each, in LLaVA's format, written below the runs folder once."""

    def complete(folder: Path) -> bool:
        return (folder / "questions.jsonl").is_file() and len(list(folder.glob("*.png"))) == QUESTIONS

    def make(folder: Path) -> None:
        from equipoise.pipelines.demo.scenes import write_questions

        write_questions(folder, QUESTIONS, seed=2024)

    return once(runs / ".demo" / "questions", complete, make) / "questions.jsonl"


def once(folder: Path, complete: Callable[[Path], bool], make: Callable[[Path], object]) -> Path:
    """A folder that is filled the first time, whoever else wants it at the same time."""
    if complete(folder):
        return folder
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / "lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not complete(folder):  # else another process has just made it
                new = folder.with_name("new")
                for leftover in (new, folder):
                    shutil.rmtree(leftover, ignore_errors=True)
                new.mkdir()
                try:
                    make(new)
                    new.rename(folder)
                finally:
                    shutil.rmtree(new, ignore_errors=True)
    return folder


def _whole(folder: Path) -> bool:
    return (folder / "metadata.jsonl").is_file() and len(list(folder.glob("*.png"))) == 2 * len(_BACKGROUNDS)


def _draw(folder: Path) -> None:
    import numpy as np

    from equipoise.pipelines.demo import shapes

    rng = np.random.default_rng(0)
    lines = []
    for index, background in enumerate(_BACKGROUNDS * 2):
        name = f"{index:02d}.png"
        shapes.draw_varied(shapes.OBJECT, background, rng).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": shapes.caption(shapes.OBJECT.name, background)}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def multimodal_folder() -> Path:
    """The embedded vision-language checkpoint, a BLIP-2 in transformers' layout."""
    with as_file(files("equipoise.pipelines.demo") / "multimodal_base") as folder:
        return folder
