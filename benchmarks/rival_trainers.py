"""BalanceMM's trainers beside ours on the same features: the update of a step, accuracy, and time per batch.

    python benchmarks/rival_trainers.py FOLDER    # a checkout of github.com/GeWu-Lab/BalanceBenchmark

What runs of BalanceMM is the `training_step` of its trainers, as it stands in FOLDER. Its models, data sets and meters
are not imported, nor is what they need and may not be installed (Lightning, torchvision, scikit-learn, thop): in their
places stand modules in which every name is an empty class. The model here has the names that its trainers ask for, with
two small encoders and a head by concatenation (for MLA one head for both modalities).

- update: from the same weights and on the same batch, by plain SGD: the largest of BATCHES batches' differences,
  relative to our update. 0 is the same method.
- accuracy: after training by each, from the same start and on the same batches, in %: mean and standard deviation of
  the seeds.
- ms per batch: the median, in this process's own time, forward pass and update too. MLA's batch is one step of theirs
  and two of ours.

The features are made: a vector of sound that is easy and right in seven clips of ten, and one of pictures that is
always right and takes longer. Prints a Markdown table.
"""

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise import registry
from equipoise.balancing.objective import Losses, Objective

ABSENT = ("lightning", "lightning_utilities", "torchvision", "sklearn", "thop")
UNUSED = ("balancemm.evaluation", "balancemm.models", "balancemm.encoders", "balancemm.utils")
NAMES, WIDTHS, CLASSES, WIDTH = ("audio", "visual"), (16, 48), 6, 32
TRAIN, TEST, BATCH, EPOCHS, RATE, BATCHES = 1280, 1000, 64, 15, 0.05, 10
Batch = dict[str, Tensor]


class Nothing(type):
    """Of empty classes in which every name is another."""

    def __getattr__(cls, name: str) -> "Nothing":
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing(name, (), {})


class Absent:
    """Finds the packages that nothing here needs: modules in which every name is an empty class."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        wanted = name.split(".")[0] in ABSENT or name.startswith(UNUSED)
        return ModuleSpec(name, self, is_package=True) if wanted else None  # pyright: ignore[reportArgumentType]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        made = ModuleType(spec.name)
        made.__getattr__ = lambda name: Nothing(name, (), {})  # type: ignore[method-assign]
        return made

    def exec_module(self, module: ModuleType) -> None: ...


def trainers(folder: Path) -> Callable[[str], ModuleType]:
    """What imports one of BalanceMM's trainers by name, without its package's own imports of all of them."""
    sys.meta_path.insert(0, Absent())  # pyright: ignore[reportArgumentType]
    sys.path.insert(0, str(folder))
    package = ModuleType("balancemm.trainer")
    package.__path__ = [str(folder / "balancemm" / "trainer")]
    sys.modules["balancemm.trainer"] = package
    return lambda name: importlib.import_module(f"balancemm.trainer.{name}_trainer")


class Net(nn.Module):
    """Two encoders and a head, by our names and by BalanceMM's."""

    def __init__(self, shared: bool):
        super().__init__()
        self.encoders = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(width, 64, bias=False), nn.Tanh(), nn.Linear(64, WIDTH, bias=False))
                for name, width in zip(NAMES, WIDTHS, strict=True)
            }
        )
        self.fusion_module = nn.Module()
        self.fusion_module.fc_out = nn.Linear(WIDTH if shared else 2 * WIDTH, CLASSES)
        self.shared, self.modalitys, self.n_classes, self.device = shared, list(NAMES), CLASSES, "cpu"
        self.modality_size = dict.fromkeys(NAMES, WIDTH)
        self.unimodality_calculate = self.Unimodality_Calculate = lambda: self.unimodal_result

    def forward(self, batch: Batch) -> Tensor:
        features = {name: self.encoders[name](batch[name]) for name in NAMES}
        head = self.fusion_module.fc_out
        columns = [head.weight] * 2 if self.shared else head.weight.chunk(2, 1)
        bias = head.bias if self.shared else head.bias / 2
        parts = {name: features[name] @ c.T + bias for name, c in zip(NAMES, columns, strict=True)}
        joint = self._sure(parts) if self.shared else torch.stack(list(parts.values())).sum(0)
        self.encoder_result = {**features, "output": joint}
        self.unimodal_result = {**parts, "output": joint}
        self.prediction = {name: logits.argmax(1) for name, logits in self.unimodal_result.items()}
        return joint

    def _sure(self, parts: dict[str, Tensor]) -> Tensor:
        stacked = torch.stack(list(parts.values()))
        logs = stacked.log_softmax(2)
        return ((logs.exp() * logs).sum(2, keepdim=True).softmax(0) * stacked).sum(0)

    def feature_extract(self, batch: Batch, modality: str) -> Tensor:
        return self.encoders[modality](batch[modality])

    def losses(self, batch: Batch) -> Losses:
        joint, labels = self(batch), batch["label"]
        said = {name: self.unimodal_result[name] for name in NAMES}
        own = {name: F.cross_entropy(logits, labels) for name, logits in said.items()}
        features = {name: self.encoder_result[name] for name in NAMES}
        return Losses(F.cross_entropy(joint, labels), own, labels, said, features)


class Method(NamedTuple):
    """One method on both sides."""

    name: str  # our objective
    options: dict[str, Any]
    trainer: str  # BalanceMM's
    settings: dict[str, Any]
    turns: int = 1  # our steps for a batch


METHODS = (
    Method("ogm_ge", {"alpha": 0.3, "tensors": "all"}, "OGM", {"alpha": 0.3, "method": "OGM_GE"}),
    Method("pmr", {"alpha": 0.6, "momentum": 0.5}, "PMR", {"alpha": 0.6, "momentum_coef": 0.5}),
    Method("mmpareto", {"gamma": 1.5}, "MMPareto", {"alpha": 1.5}),
    Method("mla", {}, "MLA", {"alpha": 0.5, "criterion": nn.CrossEntropyLoss()}, 2),
    Method("lfm", {"epochs_all": 200.0}, "LFM", {}),
)


class Ours:
    def __init__(self, method: Method, net: Net, theirs: "Theirs | None" = None):
        self.method, self.net, self.theirs = method, net, theirs
        self.objective: Objective = registry.load("objectives", method.name)(**method.options)
        self.objective.bind({name: list(net.encoders[name].parameters()) for name in NAMES})
        self.objective.steps_per_epoch = method.turns * TRAIN / BATCH
        self.objective.joint_head = list(net.fusion_module.parameters())

    def epoch(self, batches: Sequence[Batch]) -> None:
        if self.objective.wants_features():
            whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
            with torch.no_grad():
                made = {name: self.net.encoders[name](whole[name]) for name in NAMES}, whole["label"]
            self.objective.take_features(*made, *made)

    def step(self, batch: Batch, index: int, optimizer: torch.optim.Optimizer) -> None:
        if self.theirs and self.method.name == "pmr":  # of theirs, which are of a tenth of the batches
            self.objective.prototypes = self.theirs.prototypes  # type: ignore[attr-defined]
        for _ in range(self.method.turns):
            self.objective.backward(self.net.losses(batch))
            self.objective.before_step()
            optimizer.step()
            optimizer.zero_grad()


class Theirs:
    def __init__(self, method: Method, net: Net, load: Callable[[str], ModuleType]):
        self.method, self.net = method, net
        module = load(method.trainer)
        kind = getattr(module, f"{method.trainer}Trainer")
        self.trainer = kind.__new__(kind)  # without its meters and its launcher
        silent = SimpleNamespace(call=lambda *_: None)
        vars(self.trainer).update(
            method.settings | {"modulation_starts": 0, "modulation_ends": 10**9, "current_epoch": 0, "fabric": silent}
        )
        self.prototypes: dict[str, Tensor] = dict.fromkeys(NAMES, torch.zeros(()))
        if method.name == "mla":
            self.trainer.gs_plugin = module.GSPlugin(" ")
            self.trainer.gs_plugin.Pl = torch.eye(WIDTH)  # 512 there
        self.records = {name: [(n, p) for n, p in net.named_parameters() if name in n] for name in NAMES}

    def epoch(self, batches: Sequence[Batch]) -> None:
        if self.method.name == "pmr":
            # the batches that it looks at are a tenth, and must be one at least
            some = [*batches, *batches[: max(0, 10 - len(batches))]]
            self.prototypes = self.trainer.calculate_prototype(self.net, some, self.prototypes)
        if self.method.name == "lfm":  # the authors' polynomial, which BalanceMM has not
            weight = registry.load("objectives", "lfm")(**self.method.options)
            weight.steps_per_epoch, weight._steps = 1.0, self.trainer.current_epoch
            self.trainer.alpha = {0: weight.weight(), 1: 1 - weight.weight()}

    def step(self, batch: Batch, index: int, optimizer: torch.optim.Optimizer) -> None:
        more = {
            "pmr": {"proto": self.prototypes},
            "mmpareto": {"record_names": self.records, "optimizer": optimizer},
            "mla": {"len_dataloader": TRAIN // BATCH, "optimizer": optimizer},
        }.get(self.method.name, {})
        self.trainer.training_step(self.net, batch, index, **more)
        if self.method.name != "mla":  # which steps by itself
            optimizer.step()
        optimizer.zero_grad()


def made(count: int, seed: int) -> Batch:
    """Features of clips: sound is easy, and another class's in three clips of ten."""
    centres = [torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(7)) for width in WIDTHS]
    drawn = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=drawn)
    wrong = torch.rand(count, generator=drawn) < 0.3
    said = torch.where(wrong, torch.randint(CLASSES, (count,), generator=drawn), labels)
    sound = 1.5 * centres[0][said] + torch.randn(count, WIDTHS[0], generator=drawn)
    picture = 0.5 * centres[1][labels] + torch.randn(count, WIDTHS[1], generator=drawn)
    return {"audio": sound, "visual": picture, "label": labels}


def batches(data: Batch, seed: int) -> list[Batch]:
    order = torch.randperm(len(data["label"]), generator=torch.Generator().manual_seed(seed))
    return [{name: values[some] for name, values in data.items()} for some in order.split(BATCH)]


def net(method: Method, seed: int) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    made = Net(shared=method.name == "mla")
    return made, torch.optim.SGD(made.parameters(), lr=RATE)


def updates_apart(method: Method, load: Callable[[str], ModuleType]) -> float:
    """The largest relative difference of an update, from the same weights, along BalanceMM's own way."""
    (one, first), (other, second) = net(method, 0), net(method, 0)
    theirs = Theirs(method, one, load)
    ours = Ours(method, other, theirs)
    some, worst = batches(made(TRAIN, 0), 0), 0.0
    theirs.epoch(some)
    ours.epoch(some)
    for index, batch in enumerate(some[:BATCHES]):
        other.load_state_dict(one.state_dict())
        before = [parameter.detach().clone() for parameter in one.parameters()]
        for side, optimizer in ((theirs, first), (ours, second)):
            torch.manual_seed(index)  # of OGM-GE's noise
            side.step(batch, index, optimizer)
        moved = [
            torch.cat([(p.detach() - b).flatten() for p, b in zip(side.parameters(), before, strict=True)])
            for side in (one, other)
        ]
        worst = max(worst, float((moved[0] - moved[1]).norm() / moved[1].norm()))
    return worst


def trained(method: Method, seed: int, load: Callable[[str], ModuleType] | None) -> tuple[float, list[float]]:
    """Test accuracy in %, and the seconds of each batch; by BalanceMM where it is loaded, else by ours."""
    data, test = made(TRAIN, seed), made(TEST, 1000 + seed)
    model, optimizer = net(method, seed)
    side = Theirs(method, model, load) if load else Ours(method, model)
    times = []
    for epoch in range(EPOCHS):
        some = batches(data, EPOCHS * seed + epoch)
        if isinstance(side, Theirs):
            side.trainer.current_epoch = epoch
        side.epoch(some)
        for index, batch in enumerate(some):
            started = time.process_time()
            side.step(batch, index, optimizer)
            times.append(time.process_time() - started)
    with torch.no_grad():
        return 100 * float((model(test).argmax(1) == test["label"]).double().mean()), times


def rows(load: Callable[[str], ModuleType], seeds: int) -> Iterator[str]:
    for method in METHODS:
        apart = updates_apart(method, load)
        found = [[trained(method, seed, side) for seed in range(seeds)] for side in (load, None)]
        cells = [method.name, f"{apart:.1e}"]
        cells += [
            f"{statistics.mean(a for a, _ in runs):.1f} ± {statistics.stdev(a for a, _ in runs):.1f}" for runs in found
        ]
        cells += [f"{1e3 * statistics.median(t for _, times in runs for t in times):.2f}" for runs in found]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="BalanceMM's trainers beside ours")
    parser.add_argument("folder", type=Path, help="a checkout of BalanceMM")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    if not (args.folder / "balancemm" / "trainer").is_dir():
        parser.error(f"{args.folder}: has no balancemm/trainer. Give a checkout of BalanceMM.")
    torch.set_num_threads(1)
    print("| method | update apart | accuracy: BalanceMM | ours | ms per batch: BalanceMM | ours |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows(trainers(args.folder), max(2, args.seeds)):
        print(row, flush=True)


if __name__ == "__main__":
    main()
