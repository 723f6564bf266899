"""Checkpoints that cannot or must not be loaded are told apart, without opening a single weight."""

import json
import shutil

import pytest

from equipoise.pipelines.text_to_image.check import is_local, model_problems


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_a_good_checkpoint(checkpoint):
    assert model_problems(str(checkpoint)) == []


def test_the_embedded_base():
    assert is_local("demo") and model_problems("demo") == []


def test_hub_ids_are_left_to_the_hub():
    assert not is_local("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert is_local("./somewhere/deep/down") and is_local("word")


def test_a_missing_folder(tmp_path):
    assert "does not exist" in model_problems(str(tmp_path / "nowhere"))[0]


def test_not_a_checkpoint(tmp_path):
    assert "has no model_index.json" in model_problems(str(tmp_path))[0]


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_broken_index(tmp_path, text):
    (tmp_path / "model_index.json").write_text(text)
    assert "is not a JSON object" in model_problems(str(tmp_path))[0]


def test_another_kind_of_model(copied):
    index = copied / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "StableDiffusionXLPipeline"}))
    assert (
        "is a StableDiffusionXLPipeline; this pipeline tunes Stable Diffusion 1.x and 2.x"
        in model_problems(str(copied))[0]
    )


def test_pickled_weights_are_never_opened(copied):
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    (problem,) = model_problems(str(copied))
    assert "diffusion_pytorch_model.bin is a pickle, and pickles are never opened" in problem


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt"])
def test_a_pickle_as_the_model(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04")
    assert "pickles (.ckpt, .bin, .pt) are never opened" in model_problems(str(tmp_path / name))[0]


def test_a_single_file_checkpoint(tmp_path):
    (tmp_path / "sd.safetensors").write_bytes(b"")
    assert "single-file checkpoint. Convert it once" in model_problems(str(tmp_path / "sd.safetensors"))[0]


def test_variants(copied):
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (copied / part).glob("*.safetensors")
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert model_problems(str(copied), "fp16") == []
    assert all("Set model.variant accordingly" in problem for problem in model_problems(str(copied)))


def test_missing_weights(copied):
    (copied / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (problem,) = model_problems(str(copied))
    assert problem.endswith("vae/diffusion_pytorch_model.safetensors is missing.")
