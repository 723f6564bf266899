"""What coordination costs in memory, counted on a LLaVA of 7 billion weights that takes no memory itself."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlavaConfig, LlavaForConditionalGeneration

from equipoise.coordination.balance import Prediction, measure
from equipoise.pipelines import config
from equipoise.pipelines.instruction_tuning.model import adapt

FLOAT = 4  # bytes


def test_a_7b_run_fits_wherever_plain_lora_fits():
    """Counted, not run: beyond weights, gradients and Adam's moments, a run keeps the trained weights of the step
    before, and that is all that κ needs."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig()).to(torch.bfloat16).requires_grad_(False)
    tuned = adapt(model, config.load("instruction_tuning/demo", ["rank=16"]))
    every, trained = list(tuned.model.parameters()), list(tuned.named.values())
    frozen = sum(p.numel() * p.element_size() for p in every if not p.requires_grad)
    assert 13.5e9 < frozen < 14.5e9 and all(p.dtype == torch.float32 for p in trained)
    numbers = sum(p.numel() for p in trained)
    assert 20e6 < numbers < 80e6
    plain = frozen + 4 * FLOAT * numbers  # weight, gradient, two moments
    kept = FLOAT * numbers  # the weights before the step, which a run keeps in any case, to go back to
    assert kept / plain < 0.02 and plain + kept < 16e9, "on a card of 16 GB, before activations"


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        fresh = function.overloadpacket not in (torch.ops.aten.detach, torch.ops.aten.alias)
        if fresh and isinstance(made, torch.Tensor):
            self.found = max(self.found, made.numel())
        return made


def test_the_probe_makes_no_tensor_of_the_weights_size():
    components = {name: [torch.nn.Parameter(torch.zeros(1000, 1000))] for name in ("encoder", "language")}
    before = {name: [torch.ones(1000, 1000)] for name in components}
    asked = []

    def predict():
        asked.append([components[name][0].data_ptr() for name in ("encoder", "language")])
        return Prediction(torch.randn(2, 3), torch.arange(2))

    new = [components[name][0].data_ptr() for name in ("encoder", "language")]
    old = [before[name][0].data_ptr() for name in ("encoder", "language")]
    with Largest() as watched:
        measure(predict, components, before)
    assert watched.found < 100
    assert asked == [old, [new[0], old[1]], [old[0], new[1]]], "(T_t, S_t), (T_t, S_t+1), (T_t+1, S_t)"
