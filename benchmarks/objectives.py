"""Time of one batch under each objective, beside plain joint training (MML) and beside MMPareto over NumPy.

    python benchmarks/objectives.py
    python benchmarks/objectives.py --model resnet18 --batch 8 --rounds 8

Four times of the same batches, for the paper's is that of "the subroutine used for balancing modalities (if any) and
updating the model parameters", which leaves open whether the backward pass that every method needs is part of it:

- step: everything, the forward pass too;
- after forward: backward passes, balancing and update;
- balancing and update: the same without the first backward pass, that of the joint loss (for MIMO and EW that of their
  whole sum, which is the only one);
- no passes: the same without any backward pass.

Objectives take turns, one batch each, so that whatever else the machine does falls on all alike. What is compared is
the median over the rounds of a round's ratio. "NumPy" is MMPareto as a loop over NumPy arrays: a backward pass per loss
and one of their sum, gradients copied out, their inner products once, min-norm by iteration on those, and copied back.

Prints a Markdown table. On a machine that others keep busy, `--clock cpu` counts this process's time alone.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, ResNetConfig

from equipoise import registry
from equipoise.balancing.objective import Backward, Losses, Objective, differentiate

MODELS = {"small": ([16, 32, 64], [1, 1, 1], 32), "resnet18": ([64, 128, 256, 512], [2, 2, 2, 2], 112)}
HEADS = "joint and heads"  # unimodal heads learn beside it, on features that carry no gradient
HEAD = "step | after forward | balancing and update | no passes |\n| --- | --- | --- | --- | --- |"
COMPARED = (("mimo", HEADS), ("mmpareto", "mimo"), ("mgda", "mimo"), ("NumPy", "mmpareto"), ("NumPy", "mgda"))
ROWS = ("joint", "equal_weight", "mimo", "ogm_ge", "agm", "mgda", "mmpareto")
CLASSES = 6


class Times(NamedTuple):
    """Seconds."""

    step: float
    after_forward: float
    balancing: float  # and update
    no_passes: float


class Net(torch.nn.Module):
    """Two residual nets, a joint head by concatenation, and unimodal heads."""

    def __init__(self, widths: list[int], depths: list[int]):
        super().__init__()
        size = {"embedding_size": widths[0], "hidden_sizes": widths, "depths": depths, "layer_type": "basic"}
        settings = [ResNetConfig(num_channels=channels, **size) for channels in (1, 3)]
        self.names = ("audio", "visual")
        self.encoders = torch.nn.ModuleDict(
            {name: AutoModel.from_config(one) for name, one in zip(self.names, settings, strict=True)}
        )
        self.joint = torch.nn.Linear(2 * widths[-1], CLASSES)
        self.heads = torch.nn.ModuleDict({name: torch.nn.Linear(widths[-1], CLASSES) for name in self.names})

    def forward(self, batch: dict[str, Tensor], labels: Tensor, live: bool, responses: bool) -> Losses:
        made = {name: self.encoders[name](batch[name]).pooler_output.flatten(1) for name in self.names}
        joint = F.cross_entropy(self.joint(torch.cat(list(made.values()), 1)), labels)
        own = {n: F.cross_entropy(self.heads[n](f if live else f.detach()), labels) for n, f in made.items()}
        said = None
        if responses:
            columns = dict(zip(self.names, self.joint.weight.detach().chunk(2, 1), strict=True))
            said = {n: f.detach() @ columns[n].T for n, f in made.items()}
        return Losses(joint, own, labels, said)


class NumPyPareto(Objective):
    """MMPareto the slow way."""

    def backward(self, losses: Losses, backward: Backward = differentiate) -> dict:
        taken: list[dict[str, list[np.ndarray]]] = []
        every = [losses.joint, *losses.unimodal.values()]
        for loss in every:
            for parameters in self.encoders.values():
                for p in parameters:
                    p.grad = None
            backward(loss, retain_graph=True)
            taken.append(
                {
                    name: [
                        np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy().copy() for p in parameters
                    ]
                    for name, parameters in self.encoders.items()
                }
            )
        for parameters in self.encoders.values():
            for p in parameters:
                p.grad = None
        backward(torch.stack(every).sum())
        for index, (name, parameters) in enumerate(self.encoders.items(), start=1):
            pair = [taken[0][name], taken[index][name]]
            weights = self._min_norm(pair)
            mixed = [weights[0] * a + weights[1] * b for a, b in zip(*pair, strict=True)]
            length = np.sqrt(sum(float((m**2).sum()) for m in mixed))
            total = np.sqrt(sum(float((p.grad.numpy() ** 2).sum()) for p in parameters))
            for p, m in zip(parameters, mixed, strict=True):
                p.grad = torch.from_numpy(m * np.float32(1.5 * total / max(length, 1e-12)))
        return {}

    @staticmethod
    def _min_norm(pair: list[list[np.ndarray]]) -> tuple[float, float]:
        """Frank and Wolfe's algorithm on the inner products, which are computed once."""
        one, other = pair
        square, between, rest = (
            sum(float(np.vdot(a, b)) for a, b in zip(x, y, strict=True))
            for x, y in ((one, one), (one, other), (other, other))
        )
        gram = np.array([[square, between], [between, rest]])
        weights = np.array([0.5, 0.5])
        for _ in range(25):
            slopes = gram @ weights
            gap = np.eye(2)[slopes.argmin()] - weights
            size = gap @ gram @ gap
            if size < 1e-20:
                break
            share = np.clip(-(gap @ slopes) / size, 0, 1)
            weights = weights + share * gap
            if share < 1e-6:
                break
        return float(weights[0]), float(weights[1])


def measure(model: str, batch: int, rounds: int, clock: Callable[[], float]) -> dict[str, list[Times]]:
    """Seconds of each batch by objective; the first round is not counted."""
    widths, depths, side = MODELS[model]
    torch.manual_seed(0)
    data = {"audio": torch.randn(batch, 1, side, side), "visual": torch.randn(batch, 3, side, side)}
    labels = torch.arange(batch) % CLASSES
    made: dict[str, Objective] = {name: registry.load("objectives", name)() for name in ROWS}
    made |= {HEADS: registry.load("objectives", "joint")(), "NumPy": NumPyPareto()}
    nets = {}
    for name, objective in made.items():
        torch.manual_seed(1)
        net = Net(widths, depths)
        objective.bind({part: list(net.encoders[part].parameters()) for part in net.names})
        nets[name] = (net, torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9))
    times: dict[str, list[Times]] = {name: [] for name in made}
    passes: list[float] = []
    for count in range(rounds + 1):
        for name, objective in made.items():
            net, optimizer = nets[name]
            passes.clear()
            started = clock()
            losses = net(data, labels, objective.uses_unimodal, objective.uses_responses)
            forward = clock()
            beside = list(losses.unimodal.values()) if name == HEADS else []

            def backward(total: Tensor, /, *, retain_graph: bool = False, beside: list[Tensor] = beside) -> None:
                total = torch.stack([total, *beside]).sum() if beside else total
                before = clock()
                total.backward(retain_graph=retain_graph)
                passes.append(clock() - before)

            objective.backward(losses, backward)
            objective.before_step()
            optimizer.step()
            ended = clock()
            optimizer.zero_grad()
            if count:
                times[name].append(
                    Times(ended - started, ended - forward, ended - forward - passes[0], ended - forward - sum(passes))
                )
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="time of balancing and update per batch")
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    times = measure(args.model, args.batch, args.rounds, clock)
    print(f"{args.model}, batch {args.batch}, {args.threads} thread(s), torch {torch.__version__}, {args.clock} time\n")
    print(f"| ms per batch | {HEAD}")
    for name, rounds in times.items():
        cells = [f"{1e3 * statistics.median(values):.2f}" for values in zip(*rounds, strict=True)]
        print(f"| {' | '.join([name, *cells])} |")
    print(f"\n| median of the ratios | {HEAD}")
    for one, other in COMPARED:
        pairs = [zip(a, b, strict=True) for a, b in zip(times[one], times[other], strict=True)]
        ratios = zip(*([a / b for a, b in pair] for pair in pairs), strict=True)
        print(f"| {one} : {other} | {' | '.join(f'{statistics.median(values):.2f}×' for values in ratios)} |")


if __name__ == "__main__":
    main()
