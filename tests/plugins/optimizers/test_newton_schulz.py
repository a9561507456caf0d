"""Newton-Schulz iterations against the singular value decomposition."""

from __future__ import annotations

import torch

from lightrail_optimizers.newton_schulz import newton_schulz


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_newton_schulz_is_a_polynomial_of_each_singular_value():
    def iterated(s, steps=5, a=3.4445, b=-4.7750, c=2.0315):
        for _ in range(steps):
            s = a * s + b * s**3 + c * s**5
        return s

    matrices = [random(3, 5), random(5, 3, seed=1), random(4, 4, seed=2), random(3, 5, seed=3)]
    kept = [matrix.clone() for matrix in matrices]
    for matrix, found in zip(matrices, newton_schulz(matrices, eps=1e-30), strict=True):
        left, s, right = torch.linalg.svd(matrix, full_matrices=False)
        close(found, left @ torch.diag(iterated(s / s.norm())) @ right)
    assert all(torch.equal(a, b) for a, b in zip(matrices, kept, strict=True))
    low, high = 0.68, 1.2
    singular = torch.linalg.svdvals(newton_schulz([random(6, 6)])[0])
    assert ((singular > low) & (singular < high)).all()


def test_newton_schulz_keeps_shapes_and_dtypes():
    matrices = [torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(3, 2), torch.zeros(2, 2)]
    found = newton_schulz(matrices)
    assert [(f.shape, f.dtype) for f in found] == [(m.shape, m.dtype) for m in matrices]
    assert not found[2].any()
