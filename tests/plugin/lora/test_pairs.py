"""Every way of finding pairs, and every refusal."""

import logging
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import AdamW

from equipoise import ScaledAdamW, find_pairs
from equipoise.errors import PairingError


def peft_model(**options) -> nn.Module:
    base = nn.ModuleDict({"q": nn.Linear(12, 20), "v": nn.Linear(12, 16)})
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q", "v"], **options))


def couples(report) -> set[tuple[int, int]]:
    return {(id(pair.A), id(pair.B)) for pair in report}


def true_couples(model: nn.Module) -> set[tuple[int, int]]:
    params = dict(model.named_parameters())
    return {(id(p), id(params[n.replace("lora_A", "lora_B")])) for n, p in params.items() if "lora_A" in n}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def bare(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


class Kohya(nn.Module):
    """A kohya LoRA module: Linear, Conv2d, or the split qkv of its FLUX networks."""

    def __init__(self, down: nn.Module, up: nn.Module):
        super().__init__()
        self.lora_down, self.lora_up = down, up


def split_qkv() -> nn.Module:
    downs = nn.ModuleList(nn.Linear(24, 2, bias=False) for _ in range(3))
    return Kohya(downs, nn.ModuleList(nn.Linear(2, 8, bias=False) for _ in range(3)))


def test_in_a_peft_model():
    model = peft_model()
    report = find_pairs(model)
    assert couples(report) == true_couples(model)
    assert report.found_by == ("modules",)
    assert [pair.name for pair in report] == ["base_model.model.q.default", "base_model.model.v.default"]
    assert report.summary == "2 LoRA pairs of rank 2, found by modules."
    assert {pair.rank for pair in report} == {2}


def test_tensors_alone_are_traced_to_the_live_modules_that_own_them():
    model = peft_model()
    shuffled = trainable(model)[::-1]
    report = find_pairs(iter(shuffled))
    assert couples(report) == true_couples(model)
    assert report.found_by == ("modules",)
    assert couples(find_pairs(AdamW(shuffled))) == true_couples(model)


def test_by_names_when_no_module_is_alive():
    A1, B1, A2, B2 = bare((2, 12), (20, 2), (2, 12), (20, 2))
    named = [("x.lora_A.weight", A1), ("y.lora_A.weight", A2), ("y.lora_B.weight", B2), ("x.lora_B.weight", B1)]
    wanted = {(id(A1), id(B1)), (id(A2), id(B2))}
    for source in (named, AdamW(named), [{"params": named}]):
        report = find_pairs(source)
        assert couples(report) == wanted
        assert report.found_by == ("names",)


def test_by_adjacency_with_a_warning(caplog):
    A1, B1, A2, B2 = tensors = bare((4, 12), (9, 4), (4, 16), (8, 4))
    report = find_pairs(tensors)
    assert couples(report) == {(id(A1), id(B1)), (id(A2), id(B2))}
    assert report.found_by == ("adjacency",)
    assert "guess" in report.summary
    with caplog.at_level(logging.WARNING, "equipoise"):
        assert len(ScaledAdamW(tensors).pairs) == 2
    assert "guess" in caplog.text


def test_adjacency_beside_vectors_only_for_fresh_adapters():
    tensors = bare((4, 12), (9, 4), (9,))
    with pytest.raises(PairingError, match=r"Pass the model, or named parameters"):
        find_pairs(tensors)
    tensors[1].data.zero_()
    assert len(find_pairs(tensors)) == 1


@pytest.mark.parametrize(
    "shapes",
    [
        pytest.param([(2, 24)] * 3 + [(8, 2)] * 3, id="split qkv"),
        pytest.param([(2, 24), (2, 24), (16, 2), (16, 2)], id="all A, then all B (LoRA+)"),
        pytest.param([(16, 2), (2, 24)], id="B first"),
        pytest.param([(2, 24), (16, 2), (30, 30)], id="a full layer is left over"),
        pytest.param([(2, 24), (16, 2), (4, 24), (16, 2)], id="unequal ranks"),
        pytest.param([(32, 784), (32,), (784, 32), (784,)], id="an autoencoder"),
    ],
)
def test_adjacency_refuses_what_it_cannot_be_sure_of(shapes):
    with pytest.raises(PairingError, match="order does not settle"):
        find_pairs(bare(*shapes))


@pytest.mark.parametrize("shapes", [[(64, 784), (64,), (10, 64), (10,)], [(8, 8), (8, 8)], [(7, 9)], [(5,)]])
def test_ordinary_layers_are_no_pairs_and_no_error(shapes):
    report = find_pairs(bare(*shapes))
    assert len(report) == 0
    assert report.summary.startswith("No LoRA pairs found")


def test_a_live_network_with_a_narrow_middle_is_never_taken_for_a_pair():
    net = nn.Sequential(nn.Linear(64, 4, bias=False), nn.Tanh(), nn.Linear(4, 64, bias=False))
    assert len(find_pairs(list(net.parameters()))) == 0
    assert len(find_pairs(net)) == 0


@pytest.mark.parametrize("found", ["model", "tensors"])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: Kohya(nn.Linear(24, 2, bias=False), nn.Linear(2, 8, bias=False)), id="linear"),
        pytest.param(lambda: Kohya(nn.Conv2d(6, 2, 3, bias=False), nn.Conv2d(2, 8, 1, bias=False)), id="conv"),
        pytest.param(split_qkv, id="split qkv"),
    ],
)
def test_the_pairs_of_kohya_modules_are_found(make: Callable[[], Kohya], found: str):
    network = nn.ModuleDict({"lora_unet_to_q": make(), "lora_unet_to_v": make()})
    report = find_pairs(network if found == "model" else list(network.parameters()))
    params = dict(network.named_parameters())
    wanted = {(id(p), id(params[n.replace("down", "up")])) for n, p in params.items() if "lora_down" in n}
    assert couples(report) == wanted and len(wanted) == len(params) / 2


@pytest.mark.parametrize("place", ["to_q_lora", "lora", "lora_linear_layer"])
def test_layers_of_older_diffusers(place: str):
    layer = nn.ModuleDict({"down": nn.Linear(24, 2, bias=False), "up": nn.Linear(2, 8, bias=False)})
    model = nn.ModuleDict({"processor": nn.ModuleDict({place: layer})})
    assert couples(find_pairs(model)) == {(id(layer["down"].weight), id(layer["up"].weight))}


def test_down_and_up_elsewhere_are_ordinary_layers():
    model = nn.ModuleDict({"down": nn.Linear(24, 2, bias=False), "up": nn.Linear(2, 8, bias=False)})
    assert len(find_pairs(model)) == 0


def test_peft_convolution_and_embedding():
    base = nn.ModuleDict({"conv": nn.Conv2d(6, 10, 3), "words": nn.Embedding(30, 12)})
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["conv", "words"]))
    shapes = {(tuple(pair.A.shape), tuple(pair.B.shape)) for pair in find_pairs(model)}
    assert shapes == {((2, 6, 3, 3), (10, 2, 1, 1)), ((2, 30), (12, 2))}


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_dora_magnitudes_biases_and_full_layers_are_left_alone(options):
    model = peft_model(**options)
    model.base_model.model["extra"] = nn.Linear(40, 30)
    for source in (model, trainable(model)):
        report = find_pairs(source)
        assert couples(report) == true_couples(model)
        assert report.unpaired == ()


def test_a_factor_without_a_partner_is_left_to_the_base():
    report = find_pairs(nn.ModuleDict({"lora_down": nn.Conv2d(8, 4, 3, bias=False)}))
    assert len(report) == 0
    assert report.unpaired == ("lora_down.weight",)
    assert "1 LoRA factors without a partner" in report.summary


def test_a_grouped_convolution_is_a_pair_per_group():
    model = Kohya(nn.Conv2d(8, 4, 3, bias=False), nn.Conv2d(4, 8, 1, groups=2, bias=False))
    report = find_pairs(model)
    assert [(pair.rank, pair.A, pair.B) for pair in report] == [(2, model.lora_down.weight, model.lora_up.weight)] * 2
    assert report.unpaired == ()


def test_several_adapters_and_a_rank_pattern():
    model = peft_model(rank_pattern={"v": 4})
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q"]))
    assert {(pair.name.split(".")[-2:][0], pair.rank) for pair in find_pairs(model)} == {("q", 2), ("v", 4)}
    model.base_model.set_adapter(["default", "other"])
    report = find_pairs(model)
    assert {(pair.name.split(".")[-1], pair.rank) for pair in report} == {("default", 2), ("default", 4), ("other", 3)}


def test_lora_plus_groups():
    model = peft_model()
    As = [p for n, p in model.named_parameters() if "lora_A" in n]
    Bs = [p for n, p in model.named_parameters() if "lora_B" in n]
    optimizer = AdamW([{"params": Bs, "lr": 1e-2}, {"params": As}])
    assert couples(find_pairs(optimizer)) == couples(find_pairs(optimizer, model)) == true_couples(model)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_frozen_side_is_still_found(frozen: str):
    model = peft_model()
    for name, param in model.named_parameters():
        if frozen in name:
            param.requires_grad_(False)
    assert couples(find_pairs(model)) == couples(find_pairs(trainable(model))) == true_couples(model)


def test_an_entirely_frozen_adapter_is_not_reported():
    assert len(find_pairs(peft_model().requires_grad_(False))) == 0


def test_a_module_used_twice_is_one_pair():
    layer = Kohya(nn.Linear(24, 2, bias=False), nn.Linear(2, 8, bias=False))
    assert len(find_pairs(nn.ModuleDict({"a": layer, "b": layer}))) == 1


def test_refuses_a_factor_shared_by_two():
    shared = nn.Linear(24, 2, bias=False)
    layers = {name: Kohya(shared, nn.Linear(2, 8, bias=False)) for name in "ab"}
    with pytest.raises(PairingError, match=r"a\.lora_down\.weight|share a factor with the pair a"):
        find_pairs(nn.ModuleDict(layers))


def test_refuses_ranks_that_differ():
    A, B = bare((2, 24), (8, 3))
    with pytest.raises(PairingError, match=r"\(2, 24\) and lora_B \(8, 3\) belong together by name but not by rank"):
        find_pairs([("lora_A", A), ("lora_B", B)])


def test_refuses_flat_and_partitioned_parameters():
    flat, zero3, empty = bare((100,), (0,), (0, 4))
    flat._is_flat_param = True
    zero3.ds_id = 7
    for tensor, what in ((flat, "FSDP1 flat parameter"), (zero3, "DeepSpeed ZeRO"), (empty, "empty on this process")):
        with pytest.raises(PairingError, match=what):
            find_pairs([tensor])
    with pytest.raises(PairingError, match="was flattened or sharded"):
        find_pairs([("q.lora_A.weight", bare((48,))[0])])


def test_refuses_tensors_that_replaced_the_models_own():
    partition = bare((64,))
    with pytest.raises(PairingError, match="the optimizer holds none of their tensors"):
        find_pairs(AdamW(partition), peft_model())


def test_nothing_is_put_into_groups_or_state():
    model = peft_model()
    optimizer = AdamW(trainable(model))
    before = [dict(group) for group in optimizer.param_groups]
    find_pairs(optimizer)
    assert [dict(group) for group in optimizer.param_groups] == before and not optimizer.state


def test_two_models_with_the_same_names_are_told_apart_by_their_modules():
    """SDXL's two text encoders name their layers alike."""
    models = [nn.ModuleDict({"lora_A": nn.Linear(8, 2), "lora_B": nn.Linear(2, 8)}) for _ in range(2)]
    report = find_pairs([{"params": [*model.named_parameters()]} for model in models])
    assert len(report) == 2 and not report.unpaired and report.found_by == ("modules",)
    assert {(id(pair.A), id(pair.B)) for pair in report} == {
        (id(model["lora_A"].weight), id(model["lora_B"].weight)) for model in models
    }
