"""A compact language model."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lightrail.errors import ConfigurationError
from lightrail.options import at_least, between, one_of
from lightrail.traits import Traits
from lightrail_starter.models.rotary import Rotary
from lightrail_starter.models.sizes import known

__all__ = ["GPT"]


class GPT(nn.Module):
    """A decoder-only transformer: rotary positions, RMS normalisation before each part, causal attention.

    x ← x + attention(norm(x)), x ← x + mlp(norm(x)), logits = head(norm(x))

    Weights start normal with deviation 0.02, those that write to the residual stream with 0.02 / √(2 · depth), so that
    the stream's variance does not grow with depth.

    Args:
        vocab_size: Tokens; known from the data where none is given.
        context: Tokens that the model sees at most; known from the data where none is given.
        width: Features of the residual stream, at least 2; divisible by ``heads`` into an even number.
        depth: Blocks, at least 1.
        heads: Attention heads, at least 1.
        mlp: ``swiglu`` or ``gelu``; both have about 8 width² weights a block.
        tied: Whether the head shares the embedding's weights.
        dropout: Probability with which attention weights and what is written to the stream are dropped, in [0, 1).

    Raises:
        ConfigurationError: ``width`` cannot be divided among the heads.

    Example:
        >>> import torch
        >>> model = GPT(vocab_size=256, context=16, width=32, depth=2, heads=4)
        >>> model(torch.zeros(2, 16, dtype=torch.long)).shape
        torch.Size([2, 16, 256])

    Reference:
        A. Radford et al. (2019), Language Models are Unsupervised Multitask Learners, section 2.3, with the parts of
        H. Touvron et al. (2023), LLaMA, arXiv:2302.13971, section 2.2.
    """

    traits: ClassVar[Traits] = Traits(
        example={"width": 16, "depth": 2, "heads": 2},
    )

    def __init__(
        self,
        vocab_size: int | None = None,
        context: int | None = None,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        mlp: Literal["swiglu", "gelu"] = "swiglu",
        tied: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        vocabulary, self.context = known(vocab_size=vocab_size, context=context)
        at_least(1, depth=depth, heads=heads)
        at_least(2, width=width)
        one_of(("swiglu", "gelu"), mlp=mlp)
        between(0, 1, dropout=dropout)
        if width % (2 * heads):
            raise ConfigurationError(
                "width cannot be divided among the heads",
                found=f"width={width}, heads={heads}",
                allowed=f"a width that is a multiple of {2 * heads} (twice the heads)",
                remedy=f"Set model.width={max(1, round(width / (2 * heads))) * 2 * heads}.",
            )
        self.embedding = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        rotary = Rotary(width // heads, self.context)
        self.blocks = nn.ModuleList(_Block(width, heads, mlp, dropout, rotary) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self._initialise(depth)

    def _initialise(self, depth: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith("write.weight")
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if writes else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, T]`` int64 to logits ``[B, T, vocab_size]``; T at most ``context``."""
        if tokens.shape[-1] > self.context:
            raise ConfigurationError(
                "the text is longer than the model's context",
                found=f"{tokens.shape[-1]} tokens",
                allowed=f"at most {self.context} (model.context)",
                remedy="Raise model.context, or lower data.context.",
            )
        x = self.dropout(self.embedding(tokens))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp: str, dropout: float, rotary: Rotary) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = _Attention(width, heads, dropout, rotary)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = _SwiGLU(width) if mlp == "swiglu" else _GELU(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float, rotary: Rotary) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        # What the products of queries and keys are multiplied by; may be set.
        self.attention_scale = 1 / math.sqrt(width // heads)
        self.rotary = rotary
        self.read = nn.Linear(width, 3 * width, bias=False)
        self.write = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.read(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            self.rotary(q),
            self.rotary(k),
            v,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            scale=self.attention_scale,
        )
        return self.write(mixed.transpose(1, 2).reshape(batch, length, width))


class _SwiGLU(nn.Module):
    """W₃ (silu(W₁ x) ⊙ W₂ x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-8 * width // (3 * 8)) * 8  # 8/3 of the width, in whole eights
        self.read = nn.Linear(width, 2 * hidden, bias=False)
        self.write = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.read(x).chunk(2, dim=-1)
        return self.write(F.silu(gate) * value)


class _GELU(nn.Module):
    """W₂ gelu(W₁ x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(width, 4 * width, bias=False)
        self.write = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.write(F.gelu(self.read(x)))
