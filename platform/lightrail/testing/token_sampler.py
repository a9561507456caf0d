"""What the contract of a token sampler asks: probabilities that can be drawn from, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from lightrail.generation.text import TokenSampler
from lightrail.testing.suite import require

__all__ = ["require_alone", "require_likelier_first", "require_probabilities"]

TOKENS = 30


def _logits(rows: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(rows, TOKENS, generator=generator, dtype=torch.float64)


def _extremes() -> dict[str, Tensor]:
    ruled_out = _logits()
    ruled_out[:, ::2] = -torch.inf
    one_left = torch.full((2, TOKENS), -torch.inf, dtype=torch.float64)
    one_left[:, 3] = -1e4
    return {
        "ordinary logits": _logits(),
        "equal logits": torch.zeros(2, TOKENS, dtype=torch.float64),
        "logits of thousands": 1e3 * _logits(),
        "tokens ruled out": ruled_out,
        "one token left": one_left,
        "a vocabulary of one": torch.zeros(2, 1, dtype=torch.float64),
    }


def require_probabilities(sampler: TokenSampler) -> None:
    """Finite numbers of at least 0, some above it, none for what is ruled out."""
    for name, logits in _extremes().items():
        before = logits.clone()
        found = sampler.probabilities(logits)
        require(found.shape == logits.shape, f"for {name} {tuple(logits.shape)} it gives {tuple(found.shape)}")
        require(torch.equal(logits, before), f"for {name} it changes the logits in place")
        sound = bool(found.isfinite().all() and (found >= 0).all() and (found.sum(-1) > 0).all())
        require(sound, f"for {name} it gives what cannot be drawn from")
        excluded = logits.isneginf()
        require(not bool(found[excluded].any()), f"for {name} it gives a token of logit −∞ a chance")


def require_likelier_first(sampler: TokenSampler) -> None:
    """A token that the model finds likelier gets no smaller chance, wherever it stands in the vocabulary."""
    logits = _logits()
    found = sampler.probabilities(logits)
    for row, chances in zip(logits, found, strict=True):
        rising = chances[row.argsort()]
        require(bool((rising.diff() >= -1e-12).all()), "a likelier token gets a smaller chance")
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))
    turned = sampler.probabilities(logits[:, order])
    require(torch.allclose(turned, found[:, order], atol=1e-12), "in another order the tokens get other chances")


def require_alone(sampler: TokenSampler) -> None:
    """A row is the same alone and beside others, asked again and at any time; torch's random numbers are left alone."""
    logits, random_state = _logits(), torch.get_rng_state()
    found = sampler.probabilities(logits)
    sampler.probabilities(_logits().flip(0))
    for row in range(len(logits)):
        alone = sampler.probabilities(logits[[row]])
        require(torch.allclose(alone, found[[row]], atol=1e-12), "a row alone gets other chances than beside others")
    require(torch.equal(torch.get_rng_state(), random_state), "it draws random numbers: the draw is made elsewhere")
