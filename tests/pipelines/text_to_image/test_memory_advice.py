"""What makes a tuning fit a device: counted without a device, and in the order of what costs the least time."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxPipeline, FluxTransformer2DModel, QwenImageTransformer2DModel

from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.text_to_image import TextToImage, memory
from equipoise.pipelines.text_to_image.families import family
from equipoise.pipelines.text_to_image.memory import Counted
from equipoise.pipelines.text_to_image.offloading import in_blocks
from equipoise.pipelines.training.layers import named_by
from equipoise.pipelines.training.memory import PEAK

GB = 10**9
LARGE = Counted(  # about FLUX.1-dev at 512 pixels in float32
    denoiser=48 * GB,
    linear=47 * GB,
    numbers=47 * GB // 4,
    in_blocks=46 * GB,
    vae=GB // 3,
    encoders=20 * GB,
    words=0,
    training=GB // 2,
    activations=100 * GB,
)


def halved(given) -> Counted:
    """As `_counted` would find it for the precision and the batch asked for."""
    half = 2 if given.train.precision == "bf16" else 1
    whole = replace(LARGE, activations=LARGE.activations * given.train.batch // 4)
    names = ("denoiser", "linear", "in_blocks", "encoders", "activations")
    return replace(whole, **{name: getattr(whole, name) // half for name in names})


def test_advice_takes_what_costs_the_least_time_for_each_size(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "_counted", lambda given: asked.append(given.train) or halved(given))
    given = config.load("text_to_image/flux", ["train.precision=no", "train.gradient_checkpointing=false", "batch=4"])
    small = "train.precision=bf16 train.gradient_checkpointing=true"
    least = f"{small} model.quantize=fp8 model.offload=1 train.batch=1 train.accumulate=4 (about 11.9 GB)"
    assert memory._advice(given, halved(given)) == [
        f"A device of 8 GB: too small, even with {least}.",
        f"A device of 12 GB: {least}.",
        f"A device of 16 GB: {small} model.quantize=fp8 model.offload=1 (about 14.9 GB).",
        f"A device of 24 GB: {small} model.quantize=fp8 train.batch=1 train.accumulate=4 (about 23.4 GB).",
    ]
    assert len(asked) == 2, "once for each precision and batch, and the first was known"
    given = config.load("text_to_image/flux", ["model.quantize=nf4"])
    assert "A device of 24 GB: as it is" in memory._advice(given, halved(given))[-1]


def test_what_activations_take_elsewhere_is_named_where_it_counts(monkeypatch):
    counted = replace(LARGE, inputs=6 * GB, blocks=57)
    monkeypatch.setattr(memory, "_counted", lambda given: counted)
    words = "train.offload_activations{} about 6 GB of activations off the device."
    for more, last in (
        (["train.offload_activations=true"], words.format(" keeps")),
        ([], words.format("=true would keep")),
    ):
        given = config.load("text_to_image/flux", more)
        assert memory._advice(given, counted)[-1] == last and given.train.gradient_checkpointing
    assert replace(counted, inputs=30 * GB).away(given) == 100 * GB // 4 - 100 * GB // 57, "a block is at work"
    given = config.load("text_to_image/flux", ["train.gradient_checkpointing=false"])
    assert "activations off" not in memory._advice(given, counted)[-1]
    assert counted.away(given) == pytest.approx(100 * GB / PEAK, abs=1)


def test_a_dry_run_shows_it_in_a_line_where_all_sizes_do(short, capsys):
    assert main(["train", "text_to_image/dreambooth", *short, "--dry-run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# A device of ")]
    assert len(lines) == 1 and lines[0].startswith("# A device of 8, 12, 16 or 24 GB: as it is (about ")


@pytest.mark.parametrize("how", ["fp8", "nf4"])
def test_the_check_and_the_estimate_wait_for_no_other_process(short, monkeypatch, how):
    """Of several processes the first makes a dry run alone."""
    alone = [*short, f"model.quantize={how}"]
    monkeypatch.setattr("accelerate.state.PartialState.__init__", lambda *_, **__: pytest.fail("joined the others"))
    monkeypatch.setattr("equipoise.pipelines.training.quantized.find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    settings = config.load("text_to_image/dreambooth", alone)
    assert TextToImage.check(settings) == [] and TextToImage.estimate_memory(settings) is not None


def test_on_a_device_are_what_is_quantised_and_what_does_not_wait(short, build_checkpoint):
    folder = build_checkpoint("FluxPipeline")
    words = [*short, f"model={folder}"]
    found = memory._counted(config.load("text_to_image/dreambooth", words))
    assert found is not None
    both = ["model.quantize=fp8", "model.offload=0.5"]
    whole, fewer, away, live, fp8, fp8_away = (
        found.on_device(config.load("text_to_image/dreambooth", [*words, *more]))
        for more in ([], ["model.quantize=int8"], both[1:], ["lora.text_encoder=true"], both[:1], both)
    )
    denoiser = FluxPipeline.from_pretrained(folder).transformer
    linear = [layer.weight.numel() for layer in denoiser.modules() if isinstance(layer, torch.nn.Linear)]
    waiting = sum(layer.weight.numel() for layer in in_blocks(denoiser))
    assert whole - fewer == 3 * sum(linear) and whole - away == pytest.approx(2 * waiting, abs=1)
    transformer = denoiser.config
    assert found.blocks == transformer.num_layers + transformer.num_single_layers
    assert 0 < found.inputs < found.activations / PEAK
    assert whole - fp8 == 3 * waiting and fp8 - fp8_away == pytest.approx(waiting / 2, abs=1)
    assert live - whole == min(found.encoders, found.training + found.activations)


@pytest.mark.parametrize(
    ("name", "kind", "saved", "of_16_bits", "of_4_bits"),
    [
        ("FluxPipeline", FluxTransformer2DModel, 0.18, 0.8, 3.0),
        ("QwenImagePipeline", QwenImageTransformer2DModel, 0.09, 0.2, 0.9),
        ("Flux2Pipeline", Flux2Transformer2DModel, 0.24, 0.4, 1.5),
    ],
)
def test_factors_of_half_the_bits_would_save_as_little_as_the_docs_say(name, kind, saved, of_16_bits, of_4_bits):
    """In weights and gradients of rank 16, 2 bytes a number each: GB, and per cent of the denoiser's weights."""
    with torch.device("meta"):
        model = kind()  # of the sizes that are published
    layers = [
        module
        for layer, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and named_by(family(name).targets, layer)
    ]
    spared = 4 * 16 * sum(layer.in_features + layer.out_features for layer in layers)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert round(spared / GB, 2) == saved
    assert [round(100 * spared / size, 1) for size in (2 * numbers, numbers / 2)] == [of_16_bits, of_4_bits]
