"""Tasks and data for the traps of private training, named by their dotted path."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from privacy_runs import Module, Points, points
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from lightrail import Closure, Traits, Transform


class Fitted(Points):
    traits = Traits(fits_to_data="divides by the largest value of the training data")


class MaybeFitted(Points):
    """Fits to its data where an option says so."""

    def __init__(self, fits: bool = True, batch_size: int = 8) -> None:
        super().__init__(batch_size)

    traits = Traits(fits_to_data="fits")

    @staticmethod
    def traits_under(options: Any) -> Traits:
        return Traits() if not options.get("fits", True) else MaybeFitted.traits


class Stream(LightningDataModule):
    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()

    def train_dataloader(self) -> Any:
        class Endless(IterableDataset[Any]):
            def __iter__(self) -> Any:
                raise AssertionError("the data was touched")

        return DataLoader(Endless(), 8)


class Normed(Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__(width)
        self.net.insert(1, nn.BatchNorm1d(width))


class Rescaling(Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__(width)
        self.table = nn.Embedding(4, 2, max_norm=1.0)


class Collecting(Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__(width)
        from torchmetrics import CatMetric

        self.seen = CatMetric()


class Manual(Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__(width)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Contrastive(Module):
    """Every sample is told apart from the others of its batch."""

    def loss(self, batch: Any) -> Tensor:
        z = self.net(batch[0])
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))


class BatchWeights(Module):
    """The weights of samples add up to one over the batch."""

    def loss(self, batch: Any) -> Tensor:
        weights = batch[0][:, 0].softmax(0)
        return (F.cross_entropy(self.net(batch[0]), batch[1], reduction="none") * weights).sum()


class Summed(Module):
    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="sum")


class Checkpointed(Module):
    def loss(self, batch: Any) -> Tensor:
        logits: Any = checkpoint(self.net, batch[0], use_reentrant=False)
        return F.cross_entropy(logits, batch[1])


class Running(Module):
    """Keeps a mean of the data."""

    def __init__(self, width: int = 6) -> None:
        super().__init__(width)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def loss(self, batch: Any) -> Tensor:
        if self.training:
            self.get_buffer("mean").lerp_(batch[0].detach().mean(0), 0.1)
        return super().loss(batch)


class Counting(Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__(width)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def loss(self, batch: Any) -> Tensor:
        self.get_buffer("steps").add_(1)
        return super().loss(batch)


class Unused(Module):
    """One layer that nothing asks, and one that is frozen."""

    def __init__(self, width: int = 6) -> None:
        super().__init__(width)
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


class Exploding(Module):
    """The gradient of one record is not finite, or of all, though their losses are."""

    def __init__(self, width: int = 6, all_of_them: bool = False) -> None:
        super().__init__(width)
        self.all_of_them = all_of_them

    def loss(self, batch: Any) -> Tensor:
        logits = self.net(batch[0])
        is_bad = (batch[2] == 1) | self.all_of_them
        # The derivative of the root at 0 is infinite.
        extra = torch.where(is_bad, 0.0 * logits[:, 0], 1.0).sqrt()
        return (F.cross_entropy(logits, batch[1], reduction="none") + extra).mean()


class Dropping(Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__(width)
        self.net.insert(2, nn.Dropout(0.5))


class Compiled(Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__(width)
        self.net[0] = torch.compile(self.net[0], backend="eager")  # type: ignore[assignment]


class Own(Module):
    """A LightningModule with its own optimizer, in one of Lightning's forms."""

    def __init__(self, form: str = "alone") -> None:
        super().__init__()
        self.form = form

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        total = int(self.trainer.estimated_stepping_batches)
        assert total == 8
        halving = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
        match self.form:
            case "alone":
                return optimizer
            case "dict":
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": halving, "interval": "step"}}
            case "list":
                return [optimizer]
            case "lists":
                return [optimizer], [{"scheduler": halving, "interval": "step"}]
            case "several":
                return [optimizer, torch.optim.SGD(self.parameters(), lr=1.0)]
        return None


class Partly(Module):
    """Its optimizer has only the head."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[2].parameters(), lr=1.0)


class Opaque(Points):
    """Batches of a class that nobody knows."""

    def train_dataloader(self) -> Any:
        class Box:
            def __init__(self, rows: Any) -> None:
                self.rows = rows

        return DataLoader(points(), 8, collate_fn=Box)


class Secretly(Transform):
    """Asks twice, and says so nowhere."""

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        with closure.at([p + 0.1 for p in params]):
            closure()
