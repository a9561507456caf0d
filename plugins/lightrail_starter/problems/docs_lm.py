"""A byte-level language model, small enough to train many times over."""

from __future__ import annotations

from lightrail.bench.claims.problem import TaskProblem
from lightrail.traits import Traits
from lightrail_starter.data.docs import Docs
from lightrail_starter.models.gpt import GPT
from lightrail_starter.tasks.language_modeling import LanguageModeling

__all__ = ["DocsLM"]


class DocsLM(TaskProblem):
    """A transformer of some 120 thousand parameters on Python's manual: windows of 64 bytes, 16 a batch.

    Example:
        >>> problem = DocsLM()
        >>> 5 < problem.merit() < 7
        True
    """

    traits = Traits(rule="next-byte cross entropy, 2 layers of width 64, 16 windows of 64 bytes a batch")
    passes = 300

    def __init__(self) -> None:
        model = GPT(vocab_size=256, context=64, width=64, depth=2, heads=4)
        super().__init__(LanguageModeling(model), Docs(context=64, batch_size=16), validation_batches=8)
