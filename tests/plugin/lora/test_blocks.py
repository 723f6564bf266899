"""Adapters that keep several pairs in two parameters, and such as are no pairs at all, by the layers of peft itself."""

import copy
import io
import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, KasaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.variants import QALoraLinearVariant
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from torch.optim import AdamW

from equipoise import BoundedAdamW, ScaledAdamW, ScaledGD, attach, bounded, find_pairs
from equipoise.errors import PairingError
from equipoise.optimizers.reference import ReferenceScaled

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")


class Experts(nn.Module):
    """Three experts' weights in one parameter, (experts, out, in) or, transposed, (experts, in, out)."""

    def __init__(self, transposed: bool):
        super().__init__()
        self.is_transposed = transposed
        self.weight = nn.Parameter(torch.randn(3, 8, 6) * torch.tensor([1.0, 2.0, 4.0])[:, None, None])
        self.other = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x: Tensor) -> Tensor:  # (batch, experts, in)
        return torch.einsum("bei,eio->beo" if self.is_transposed else "bei,eoi->beo", x, self.weight)


class MergedLinear(nn.Linear):
    """loralib's, without dropout and merging: queries and values of a GPT-2 layer adapted, its keys not."""

    def __init__(self, n: int, m: int, r: int = 2, enable_lora: tuple[bool, ...] = (True, False, True)):
        super().__init__(n, m, bias=False)
        self.enable_lora, self.fan_in_fan_out, self.scaling = list(enable_lora), True, 2.0
        groups = sum(enable_lora)
        self.lora_A = nn.Parameter(torch.randn(r * groups, n))
        self.lora_B = nn.Parameter(torch.zeros(m // len(enable_lora) * groups, r))
        self.weight = nn.Parameter(self.weight.data.T.contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        groups, size = sum(self.enable_lora), self.weight.shape[1] // len(self.enable_lora)
        delta = F.conv1d(self.lora_A.unsqueeze(0), self.lora_B.unsqueeze(-1), groups=groups).squeeze(0)
        blocks = iter(delta.split(size))
        rows = [next(blocks) if on else torch.zeros(size, x.shape[1]) for on in self.enable_lora]
        return x @ (self.weight + self.scaling * torch.cat(rows).T)


def peft(layer: nn.Module, **options) -> nn.Module:
    return get_peft_model(nn.ModuleDict({"layer": layer}), LoraConfig(r=4, lora_alpha=8, **options)).base_model.model[
        "layer"
    ]


def block_diagonal(side: str) -> nn.Module:
    blocks = BdLoraConfig(**{f"target_modules_bd_{side}": ["layer"], "nblocks": 2})
    return peft(nn.Linear(6, 8, bias=False), target_modules=["layer"], use_bdlora=blocks)


# A layer, and where its blocks lie in what it computes: the dimension to split, and the blocks that are adapted.
LAYERS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...], int]] = {
    "experts": (lambda: peft(Experts(False), target_parameters=["layer.weight"]), 0, (0, 1, 2), 3),
    "experts, transposed": (lambda: peft(Experts(True), target_parameters=["layer.weight"]), 0, (0, 1, 2), 3),
    "grouped convolution": (
        lambda: peft(nn.Conv2d(6, 8, 1, groups=2, bias=False), target_modules=["layer"]), 0, (0, 1), 2,
    ),
    "block-diagonal B": (lambda: block_diagonal("b"), 0, (0, 1), 2),
    "block-diagonal A": (lambda: block_diagonal("a"), 1, (0, 1), 2),
    "MergedLinear": (lambda: MergedLinear(6, 12), 0, (0, 2), 3),
    "MergedLinear of one": (lambda: MergedLinear(6, 12, enable_lora=(False, True, False)), 0, (1,), 3),
}  # fmt: skip


def made(kind: str, fresh: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = LAYERS[kind][0]()
    for name, param in model.named_parameters():
        if "lora_B" in name and not fresh:
            nn.init.normal_(param)
    return model


def weight(model: nn.Module) -> Tensor:
    """The weight that a layer acts by: (m, n), or (experts, …), found from what it makes of unit vectors."""
    with torch.no_grad():
        if any(hasattr(module, "parameter_name") for module in model.modules()):
            n = 8 if model.get_base_layer().is_transposed else 6
            return torch.stack([model(torch.eye(n)[:, None].expand(-1, 3, -1))[:, e].T for e in range(3)])
        x = torch.eye(6)
        if isinstance(getattr(model, "base_layer", None), nn.Conv2d):
            return model(x[:, :, None, None])[..., 0, 0].T
        return model(x).T


def blocks(kind: str, of: Tensor) -> list[Tensor]:
    _, dim, adapted, count = LAYERS[kind]
    return [of.chunk(count, dim)[i] for i in adapted]


def frozen(model: nn.Module) -> Tensor:
    off = copy.deepcopy(model)
    for name, param in off.named_parameters():
        if "lora_B" in name:
            param.data.zero_()
    return weight(off)


def backward(model: nn.Module, step: int = 0) -> None:
    torch.manual_seed(step)
    for param in model.parameters():
        param.grad = torch.randn_like(param) if param.requires_grad else None


@pytest.mark.parametrize("kind", LAYERS)
def test_each_block_moves_its_part_of_the_weight_by_its_own_product(kind: str):
    model = made(kind)
    pairs = find_pairs(model).pairs
    change = blocks(kind, weight(model) - frozen(model))
    assert len(pairs) == len(change) and len({pair.name for pair in pairs}) == len(pairs)
    for pair, moved in zip(pairs, change, strict=True):
        A, B = (pair.part(side, factor).detach().flatten(1) for side, factor in enumerate((pair.A, pair.B)))
        assert A.shape[0] == B.shape[1] == pair.rank
        torch.testing.assert_close(moved.reshape(B.shape[0], A.shape[1]), 2.0 * B @ A)


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_block_takes_the_steps_of_a_pair_of_its_own(kind: str, order: str):
    model = made(kind)
    optimizer = ScaledAdamW(model, 0.1, damping=1e-3, order=order, weight_decay=0.0)
    pairs = optimizer.pairs.pairs
    alone = [
        tuple(nn.Parameter(pair.part(side, factor).detach().flatten(1).double()) for side, factor in enumerate(sides))
        for pair in pairs
        for sides in [(pair.A, pair.B)]
    ]
    slow = ReferenceScaled(alone, 0.1, damping=1e-3, sequential=order == "sequential")  # type: ignore[arg-type]
    for step in range(4):
        backward(model, step)
        for pair, twin in zip(pairs, alone, strict=True):
            for side, factor in enumerate((pair.A, pair.B)):
                assert factor.grad is not None
                twin[side].grad = pair.part(side, factor.grad).flatten(1).double()
        if step == 2:  # other programs put new storage behind parameters
            for param in model.parameters():
                param.data = param.data.clone()
        optimizer.step()
        slow.step()
    assert optimizer.fallbacks == 0
    for pair, twin in zip(pairs, alone, strict=True):
        for side, factor in enumerate((pair.A, pair.B)):
            found = pair.part(side, factor.detach()).flatten(1).double()
            torch.testing.assert_close(found, twin[side].detach(), rtol=0, atol=1e-4)  # float32 against float64


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "MergedLinear of one"])
def test_one_gram_matrix_for_all_blocks_would_be_wrong(kind: str):
    model = made(kind)
    backward(model)
    A, B = (next(p for name, p in model.named_parameters() if f"lora_{side}" in name) for side in "AB")
    raw = A.grad.flatten(1).clone()
    ScaledGD(model, 0.0, damping=1e-3).step()
    if B.flatten(1).shape[1] != A.shape[0]:
        return  # no product of the two exists at all
    gram = B.flatten(1).T @ B.flatten(1) + 1e-3 * torch.eye(A.shape[0])
    assert (torch.linalg.solve(gram, raw) - A.grad.flatten(1)).norm() > 0.1 * A.grad.norm()


@pytest.mark.parametrize("kind", LAYERS)
def test_every_block_is_bounded_by_its_part_of_the_frozen_weight(kind: str):
    model = made(kind)
    start = frozen(model)
    optimizer = BoundedAdamW(model, lr=10.0, trust=0.01)
    for step in range(3):
        before = weight(model)
        backward(model, step)
        optimizer.step()
        for moved, size in zip(blocks(kind, weight(model) - before), blocks(kind, start), strict=True):
            assert moved.norm() / size.norm() == pytest.approx(0.01, rel=1e-3)
    assert list(optimizer.shares) == [pair.name for pair in optimizer.pairs]


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_reach_holds_for_every_block_and_over_a_resumption(kind: str, fresh: bool):
    model = made(kind, fresh)
    start, began = frozen(model), weight(model)
    optimizer = BoundedAdamW(model, lr=1.0, reach=0.02, trust=0.01)
    for step in range(4):
        backward(model, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer = BoundedAdamW(model, lr=1.0, reach=0.02, trust=0.01)
    optimizer.load_state_dict(torch.load(file))
    for step in range(4, 12):
        backward(model, step)
        optimizer.step()
    far = [
        float(moved.norm() / size.norm())
        for moved, size in zip(blocks(kind, weight(model) - began), blocks(kind, start), strict=True)
    ]
    assert max(far) <= 0.02 * 1.001 and max(far) > 0.015
    assert list(optimizer.moved.values()) == pytest.approx(far, rel=1e-3)


def test_schedule_free_blocks_move_as_pairs_of_their_own():
    """Its second sequence is taken back block by block, too."""
    model = made("MergedLinear")
    pairs = find_pairs(model).pairs
    alone = nn.ModuleList()
    for pair, W in zip(pairs, blocks("MergedLinear", model.weight.data.T), strict=True):
        layer = MergedLinear(6, 4, enable_lora=(True,))
        layer.weight.data.copy_(W.T)
        layer.lora_A.data.copy_(pair.part(0, pair.A.data))
        layer.lora_B.data.copy_(pair.part(1, pair.B.data))
        alone.append(layer)
    both = [bounded(AdamWScheduleFree)(net, lr=1.0, trust=0.01) for net in (model, alone)]
    for optimizer in both:
        optimizer.train()
    for step in range(5):
        backward(model, step)
        for pair, layer in zip(pairs, alone, strict=True):
            for side, (whole, param) in enumerate(((pair.A, layer.lora_A), (pair.B, layer.lora_B))):
                assert whole.grad is not None
                param.grad = pair.part(side, whole.grad).clone()
        for optimizer in both:
            optimizer.step()
    for optimizer in both:
        optimizer.eval()
    for pair, layer in zip(pairs, alone, strict=True):
        torch.testing.assert_close(pair.part(0, pair.A), layer.lora_A)
        torch.testing.assert_close(pair.part(1, pair.B), layer.lora_B)


def test_two_parameters_of_one_module_have_pairs_of_their_own():
    model = peft(Experts(False), target_parameters=["layer.weight", "layer.other"])
    pairs = find_pairs(model).pairs
    assert len(pairs) == 6 and len({id(pair.A) for pair in pairs}) == 2
    backward(model)
    BoundedAdamW(model, lr=1.0, trust=0.01).step()


def test_experts_are_found_whatever_the_optimizer_was_given():
    model = made("experts")
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    for source in (model, AdamW(trainable), trainable, [param for _, param in trainable]):
        assert [pair.rank for pair in find_pairs(source)] == [4, 4, 4]


def test_an_optimizer_of_experts_can_be_copied():
    model = made("experts")
    both = copy.deepcopy({"model": model, "optimizer": ScaledAdamW(model, 0.1)})
    backward(both["model"])
    both["optimizer"].step()
    assert len(both["optimizer"].pairs) == 3


def test_experts_of_which_none_is_trained_are_not_reported():
    assert len(find_pairs(made("experts").requires_grad_(False))) == 0


# No pairs


def adalora() -> nn.Module:
    return get_peft_model(
        nn.ModuleDict({"layer": nn.Linear(6, 8)}), AdaLoraConfig(init_r=2, total_step=10, target_modules=["layer"])
    )


def kasa() -> nn.Module:
    return peft(nn.Linear(6, 8), target_modules=["layer"], kasa_config=KasaConfig())


class Tucker(nn.Module):
    """The factors of LyCORIS' convolutions with use_tucker, by its names."""

    def __init__(self):
        super().__init__()
        self.lora_down, self.lora_up = nn.Conv2d(6, 2, 1, bias=False), nn.Conv2d(2, 8, 1, bias=False)
        self.lora_mid = nn.Conv2d(2, 2, 3, bias=False)


class Scalar(nn.Module):
    """The factors of LyCORIS with use_scalar, by its names."""

    def __init__(self):
        super().__init__()
        self.lora_down, self.lora_up = nn.Linear(6, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.scalar = nn.Parameter(torch.tensor(0.0))


NO_PAIRS = {"AdaLoRA": adalora, "KaSA": kasa, "Tucker": Tucker, "scalar": Scalar}


@pytest.mark.parametrize("given", ["model", "names", "tensors"])
@pytest.mark.parametrize("kind", NO_PAIRS)
def test_what_has_something_between_its_factors_is_left_to_the_base(kind: str, given: str, caplog):
    torch.manual_seed(0)
    model = NO_PAIRS[kind]()
    plain = copy.deepcopy(model)
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    source = {"model": model, "names": named, "tensors": [param for _, param in named]}[given]
    report = find_pairs(source)
    (where,) = report.left
    assert len(report) == 0 and report.unpaired == () and kind in report.summary
    assert "1 adapter is left to the base optimizer" in report.summary and where[1] in report.summary
    with caplog.at_level(logging.WARNING, "equipoise"):
        scaled = ScaledAdamW(source, 0.1, trust=0.01)
        backward(model)
        scaled.step()
    assert "The option trust bounds LoRA pairs alone: 1 adapter is left" in caplog.text
    backward(plain)
    AdamW([param for param in plain.parameters() if param.requires_grad], 0.1).step()
    assert all(torch.allclose(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_pairs_beside_what_is_none_are_treated(caplog):
    model = nn.ModuleDict({"one": Tucker(), "two": made("MergedLinear")})
    with caplog.at_level(logging.WARNING, "equipoise"):
        optimizer = attach(AdamW(model.parameters(), 1.0), model, damping=None, trust=0.01)
        backward(model)
        optimizer.step()
    assert "one.lora_down" not in caplog.text and "(one)" in caplog.text
    assert len(optimizer.shares) == 2


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported for CAUSAL_LM:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"alora_invocation_tokens": [1]},
        {"velora_config": VeloraConfig(num_groups=2)},
        {"monteclora_config": MontecloraConfig()},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": "pissa"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_variants_are_plain_pairs(options: dict):
    report = find_pairs(peft(nn.Linear(6, 8), target_modules=["layer"], **options))
    assert [(pair.rank, pair.block) for pair in report] == [(4, None)] and not report.rest


def test_qalora_is_bounded_by_what_it_adds_to_the_weight():
    """peft offers it for GPTQ layers alone; the variant itself goes with any."""
    model = peft(nn.Linear(6, 8, bias=False), target_modules=["layer"])
    QALoraLinearVariant.init(model, "default", LoraConfig(use_qalora=True, qalora_group_size=3))
    model.lora_variant["default"] = QALoraLinearVariant()
    nn.init.normal_(model.lora_B["default"].weight)
    assert model.lora_A["default"].weight.shape == (4, 2)
    before, size = weight(model), frozen(model).norm()
    backward(model)
    BoundedAdamW(model, lr=10.0, trust=0.01).step()
    assert (weight(model) - before).norm() / size == pytest.approx(0.01, rel=1e-3)


def test_a_frozen_weight_that_has_not_as_many_parts_is_refused():
    layer = nn.Module()
    layer.lora_A, layer.lora_B = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(8, 2))
    layer.weight = nn.Parameter(torch.randn(7, 6), requires_grad=False)
    backward(layer)
    with pytest.raises(PairingError, match=r"which part of the frozen weight \(7, 6\)"):
        BoundedAdamW(layer, 0.1).step()
