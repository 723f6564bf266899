"""Bases in fewer bits: the denoiser is smaller and nearly the same, and the result fits the whole one."""

import json

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from equipoise.errors import InputError
from equipoise.pipelines import config
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image import TextToImage
from equipoise.pipelines.text_to_image.base import load_base
from equipoise.pipelines.text_to_image.compare import compare
from equipoise.pipelines.text_to_image.offloading import ActivationsAway, Offloaded, VisitingLinear, in_blocks, offload
from equipoise.pipelines.text_to_image.result import LORA_FILE
from equipoise.pipelines.training import quantized
from equipoise.pipelines.training.quantized import BLOCK, BYTES

NAME = "text_to_image/dreambooth"


@pytest.mark.parametrize(
    ("how", "package", "near"), [("fp8", "torch", 0.02), ("int8", "torchao", 0.02), ("nf4", "bitsandbytes", 0.1)]
)
def test_a_base_in_fewer_bits_learns_and_its_factors_fit_the_whole_one(how, package, near, short, build_checkpoint):
    pytest.importorskip(package, reason=f"{package} is not installed, and nothing else here needs it")
    folder = build_checkpoint("FluxPipeline")
    results = {}
    for quantize in ("null", how, how):
        words = [*short, f"model={folder}", f"model.quantize={quantize}", "learning_rate=0.02", "samples.prompts=[]"]
        settings = config.load(NAME, words)
        assert TextToImage.check(settings) == []
        run = Store(settings.runs).create(settings)
        assert execute(TextToImage, settings, run).state == "done"
        results[quantize] = json.loads((run.folder / "result" / "result.json").read_text())
    before, after = results[how]["loss_before"], results[how]["loss_after"]
    assert after < before == pytest.approx(results["null"]["loss_before"], rel=near)
    assert before != results["null"]["loss_before"]
    layer = load_base(settings.model, "no").denoiser.get_submodule("transformer_blocks.0.ff.net.2")
    weight = layer.offloaded.weight if how == "fp8" else layer.weight
    if how == "fp8":
        assert weight.dtype == torch.float8_e4m3fn
    kinds = {"int8": ("Int8Tensor", "AffineQuantizedTensor", "LinearActivationQuantizedTensor"), "nf4": ("Params4bit",)}
    assert type(weight).__name__ in kinds.get(how, ("Tensor",))

    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(run.folder / "result", weight_name=LORA_FILE)
    layer = pipeline.transformer.get_submodule("transformer_blocks.0.ff.net.2")
    own = load_file(run.folder / "result" / LORA_FILE)["transformer.transformer_blocks.0.ff.net.2.lora_B.weight"]
    assert torch.equal(next(iter(layer.lora_B.values())).weight, own)


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusionPipeline"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_weights_that_wait_elsewhere_change_no_number_but_by_rounding(short, build_checkpoint, name, share):
    words = [*short, f"model={build_checkpoint(name)}", "learning_rate=0.02", "train.gradient_checkpointing=true"]
    found = []
    for more in ([], [f"model.offload={share}"], [f"model.offload={share}", "lora.dora=true"]):
        settings = config.load(NAME, [*words, *more])
        assert TextToImage.check(settings) == []
        run = Store(settings.runs).create(settings)
        assert execute(TextToImage, settings, run).state == "done"
        found.append(([record["loss"] for record in run.metrics()], load_file(run.folder / "result" / LORA_FILE)))
    (losses, own), (again, other), (of_dora, _) = found
    assert losses == pytest.approx(again, rel=1e-4), "sums in another order: peft's own layer in place of the fused one"
    assert own.keys() == other.keys() and of_dora != pytest.approx(losses, rel=1e-3)
    denoiser = load_base(settings.model, "no").denoiser
    away = [layer for layer in denoiser.modules() if isinstance(layer, VisitingLinear)]
    here = [layer for layer in in_blocks(denoiser)]
    assert len(away) == int(share * (len(away) + len(here))) > 0 and bool(here) == (share < 1)


def test_weights_that_wait_elsewhere_are_among_those_a_run_resumes_on(work):
    here, away = work(), work("model.offload=1")
    assert away.frozen == here.frozen
    layers = [layer for layer in away.base.denoiser.modules() if isinstance(layer, VisitingLinear)]
    with torch.no_grad():
        layers[-1].offloaded.weight.add_(1)
        try:
            assert work("model.offload=1").frozen != here.frozen
        finally:
            layers[-1].offloaded.weight.sub_(1)


def test_a_weight_that_waits_elsewhere_works_on_the_device_and_is_never_moved_there():
    """The device without memory stands for one of its own."""
    layers = nn.ModuleList([nn.Linear(6, 4).requires_grad_(False) for _ in range(4)])
    offload(layers, 0.5, torch.device("meta"))
    layers.to("meta")
    kinds = [type(layer) for layer in layers]
    assert kinds == [nn.Linear, VisitingLinear] * 2
    given = torch.ones(2, 6, device="meta", requires_grad=True)
    made = layers[1](given)
    made.sum().backward()
    assert made.is_meta and given.grad.is_meta and layers[1].offloaded.weight.device.type == "cpu"
    assert layers[1].weight.is_meta and layers[1].bias.is_meta and "1.weight" not in layers.state_dict()


def test_runs_of_a_base_in_fewer_bits_are_not_compared_with_others(short, tmp_path):
    ways = (["model.offload=0.5"], ["model.quantize=fp8"])
    settings = [config.load(NAME, [*short, *more, "samples.prompts=[a vase]"]) for more in ways]
    runs = [Store(one.runs).create(one) for one in settings]
    with pytest.raises(InputError, match=r"^comparison: model\.quantize differs between the runs \(null and fp8\)"):
        compare("both", tmp_path / "both", runs, settings)


def test_what_is_not_there_is_asked_for(short, monkeypatch):
    monkeypatch.setattr("equipoise.pipelines.text_to_image.check.find_spec", lambda name: None)
    assert TextToImage.check(config.load(NAME, [*short, "model.quantize=int8"])) == [
        "model.quantize: int8 needs the package torchao. pip install torchao."
    ]
    monkeypatch.setattr("equipoise.pipelines.training.quantized.find_spec", lambda name: None)
    assert TextToImage.check(config.load(NAME, [*short, "model.quantize=nf4", "model.offload=1"])) == [
        "model.quantize: nf4 needs the package bitsandbytes. pip install 'equipoise[quantized]'.",
        "model.offload: works with whole weights, not in nf4. Leave one of the two out.",
    ]


def test_the_estimate_of_fewer_bits(short, build_checkpoint):
    """Of the denoiser's linear layers four bytes a weight become one, or a half and its share of the scales."""
    folder = build_checkpoint("FluxPipeline")
    sizes = {}
    for quantize in ("null", "int8", "nf4", "fp8"):
        estimate = TextToImage.estimate_memory(
            config.load(NAME, [*short, f"model={folder}", f"model.quantize={quantize}"])
        )
        assert estimate is not None
        sizes[quantize] = estimate.model
    linear = [m for m in FluxPipeline.from_pretrained(folder).transformer.modules() if isinstance(m, torch.nn.Linear)]
    count = sum(layer.weight.numel() for layer in linear)
    whole_blocks = sum(layer.weight.numel() for layer in linear if layer.in_features % BLOCK == 0)  # on a CPU
    assert 0 < whole_blocks < count
    assert sizes["null"] - sizes["int8"] == 3 * count and sizes["null"] - sizes["nf4"] == pytest.approx(
        (4 - BYTES["nf4"]) * whole_blocks, abs=1
    )
    in_numbered = sum(layer.weight.numel() for layer in in_blocks(FluxPipeline.from_pretrained(folder).transformer))
    assert sizes["null"] - sizes["fp8"] == 3 * in_numbered


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-6, 0.005, 0.02, 100.0])
def test_rows_in_fp8_are_as_near_whatever_their_size(dtype, size):
    torch.manual_seed(0)
    weight = (torch.randn(64, 256) * size * torch.logspace(-2, 0, 64)[:, None]).to(dtype)
    weight[3] = 0
    again = Offloaded.in_fp8(weight).on(torch.device("cpu"))
    assert again.dtype == dtype and torch.equal(again[3], weight[3])
    rows = [row for row in range(64) if row != 3]
    off = (again - weight).float().norm(dim=1) / weight.float().norm(dim=1).clamp_min(1e-30)
    assert off[rows].max() < 0.032, "rounding to four bits: at most one in 16, 0.026 on average over these"


def test_rows_in_units_of_their_own_are_nearer_than_a_plain_cast():
    """The figures that docs/text_to_image.md has."""
    torch.manual_seed(0)
    for size, plain, ours in ((0.005, 0.113, 0.026), (0.01, 0.057, 0.026), (0.05, 0.027, 0.026)):
        weight = torch.randn(512, 512) * size
        made = weight.to(torch.float8_e4m3fn).float(), Offloaded.in_fp8(weight).on(torch.device("cpu"))
        off = [((one - weight).norm() / weight.norm()).item() for one in made]
        assert off == pytest.approx([plain, ours], abs=6e-4)


def test_fp8_keeps_nothing_whole_for_the_backward_pass_and_may_wait_elsewhere():
    layers = nn.Sequential(*(nn.Linear(64, 64, bias=False).requires_grad_(False) for _ in range(4)))
    given = torch.randn(3, 64, requires_grad=True)
    plain = layers(given)
    offload(layers, 0.5, torch.device("cpu"), fp8=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        made = layers(given)
    assert all(count < 64 * 64 for count in kept)
    made.sum().backward()
    assert given.grad.isfinite().all() and (made - plain).norm() < 0.08 * plain.norm()
    assert [layer.offloaded.weight.dtype for layer in layers] == [torch.float8_e4m3fn] * 4


def test_whether_fp8_works_is_not_tried_where_it_does_and_said_where_not(monkeypatch):
    """A try takes memory of a GPU for as long as the process lives."""
    monkeypatch.setattr(quantized, "_device", lambda: "cuda")
    monkeypatch.setattr(torch, "ones", lambda *_, **__: pytest.fail("tried"))
    assert quantized.problems("fp8") == []
    monkeypatch.undo()
    monkeypatch.setattr(quantized, "_device", lambda: "mps")
    assert quantized.problems("fp8") == ["model.quantize: fp8 does not work on mps. Leave it out."]


def test_of_weights_in_fp8_those_that_do_not_wait_are_on_the_device():
    layers = nn.ModuleList([nn.Linear(6, 4).requires_grad_(False) for _ in range(4)])
    offload(layers, 0.5, torch.device("meta"), fp8=True)
    assert [layer.offloaded.weight.device.type for layer in layers] == ["meta", "cpu"] * 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_but_weights_waits_elsewhere_for_the_backward_pass(checkpointing):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.GELU(), nn.Linear(8, 8), nn.GELU())
    given = torch.randn(3, 8, requires_grad=True)

    def made() -> torch.Tensor:
        return checkpoint(layers, given, use_reentrant=False) if checkpointing else layers(given)

    plain = torch.autograd.grad(made().square().sum(), [given, layers[2].weight])
    hooks, away, here = ActivationsAway(layers.parameters(), torch.device("cpu")), [], []
    pack = hooks.pack_hook

    def seen(tensor: torch.Tensor) -> object:
        kept = pack(tensor)
        (here if isinstance(kept, torch.Tensor) else away).append(tensor.untyped_storage().data_ptr())
        return kept

    hooks.pack_hook = seen
    with hooks:
        loss = made().square().sum()
    own = {weight.untyped_storage().data_ptr() for weight in layers.parameters()}
    assert away and not own & set(away) and set(here) <= own and bool(here) == (not checkpointing)
    assert all(map(torch.equal, plain, torch.autograd.grad(loss, [given, layers[2].weight])))


def test_keeping_activations_elsewhere_is_entered_at_every_step(short, monkeypatch):
    entered, losses, enter = [], [], ActivationsAway.__enter__
    monkeypatch.setattr(ActivationsAway, "__enter__", lambda hooks: entered.append(hooks) or enter(hooks))
    words = [*short, "steps=2", "samples.prompts=[]", "train.gradient_checkpointing=true", "learning_rate=0.02"]
    for away in ("false", "true"):
        settings = config.load(NAME, [*words, f"train.offload_activations={away}"])
        run = Store(settings.runs).create(settings)
        assert execute(TextToImage, settings, run).state == "done"
        losses.append([record["loss"] for record in run.metrics()])
    assert len(entered) == 2 and losses[0] == losses[1]


def test_second_derivatives_pass_a_weight_that_waits_elsewhere():
    layers = nn.Sequential(*(nn.Linear(3, 3).requires_grad_(False) for _ in range(2))).double()
    offload(layers, 1.0, torch.device("cpu"))
    assert [type(layer) for layer in layers] == [VisitingLinear] * 2
    given = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layers(x.tanh()).tanh(), (given,))
