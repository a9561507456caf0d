"""Newton-Schulz iterations that bring the singular values of many matrices near 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["newton_schulz"]

# The quintic of Jordan et al., 2024: steep at 0, so that five steps are enough, at the price of singular values that
# end between about 0.7 and 1.2 rather than at 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(
    matrices: Sequence[Tensor],
    steps: int = 5,
    coefficients: tuple[float, float, float] = _COEFFICIENTS,
    eps: float = 1e-7,
) -> list[Tensor]:
    """``X = a X + b (X X^T) X + c (X X^T)² X``, ``steps`` times from ``X = M / (|M| + eps)``.

    Matrices of one shape, or of that shape transposed, are iterated together. They are computed in bfloat16 on an
    accelerator; on a CPU, where that is slower, in their own precision, single at least.

    Args:
        matrices: Two-dimensional; they stay as they are.
        steps: How often, >= 0.
        coefficients: ``(a, b, c)``.
        eps: Added to the Frobenius norm, > 0.

    Returns:
        New tensors, in the shapes and dtypes of ``matrices``.

    Example:
        >>> X = newton_schulz([torch.diag(torch.tensor([3.0, 1.0]))], coefficients=(1.5, -0.5, 0.0), steps=12)[0]
        >>> torch.allclose(X, torch.eye(2), atol=1e-4)
        True
    """
    indices: dict[tuple[int, int, torch.dtype, torch.device], list[int]] = {}
    for index, matrix in enumerate(matrices):
        rows, columns = matrix.shape
        indices.setdefault((min(rows, columns), max(rows, columns), matrix.dtype, matrix.device), []).append(index)
    results: list[Tensor] = list(matrices)
    for together in indices.values():
        stack = torch.stack([_wide(matrices[index]) for index in together])
        for index, result in zip(together, _iterate(stack, steps, coefficients, eps).unbind(), strict=True):
            results[index] = result.mT if _is_tall(matrices[index]) else result
    return results


def _is_tall(matrix: Tensor) -> bool:
    return matrix.size(0) > matrix.size(1)


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if _is_tall(matrix) else matrix  # the smaller Gram matrix is the cheaper one


def _iterate(stack: Tensor, steps: int, coefficients: tuple[float, float, float], eps: float) -> Tensor:
    a, b, c = coefficients
    wide = stack.to(torch.promote_types(stack.dtype, torch.float32))
    x = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + eps)
    if stack.device.type != "cpu":
        x = x.bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(stack.dtype)
