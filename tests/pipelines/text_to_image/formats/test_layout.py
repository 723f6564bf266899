"""Checkpoints that cannot or must not be loaded are told apart, without opening a single weight."""

import ast
import json
import shutil
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save_file

from equipoise.pipelines import config as configs
from equipoise.pipelines.text_to_image.check import doubts
from equipoise.pipelines.text_to_image.formats import layout
from equipoise.pipelines.text_to_image.formats.layout import (
    hub_problems,
    is_local,
    layers,
    model_problems,
    native_resolution,
)
from equipoise.pipelines.training.layers import unmatched


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
def test_a_broken_index_is_a_problem(tmp_path, text):
    (tmp_path / "model_index.json").write_text(text)
    assert "is not a JSON object" in model_problems(str(tmp_path))[0]


def test_another_kind_of_model_is_a_problem(copied):
    index = copied / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "LattePipeline"}))
    (problem,) = model_problems(str(copied))
    assert "is a LattePipeline; this pipeline tunes Stable Diffusion 1.x, 2.x, XL, 3 and 3.5" in problem


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


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("conditioner.embedders.1.model.ln_final.weight", "StableDiffusionXLPipeline.from_single_file("),
        ("cond_stage_model.transformer.weight", "StableDiffusionPipeline.from_single_file("),
        ("text_encoders.clip_g.weight", "StableDiffusion3Pipeline.from_single_file("),
        ("double_blocks.0.img_attn.qkv.weight", "StableDiffusionXLPipeline, ZImagePipeline"),
        ("lora_unet_down_blocks_0.lora_up.weight", "of LoRA factors. Give the base that they are for"),
    ],
)
def test_a_single_file_says_whose_it_is(tmp_path, layer, words):
    save_file({layer: torch.zeros(1)}, tmp_path / "one.safetensors")
    (problem,) = model_problems(str(tmp_path / "one.safetensors"))
    assert words in problem and (problem.count("Pipeline") < 4) == ("ZImage" not in words)


def test_the_command_that_converts_a_single_file_may_be_copied_whatever_its_name(tmp_path):
    file = tmp_path / """it's "so" $(echo) `x` \\ ü.safetensors"""
    save_file({"text_encoders.clip_g.weight": torch.zeros(1)}, file)
    (problem,) = model_problems(str(file))
    command = problem.partition("Convert it once: ")[2].removesuffix(", then give FOLDER.")
    shown = subprocess.run(["sh", "-c", command.replace("python -c", "printf %s", 1)], capture_output=True, check=True)
    texts = {node.value for node in ast.walk(ast.parse(shown.stdout.decode())) if isinstance(node, ast.Constant)}
    assert texts == {str(file), "FOLDER"}


def test_a_variant_of_the_weights_is_found_by_its_name(copied):
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (copied / part).glob("*.safetensors")
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert model_problems(str(copied), "fp16") == []
    assert all("Set model.variant accordingly" in problem for problem in model_problems(str(copied)))


def test_missing_weights(copied):
    (copied / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (problem,) = model_problems(str(copied))
    assert problem.endswith("vae/diffusion_pytorch_model.safetensors is missing.")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unet/config.json", "unet/config.json is missing"),
        ("vae/config.json", "vae/config.json is missing"),
        ("text_encoder/config.json", "text_encoder/config.json is missing"),
        ("scheduler", "scheduler/scheduler_config.json is missing"),
        ("tokenizer/tokenizer_config.json", "tokenizer/tokenizer_config.json is missing"),
        ("tokenizer", "has no vocabulary: neither tokenizer.json nor both"),
    ],
)
def test_missing_files_are_named(copied, name, message):
    gone = copied / name
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert any(message in problem for problem in model_problems(str(copied)))


def test_either_form_of_the_vocabulary_will_do(copied):
    (copied / "tokenizer" / "tokenizer.json").rename(copied / "tokenizer.json")
    assert model_problems(str(copied)) == []
    (copied / "tokenizer" / "merges.txt").unlink()
    assert "has no vocabulary" in model_problems(str(copied))[0]
    (copied / "tokenizer.json").rename(copied / "tokenizer" / "tokenizer.json")
    assert model_problems(str(copied)) == []


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_cut_short(copied, part):
    (weights,) = (copied / part).glob("*.safetensors")
    for size in (weights.stat().st_size - 1, 100, 0):
        weights.write_bytes(weights.read_bytes()[:size])
        (problem,) = model_problems(str(copied))
        assert f"{weights} cannot be read as safetensors" in problem


def test_every_shard_is_looked_for(copied):
    """Each is looked for; the index of a pickle is none."""
    (weights,) = (copied / "unet").glob("*.safetensors")
    shard = weights.rename(weights.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    listed = {"weight_map": {"a": shard.name, "b": "diffusion_pytorch_model-00002-of-00002.safetensors"}}
    index = copied / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps(listed))
    (problem,) = model_problems(str(copied))
    assert "00002-of-00002.safetensors is missing" in problem
    index.write_text(json.dumps({"weight_map": {"a": shard.name}}))
    assert model_problems(str(copied)) == []
    index.rename(index.with_name("diffusion_pytorch_model.bin.index.json"))
    shard.rename(shard.with_suffix(".bin"))
    (problem,) = model_problems(str(copied))
    assert "is a pickle" in problem


def test_an_unknown_prediction_type(copied):
    file = copied / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "flow"}))
    assert "must be epsilon or v_prediction or sample, got 'flow'" in model_problems(str(copied))[0]


def test_every_target_must_name_a_layer(checkpoint):
    known = layers(checkpoint, "unet")
    assert unmatched(["to_q", "to_out.0", "conv_in", "mid_block.resnets.0.conv1"], known, "lora.targets") == []
    problems = unmatched(["to_q", "nonexistent", "attn1", "norm1", "o_q"], known, "lora.targets")
    assert [problem.split(": ")[1] for problem in problems] == ["nonexistent", "attn1", "norm1", "o_q"]
    assert "There are" in problems[0] and "to_out.0, to_q" in problems[0]
    assert unmatched(["q_proj"], layers(checkpoint, "text_encoder"), "lora.text_encoder_targets") == []


@pytest.mark.parametrize(
    ("kind", "message"),
    [("StableDiffusionPipeline", None), ("LattePipeline", "owner/name is a LattePipeline")],
)
def test_the_kind_of_a_hub_checkpoint_is_asked_first(monkeypatch, tmp_path, kind, message):
    def fetch(repository, name, revision):
        assert (repository, name, revision) == ("owner/name", "model_index.json", "main")
        (tmp_path / name).write_text(json.dumps({"_class_name": kind}))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    problems = hub_problems("owner/name", "main")
    assert problems == [] if message is None else message in problems[0]


class OneFile(BaseHTTPRequestHandler):
    """A repository that has one file: the index of a modular pipeline."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        there = self.path.endswith("/modular_model_index.json")
        body = json.dumps({"_class_name": "AnimaModularPipeline"}).encode() if there else b""
        self.send_response(200 if there else 404)
        about = {"ETag": '"1"', "X-Repo-Commit": "a" * 40} if there else {"X-Error-Code": "EntryNotFound"}
        for key, value in {**about, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")


def test_a_modular_pipeline_on_the_hub_has_an_index_of_another_name(monkeypatch, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), OneFile) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", there)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        assert hub_problems("circlestone/anima") == []
        assert layout.read_index("circlestone/anima") == {"_class_name": "AnimaModularPipeline"}
        server.shutdown()
    assert hub_problems("circlestone/anima") == [], "from the cache"


def test_a_hub_id_that_is_none(monkeypatch):
    def fetch(*_, **__):
        raise OSError("404: no\nsuch repository")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", fetch)
    (problem,) = hub_problems("nobody/nothing")
    assert "nobody/nothing is no folder here, and the hub gave no model_index.json" in problem
    assert "404: no such repository" in problem


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    """A real server that takes every connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        there = f"http://127.0.0.1:{silent.getsockname()[1]}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", there)
        monkeypatch.setattr(layout, "HUB_TIMEOUT", 0.5)
        started = time.monotonic()
        (problem,) = hub_problems("nobody/nothing")
    assert "timed out" in problem and "Check the spelling, the revision and the connection" in problem
    assert time.monotonic() - started < 5
    assert layout.HUB_TIMEOUT < 30


@pytest.mark.parametrize(("resolution", "doubted"), [(32, False), (48, False), (16, True), (512, True)])
def test_a_resolution_far_from_the_bases_own_is_doubted(checkpoint, resolution, doubted):
    """This base's latents are 4 by 4, of 8 by 8 pixels each."""
    given = [f"model={checkpoint}", f"data.resolution={resolution}"]
    found = doubts(configs.load("text_to_image/dreambooth", given))
    assert len(found) == doubted
    assert not doubted or f"{resolution} pixels, but {checkpoint} was made for 32" in found[0]
    assert native_resolution("demo") == 64


def test_a_base_that_does_not_say_its_resolution_is_not_doubted(tmp_path):
    assert native_resolution(str(tmp_path)) is None
    for part, described in (("unet", {"sample_size": [64, 96]}), ("vae", {"block_out_channels": [8]})):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(described))
    assert native_resolution(str(tmp_path)) is None
