"""Language modelling: the next token, here a byte."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightrail.options import at_least, non_negative, one_of
from lightrail_starter.tasks.losses import LossFn
from lightrail_starter.tasks.metrics import means
from lightrail_starter.tasks.stablemax import log_stablemax, stablemax_cross_entropy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LanguageModeling"]

Batch = tuple[Tensor, Tensor]

PROMPTS = 3

LOSSES: dict[str, LossFn] = {"cross_entropy": F.cross_entropy, "stablemax": stablemax_cross_entropy}


class LanguageModeling(LightningModule):
    """Learns to predict each byte from those before it.

    Args:
        model: Maps bytes ``[B, T]`` to logits ``[B, T, V]``; position t must not see what comes after t.
        sample_length: Bytes that the figures show the model continuing each prompt by, at least 0.
        temperature: Of these samples; 1 samples from the model as it is, 0 takes the likeliest byte.
        loss: ``cross_entropy``, or ``stablemax``: the cross entropy of probabilities that grow with the logits, not
            with their exponentials, worked out in double precision. Bits, perplexities and samples are of those
            probabilities.

    Example:
        >>> task = LanguageModeling(nn.Embedding(256, 256))
        >>> tokens = torch.zeros(2, 5, dtype=torch.long)
        >>> sorted(task.training_step((tokens, tokens), 0))
        ['accuracy', 'loss']
    """

    monitor = ("val_loss", "min")

    def __init__(
        self, model: nn.Module, sample_length: int = 160, temperature: float = 0.8, loss: str = "cross_entropy"
    ) -> None:
        super().__init__()
        at_least(0, sample_length=sample_length)
        non_negative(temperature=temperature)
        one_of(LOSSES, loss=loss)
        self.model = model
        self.sample_length = sample_length
        self.temperature = temperature
        self.loss_name = loss
        self.loss_fn = LOSSES[loss]
        self.metrics = means("loss", "accuracy")
        self._losses: list[Tensor] = []
        self._prompts: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, T, V]``."""
        return self.model(tokens)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The cross entropy of the next byte in nats, and the share of bytes that are predicted rightly."""
        inputs, target = batch
        logits = self.model(inputs)
        accuracy = logits.argmax(-1).eq(target).mean(dtype=torch.float32)
        return {"loss": self.loss_fn(logits.flatten(0, 1), target.flatten()), "accuracy": accuracy}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Logits ``[B, T, V]``, whose softmax is the model's probabilities, and bytes ``[B, T]``."""
        return self._evaluate(batch, "val")[0]

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Logits ``[B, T, V]``, whose softmax is the model's probabilities, and bytes ``[B, T]``."""
        found, losses = self._evaluate(batch, "test")
        self._losses.append(losses.float().cpu())
        if self._prompts is None:
            apart = max(1, len(batch[0]) // PROMPTS)
            self._prompts = batch[0][::apart][:PROMPTS].cpu()
        return found

    def on_test_epoch_start(self) -> None:
        self._losses, self._prompts = [], None

    def _evaluate(self, batch: Batch, stage: str) -> tuple[dict[str, Tensor], Tensor]:
        inputs, target = batch
        logits = self.model(inputs)
        losses = self.loss_fn(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
        values = {"loss": losses.mean(), "accuracy": logits.argmax(-1).eq(target).float().mean()}
        for name, value in values.items():
            metric: Any = self.metrics[f"{stage}_{name}"]
            metric.update(value, weight=target.numel())
            self.log(f"{stage}_{name}", metric, on_step=False, on_epoch=True, prog_bar=stage == "val")
        return {"prediction": self._softmax_logits(logits), "target": target}, losses

    def _softmax_logits(self, logits: Tensor) -> Tensor:
        """Logits whose softmax is what the loss takes for the model's probabilities."""
        return log_stablemax(logits).float() if self.loss_name == "stablemax" else logits

    def on_validation_epoch_end(self) -> None:
        self._log_derived("val")

    def on_test_epoch_end(self) -> None:
        self._log_derived("test")

    def _log_derived(self, stage: str) -> None:
        """What follows from the mean loss, not from its batches."""
        metric: Any = self.metrics[f"{stage}_loss"]
        if metric.update_called:
            loss = metric.compute()
            self.log(f"{stage}_bits_per_byte", loss / math.log(2))
            self.log(f"{stage}_perplexity", loss.exp())

    def num_samples(self, batch: Batch) -> int:
        """The terms of the mean loss: every byte that is predicted."""
        return batch[1].numel()

    def outputs(self, batch: Batch) -> Tensor:
        """Logits ``[B, T, V]``: what the loss looks at."""
        return self.model(batch[0])

    def output_loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The mean cross entropy of these logits."""
        return self.loss_fn(outputs.flatten(0, 1), batch[1].flatten())

    def sample_losses(self, batch: Batch) -> Tensor:
        """The mean cross entropy of each window of text, ``[B]``."""
        logits = self.outputs(batch)
        losses = self.loss_fn(logits.flatten(0, 1), batch[1].flatten(), reduction="none")
        return losses.view(batch[1].shape).mean(1)

    def sampled_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """The mean cross entropy with each next byte drawn from the model's own probabilities.

        The bytes before it stay those of the text. Its gradient ĝ is such that E[ĝ ⊙ ĝ] · B T is the diagonal of the
        Gauss-Newton matrix of the mean cross entropy over the B T bytes of the batch. Under ``stablemax``, where bytes
        are drawn from those probabilities, it is the Gauss-Newton matrix with log s(z) for outputs, the Fisher matrix.

        Args:
            batch: As in training; its targets are not used.
            generator: Where the bytes are drawn from.
        """
        logits = self.model(batch[0]).flatten(0, 1)
        with torch.no_grad():
            labels = torch.multinomial(self._softmax_logits(logits).softmax(-1), 1, generator=generator)[:, 0]
        return self.loss_fn(logits, labels)

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, V]`` of the byte after ``tokens`` ``[B, T]``, of which the model sees its context at most."""
        context = getattr(self.model, "context", None)
        seen = tokens if context is None else tokens[:, -context:]
        return self._softmax_logits(self.model(seen.to(self.device))[:, -1])

    def encode_text(self, text: str) -> Tensor:
        """The bytes ``[T]`` of a text; of an empty one a line break, which any text may follow."""
        return torch.tensor(list((text or "\n").encode()), dtype=torch.long)

    def decode_text(self, tokens: Tensor) -> str:
        """The text of bytes ``[T]``; what is no character stands as a replacement."""
        return bytes(tokens.tolist()).decode(errors="replace")

    @torch.no_grad()
    def continue_text(self, prompts: Tensor, length: int, generator: torch.Generator) -> Tensor:
        """Samples what comes next.

        Args:
            prompts: Bytes ``[B, T]``; the model sees at most the last T of prompt and continuation.
            length: How many bytes to add.
            generator: Where they are drawn from, on the CPU.

        Returns:
            The bytes that were added, ``[B, length]``.
        """
        tokens, window = prompts, prompts.shape[1]
        was_training = self.training
        self.eval()
        for _ in range(length):
            logits = self._softmax_logits(self.model(tokens[:, -window:].to(self.device))[:, -1]).float().cpu()
            if self.temperature:
                drawn = torch.multinomial((logits / self.temperature).softmax(-1), 1, generator=generator)
            else:
                drawn = logits.argmax(-1, keepdim=True)
            tokens = torch.cat((tokens, drawn), dim=1)
        self.train(was_training)
        return tokens[:, window:]

    def figures(self) -> dict[str, Figure]:
        """What the model writes after prompts of the last test, and its loss by position in the window."""
        from lightrail_starter.figures.language import continuations, loss_by_position

        if self._prompts is None:
            return {}
        drawn = {"loss_by_position": loss_by_position(torch.cat(self._losses))}
        if self.sample_length:
            added = self.continue_text(self._prompts, self.sample_length, torch.Generator().manual_seed(0))
            drawn["continuations"] = continuations(self._prompts, added)
        return drawn
