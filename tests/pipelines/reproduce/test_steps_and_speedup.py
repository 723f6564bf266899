"""What the small parts of `equipoise reproduce` measure: steps by eq. 2 and 3, Corollary 1, ranks and alpha on text."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from equipoise.pipelines.cli import main
from equipoise.pipelines.reproduce import ada_sam_speedup, ada_sam_text, alpha_adam_steps, scaled_gd, scaled_text
from equipoise.pipelines.reproduce.alpha_adam import GPT, make_optimizer, texts


def test_a_step_that_is_tried_leaves_net_and_moments_and_masks_shorten_it():
    torch.manual_seed(0)
    net, (learned, held_out) = GPT(), texts()
    optimizer = make_optimizer("AdamW", net, alpha_adam_steps.RATE)
    for start in (0, 2, 4):
        optimizer.zero_grad()
        net.loss(learned[start : start + 2]).backward()
        optimizer.step()
    optimizer.zero_grad()
    rows = learned[6:8]
    net.loss(rows).backward()
    before = [param.detach().clone() for param in net.parameters()]
    moments = [optimizer.state[param]["exp_avg"].clone() for param in net.parameters()]
    found = {
        method: alpha_adam_steps._tried(method, net, optimizer, rows, held_out[:2])
        for method in ("AdamW", "+AM", "+SM")
    }
    assert all(map(torch.equal, before, net.parameters()))
    assert all(torch.equal(m, optimizer.state[p]["exp_avg"]) for m, p in zip(moments, net.parameters(), strict=True))
    gradients = [param.grad.clone() for param in net.parameters()]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    moved = sum(((b - p) * g).sum().item() for b, p, g in zip(before, net.parameters(), gradients, strict=True))
    assert found["AdamW"][0] == pytest.approx(moved, rel=1e-4), "eq. 2, by hand"
    assert found["AdamW"][2] == pytest.approx(found["AdamW"][0] - found["AdamW"][1] / 2)
    assert found["AdamW"][0] < found["+SM"][0] != found["+AM"][0], "what is left out went up by its own batch"
    assert len(found["AdamW"]) == len(alpha_adam_steps.COLUMNS)


def test_which_mask_is_ahead_does_not_depend_on_the_sign_of_adamws_figures(monkeypatch):
    """On held-out text a step of AdamW may go against the gradient, and along a direction of negative curvature."""
    figures = dict.fromkeys(alpha_adam_steps.METHODS, [0.0] * 6)
    figures |= {"+AM": [3.0, 1.0, 2.5] * 2, "+SM": [1.0, 2.0, 0.0] * 2}

    @contextmanager
    def trained(*_):
        yield lambda train, cells: [cell | {"points": [figures] * alpha_adam_steps.POINTS} for cell in cells]

    monkeypatch.setattr(alpha_adam_steps, "workers", trained)
    for size in (4.0, -4.0):
        figures["AdamW"] = [size] * 6
        text = alpha_adam_steps.reproduce(2, 1).text
        assert text.count("paper above 0, here +0.500 (+0.500 to +0.500). Same direction.") == 2, "GC"
        assert text.count("paper below 0, here -0.250 (-0.250 to -0.250). Same direction.") == 2, "DS"
    assert [line.split()[1] for line in text.splitlines() if line.startswith("+AM ")] == ["+1.75"], "3 is more than -4"


def test_the_rip_constant_is_what_a_product_of_rank_one_shows(monkeypatch):
    monkeypatch.setattr(scaled_gd, "ROWS", 400)
    inputs = scaled_gd._inputs(torch.Generator().manual_seed(0), scaled_gd.GAUSSIAN)
    constant = scaled_gd.isometry(inputs)
    stretched = []
    for x in inputs:
        _, vectors = torch.linalg.eigh(x.T @ x)
        for vector in vectors.T:
            product = vector[:, None] @ torch.ones(1, 3, dtype=x.dtype)
            stretched.append(abs(((x @ product).norm() / product.norm()).item() ** 2 - 1))
    assert max(stretched) == pytest.approx(constant, rel=1e-9) and constant > 0.1
    for _ in range(20):
        product = torch.randn(scaled_gd.WIDTH, 3, dtype=torch.float64)
        assert all(abs((x @ product).norm() ** 2 / product.norm() ** 2 - 1) <= constant for x in inputs)


def test_data_near_an_isometry_is_the_same_data_with_the_constant_of_the_theorem(monkeypatch):
    monkeypatch.setattr(scaled_gd, "ROWS", 400)
    both = [scaled_gd._inputs(torch.Generator().manual_seed(0), data) for data in (scaled_gd.GAUSSIAN, scaled_gd.NEAR)]
    constant = scaled_gd.isometry(both[1])
    assert constant <= scaled_gd.ISOMETRY and constant == pytest.approx(scaled_gd.ISOMETRY, rel=1e-6)
    for x, near in zip(*both, strict=True):
        left, _, right = torch.linalg.svd(x, full_matrices=False)
        across = left.T @ near @ right.T
        assert torch.allclose(across, across.diagonal().diag(), atol=1e-10), "the same singular vectors"


def test_the_distance_of_eq_6_is_the_least_over_all_changes_of_basis():
    """It is 0 for the same product in any basis; for another product no random basis nearby has a smaller one; and at
    rank 1 it is what a search over a grid finds."""
    rng = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=rng)

    (left, _), (right, _) = (torch.linalg.qr(drawn(rows, 3)) for rows in (8, 6))
    sizes = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    part = (left, sizes, right)
    a, b, basis = left * sizes.sqrt(), right * sizes.sqrt(), torch.eye(3, dtype=torch.float64) + 0.3 * drawn(3, 3)
    moved = a @ basis, torch.linalg.solve(basis, b.T).T
    assert scaled_gd.distance(*moved, *part) < 1e-12

    away = a + 0.05 * drawn(8, 3) * sizes.sqrt(), b + 0.05 * drawn(6, 3) * sizes.sqrt()
    found = scaled_gd.distance(*away, *part)
    other = (away[0] @ basis, torch.linalg.solve(basis, away[1].T).T)
    assert scaled_gd.distance(*other, *part) == pytest.approx(found, rel=1e-6), "of the products alone"

    def at(q: torch.Tensor) -> float:
        first = (away[0] @ q - a) * sizes.sqrt()
        second = (torch.linalg.solve(q, away[1].T).T - b) * sizes.sqrt()
        return (first.square().sum() + second.square().sum()).sqrt().item()

    one = torch.eye(3, dtype=torch.float64)
    tried = [at(one + size * drawn(3, 3)) for size in (1e-3, 1e-2, 1e-1) for _ in range(50)]
    assert 0 < found <= min(tried)

    line = (torch.ones(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), torch.ones(1, 1).double())
    twice = scaled_gd.distance(torch.full((1, 1), 4.0).double(), torch.full((1, 1), 4.0).double(), *line)
    by_hand = min((4 * q - 1) ** 2 + (4 / q - 1) ** 2 for q in (i / 1000 for i in range(200, 5000)))
    assert twice == pytest.approx(by_hand**0.5, rel=1e-5)


def test_the_norm_that_is_averaged_is_that_of_the_whole_loss():
    net = ada_sam_speedup.Logistic(3)
    net.x.data = torch.linspace(-1, 1, ada_sam_speedup.WIDTH, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(net.loss(net.rows), net.x)
    assert net.squared_norm() == pytest.approx(gradient.square().sum().item(), rel=1e-12)


def test_larger_batches_and_longer_runs_have_smaller_gradients():
    def norm(batch: int, steps: int) -> float:
        return ada_sam_speedup.train({"way": ada_sam_speedup.WAYS[0], "batch": batch, "steps": steps, "seed": 0})[
            "norm"
        ]

    first = norm(1, 50)
    assert norm(16, 50) < first / 2 and norm(1, 400) < first / 1.5


def test_alpha_of_twice_the_rank_is_a_quarter_of_the_rate(monkeypatch):
    monkeypatch.setattr(scaled_text, "BASE_STEPS", 1)
    monkeypatch.setattr(scaled_text, "ROWS", 8)
    cell = {"rank": 1, "steps": 3, "seed": 0}
    scaled_text.exchanged.cache_clear()
    scaled_text.base_weights.cache_clear()
    try:
        losses = {
            (method, rate): scaled_text.train({**cell, "method": method, "rate": rate})["loss"]
            for method, rate in (
                ("scaled GD", 1.0), (scaled_text.TWICE, 0.25), ("scaled GD", 0.25), ("SGD", 1.0), ("AdamW", 0.1)
            )
        }  # fmt: skip
    finally:
        scaled_text.exchanged.cache_clear()
        scaled_text.base_weights.cache_clear()
    assert losses["scaled GD", 1.0] == pytest.approx(losses[scaled_text.TWICE, 0.25], abs=1e-3)
    assert len({round(loss, 4) for loss in losses.values()}) >= 4


@pytest.mark.slow
def test_the_corollary_as_the_command_prints_it(tmp_path, capsys):
    words = ["reproduce", "ada-sam-speedup", "--seeds", "1", "--steps", "32", "--workers", "1"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "ρ ∝ 1/√(bT), 2 at b = T = 1:" in out and out.count("the corollary's: -0.5") == 2
    cells = json.loads(Path(tmp_path, "out", "results.json").read_text())["runs"]
    assert len(cells) == 2 * 4 * 3 and {cell["steps"] for cell in cells} == {2, 8, 32}


def test_adasam_is_fine_tuned_as_the_others_are_and_goes_on_from_earlier_runs(monkeypatch):
    """In one process: all settings on two seeds, one of them known already."""
    monkeypatch.setattr(scaled_text, "BASE_STEPS", 1)
    monkeypatch.setattr(ada_sam_text, "RATES", dict.fromkeys(ada_sam_text.RATES, (0.1,)))
    monkeypatch.setattr(ada_sam_text, "RHOS", (0.05, 0.2))
    caches = (scaled_text.exchanged, scaled_text.base_weights, ada_sam_text._windows)
    for cache in caches:
        cache.cache_clear()
    kept: list[dict] = []

    @contextmanager
    def here(_count, _name, evaluations, keep=None):
        yield lambda train, cells: [cell | train(cell) for cell in cells]

    monkeypatch.setattr(ada_sam_text, "workers", here)
    try:
        first = ada_sam_text.reproduce(1, 1, steps=1)
        trained = ada_sam_text.train
        monkeypatch.setattr(ada_sam_text, "train", lambda cell: kept.append(cell) or trained(cell))
        again = ada_sam_text.reproduce(1, 1, steps=1, earlier=first.cells)
    finally:
        for cache in caches:
            cache.cache_clear()
    assert kept == [] and again.text == first.text, "nothing is trained a second time"
    assert len(first.cells) == 2 + 2 * 2 + 2, "each once, SAM and AdaSAM at each ρ, and two with twice the steps"
    assert {cell["steps"] for cell in first.cells} == {1, 2}
    losses = {(c["optimizer"], c["rho"], c["steps"]): c["loss"] for c in first.cells}
    assert len(set(losses.values())) == len(losses), "every option does something"
    assert all(cell["loss"] < 20 and cell["before"] != cell["loss"] for cell in first.cells)
    assert "- AdaSAM less AMSGrad: paper below 0, here " in first.text and "at equal gradients: here " in first.text
