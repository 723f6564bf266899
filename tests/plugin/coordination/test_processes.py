"""Two processes, each with its half of every batch, take the steps of one: the same κ, rates and weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from equipoise.coordination.balance import Prediction, balance_of, measure, swapped
from equipoise.coordination.commit import Commit, CommitCLR, look_ahead
from equipoise.coordination.descent import FeatureDescent

STEPS = 6
COORDINATORS = {
    "commit_clr": lambda: CommitCLR(window=3, every=1, measure_every=1),
    "commit": lambda: Commit(window=3, every=1, regularizer=0.3, regularize_every=2, measure_every=1),
    "feature_cd": lambda: FeatureDescent(window=2, latest=0.5, measure_every=1),
}


class TwoSided(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.language = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, given):
        return self.language(torch.tanh(self.encoder(given)))


def train(name: str, rank: int, world: int) -> dict:
    torch.manual_seed(0)
    model = TwoSided().double()
    data = torch.randn(STEPS, 4, 3, 6, dtype=torch.float64)[:, rank::world]  # (steps, samples, tokens, features)
    labels = torch.randint(0, 4, (STEPS, 4, 3))[:, rank::world]
    asked = (torch.arange(3) < torch.tensor([1, 3, 2, 2])[:, None])[rank::world]  # samples of different lengths
    sample = asked.nonzero()[:, 0]
    coordinator = COORDINATORS[name]()
    wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    components = {side: list(getattr(model, side).parameters()) for side in ("encoder", "language")}
    optimizer = torch.optim.Adam([{"params": inside, "side": side} for side, inside in components.items()])
    seen: dict = {"kappa": [], "rates": []}
    for step in range(STEPS):
        factors = coordinator.factors(list(components))
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * factors[group["side"]]
        seen["rates"] += [group["lr"] for group in optimizer.param_groups]
        each = F.cross_entropy(wrapped(data[step])[asked], labels[step][asked], reduction="none")
        counts = asked.sum(1)
        (each / counts[sample]).sum().div(len(counts)).backward()
        before = {side: [p.detach().clone() for p in inside] for side, inside in components.items()}
        optimizer.step()
        optimizer.zero_grad()

        def predict(step=step):
            return Prediction(model(data[step])[asked], sample)

        if weight := coordinator.weight(step):
            with swapped(model.parameters(), [*before["encoder"], *before["language"]]), torch.no_grad():
                base = predict()
            balance = look_ahead(predict, components, before, base, weight)
        else:
            balance = measure(predict, components, before)
        seen["kappa"].append(coordinator.observe(step, balance)["kappa"])
        coordinator.stepped(components, step, STEPS)
    return seen | {"weights": torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()}


def work(rank: int, file: str) -> dict:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    results: dict = {name: train(name, rank, 2) for name in COORDINATORS}
    # one process with one sample, one with three, and then one with none
    for case, counts in enumerate(((1, 3), (0, 3))):
        base = Prediction(torch.zeros(0), torch.arange(counts[rank]), 1.0, 2.0 + rank, 3.0)
        nothing = torch.tensor(float("nan"))
        found = balance_of(base, torch.tensor(1.0 + rank) if counts[rank] else nothing, torch.tensor(0.5))
        results[case] = found
    torch.distributed.destroy_process_group()
    return results


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(two_processes, tmp_path):
    first, second = two_processes(work, str(tmp_path / "meet"))
    for name in COORDINATORS:
        alone = train(name, 0, 1)
        for mine in (first[name], second[name]):
            assert mine["kappa"] == pytest.approx(alone["kappa"], rel=1e-9, nan_ok=True)  # sums in another order
            assert mine["rates"] == pytest.approx(alone["rates"], rel=1e-9)
            assert mine["weights"] == pytest.approx(alone["weights"], rel=1e-9, abs=1e-12)
        assert first[name]["kappa"] == pytest.approx(second[name]["kappa"], rel=0, nan_ok=True), "to the bit"
        assert first[name]["rates"] == second[name]["rates"]
        assert len(set(alone["rates"][::2])) > 1, "the rates move"
    assert first[0] == second[0] and first[1] == second[1]
    assert (first[0].language, first[0].encoder) == (1.75, 0.5) and first[0].h_language == 1.75 / 2.75
    assert (first[1].language, first[1].encoder) == (2.0, 0.5), "who has no answers has no say"
