"""Bases in fewer bits: the denoiser is smaller and nearly the same, and the result fits the whole one."""

import json

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from equipoise.pipelines import config
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image import TextToImage
from equipoise.pipelines.text_to_image.base import load_base
from equipoise.pipelines.text_to_image.result import LORA_FILE

NAME = "text_to_image/dreambooth"


def test_int8_by_torchao(short, build_checkpoint):
    pytest.importorskip("torchao", reason="torchao is not installed, and nothing else needs it")
    folder = build_checkpoint("FluxPipeline")
    results = {}
    for quantize in ("null", "int8"):
        words = [*short, f"model={folder}", f"model.quantize={quantize}", "learning_rate=0.02", "samples.prompts=[]"]
        settings = config.load(NAME, words)
        assert TextToImage.check(settings) == []
        run = Store(settings.runs).create(settings)
        assert execute(TextToImage, settings, run).state == "done"
        results[quantize] = json.loads((run.folder / "result" / "result.json").read_text())
    before, after = results["int8"]["loss_before"], results["int8"]["loss_after"]
    assert after < before == pytest.approx(results["null"]["loss_before"], rel=0.02)
    assert before != results["null"]["loss_before"]
    weight = load_base(settings.model, "no").denoiser.get_submodule("transformer_blocks.0.ff.net.2").weight
    assert type(weight).__name__ == "Int8Tensor" or "Quantized" in type(weight).__name__

    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(run.folder / "result", weight_name=LORA_FILE)
    layer = pipeline.transformer.get_submodule("transformer_blocks.0.ff.net.2")
    own = load_file(run.folder / "result" / LORA_FILE)["transformer.transformer_blocks.0.ff.net.2.lora_B.weight"]
    assert torch.equal(next(iter(layer.lora_B.values())).weight, own)


def test_what_is_not_there_is_asked_for(short, monkeypatch):
    monkeypatch.setattr("equipoise.pipelines.text_to_image.check.find_spec", lambda name: None)
    assert TextToImage.check(config.load(NAME, [*short, "model.quantize=int8"])) == [
        "model.quantize: int8 needs the package torchao. pip install torchao."
    ]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert TextToImage.check(config.load(NAME, [*short, "model.quantize=nf4"])) == [
        "model.quantize: nf4 needs the package bitsandbytes. pip install bitsandbytes.",
        "model.quantize: nf4 needs a CUDA device, and none is here. Use int8, or leave it out.",
    ]


def test_the_estimate_of_fewer_bits(short, build_checkpoint):
    """Of the denoiser's linear layers four bytes a weight become one, or a half."""
    folder = build_checkpoint("FluxPipeline")
    sizes = {}
    for quantize in ("null", "int8", "nf4"):
        estimate = TextToImage.estimate_memory(
            config.load(NAME, [*short, f"model={folder}", f"model.quantize={quantize}"])
        )
        assert estimate is not None
        sizes[quantize] = estimate.model
    linear = [m for m in FluxPipeline.from_pretrained(folder).transformer.modules() if isinstance(m, torch.nn.Linear)]
    count = sum(layer.weight.numel() for layer in linear)
    assert sizes["null"] - sizes["int8"] == 3 * count and sizes["null"] - sizes["nf4"] == pytest.approx(
        3.5 * count, abs=1
    )
