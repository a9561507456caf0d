"""Writing texts from a run of a language model, shown as they come."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightrail.generation.text import TextModel, TokenSampler, write_text

if TYPE_CHECKING:
    from lightrail.generation.composed import Generation

__all__ = ["write_texts"]


def write_texts(generation: Generation, shows: bool) -> list[str]:
    """Continues the prompt as often as ``generate.count`` says.

    Args:
        generation: A language model and a sampler of tokens.
        shows: Whether each text is written to standard output as it comes.

    Returns:
        What was added to the prompt.
    """
    model, sampler = generation.model, generation.sampler
    assert isinstance(model, TextModel)
    assert isinstance(sampler, TokenSampler)
    request = generation.request
    prompt_text = request["prompt"] or ""
    prompt = model.encode_text(prompt_text).to(getattr(model, "device", "cpu"))
    count, length = int(request["count"]), int(request["length"])
    # What is watched comes one text after the other; what is not, a batch at a time. The texts are the same.
    size = 1 if shows else int(request["batch_size"])
    texts = []
    for first in range(0, count, size):
        indices = range(first, min(first + size, count))
        stream = _Stream(model, prompt_text, is_first=first == 0) if shows else None
        added = write_text(
            model,
            sampler,
            prompt,
            length,
            indices,
            seed=generation.seed,
            on_token=None if stream is None else stream.add,
        )
        if stream is not None:
            stream.end()
        texts += [model.decode_text(tokens.cpu()) for tokens in added]
    return texts


class _Stream:
    """Writes a text as its tokens come; characters that take several tokens when they are whole."""

    def __init__(self, model: TextModel, prompt: str, is_first: bool) -> None:
        self._model = model
        self._tokens: list[Tensor] = []
        self._written = 0
        self._write(("" if is_first else "\n") + prompt)

    def add(self, token: Tensor) -> None:
        self._tokens.append(token[0].cpu())
        text = self._model.decode_text(torch.stack(self._tokens))
        # A character that is not whole yet decodes as a replacement.
        whole = text.rstrip("\ufffd")
        if len(whole) > self._written:
            self._write(whole[self._written :])
            self._written = len(whole)

    def end(self) -> None:
        if self._tokens:
            self._write(self._model.decode_text(torch.stack(self._tokens))[self._written :])
        self._write("\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
