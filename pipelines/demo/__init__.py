"""The embedded demo: a small base model, the object it has never seen, and what its pictures should look like."""

from importlib.resources import as_file, files
from pathlib import Path

NAME = "demo"  # stands for the embedded base as `model`, and for the drawn object as `data`


def base_folder() -> Path:
    """The embedded Stable Diffusion checkpoint, in diffusers' layout."""
    with as_file(files("equipoise.pipelines.demo") / "base") as folder:
        return folder


def pictures_folder(runs: Path) -> Path:
    """Six drawn, captioned pictures of the object, written below the runs folder once."""
    import json

    import numpy as np

    from equipoise.pipelines.demo import shapes
    from equipoise.pipelines.files import write_atomic

    folder = runs / ".demo" / "object"
    captions = folder / "metadata.jsonl"
    if captions.is_file():  # written last
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for index, background in enumerate(("white", "gray", "black") * 2):
        name = f"{index:02d}.png"
        shapes.draw_varied(shapes.OBJECT, background, rng).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": shapes.caption(shapes.OBJECT.name, background)}))
    write_atomic(captions, "\n".join(lines) + "\n")
    return folder
