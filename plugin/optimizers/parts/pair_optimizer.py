"""What optimizer classes that treat LoRA pairs add to their base: discovery of the pairs, options, state, copies."""

import functools
import inspect
from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from equipoise.errors import InputError
from equipoise.lora.pairs import PairReport
from equipoise.optimizers.parts.checks import is_number
from equipoise.optimizers.parts.step_hook import StepHook, check_options

STEPS = 0.1  # of reach, the option trust where it is not given


class PairOptimizer:
    """Mixed into a torch optimizer class before its base; everything happens in the hooks around its step."""

    _OPTIONS: ClassVar[dict[str, Any]]  # what it adds to every parameter group, with the defaults
    _hook: StepHook
    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]

    @property
    def pairs(self) -> PairReport:
        """The LoRA pairs that are treated; looked up now if no step was taken yet."""
        return self._hook.look_up(self)

    @property
    def fallbacks(self) -> int:
        """How many gradients were left unscaled or scaled inexactly, for want of an inverse. Waits for the device."""
        return self._hook.failures

    @property
    def shares(self) -> dict[str, float]:
        """By pair, the share of the last step that the option trust let through. Waits for the device."""
        return self._hook.shares

    @property
    def moved(self) -> dict[str, float]:
        """By pair, how far BA is from where it began, as a share of the frozen weight's norm, where the option reach
        bounds it. Waits for the device."""
        return self._hook.moved

    def _make_adamw(self, given: Any, model: nn.Module | None, options: Mapping[str, Any], **adamw: Any) -> None:
        super().__init__(given, **adamw)  # type: ignore[call-arg]
        self._work_on_pairs(options, model)

    def _work_on_pairs(self, options: Mapping[str, Any], model: nn.Module | None) -> None:
        options = with_trust(options)
        self.defaults.update(options)
        for group in self.param_groups:
            for name, value in options.items():
                group.setdefault(name, value)  # None stays: a group may be left unbounded
        check_options(self)
        self._hook = StepHook(model, scales="damping" in self._OPTIONS)
        self._hook.register(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)  # type: ignore[misc]
        if "_hook" in self.__dict__:
            check_options(self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy's tensors belong to no module, so what was found goes along (not into state_dict, which stays plain).
        return super().__getstate__() | {"_found": self._hook.found, "_norms": self._hook.norms}  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        found, norms = state.pop("_found", None), state.pop("_norms", None)
        before = self.__dict__.get("param_groups", [])
        super().__setstate__(state)  # type: ignore[misc]
        for index, group in enumerate(self.param_groups):  # a state saved by another class lacks options: ours stay
            own = before[index] if index < len(before) else self.defaults
            ours = {name: own.get(name, value) for name, value in self._OPTIONS.items()}
            if "trust" in group:  # saved by a class like this one, perhaps before it had a reach: as it was
                group.setdefault("reach", None)
                ours.pop("reach")
            fill_group(group, ours)
        if "_hook" not in self.__dict__:  # copying and unpickling drop hooks
            self._hook = StepHook(None, scales="damping" in self._OPTIONS, found=found, norms=norms)
            self._hook.register(self)


def with_trust(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Options with steps that go with their reach, where trust is not given."""
    reach = options.get("reach")
    if options.get("trust") is None and is_number(reach) and reach > 0:  # type: ignore[operator]
        return {**options, "trust": STEPS * reach}  # type: ignore[operator]
    return options


def fill_group(group: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Give a group, perhaps loaded from another class's state, the options that it lacks; None counts as lacking."""
    for name, value in options.items():
        if group.get(name) is None:
            group[name] = value


def unwrap(optimizer: Any) -> Any:
    """The optimizer itself, out of accelerate's wrapper."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and isinstance(
        getattr(optimizer, "optimizer", None), Optimizer
    ):
        optimizer = optimizer.optimizer
    return optimizer


def make_class(
    maker: Callable[[type], type],
    mixin: type,
    base: type[Optimizer],
    options: Mapping[str, tuple[Any, Any]],
    doc: str,
    begin: Callable[[Any, Mapping[str, Any], nn.Module | None], None] = PairOptimizer._work_on_pairs,
) -> type[Optimizer]:
    """A class of `mixin` on top of `base`, whose constructor takes `options` (type, default) as keywords too.

    Args:
        maker: The module-level function that makes it again from `base` when a copy is unpickled. The class is
            named after it.
        begin: What an instance does with those options, and the model if it was given one, once `base` is constructed.
    """
    defaults = {name: default for name, (_, default) in options.items()}

    def __init__(self, params, *args, **given):
        ours = {name: given.pop(name, default) for name, default in defaults.items()}
        tensors, model = unpack(params)
        whole = model is not None and issubclass(base, PairOptimizer)  # which looks for pairs in it
        base.__init__(self, params if whole else tensors, *args, **given)
        begin(self, ours, model)

    makers, root = vars(base).get("_made", ((), base))
    made = ((maker, *makers), root)  # a class made of a made one has no name that pickle could find

    def __reduce_ex__(self, protocol):
        return _blank, made, self.__getstate__()

    __init__.__signature__ = _signature(base, options)  # type: ignore[attr-defined]
    body = {"__init__": __init__, "__reduce_ex__": __reduce_ex__, "__doc__": doc, "_made": made}
    body["__module__"] = maker.__module__
    name = maker.__name__[0].upper() + maker.__name__[1:] + base.__name__
    return type(name, (*((_Abstract,) if _starts_abstract(base) else ()), mixin, base), body)


class _Abstract(ABC):  # noqa: B024  # it is here for where it begins, not for methods
    """First among the bases of a class that is to take the place of a `class Base(ABC, Optimizer)` in `attach`.

    Python lets an object change its class only if both classes begin from the same base.
    """


def _starts_abstract(base: type) -> bool:
    while base.__base__ not in (ABC, object, None):
        base = base.__base__  # type: ignore[assignment]
    return base.__base__ is ABC


def unpack(params: nn.Module | Iterable[Any]) -> tuple[Any, nn.Module | None]:
    """The parameters as torch takes them, and the model if that is what was given."""
    if isinstance(params, Tensor):
        return params, None
    if not isinstance(params, nn.Module):
        # An iterator can be read only once, and torch takes what is left of one for a whole group.
        items = [
            {**item, "params": item["params"] if isinstance(item["params"], Tensor) else list(item["params"])}
            if isinstance(item, Mapping)
            else item
            for item in (params if isinstance(params, Iterable) else [params])
        ]
        if wrong := [entry for entry in _entries(items) if not isinstance(entry, Tensor)]:
            raise InputError(
                "The parameters must be a model, tensors, (name, tensor) pairs, or groups of them such as "
                f'{{"params": [...]}}, got {wrong[0]!r}.'
            )
        return items, None
    named = [(name, param) for name, param in params.named_parameters() if param.requires_grad]
    if not named:
        raise InputError(
            f"The model ({type(params).__name__}) has no trainable parameter. Add a LoRA adapter, or call "
            "requires_grad_(True) on what is to learn."
        )
    return named, params


def _entries(items: Iterable[Any]) -> list[Any]:
    """What should be tensors, out of groups and (name, tensor) pairs."""
    found: list[Any] = []
    for item in items:
        entries = item["params"] if isinstance(item, Mapping) else [item]
        found += [entries] if isinstance(entries, Tensor) else list(entries)
    return [entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry for entry in found]


def _blank(makers: Sequence[Callable[[type], type]], root: type[Optimizer]) -> Any:
    cls: Any = functools.reduce(lambda base, maker: maker(base), reversed(makers), root)
    return cls.__new__(cls)


def _signature(base: type[Optimizer], options: Mapping[str, tuple[Any, Any]]) -> inspect.Signature:
    """base's signature with `options` as keywords."""
    given = list(inspect.signature(base.__init__).parameters.values())
    keyword, rest = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD
    ours = [
        inspect.Parameter(name, keyword, default=default, annotation=kind) for name, (kind, default) in options.items()
    ]
    last = [parameter for parameter in given if parameter.kind is rest]
    return inspect.Signature([p for p in given if p.kind is not rest] + ours + last)
