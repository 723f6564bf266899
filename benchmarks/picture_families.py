"""Which families of diffusers text-to-image tuning trains, from a saved checkpoint to a picture that diffusers draws.

    python benchmarks/picture_families.py                        # all; --only SanaPipeline FluxPipeline for some

Each family's small checkpoint (tests/pipelines/conftest.py and tests/pipelines/text_to_image/flows.py: real classes and
layout, random weights) is trained for four steps by `equipoise train`; diffusers loads the result by itself and draws
from the noise of the run's sample, and the two pictures are compared. Prints a Markdown table, and another of the LoRA
loaders of diffusers, with what stands in the way where nothing is trained that they load.
"""

import argparse
import inspect
import json
import os
import runpy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import diffusers
import torch
from PIL import Image

from equipoise.errors import InputError
from equipoise.pipelines.cli import main as equipoise
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image.base import load_base
from equipoise.pipelines.text_to_image.config import TextToImageModel
from equipoise.pipelines.text_to_image.families import Family, autoencoders, family, trained
from equipoise.pipelines.text_to_image.families.generic import GenericFlow
from equipoise.pipelines.text_to_image.result import export

TESTS = Path(__file__).parents[1] / "tests" / "pipelines"
PROMPT = "a sks object"
FORMATS = ("kohya", "comfyui")
HEAD = (
    "| family | class in diffusers | trained | text encoders | starts from pictures | diffusers draws the same "
    "| kohya | ComfyUI |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=trained(), choices=trained(), metavar="CLASS")
    chosen = parser.parse_args().only
    quiet = runpy.run_path(str(Path(__file__).with_name("families.py")))["quiet"]
    print(HEAD)
    with tempfile.TemporaryDirectory() as root:
        for name in chosen:
            with quiet():
                found = row(name, write, Path(root))
            print(f"| {' | '.join(found)} |", flush=True)
    print("\n| LoRA loader of diffusers | trained | why not |\n| --- | --- | --- |")
    for name, (titles, reason) in loaders().items():
        print(f"| {name} | {titles} | {reason} |")


def write(name: str, folder: Path) -> Path:
    """A family's small checkpoint."""
    flows = runpy.run_path(str(TESTS / "text_to_image" / "flows.py"))
    if name in flows["BUILDERS"]:
        return flows["write"](name, folder)
    own = runpy.run_path(str(TESTS / "conftest.py"))
    made = own["BUILDERS"][_LIKE.get(name, name)](own["_Parts"](folder))
    if name in _LIKE:
        made = getattr(diffusers, name)(**made.components)
    made.save_pretrained(folder, safe_serialization=True)
    return folder


_LIKE = {"FluxKontextPipeline": "FluxPipeline"}  # published with other weights in the same layout


def pairs(root: Path) -> list[str]:
    """Pictures, and of each one to start from, as a run is told of them."""
    for folder, colours in {"after": ("navy", "olive"), "before": ("teal", "maroon")}.items():
        (root / folder).mkdir(exist_ok=True)
        for index, colour in enumerate(colours):
            Image.new("RGB", (32, 32), colour).save(root / folder / f"{index}.png")
    return [
        f"data={root / 'after'}",
        f"data.sources={root / 'before'}",
        f"samples.sources=[{root / 'before' / '0.png'}]",
    ]


def row(name: str, write: Callable[[str, Path], Path], root: Path) -> list[str]:
    kind = family(name)
    folder = write(name, root / "checkpoints" / name)
    words = [f"model={folder}", "data=demo", "data.resolution=32", "steps=4", "batch=2", f"runs={root / 'runs'}"]
    words += ["learning_rate=0.02", "lora.alpha=2", f"samples.prompts=[{PROMPT}]", "samples.steps=2", "train.clip=0"]
    words += pairs(root) if kind.must_edit else []
    code = equipoise(["train", "text_to_image/dreambooth", *words, "samples.guidance=null", "--id", name])
    run = Store(root / "runs").get(name)
    result = json.loads((run.result / "result.json").read_text())
    done = "yes" if not code and result["loss_before"] != result["loss_after"] else f"no: {code}"
    encoders = ", ".join(type(getattr(_base(folder).pipeline, part)).__name__ for part in kind.text_encoders)
    starts = "several, or none" if kind.several else "one" if kind.edits else "–"
    drawn = _same(kind, folder, run, root / "before" / "0.png")
    return [kind.title, name, done, encoders, starts, drawn, *(_named(run, f, root) for f in FORMATS)]


def _base(folder: Path) -> Any:
    return load_base(TextToImageModel(path=str(folder)), "no")


def _same(kind: Family, folder: Path, run: Any, start: Path) -> str:
    """Whether diffusers alone draws the run's sample."""
    words: dict[str, Any] = {"guidance_scale": kind.guidance}
    if isinstance(kind, GenericFlow):
        words = {kind.strength: kind.guidance, **kind.options, **({"negative_prompt": ""} if kind.negative else {})}
    if kind.must_edit:
        with Image.open(start) as picture:
            words |= {"image": picture.copy(), "max_area": 32 * 32, "_auto_resize": False}
    shape = list(autoencoders.shape(_base(folder).vae, 32, 32))
    drawn = runpy.run_path(str(TESTS / "text_to_image" / "flows.py"))["draw"](
        str(folder), str(run.result), shape, words
    )
    with Image.open(run.folder / "samples" / "step-00000004" / "00-0.png") as sample:
        ours = torch.tensor(list(sample.convert("RGB").tobytes())).int()
    far = int((ours - drawn.int()).abs().max())
    return "yes" if far <= 1 else f"no: up to {far} of 255"


def _named(run: Any, format: str, root: Path) -> str:
    """Whether its file can be written under another app's names."""
    try:
        export(run.result, format, root / f"{run.id}-{format}.safetensors")
        return "yes"
    except InputError:
        return "–"


def loaders() -> dict[str, tuple[str, str]]:
    """By LoRA loader of diffusers: what is trained that it loads, and where that is nothing, what stands in the way."""
    from diffusers.loaders import lora_pipeline

    found = {}
    for name, mixin in vars(lora_pipeline).items():
        if name.endswith("LoraLoaderMixin") and issubclass(mixin, lora_pipeline.LoraBaseMixin) and name not in _GENERAL:
            kinds = [kind for kind in _pipelines() if mixin in kind.__bases__]
            titles = [family(kind.__name__).title for kind in kinds if kind.__name__ in trained()]
            found[name.removesuffix("LoraLoaderMixin")] = (", ".join(titles), "" if titles else _why_not(kinds))
    return found


_GENERAL = ("LoraLoaderMixin",)  # an old name of Stable Diffusion's


def _pipelines() -> list[Any]:
    made = (getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Pipeline"))
    return [kind for kind in made if isinstance(kind, type) and getattr(kind, "_lora_loadable_modules", None)]


def _why_not(kinds: list[Any]) -> str:
    calls = [{*inspect.signature(kind.__call__).parameters} for kind in kinds if "Modular" not in kind.__name__]
    if not calls:
        return "there is a modular pipeline alone" if kinds else "no pipeline of diffusers uses it"
    for word in ("frames", "video", "audio"):
        if 2 * sum(any(word in name for name in call) for call in calls) > len(calls):
            return "makes sound" if word == "audio" else "makes videos"
    return "not tried yet" if any("height" in call for call in calls) else "makes no pictures"


if __name__ == "__main__":
    main()
