"""Writing texts from a run of a language model, shown as they come."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightrail.generation.text import TextModel, TokenSampler, write_text

if TYPE_CHECKING:
    from lightrail.generation.composed import Generation

__all__ = ["prompts_of", "write_texts"]


def prompts_of(generation: Generation) -> list[str]:
    """The prompt of each text: of several that were asked for, they are gone through in turn."""
    wanted = generation.request["prompt"]
    prompts = [wanted or ""] if wanted is None or isinstance(wanted, str) else list(wanted)
    return [prompts[i % len(prompts)] for i in range(int(generation.request["count"]))]


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
    prompts, length = prompts_of(generation), int(request["length"])
    # What is watched comes one text after the other; what is not, a batch at a time. The texts are the same.
    size = 1 if shows else int(request["batch_size"])
    texts = [""] * len(prompts)
    for indices in _batches(prompts, size):
        prompt = prompts[indices[0]]
        stream = _Stream(model, prompt, is_first=indices[0] == 0) if shows else None
        added = write_text(
            model,
            sampler,
            model.encode_text(prompt).to(getattr(model, "device", "cpu")),
            length,
            indices,
            seed=generation.seed,
            on_token=None if stream is None else stream.add,
        )
        if stream is not None:
            stream.end()
        for index, tokens in zip(indices, added, strict=True):
            texts[index] = model.decode_text(tokens.cpu())
    return texts


def _batches(prompts: Sequence[str], size: int) -> list[list[int]]:
    """The texts that are written together, by number: those of one prompt, in the order of their first ones."""
    by_prompt: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(index)
    batches = [of[i : i + size] for of in by_prompt.values() for i in range(0, len(of), size)]
    return sorted(batches, key=lambda indices: indices[0])


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
