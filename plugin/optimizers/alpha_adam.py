"""AlphaAdam: AdamW that leaves out the entries whose gradient contradicts the momentum, and makes up for them.

Method: AlphaAdam, asynchronous masked Adam with dynamic compensation.
Paper: Chang, Li & Yuan, AlphaAdam: Asynchronous Masked Optimization with Dynamic Alpha for Selective Updates, 2025.
Options: `mask="async"` is eq. 6, `"sync"` eq. 5; `compensation="norm"` is eq. 9, `"algorithm1"` what the algorithm box
has in its place; `max_alpha` is α_max of Appendix F.4. Bias correction belongs to AdamW, on which the text builds; the
box omits it. The box's strict ">" would keep nothing at the first step, where h is 0; eq. 6 has "≥", and so has this.
"cautious" as mask and compensation makes its nearest rival: Liang et al., Cautious Optimizers, arXiv 2411.16085, 2024.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from equipoise.errors import InputError
from equipoise.lora.pairs import is_dtensor
from equipoise.optimizers.parts.arithmetic import Tensors, batches, narrow, rate, widen, widen_all
from equipoise.optimizers.parts.checks import (
    check_adam,
    check_dense,
    check_not_negative,
    check_switches,
    fill_options,
    group_label,
    is_number,
    loss_of,
)
from equipoise.optimizers.parts.pair_optimizer import unpack
from equipoise.optimizers.parts.preconditioner import chunk_entries

Mask = Literal["async", "sync", "cautious", "none"]
Compensation = Literal["norm", "algorithm1", "cautious", "none"]
_Row = tuple[list[int], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]  # whose they are, θ, g, h, v
_Applied = tuple[Tensor, Tensor | None]  # α, and the kept share if it was counted: () on the device

# Stands in for an eps of 0: below the root of the smallest float32, so that 0/0 becomes 0 and nothing else changes.
_TINY = 1e-30
_ROWS = 16  # of u that wait in memory for their α at a time


class AlphaAdam(Optimizer):
    """AdamW on the entries whose gradient agrees in sign with the momentum, scaled up for those left out.

    The update: h and v are Adam's moments, u = ĥ/(√v̂ + ε), the mask φ = 1[h₋₁·g ≥ 0] with h₋₁ from before this step,
    and α = ‖u‖/‖φ⊙u‖ per tensor; then θ ← θ(1 − lr·wd) − lr·α·φ⊙u. A step is as long as AdamW's, so AdamW's learning
    rates are where to start. Where a mask keeps nothing, only the weight decay moves. The paper's ablation (Table 3)
    has it ahead of AdamW early in training and slightly behind at the end. It treats any tensor; for LoRA factors it
    combines with `scaled` and `bounded`.

    Args:
        params: A model (its trainable parameters), named parameters, parameter groups, or an iterator of tensors.
        lr: Learning rate, a number or a tensor without dimensions. (>= 0)
        betas: Decay of the running means of the gradient and of its square. (0 <= x < 1)
        eps: Added to the denominator. (>= 0)
        weight_decay: Decoupled weight decay, of all entries, kept or not. (>= 0)
        mask: "async": the gradient against the momentum before it (eq. 6). "sync": against the momentum that holds it
            already (eq. 5), which drops fewer. "cautious": as that, but what has no gradient is left out too. "none":
            every entry is kept.
        compensation: "norm": α restores the norm of the step (eq. 9). "algorithm1": the algorithm box, the square of
            that times d/(‖φ‖₀ + 1) for d entries; steps get longer, so learning rates do not carry over. "cautious":
            d/(‖φ‖₀ + 1) alone; with the mask of that name this is cautious AdamW. "none": α = 1.
        bias_correction: Correct the moments for their start at zero; the algorithm box does not.
        max_alpha: Largest α; the paper has 2 (Appendix F.4). None: no limit. (>= 1)
        count_kept: Count at each step what the mask keeps, for `kept`; costs a pass over the mask.
        maximize: Maximise the objective instead of minimising it.
        foreach: Work on many tensors at once; None: wherever all are plain tensors. False: the readable update.

    Moments have their parameter's dtype, as AdamW's; for bfloat16 the arithmetic in between is float32. The state is
    AdamW's, so that a checkpoint of either loads into the other.

    Raises:
        InputError: An option is out of bounds, a parameter is complex or float16 (in which the square of a gradient of
            1e-4 is 0, and the step explodes), a gradient is sparse, or a model has nothing to train.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> optimizer = AlphaAdam([("weight", weight)], lr=0.1, weight_decay=0.0, count_kept=True)
        >>> for gradient in ([1.0, 1.0, 1.0], [1.0, 1.0, -1.0]):
        ...     weight.grad = torch.tensor(gradient)
        ...     optimizer.step()
        >>> print([f"{entry:.3f}" for entry in weight.tolist()])  # the third stays where the first step took it
        ['-0.200', '-0.200', '-0.100']
        >>> print(f"{optimizer.alphas['weight']:.3f} {optimizer.kept['weight']:.3f}")
        1.001 0.667

    References:
        AlphaAdam: Asynchronous Masked Optimization with Dynamic Alpha for Selective Updates, 2025, eq. 5, 6 and 9,
        Algorithm 1, Appendix F.4
        "cautious": Cautious Optimizers: Improving Training with One Line of Code, arXiv 2411.16085, 2024
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        mask: Mask = "async",
        compensation: Compensation = "norm",
        bias_correction: bool = True,
        max_alpha: float | None = None,
        count_kept: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        given, _ = unpack(params)
        super().__init__(given, {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "mask": mask,
            "compensation": compensation, "bias_correction": bias_correction, "max_alpha": max_alpha,
            "count_kept": count_kept, "maximize": maximize, "foreach": foreach,
        })  # fmt: skip
        self._applied: dict[Tensor, _Applied] = {}  # of each parameter's last step; no part of the state

    @property
    def alphas(self) -> dict[str, float]:
        """By parameter, the α of its last step. Waits for the device; costs nothing unless it is asked for."""
        return self._read(0)

    @property
    def kept(self) -> dict[str, float]:
        """By parameter, the share of its entries that the mask kept at its last step, with `count_kept`. Waits too."""
        if not any(group["count_kept"] for group in self.param_groups):
            raise InputError(f"{type(self).__name__}: what the mask keeps is counted only with count_kept=True.")
        return self._read(1)

    def metrics(self) -> dict[str, float]:
        """`alpha`, the median of `alphas`."""
        alphas = self.alphas
        return {"alpha": median(alphas.values())} if alphas else {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check_options(self, len(self.param_groups) - 1)
            for param in self.param_groups[-1]["params"]:
                _check_dtype(type(self).__name__, param)
        except InputError:
            del self.param_groups[-1]
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        for saved in state.get("state", {}).values():
            if missing := [name for name in ("step", "exp_avg", "exp_avg_sq") if saved and name not in saved]:
                raise InputError(
                    f"{type(self).__name__}: the state to load has no {', '.join(missing)}, so it is of another kind "
                    "of optimizer. Load one of AdamW's kind, or begin with a new state."
                )
        before = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        self._applied = {}
        fill_options(self, before, self.defaults)
        for saved in filter(None, self.state.values()):  # one saved by AdamW may count on the device
            saved["step"] = torch.as_tensor(saved["step"], dtype=torch.float32).cpu()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = loss_of(self, closure)
        for index in range(len(self.param_groups)):  # before anything moves
            _check_options(self, index)
        check_dense(self)
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            states = [self._state(param) for param in params]
            if not params:
                continue
            # Of a number torch would make a tensor for each count.
            torch._foreach_add_([state["step"] for state in states], [torch.ones(())] * len(states))
            plain = all(type(param) in (Tensor, nn.Parameter) for param in params)
            many = plain if group["foreach"] is None else group["foreach"] and not any(map(is_dtensor, params))
            update = _update_many if many else _update_each
            options = {**group, "lr": rate(group)}
            for batch in batches(params, [float(state["step"]) for state in states], _ROWS):
                taken = [params[i] for i in batch]
                self._applied.update(zip(taken, update(taken, [states[i] for i in batch], options), strict=True))
        return loss

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            # Counted on the CPU, as torch does: reading the count then never waits for the device.
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        return state

    def _read(self, which: int) -> dict[str, float]:
        values = {}
        for index, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{index}.{i}" for i in range(len(group["params"]))]
            for name, param in zip(names, group["params"], strict=True):
                value = self._applied.get(param, (None, None))[which]
                if value is not None:
                    values[name] = value
        if not values:
            return {}
        first = next(iter(values.values()))
        read = torch.stack([value.to(first) for value in values.values()]).tolist()  # waits once, not for each
        return dict(zip(values, read, strict=True))


def _update_each(params: Tensors, states: Sequence[dict[str, Tensor]], group: Mapping[str, Any]) -> list[_Applied]:
    """The update as the paper has it, one tensor after the other."""
    (beta1, beta2), applied = group["betas"], []
    for param, state in zip(params, states, strict=True):
        assert param.grad is not None
        p, g, h, v = map(widen, (param, param.grad, state["exp_avg"], state["exp_avg_sq"]))
        if group["maximize"]:
            g = -g
        past = h.clone()
        h.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        t = float(state["step"]) if group["bias_correction"] else math.inf
        u = (h / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + max(group["eps"], _TINY))

        phi = torch.ones_like(u, dtype=torch.bool)
        if group["mask"] == "cautious":
            phi = h * g > 0
        elif group["mask"] != "none":
            phi = (past if group["mask"] == "async" else h) * g >= 0
        masked = torch.where(phi, u, 0)
        count = phi.sum().to(u.dtype)
        alpha = _alpha(u.norm(), masked.norm(), (count + 1) / p.numel(), group)

        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * alpha * masked)
        for stored, value in ((param, p), (state["exp_avg"], h), (state["exp_avg_sq"], v)):
            if stored is not value:
                stored.copy_(value)
        applied.append((alpha, count / p.numel() if group["count_kept"] else None))
    return applied


def _update_many(params: Tensors, states: Sequence[dict[str, Tensor]], group: Mapping[str, Any]) -> list[_Applied]:
    """The same update in few passes over memory, for tensors of one device, dtype and step count."""
    t = float(states[0]["step"]) if group["bias_correction"] else math.inf
    decay = _scalar(1 - group["lr"] * group["weight_decay"], params[0])
    masks = group["mask"] != "none"
    counts = masks and (group["count_kept"] or group["compensation"] in ("algorithm1", "cautious"))

    rows = _rows(params, states)
    updates, norms, kept_norms, dropped = [], [], [], []
    for _, _, grads, moments, squares in rows:
        g, h, v = map(widen_all, (grads, moments, squares))
        if group["maximize"]:
            g = torch._foreach_neg(g)
        agreement = torch._foreach_mul(h, g) if group["mask"] == "async" else ()
        u = _adams_update(g, h, v, t, group)
        norms += torch._foreach_norm(u)
        if masks:
            # φ − 1 is -1 or 0. To choose by comparison (torch.where) takes forty times as long on a CPU.
            agreement = agreement or torch._foreach_mul(h, g)
            if group["mask"] == "cautious":  # 0 counts as disagreement
                torch._foreach_sign_(agreement)
                torch._foreach_sub_(agreement, 1)
            torch._foreach_clamp_max_(agreement, 0)
            torch._foreach_sign_(agreement)
            torch._foreach_addcmul_(u, u, agreement)
            kept_norms += torch._foreach_norm(u)
            if counts:
                dropped += torch._foreach_norm(agreement)
        narrow(h, moments)
        narrow(v, squares)
        updates.append(u)

    def gather(pieces: list[Tensor]) -> Tensor:  # norms of pieces → (tensors,), squared
        squares = torch.stack(pieces).square()
        return squares.new_zeros(len(params)).index_add_(0, owners, squares)

    owners = torch.tensor([owner for row in rows for owner in row[0]]).to(params[0].device, non_blocking=True)
    full = gather(norms).sqrt()
    kept = gather(kept_norms).sqrt() if masks else full
    sizes = torch.tensor([param.numel() for param in params], dtype=full.dtype).to(full.device, non_blocking=True)
    count = sizes - gather(dropped).round() if counts else sizes
    alpha = _alpha(full, kept, (count + 1) / sizes, group)
    steps = (alpha * -group["lr"]).unbind()
    for (owned, stored, *_), u in zip(rows, updates, strict=True):
        p = widen_all(stored)
        if group["weight_decay"] != 0:
            torch._foreach_mul_(p, decay)
        torch._foreach_addcmul_(p, u, [steps[owner] for owner in owned])
        narrow(p, stored)
    shares = (count / sizes).unbind() if group["count_kept"] else [None] * len(params)
    return list(zip(alpha.unbind(), shares, strict=True))


def _adams_update(g: Tensors, h: Tensors, v: Tensors, t: float, group: Mapping[str, Any]) -> Tensors:
    """u, all of the update that Adam would make, and the moments brought up to date; t: the step's number, or inf."""
    (beta1, beta2), eps = group["betas"], max(group["eps"], _TINY)
    if g[0].is_cpu and all(tensor.is_contiguous() for tensors in (g, h, v) for tensor in tensors):
        # torch's fused kernel makes it in one pass: what a step of length -1 makes of a parameter that is 0.
        u = [torch.zeros_like(tensor) for tensor in h]
        torch._fused_adam_(
            u, g, h, v, [], [torch.tensor(t)] * len(u),
            lr=-1.0, beta1=beta1, beta2=beta2, eps=eps, weight_decay=0.0, amsgrad=False, maximize=False,
        )  # fmt: skip
        return u
    torch._foreach_lerp_(h, g, 1 - beta1)
    torch._foreach_lerp_(v, torch._foreach_mul(g, g), 1 - beta2)
    root = math.sqrt(1 - beta2**t)
    u = torch._foreach_sqrt(v)
    torch._foreach_add_(u, _scalar(eps * root, g[0]))
    torch._foreach_reciprocal_(u)  # and a product: faster than to divide
    torch._foreach_mul_(u, h)
    torch._foreach_mul_(u, _scalar(root / (1 - beta1**t), g[0]))
    return u


def _alpha(
    full: Tensor,  # () or (tensors,): ‖u‖
    kept: Tensor,  # ‖φ⊙u‖
    room: Tensor,  # (‖φ‖₀ + 1)/d
    group: Mapping[str, Any],
) -> Tensor:
    if group["compensation"] == "none":
        return torch.ones_like(full)
    alpha = torch.where(kept > 0, full / kept, 1.0)  # nothing kept: nothing moves, whatever α
    if group["compensation"] == "algorithm1":
        alpha = alpha.square() / room
    elif group["compensation"] == "cautious":
        alpha = torch.ones_like(full) / room
    return alpha.clamp(max=1e30 if group["max_alpha"] is None else group["max_alpha"])  # inf·0 would be NaN


def _rows(params: Tensors, states: Sequence[dict[str, Tensor]]) -> list[_Row]:
    """Tensors that fit the cache together, large ones on a CPU in pieces, so that only the first pass reads memory."""
    limit, rows, filled = chunk_entries(params[0].device), [], math.inf
    for owner, (param, state) in enumerate(zip(params, states, strict=True)):
        assert param.grad is not None
        tensors, size = (param, param.grad, state["exp_avg"], state["exp_avg_sq"]), param.numel()
        pieces: Iterable[tuple[Tensor, ...]] = [tensors]
        if size > limit and param.device.type == "cpu" and all(tensor.is_contiguous() for tensor in tensors):
            pieces, size = zip(*(tensor.view(-1).split(limit) for tensor in tensors), strict=True), limit
        for piece in pieces:
            if filled + size > limit:
                rows.append(([], [], [], [], []))
                filled = 0
            for column, entry in zip(rows[-1], (owner, *piece), strict=True):
                column.append(entry)
            filled += size
    return rows


def _scalar(value: Any, like: Tensor) -> Any:
    """On a CPU as a tensor: torch would make one of a number for every single tensor of a list."""
    if like.device.type != "cpu":
        return value
    return torch.as_tensor(value, dtype=torch.promote_types(like.dtype, torch.float32))


def _check_dtype(name: str, param: Tensor) -> None:
    if param.is_complex():
        raise InputError(f"{name}: a parameter is complex. Train its torch.view_as_real instead.")
    if param.dtype == torch.float16:
        raise InputError(
            f"{name}: a parameter of shape {tuple(param.shape)} is float16, in which squares of small gradients are 0, "
            "so that the step explodes. Train it in float32 with autocast to float16, or in bfloat16."
        )


def _check_options(optimizer: Optimizer, index: int) -> None:
    group, where = optimizer.param_groups[index], group_label(optimizer, index)
    check_adam(where, group)
    check_not_negative(where, "eps", group["eps"])
    for name, choices in (("mask", get_args(Mask)), ("compensation", get_args(Compensation))):
        if group[name] not in choices:
            raise InputError(f"{where}: {name} must be {' or '.join(map(repr, choices))}; got {group[name]!r}.")
    limit = group["max_alpha"]
    if limit is not None and not (is_number(limit) and limit >= 1):
        raise InputError(f"{where}: max_alpha must be a finite number, 1 or more, or None; got {limit!r}.")
    check_switches(where, group, "bias_correction", "count_kept")
    if not (group["foreach"] is None or isinstance(group["foreach"], bool)):
        raise InputError(f"{where}: foreach must be True, False or None; got {group['foreach']!r}.")
