"""What several tests of text-to-image tuning start from."""

import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from equipoise.pipelines import config
from equipoise.pipelines.pipeline import Outcome, execute
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image import TextToImage
from equipoise.pipelines.text_to_image.base import Base, load_base
from equipoise.pipelines.text_to_image.config import TextToImageModel
from equipoise.pipelines.text_to_image.families import autoencoders


@pytest.fixture
def work(short, monkeypatch):
    """The work of a run, as its loop gets it."""

    def make(*overrides):
        caught = []
        monkeypatch.setattr(
            "equipoise.pipelines.text_to_image.train.train_loop",
            lambda _, work, *rest: caught.append(work) or Outcome("stopped"),
        )
        settings = config.load("text_to_image/dreambooth", [*short, *overrides])
        execute(TextToImage, settings, Store(settings.runs).create(settings))
        return caught[0]

    return make


# Families that are trained by flow matching


@pytest.fixture(scope="session")
def built(tmp_path_factory, build_checkpoint):
    """Makes a family's small checkpoint, once."""
    flows = runpy.run_path(str(Path(__file__).with_name("flows.py")))
    root, made = tmp_path_factory.mktemp("flows"), {}

    def build(name: str) -> Path:
        if name not in flows["BUILDERS"]:
            return build_checkpoint(name)
        if name not in made:
            made[name] = flows["write"](name, root / name)
        return made[name]

    return build


@pytest.fixture
def base(built):
    return lambda name: load_base(TextToImageModel(path=str(built(name))), "no")


@pytest.fixture(scope="session")
def words():
    """What the command line is given for a short run."""

    def made(folder: Path, runs: Path, *more: str) -> list[str]:
        given = [f"model={folder}", "data=demo", "data.resolution=32", "batch=2", "samples.steps=2", f"runs={runs}"]
        return ["text_to_image/dreambooth", *given, "samples.guidance=null", "train.clip=0", "lora.alpha=2", *more]

    return made


@pytest.fixture(scope="session")
def float_bytes():
    """Counts what the weights of a checkpoint take in float32."""

    def counted(folder: Path) -> int:
        return sum(
            tensor.numel() * 4
            for file in folder.glob("*/*.safetensors")
            for tensor in load_file(file).values()
            if tensor.is_floating_point()
        )

    return counted


@pytest.fixture(scope="session")
def some_latents():
    def drawn(base: Base, count: int, seed: int = 0) -> torch.Tensor:
        shape = autoencoders.shape(base.vae, 32, 32)
        return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed))

    return drawn


@pytest.fixture(scope="module")
def few_draws():
    """Behind the losses before and after: eight instead of 64, where these are no measurements."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("equipoise.pipelines.text_to_image.fixed.DRAWS", 8)
        yield
