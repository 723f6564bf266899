"""Finds the LoRA factor pairs (A, B) in a model, a parameter list or a live optimizer.

A is (r, n) and B is (m, r), as in PEFT: the weight moves by s·BA. A convolution's A (r, in, kh, kw) counts as
(r, in·kh·kw) and its B (m, r, 1, 1) as (m, r). Where A and B hold several pairs side by side, each is a pair of its
own; where something else lies between the two, they are none, and left to the base optimizer.
"""

import gc
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from equipoise.errors import NamelessError, PairingError
from equipoise.lora.blocks import Block, declared, split
from equipoise.lora.names import between, layer_of, role

_MAX_BARE_RANK = 256  # a wider "factor" without a name is more likely a layer of its own
_ADVICE = "Pass the model, or named parameters, to find_pairs or to the optimizer."


@dataclass(frozen=True, eq=False)
class Pair:
    """One LoRA pair. Either side may be frozen; a frozen side still supplies its Gram matrix."""

    name: str  # where it sits: A's name without its factor token
    A: Tensor  # (r, n) or (r, in, kh, kw); the whole parameter, also where the pair is a block of it
    B: Tensor  # (m, r) or (m, r, 1, 1)
    found_by: str  # "modules", "names" or "adjacency"
    block: Block | None = None  # which of several pairs in A and B

    @property
    def rank(self) -> int:
        return self.A.shape[0] // (self.block.count if self.block else 1)

    def part(self, side: int, tensor: Tensor) -> Tensor:
        """What this pair has of a tensor that is shaped as its parameter A (side 0) or B (side 1): a view."""
        if self.block is None:
            return tensor
        return self.block.of_B(tensor) if side else self.block.of_A(tensor)


@dataclass(frozen=True, eq=False)
class PairReport:
    """What `find_pairs` found. Iterating over it gives the pairs."""

    pairs: tuple[Pair, ...]
    unpaired: tuple[str, ...] = ()  # named like a LoRA factor, without a partner that fits: left to the base optimizer
    left: tuple[tuple[str, str], ...] = ()  # (where, why) of adapters that are no pairs: left to the base optimizer too

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def factors(self) -> frozenset[int]:
        """The `id` of every factor: what tells them from other parameters."""
        return frozenset(id(factor) for pair in self.pairs for factor in (pair.A, pair.B))

    @property
    def found_by(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(pair.found_by for pair in self.pairs))

    @property
    def summary(self) -> str:
        """One sentence for a log."""
        if not self.pairs:
            text = "No LoRA pairs found: every parameter is left to the base optimizer"
        else:
            ranks = ", ".join(str(rank) for rank in sorted({pair.rank for pair in self.pairs}))
            plural = "s" if len(self.pairs) > 1 else ""
            text = f"{len(self.pairs)} LoRA pair{plural} of rank {ranks}, found by {' and '.join(self.found_by)}"
        if "adjacency" in self.found_by:
            text += " (a guess from shapes and order; pass the model to be certain)"
        return "; ".join([text, *self.rest]) + "."

    @property
    def rest(self) -> list[str]:
        """What is left to the base optimizer and why, a clause for each reason."""
        clauses = []
        if self.unpaired:
            count, shown = len(self.unpaired), some(self.unpaired)
            clauses.append(f"{count} LoRA factors without a partner ({shown}) are left to the base optimizer")
        for why in dict.fromkeys(why for _, why in self.left):
            where = [name for name, reason in self.left if reason == why]
            count = f"{len(where)} adapters are" if len(where) > 1 else "1 adapter is"
            clauses.append(f"{count} left to the base optimizer ({some(where)}), for {why}")
        return clauses


def find_pairs(source: Any, model: nn.Module | None = None) -> PairReport:
    """Pair every LoRA A with its B.

    Looks, in this order and until every tensor is accounted for, at the names in the model; at the names that came with
    the tensors; at the live modules that own them; and, for tensors that nothing names, at shapes and order. Only pairs
    with a side in `source` are reported.

    Args:
        source: A module (its trainable parameters), an optimizer, parameter groups, tensors, or (name, tensor) pairs.
        model: Where the tensors live, when `source` is not itself a module.

    Raises:
        PairingError: The factors cannot be paired with certainty, or are no longer tensors of their own (FSDP1, ZeRO).
    """
    wanted, names = _tensors(source)
    if isinstance(source, nn.Module):
        model = source
    for tensor in wanted.values():
        _refuse_sharded(tensor, names.get(id(tensor)))

    search = _Search(wanted)
    roots: list[nn.Module] = []
    if model is not None:
        search.walk_modules(model)
        if search.found_elsewhere and not search.pairs and not search.left:
            raise PairingError(
                f"The model has {search.found_elsewhere} trainable LoRA pairs, but the optimizer holds none of their "
                "tensors: it was made for another model, or its parameters were replaced by flattened or partitioned "
                "ones, which cannot be scaled. Use DDP or FSDP2, or another optimizer."
            )
    elif any(map(role, names.values())):
        roots = live_roots()
        for root in roots:  # names do not say that A and B are those of several experts
            search.learn(root.named_parameters(remove_duplicate=False), root)
    search.walk([(names[key], tensor) for key, tensor in wanted.items() if key in names], "names")
    if search.nameless() or search.lonely:
        for root in roots or live_roots():
            search.walk_modules(root)
    search.pair_by_adjacency()
    return search.report()


REPLACED = (
    "The optimizer's parameters were replaced by flattened or partitioned ones (ZeRO, FSDP1), and a partition holds no "
    "full LoRA factor. Use DDP or FSDP2, or another optimizer."
)


class _Search:
    """The pairs among `wanted` (tensors by id) as far as they are known."""

    def __init__(self, wanted: dict[int, Tensor]):
        self.wanted = wanted
        self.pairs: list[Pair] = []
        self.named: set[int] = set()  # tensors that some source has a name for
        self.lonely: dict[int, str] = {}  # LoRA-named tensors still without a partner
        self.partner: dict[int, Pair] = {}
        self.left: dict[int, tuple[str, str]] = {}  # by the id of either factor: (layer, why it makes no pair)
        self.found_elsewhere = 0
        self._blocks: dict[int, tuple[str, int]] = {}
        self._why: dict[int, str] = {}  # by the id of either factor

    def nameless(self) -> list[Tensor]:
        return [tensor for key, tensor in self.wanted.items() if key not in self.named]

    def learn(self, named: Iterable[tuple[str, Tensor]], root: nn.Module | None = None) -> None:
        """What is no plain pair, as far as names and a module tell."""
        named = list(named)
        reasons = dict(filter(None, (between(name) for name, _ in named)))
        for name, tensor in named if reasons else ():
            if (known := role(name)) and (why := reasons.get(layer_of(known[1]))):
                self._why[id(tensor)] = why
        if root is not None:
            self._blocks |= declared(root)

    def walk_modules(self, root: nn.Module) -> None:
        named = list(root.named_parameters(remove_duplicate=False))
        self.learn(named, root)
        self.walk(named, "modules")

    def walk(self, named: Sequence[tuple[str, Tensor]], found_by: str) -> None:
        self.learn(named)
        sides: dict[str, dict[str, tuple[str, Tensor]]] = {}
        shared: set[str] = set()  # names that two models have: they tell nothing, the live modules may
        for name, tensor in named:
            self.named.add(id(tensor))
            known = role(name)
            if known is None:
                continue
            if tensor.ndim >= 2:
                side = sides.setdefault(known[1], {})
                if side.setdefault(known[0], (name, tensor))[1] is not tensor:
                    shared.add(known[1])
                    self.named.discard(id(tensor))
            elif id(tensor) in self.wanted and not name.endswith("bias"):
                raise PairingError(
                    f"{name} is a LoRA factor but has shape {tuple(tensor.shape)}: it was flattened or sharded (FSDP1, "
                    "ZeRO), and a shard has no Gram matrix. Use DDP or FSDP2, or another optimizer."
                )
        for key, both in sides.items():
            if key in shared:
                self.named.difference_update(id(tensor) for _, tensor in both.values())
                continue
            if len(both) == 2:
                self._add(key, both["A"], both["B"], found_by)
            for name, tensor in both.values():
                if id(tensor) in self.wanted and id(tensor) not in self.partner and id(tensor) not in self.left:
                    self.lonely[id(tensor)] = name

    def _add(self, key: str, a: tuple[str, Tensor], b: tuple[str, Tensor], found_by: str) -> None:
        (name_a, A), (name_b, B) = a, b
        if id(A) not in self.wanted and id(B) not in self.wanted:
            self.found_elsewhere += A.requires_grad or B.requires_grad
            return
        if why := self._why.get(id(A)):
            for side in (A, B):
                self.left[id(side)] = (layer_of(key) or key, why)
                self.lonely.pop(id(side), None)
            return
        if any(id(side) in self.partner for side in (A, B)):
            known = self.partner.get(id(A)) or self.partner[id(B)]
            if known.A is A and known.B is B:
                return  # the same pair under a second name
            raise PairingError(
                f"{name_a} and {name_b} share a factor with the pair {known.name}: one Gram matrix cannot serve two "
                "products. Give each layer its own factors, or use another optimizer."
            )
        blocks = split(A, B, self._blocks.get(id(A)))
        if blocks is None:
            raise PairingError(
                f"{name_a} {tuple(A.shape)} and {name_b} {tuple(B.shape)} belong together by name but not by rank: "
                f"A's first size is {A.shape[0]}, B's second {B.flatten(1).shape[1]}. Use A (r, n) and B (m, r)."
            )
        layer = layer_of(key) or key
        pairs = [Pair(f"{layer}[{block.index}]", A, B, found_by, block) for block in blocks]
        self.pairs += pairs or [Pair(layer, A, B, found_by)]
        for side in (A, B):
            self.partner[id(side)] = self.pairs[-1]
            self.lonely.pop(id(side), None)

    def pair_by_adjacency(self) -> None:
        """Pair neighbours among tensors that nothing names, if shapes and order leave no other reading.

        A two-layer network with a narrow middle has the shapes of a LoRA pair, so shapes alone are not evidence. It is
        asked besides that one side of every pair is exactly zero (a fresh adapter), or that there is no vector among
        the tensors (layers come with biases, and DoRA's magnitudes hide which order was meant).
        """
        bare = self.nameless()
        tensors = [tensor for tensor in bare if tensor.ndim >= 2]
        if not any(_fit(A, B) for A in tensors for B in tensors):
            return
        couples = list(zip(tensors[::2], tensors[1::2], strict=False))
        fits = len(tensors) % 2 == 0 and all(_fit(A, B) for A, B in couples)
        fresh = fits and all(not A.any() or not B.any() for A, B in couples)
        if not fits or not (fresh or len(tensors) == len(bare)):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in bare[:6]) + (", …" if len(bare) > 6 else "")
            raise NamelessError(
                f"The parameters have no names, no live module owns them, and their order does not settle which LoRA "
                f"factors belong together: got {shapes}. {_ADVICE}"
            )
        for index, (A, B) in enumerate(couples):
            pair = Pair(f"pair {index}", A, B, "adjacency")
            self.pairs.append(pair)

    def report(self) -> PairReport:
        return PairReport(tuple(self.pairs), tuple(self.lonely.values()), tuple(dict.fromkeys(self.left.values())))


def some(names: Sequence[str]) -> str:
    """The first three of many names, for a message."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _fit(A: Tensor, B: Tensor) -> bool:
    """Whether A (r, n…) and B (m, r…) could be a pair, going by a rank well below either width."""
    if A is B:
        return False
    rank, columns = A.flatten(1).shape
    rows, rank_b = B.flatten(1).shape
    return rank == rank_b and rank <= _MAX_BARE_RANK and 2 * rank <= min(rows, columns)


def _tensors(source: Any) -> tuple[dict[int, Tensor], dict[int, str]]:
    """The trainable tensors of `source` by id, in order, and the names that came with them."""
    if isinstance(source, nn.Module):
        source = [(name, param) for name, param in source.named_parameters() if param.requires_grad]
    elif isinstance(source, Optimizer):
        source = source.param_groups
    tensors: dict[int, Tensor] = {}
    names: dict[int, str] = {}
    for item in source:
        if isinstance(item, Mapping):
            params = list(item["params"]) if not isinstance(item["params"], Tensor) else [item["params"]]
            entries: Any = params
            if "param_names" in item:
                if len(item["param_names"]) != len(params):
                    raise PairingError(REPLACED)
                entries = zip(item["param_names"], params, strict=True)
        else:
            entries = [item]
        for entry in entries:
            name, tensor = entry if isinstance(entry, tuple) else (None, entry)
            tensors[id(tensor)] = tensor
            if name is not None:
                names[id(tensor)] = name
    return tensors, names


def live_roots() -> list[nn.Module]:
    """Every module alive in this process that is no other module's child."""
    kinds, waiting = set(), [nn.Module]
    while waiting:
        kinds.add(kind := waiting.pop())
        waiting += [t for t in type.__subclasses__(kind) if t not in kinds and t is not torch.jit.ScriptModule]
    # type(), not isinstance: that asks the object for __class__, and lazy proxies answer by importing things.
    objects = gc.get_objects()
    found: list[Any] = list(compress(objects, map(kinds.__contains__, map(type, objects))))
    modules = [module for module in found if "_modules" in vars(module)]  # others are still being made
    children = {id(child) for module in modules for child in vars(module)["_modules"].values()}
    return [module for module in modules if id(module) not in children]


def sharding(tensor: Tensor) -> str:
    """What keeps a parameter from being in full on this process, in words; empty if it is."""
    if getattr(tensor, "_is_flat_param", False) or type(tensor).__name__ == "FlatParameter":
        return "an FSDP1 flat parameter"
    if hasattr(tensor, "ds_id"):
        return "a DeepSpeed ZeRO partition"
    if tensor.numel() == 0 and tensor.requires_grad:
        return "empty on this process (a ZeRO or FSDP shard)"
    return ""


def _refuse_sharded(tensor: Tensor, name: str | None) -> None:
    if what := sharding(tensor):
        raise PairingError(
            f"{name or 'A parameter'} of shape {tuple(tensor.shape)} is {what}: scaling needs full LoRA factors. "
            "Use DDP or FSDP2, or another optimizer."
        )


def is_dtensor(tensor: Tensor) -> bool:
    """Whether processes have a part of it each, under its full shape (FSDP2)."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported: then there are none
    return module is not None and isinstance(tensor, module.DTensor)
