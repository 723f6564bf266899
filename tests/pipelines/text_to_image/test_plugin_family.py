"""Families of models that other distributions add: found for checkpoints whose model_index.json names their class."""

import json
import shutil
from pathlib import Path

import pytest

from equipoise.pipelines import demo
from equipoise.pipelines.text_to_image.base import load_base
from equipoise.pipelines.text_to_image.config import TextToImageModel
from equipoise.pipelines.text_to_image.formats.layout import model_problems, native_resolution

CLASS = "StableDiffusionPAGPipeline"  # of diffusers, with the parts that Stable Diffusion has
FAMILY = f"""
from equipoise.pipelines.text_to_image.families.stable_diffusion import StableDiffusion


class Perturbed(StableDiffusion):
    pipeline = "{CLASS}"
    title = "Stable Diffusion with perturbed attention"
"""


@pytest.fixture
def base(tmp_path) -> Path:
    """The embedded base under another class's name."""
    folder = shutil.copytree(demo.base_folder(), tmp_path / "base")
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": CLASS}))
    return folder


def test_a_plugins_family_is_found_by_the_class_that_a_checkpoint_names(base, distribution):
    (problem,) = model_problems(str(base))
    assert f"is a {CLASS}; this pipeline tunes Stable Diffusion 1.x" in problem
    assert native_resolution(str(base)) is None
    distribution("perturbed", {"equipoise.families": {CLASS: "perturbed_family:Perturbed"}}, perturbed_family=FAMILY)
    assert model_problems(str(base)) == [] and native_resolution(str(base)) == 64
    loaded = load_base(TextToImageModel(path=str(base)), "no")
    assert type(loaded.pipeline).__name__ == CLASS and loaded.family.title.endswith("perturbed attention")


def test_a_family_that_cannot_be_used_is_a_sentence_of_the_check(base, distribution):
    name = "StableDiffusionLDM3DPipeline"
    (base / "model_index.json").write_text(json.dumps({"_class_name": name}))
    distribution("broken", {"equipoise.families": {name: "broken_family:Missing"}}, broken_family="")
    (problem,) = model_problems(str(base))
    assert f"is a {name}: family {name!r} of broken 1.0 cannot be used: broken_family:Missing: " in problem
    assert "Repair or uninstall broken." in problem
