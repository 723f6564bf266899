"""What sharpness-aware optimizer classes add to their base: the second evaluation, at the worst nearby point.

Each step: s at x, then g at x + ρ·s/‖s‖ on the same batch, then x again, to the bit, and the base's step with g. All of
it happens in a step hook before every other one, so that the base, its hooks (scaled gradients, the bound) and
schedulers see one ordinary step with one gradient, g.
"""

import copy
import functools
import inspect
import random
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from equipoise.errors import InputError
from equipoise.lora.pairs import is_dtensor, live_roots, sharding
from equipoise.optimizers.parts.arithmetic import real
from equipoise.optimizers.parts.checks import check_not_negative, check_switches, fill_options, group_label, loss_of
from equipoise.optimizers.parts.step_hook import is_nested, with_closure

OPTIONS: dict[str, Any] = {"rho": (float, 0.05), "adaptive": (bool, False), "every": (int, 1)}  # (type, default)
_COUNTER = "sharpness_step"  # in every parameter group: how many steps were taken
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class SharpOptimizer:
    """What every sharpness-aware class adds to its base. Use `AdaSAM`, `SAM` or `SharpnessAware`.

    A loop that leaves the evaluation to the optimizer calls `step(closure)`, where the closure clears the gradients,
    calls backward and returns the loss. It is called twice, with random numbers (noise, dropout) the same both times,
    and the loss of the first is returned: those of torch, Python and NumPy, and of generators that the closure itself
    names; one that hides in another object it has to rewind. A loop that calls backward itself goes

        optimizer.zero_grad()
        loss(batch).backward()
        if optimizer.perturb():           # which clears the gradients
            loss(batch).backward()        # the same batch, noise and all its micro-batches
            optimizer.restore()
        optimizer.step()

    with GradScaler on scaled gradients throughout (only the direction of the first matters; unscale and clip after
    `restore`), and under DistributedDataParallel with both last backwards synchronised, so that every process moves to
    the same point as one alone would: that costs two all-reduces a step, and no other. Micro-batches are accumulated
    within the closure or by such a loop: accelerate's `accumulate` hands on only the last of several `step(closure)`,
    and the other closures would never be called. GradScaler takes no closure.
    """

    _BASE: ClassVar[type[Optimizer]]
    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    _saved: list[tuple[Tensor, Tensor]]  # (tensor, its value before perturb)
    _ready: bool  # perturb was called, and neither step nor, away from the worst point, zero_grad since
    _watched: tuple[list[Tensor], list[weakref.ref[nn.Module]]]  # parameters, and the modules that keep statistics

    @torch.no_grad()
    def perturb(self) -> bool:
        """Go to the worst nearby point by the gradients that are there, and clear them if there is one to go to.

        A gradient that is zero, or not finite somewhere, leads nowhere: the second evaluation then repeats the first,
        so that a GradScaler finds there what it looks for. Nothing here waits for the device.

        Returns:
            Whether a second evaluation is due. It is not on the steps between `every`, where every rho is 0, and
            without any gradient; the gradients then stay for the step, and must not be cleared before it.

        Raises:
            InputError: The parameters are perturbed already (they are put back), a gradient is sparse, a parameter
                sharded, or an option out of bounds.
        """
        self._ready = False
        if self._saved:
            self.restore()
            raise InputError(
                f"{type(self).__name__}: perturb() found the parameters still perturbed, so these gradients are not of "
                "the point they are at now, restored. After a second evaluation that failed, call restore() before the "
                "next forward pass."
            )
        check_sharpness(self)
        self._watch()
        found = [(group, param) for group in self.param_groups for param in group["params"] if param.grad is not None]
        weighted = [_weighted(param, group["adaptive"]) for group, param in found]
        self._ready = True
        first = self.param_groups[0]
        if first[_COUNTER] % first["every"] or not any(group["rho"] for group in self.param_groups) or not found:
            return False
        self._saved += [(param, param.detach().clone()) for _, param in found]
        for module in filter(None, (reference() for reference in self._watched[1])):
            buffers = (getattr(module, name, None) for name in _STATISTICS)
            self._saved += [(buffer, buffer.clone()) for buffer in buffers if isinstance(buffer, Tensor)]
        norms = [torch.linalg.vector_norm(gradient) for gradient in weighted]
        exact = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
        norm = torch.linalg.vector_norm(torch.stack([part.to(norms[0].device, exact) for part in norms]))
        reach = {device: norm.to(device) for device in {part.device for part in norms}}
        for (group, param), gradient in zip(found, weighted, strict=True):
            distance = reach[gradient.device]
            way = gradient / distance * (-group["rho"] if group.get("maximize") else group["rho"])
            if group["adaptive"]:
                way *= real(param).abs()
            real(param).add_(torch.where((distance > 0) & distance.isfinite(), way, 0.0))
        torch.clear_autocast_cache()  # which would go on with the weights as they were
        self.zero_grad()
        return True

    @torch.no_grad()
    def restore(self) -> None:
        """Put parameters, and the running statistics of normalisation layers, back to the bit; once is enough."""
        for tensor, value in self._saved:
            tensor.copy_(value)
        if self._saved:
            torch.clear_autocast_cache()
        self._saved.clear()

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """As the base's. Once the parameters are restored, it also ends a step that GradScaler skipped."""
        self._ready = self._ready and bool(self._saved)
        super().zero_grad(*args, **kwargs)  # type: ignore[misc]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)  # type: ignore[misc]
        if "_saved" in self.__dict__:
            check_sharpness(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.get("param_groups", [])
        super().__setstate__(state)  # type: ignore[misc]
        fill_options(self, before, {name: value for name, (_, value) in OPTIONS.items()} | {_COUNTER: 0})  # type: ignore[arg-type]
        if "_saved" not in self.__dict__:  # copying and unpickling drop hooks
            self._hook_in()

    def _sharpen(self, options: Mapping[str, Any], model: nn.Module | None = None) -> None:
        options = {**options, _COUNTER: 0}
        self.defaults.update(options)
        for group in self.param_groups:
            for name, value in options.items():
                group.setdefault(name, value)
        check_sharpness(self)
        self._hook_in()

    def _hook_in(self) -> None:
        self._saved, self._ready, self._watched = [], False, ([], [])
        handle = self.register_step_pre_hook(_before)  # type: ignore[attr-defined]
        self._optimizer_step_pre_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
        self.register_step_post_hook(_after)  # type: ignore[attr-defined]

    def _evaluate_twice(self, closure: Callable[[], Any]) -> Any:
        self.restore()  # left over if a second evaluation by hand raised
        devices = {param.device for group in self.param_groups for param in group["params"]}
        generators = _generators(closure)
        before = _random_states(devices, generators)
        loss = self._evaluate(closure)
        if self.perturb():
            after = _random_states(devices, generators)
            try:
                _set(before)
                self._evaluate(closure)
            finally:
                self.restore()
                _set(after)
        return loss

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        loss = loss_of(self, closure)  # type: ignore[arg-type]
        if all(param.grad is None for group in self.param_groups for param in group["params"]):
            raise InputError(
                f"{type(self).__name__}: the closure left no gradient on any parameter. Let it call backward() on a "
                "loss that depends on them, after zero_grad()."
            )
        return loss

    def _watch(self) -> None:
        """Look up, once for the same parameters, which live modules keep statistics of what passes through them."""
        params = [param for group in self.param_groups for param in group["params"]]
        if list(map(id, params)) == list(map(id, self._watched[0])):
            return
        for param in params:
            if what := sharding(param) or "a DTensor" * is_dtensor(param):
                raise InputError(
                    f"{type(self).__name__}: a parameter of shape {tuple(param.shape)} is {what}, and the norm over "
                    "all parameters needs whole ones. Use plain data parallelism (DDP), or another optimizer."
                )
        # all of them: a frozen part, or one that another optimizer trains, may be no child of what is trained here
        keepers = [module for root in live_roots() for module in root.modules() if hasattr(module, _STATISTICS[0])]
        self._watched = params, list(map(weakref.ref, keepers))


def check_sharpness(optimizer: Any, given: Mapping[str, Any] | None = None) -> None:
    """Check the options in every parameter group, or `given` where a group says nothing.

    Raises:
        InputError: The first that is out of bounds: where, what was got, what to do.
    """
    groups = [{**(given or {}), **group} for group in optimizer.param_groups]
    for index, group in enumerate(groups):
        where, rho, every = group_label(optimizer, index), group["rho"], group["every"]
        check_not_negative(where, "rho", rho, " Try 0.05.")
        check_switches(where, group, "adaptive")
        rate = group.get("lr", 0.0)  # torch's own optimizers let NaN through
        if isinstance(rate, float):
            check_not_negative(where, "lr", rate)
        if not (isinstance(every, int) and not isinstance(every, bool) and every >= 1):
            raise InputError(f"{where}: every must be a whole number, 1 or more; got {every!r}. Try 1.")
        if every != groups[0]["every"]:
            raise InputError(
                f"{where}: every is {every}, and {groups[0]['every']} in group 0: a batch is evaluated again for all "
                "parameters or for none. Give all groups one value."
            )


def _before(optimizer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    if is_nested(optimizer):
        return None
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is not None:
        if _is_scaled():
            raise InputError(
                f"{type(optimizer).__name__}: step(closure) through an enabled GradScaler would take its step with "
                "gradients that are still multiplied by the scale. Call backward, perturb(), backward again and "
                "restore(), and then the scaler's step without a closure."
            )
        try:
            loss = optimizer._evaluate_twice(closure)
        finally:
            optimizer._ready = False  # a step that failed is not to be taken without a closure
        return with_closure(args, kwargs, lambda: loss)
    name = type(optimizer).__name__
    if optimizer._saved:
        raise InputError(f"{name}: the parameters are still perturbed. Call restore() before step().")
    if not optimizer._ready:
        raise InputError(
            f"{name} evaluates each batch twice: call step(closure) with a closure that clears the gradients, calls "
            "backward and returns the loss, or perturb(), a second backward and restore() before step()."
        )
    return None


def _after(optimizer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    if not is_nested(optimizer):
        optimizer._ready = False
        for group in optimizer.param_groups:
            group[_COUNTER] += 1


def _is_scaled() -> bool:
    """Whether an enabled GradScaler calls this step; one that is switched off hands it through."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is GradScaler.step.__code__ and frame.f_locals["self"].is_enabled():
            return True
        frame = frame.f_back
    return False


def _weighted(param: Tensor, adaptive: bool) -> Tensor:  # in float32 at least: squares of scaled fp16 overflow
    """The gradient as the norm counts it: s, or |w|·s."""
    grad: Any = param.grad
    if grad.layout != torch.strided:
        raise InputError(
            f"A parameter of shape {tuple(param.shape)} has a sparse gradient, which shows no way to a worst nearby "
            "point. Make its layer with sparse=False, or leave it to another optimizer."
        )
    grad = real(grad.detach())
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    return grad * real(param).abs() if adaptive else grad


_State = tuple[Callable[[Any], Any], Any]  # what sets a state, and the state


def _random_states(devices: Iterable[torch.device], generators: Iterable[Any]) -> list[_State]:
    """Of all that a loss may draw random numbers from; reading them waits for no device."""
    states: list[_State] = [(torch.set_rng_state, torch.get_rng_state()), (random.setstate, random.getstate())]
    if numpy := sys.modules.get("numpy"):
        states.append((numpy.random.set_state, numpy.random.get_state()))
    for device in devices:
        if device.type in ("cuda", "xpu"):
            module = torch.get_device_module(device)
            states.append((functools.partial(module.set_rng_state, device=device), module.get_rng_state(device)))
        elif device.type == "mps":
            states.append((torch.mps.set_rng_state, torch.mps.get_rng_state()))
    for generator in generators:
        if isinstance(generator, torch.Generator):
            states.append((generator.set_state, generator.get_state()))
        elif isinstance(generator, random.Random):
            states.append((generator.setstate, generator.getstate()))
        else:  # NumPy's
            state = copy.deepcopy(generator.bit_generator.state)
            states.append((functools.partial(setattr, generator.bit_generator, "state"), state))
    return states


def _generators(closure: Callable[[], Any]) -> list[Any]:
    """Random generators that a closure names: as variables around it, as defaults, or as globals."""
    function = inspect.unwrap(closure)
    function = getattr(function, "__func__", function)
    if not isinstance(function, FunctionType):
        return []
    named: list[Any] = [function.__globals__.get(name) for name in function.__code__.co_names]
    named += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a variable that has no value yet
            named.append(cell.cell_contents)
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    if numpy := sys.modules.get("numpy"):
        kinds += (numpy.random.Generator,)
    return [value for value in named if isinstance(value, kinds)]


def _set(states: list[_State]) -> None:
    for setter, state in states:
        setter(state)
