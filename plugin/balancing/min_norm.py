"""The point of least norm among convex combinations of gradients, from their inner products alone.

Source: Désidéri, Multiple-gradient Descent Algorithm (MGDA) for Multi-objective Optimization, 2012. The Gram matrix
holds all that the answer depends on; it is a few numbers, and they stay on the gradients' device.
"""

from functools import cache
from itertools import combinations

import torch
from torch import Tensor

MOST = 8  # objectives; the solver looks at every subset of them


def min_norm(
    products: Tensor,  # (..., n, n) Gram matrices of the gradients
) -> Tensor:  # (..., n) weights, each at least 0, that sum to 1
    """The weights w that minimize wᵀGw on the simplex.

    For two, the closed form. For more, the best of every subset's stationary point: exact, and 2ⁿ systems of at most n
    equations, solved in one batch.

    Raises:
        ValueError: There are more than MOST.
    """
    count = products.shape[-1]
    if count > MOST:
        raise ValueError(f"min_norm takes at most {MOST} gradients, got {count}.")
    if count == 2:
        over = products.diagonal(dim1=-2, dim2=-1) - products[..., 0, 1:]  # (..., 2) of each square over the product
        between = over.sum(-1, keepdim=True)  # ‖a − b‖²
        return torch.where(between > 0, (over.flip(-1) / between).clamp(0, 1), 0.5)
    return _best_of_subsets(products)


def _best_of_subsets(products: Tensor) -> Tensor:
    """On the optimal support S, Gw = ν·1 and Σw = 1 (the KKT conditions); off it, w = 0."""
    count = products.shape[-1]
    masks, eye = _supports(count).to(products), torch.eye(count).to(products)
    scale = products.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(products.dtype).tiny)
    # rows off the support say w = 0; a trace of the identity lets two equal gradients share their weight
    jitter = 8 * torch.finfo(products.dtype).eps * eye
    scaled = (products / scale[..., None, None] + jitter)[..., None, :, :]
    system = masks[:, :, None] * masks[:, None] * scaled + (1 - masks)[:, :, None] * eye
    solved = torch.linalg.solve(system, masks.expand(system.shape[:-1]))  # (..., subsets, n)
    weights = solved / solved.sum(-1, keepdim=True)
    norms = torch.einsum("...si,...ij,...sj->...s", weights, products, weights)
    valid = (weights >= 0).all(-1) & norms.isfinite()
    best = torch.where(valid, norms, torch.inf).argmin(-1)
    return weights.take_along_dim(best[..., None, None], -2).squeeze(-2)


@cache
def _supports(count: int) -> Tensor:  # (2ⁿ − 1, n) of 0 and 1
    supports = [s for size in range(1, count + 1) for s in combinations(range(count), size)]
    return torch.tensor([[float(index in support) for index in range(count)] for support in supports])
