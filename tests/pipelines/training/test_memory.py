"""Estimates of memory: shapes alone against real tensors, and against what real files hold."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from equipoise import registry
from equipoise.pipelines import config as configs
from equipoise.pipelines.config.sections import ObjectiveSection, OptimizerSection
from equipoise.pipelines.text_to_image.families.stable_diffusion import StableDiffusion
from equipoise.pipelines.text_to_image.formats.layout import model_source
from equipoise.pipelines.training import memory


def test_what_the_backward_pass_needs():
    """Counted by hand: the input, ReLU's output, which is the last layer's input, and nothing else."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 2))
    weights = list(net.parameters())
    assert memory.kept_for_backward(lambda: net(torch.zeros(5, 6)), weights) == 4 * 5 * (6 + 10)
    assert memory.kept_for_backward(lambda: net.requires_grad_(False)(torch.zeros(5, 6)), weights) == 0


def test_attention_keeps_no_scores():
    def attend() -> None:
        query, key, value = (torch.zeros(2, 3, 100, 8, requires_grad=True) for _ in range(3))
        F.scaled_dot_product_attention(query, key, value=value)

    assert memory.kept_for_backward(attend, []) == 4 * (4 * 2 * 3 * 100 * 8)


@pytest.mark.parametrize(
    ("name", "options", "state"), [("sgd", {}, 0), ("sgd", {"momentum": 0.9}, 1), ("adamw", {}, 2)]
)
def test_what_an_optimizer_adds(name, options, state):
    trained = torch.zeros(1000)
    found = memory.training([trained], OptimizerSection(name=name, options=options))
    assert found == pytest.approx(4000 * (2 + state), rel=1e-3)  # Adam counts its steps


def test_scaling_remembers_more_than_adam():
    trained = [torch.zeros(1000)]
    assert memory.training(trained, OptimizerSection(name="scaled_adamw")) >= 4 * 4000


def test_an_optimizer_that_does_not_work_counts_as_adam():
    assert memory.training([torch.zeros(1000)], ObjectiveSection(name="joint")) == 4 * 4000


@pytest.mark.parametrize("name", ["text_to_image/demo", "instruction_tuning/demo", "audio_visual/demo"])
def test_of_the_shipped_configurations(name):
    """More for a larger batch, in the activations alone; less with gradient checkpointing."""
    config = configs.load(name)
    pipeline = registry.load("pipelines", config.pipeline)
    one = pipeline.estimate_memory(config)
    two = pipeline.estimate_memory(configs.set_keys(config, {"batch": 2 * config.train.batch}))
    assert 1.9 * one.activations < two.activations < 2.1 * one.activations
    assert (one.model, one.training, one.program) == (two.model, two.training, two.program)
    assert one.total == one.model + one.training + one.activations + one.program
    if name != "audio_visual/demo":
        less = pipeline.estimate_memory(configs.set_keys(config, {"train.gradient_checkpointing": True}))
        assert less.activations < one.activations
        half = pipeline.estimate_memory(configs.set_keys(config, {"train.precision": "bf16"}))
        assert half.model < one.model and half.activations < one.activations


def test_weights_are_those_of_the_files():
    """The embedded base is on disk in half the precision that it is trained in."""
    files = [
        file for part in StableDiffusion().parts for file in Path(model_source("demo"), part).glob("*.safetensors")
    ]
    on_disk = sum(file.stat().st_size for file in files)
    config = configs.load("text_to_image/demo", ["rank=1", "lora.targets=[to_q]", "lora.text_encoder=false"])
    found = registry.load("pipelines", "text_to_image").estimate_memory(config)
    assert found.model == pytest.approx(2 * on_disk, rel=0.02)


def test_a_model_that_is_not_here():
    for name in ("text_to_image", "instruction_tuning"):
        config = configs.set_keys(configs.load(f"{name}/demo"), {"model": "nobody/has-this-model"})
        assert registry.load("pipelines", name).estimate_memory(config) is None
