"""The point of least norm among convex combinations of gradients, from their inner products alone.

Source: Désidéri, Multiple-gradient Descent Algorithm (MGDA) for Multi-objective Optimization, 2012. The Gram matrix
holds all that the answer depends on; it is a few numbers, and they stay on the gradients' device.
"""

from itertools import combinations

import torch
from torch import Tensor

MOST = 8  # objectives; the solver looks at every subset of them


def min_norm(
    products: Tensor,  # (n, n) Gram matrix of the gradients
) -> Tensor:  # (n,) weights, each at least 0, that sum to 1
    """The weights w that minimize wᵀGw on the simplex.

    For two, the closed form. For more, the best of every subset's stationary point: exact, and 2ⁿ systems of at most n
    equations, solved in one batch.

    Raises:
        ValueError: There are more than MOST.
    """
    count = len(products)
    if count > MOST:
        raise ValueError(f"min_norm takes at most {MOST} gradients, got {count}.")
    if count == 2:
        (aa, ab), (_, bb) = products.unbind()[0].unbind(), products.unbind()[1].unbind()
        first = torch.where(aa + bb - 2 * ab > 0, ((bb - ab) / (aa + bb - 2 * ab)).clamp(0, 1), 0.5)
        return torch.stack([first, 1 - first])
    return _best_of_subsets(products)


def _best_of_subsets(products: Tensor) -> Tensor:
    """On the optimal support S, Gw = ν·1 and Σw = 1 (the KKT conditions); off it, w = 0."""
    count = len(products)
    supports = [s for size in range(1, count + 1) for s in combinations(range(count), size)]
    masks = torch.zeros(len(supports), count, dtype=products.dtype)
    for row, support in enumerate(supports):
        masks[row, list(support)] = 1
    masks = masks.to(products.device)
    scale = products.diagonal().mean().clamp(min=torch.finfo(products.dtype).tiny)
    eye = torch.eye(count, dtype=products.dtype, device=products.device)
    # rows off the support say w = 0; a trace of the identity lets two equal gradients share their weight
    jitter = 8 * torch.finfo(products.dtype).eps * eye
    system = masks[:, :, None] * masks[:, None] * (products / scale + jitter) + (1 - masks)[:, :, None] * eye
    solved = torch.linalg.solve(system, masks)
    weights = solved / solved.sum(1, keepdim=True)
    norms = torch.einsum("si,ij,sj->s", weights, products, weights)
    valid = (weights >= 0).all(1) & norms.isfinite()
    return weights[torch.where(valid, norms, torch.inf).argmin()]
