"""Questions about parts of the batch: groups, clusters, objectives, single samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightrail.errors import ClosureError
from lightrail.step.batches import leading_size, split_batch, split_by_cluster
from lightrail.step.evaluation import Evaluation
from lightrail.step.sharded import are_sharded

__all__ = ["PartsOfTheBatch"]


class PartsOfTheBatch(Evaluation):
    """What a :class:`lightrail.Closure` answers about parts of its window."""

    @contextmanager
    def part(self, index: int, count: int) -> Iterator[Any]:
        """Inside, every question is about one of ``count`` disjoint parts of the window.

        Where there are ``count`` micro-batches, or a multiple, a part is a run of them; otherwise it is the slice
        ``index`` of every micro-batch along its leading axis. A question about it counts as ``1 / count`` evaluations.

        Args:
            index: Which part, from 0.
            count: How many parts there are.

        Raises:
            ClosureError: No batch was given, or a micro-batch has fewer samples than there are parts.
        """
        kept = self._batches, self._states, self._divisor, self._share, self._has_run
        if len(self._batches) % count == 0:
            size = len(self._batches) // count
            chosen = slice(index * size, (index + 1) * size)
            self._batches, self._states = self._batches[chosen], self._states[chosen]
        else:
            self._batches = [split_batch(batch, count)[index] for batch in self._batches]
        # What the first evaluation of a step does belongs to the whole window.
        self._divisor, self._share, self._has_run = len(self._batches), self._share / count, True
        try:
            yield self
        finally:
            self._batches, self._states, self._divisor, self._share, self._has_run = kept

    @torch.enable_grad()
    def groups(self, count: int) -> list[list[Tensor]]:
        """The gradients of ``count`` disjoint parts of the batch.

        Part j is the j-th of ``count`` slices along the leading axis, over all micro-batches and ranks.

        Args:
            count: How many parts, between 1 and the size of the smallest micro-batch.

        Returns:
            ``count`` lists of one tensor a parameter.

        Raises:
            ClosureError: No batch was given, or one is smaller than ``count``.
        """
        self._count()
        parts = [split_batch(batch, count) for batch in self._batches]
        found = []
        for part in range(count):
            _, gradients = self._gradient_of(self._loss_fn, [parts[index][part] for index in range(len(self._batches))])
            found.append(self._filled(gradients))
        return found

    @torch.enable_grad()
    def clusters(self, count: int) -> list[tuple[int, list[Tensor]]]:
        """The gradient of the samples of each cluster, over the whole window and all ranks.

        Every sample is evaluated once, together with the others of its cluster.

        Args:
            count: How many clusters there are; the task numbers them from 0.

        Returns:
            For each cluster how many samples it has here, and the gradient of their mean loss (zeros where it has
            none), one tensor a parameter.

        Raises:
            ClosureError: The task offers no ``clusters``, or numbers one ``count`` or higher.
        """
        clusters_fn = self._required(self._clusters_fn, "clusters", "clusters(batch)")
        if are_sharded(self.params):  # a rank without samples of a cluster would leave the others waiting
            raise self._sharded("evaluates clusters of the batch")
        self._count()
        parts = [split_by_cluster(batch, clusters_fn(*batch), count) for batch in self._batches]
        summed_loss = lambda *batch: self._loss_fn(*batch) * (leading_size(batch) or 0)  # noqa: E731
        sizes = torch.zeros(count, dtype=torch.float64, device=self.params[0].device)
        sums = []
        for cluster in range(count):
            members = [each[cluster] for each in parts]
            sizes[cluster] = sum(leading_size(batch) or 0 for batch in members) / self._divisor
            sums.append(self._filled(self._gradient_here(summed_loss, members)[1]))
        # All of them, on every rank: a rank may lack a cluster that another has.
        self._average([sizes, *(tensor for each in sums for tensor in each)])
        for size, each in zip(sizes.tolist(), sums, strict=True):
            if size:
                torch._foreach_div_(each, size)
        samples = [round(size * self._divisor * self._world_size) for size in sizes.tolist()]
        return list(zip(samples, sums, strict=True))

    @torch.enable_grad()
    def jacobian(self) -> list[list[Tensor]]:
        """One gradient an objective, for tasks with several losses.

        Returns:
            A list, an objective, of one tensor a parameter.

        Raises:
            ClosureError: The task offers no ``objectives``.
        """
        objectives_fn = self._required(self._objectives_fn, "objectives", "objectives(batch)")
        self._count()
        rows: list[list[Tensor]] = []
        with self._whole() as seen, self._aside():
            params = [p for p in seen if p.requires_grad]
            for index, batch in enumerate(self._batches):
                values = as_scalars(self._replay(objectives_fn, batch, index))
                for row, value in enumerate(values):
                    gradients = iter(
                        torch.autograd.grad(
                            value / self._divisor,
                            params,
                            retain_graph=row + 1 < len(values),
                            allow_unused=True,
                            materialize_grads=True,
                        )
                    )
                    full = [next(gradients) if p.requires_grad else torch.zeros_like(p) for p in seen]
                    if index == 0:
                        rows.append(full)
                    else:
                        torch._foreach_add_(rows[row], full)
            for row in rows:
                self._average(row)
        return [self._cut(row) for row in rows]

    @torch.no_grad()
    def sample_losses(self) -> Tensor:
        """The loss of each sample of this rank's window, ``[N]``, micro-batch after micro-batch.

        Raises:
            ClosureError: The task offers no ``sample_losses``.
        """
        sample_losses_fn = self._sample_losses()
        self._count()
        with self._aside():
            return torch.cat([self._replay(sample_losses_fn, batch, i) for i, batch in enumerate(self._batches)])

    @torch.enable_grad()
    def weighted(self, weights: Tensor) -> list[Tensor]:
        """The gradient of the mean of ``w_i loss_i``, over the window and all ranks.

        Args:
            weights: ``[N]``, in the order of :meth:`sample_losses`.

        Returns:
            One tensor a parameter; ``.grad`` stays as it was.
        """
        sample_losses_fn = self._sample_losses()
        self._count()
        taken = 0

        def mean(*batch: Any) -> Tensor:
            nonlocal taken
            losses = sample_losses_fn(*batch)
            chosen = weights[taken : taken + len(losses)]
            taken += len(losses)
            return (chosen.to(losses) * losses).mean()

        return self._filled(self._gradient_of(mean)[1])

    @torch.enable_grad()
    def sample_jacobian(self) -> list[Tensor]:
        """The gradient of every sample's own loss, over the window and all ranks.

        Returns:
            One tensor a parameter, ``[N, *shape]``: N times the memory of the parameters.

        Raises:
            ClosureError: The task offers no ``sample_losses``.
        """
        sample_losses_fn = self._sample_losses()
        if are_sharded(self.params):
            raise self._sharded("asks for the gradient of every sample")
        self._count()
        params = [p for p in self.params if p.requires_grad]
        rows = []
        # The fused attention kernels cannot be differentiated for a batch of vectors at once.
        with self._aside(), sdpa_kernel(SDPBackend.MATH):
            for index, batch in enumerate(self._batches):
                rows.append(_row_gradients(self._replay(sample_losses_fn, batch, index), params))
        stacked = iter([torch.cat(column) for column in zip(*rows, strict=True)])
        count = sum(len(row[0]) for row in rows)
        full = [next(stacked) if p.requires_grad else p.new_zeros(count, *p.shape) for p in self.params]
        return [self._gathered(each) for each in full]

    def _sample_losses(self) -> Callable[..., Tensor]:
        return self._required(self._sample_losses_fn, "sample_losses", "sample_losses(batch)")

    def _gathered(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in the order of the ranks."""
        if self._world_size == 1:
            return rows
        sizes = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(self._world_size)]
        torch.distributed.all_gather(sizes, torch.tensor(len(rows), device=rows.device))
        longest = int(max(sizes))
        padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
        found = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(found, padded)
        return torch.cat([each[: int(size)] for each, size in zip(found, sizes, strict=True)])

    def objectives(self, batch: Any) -> Any:
        """The task's losses of a micro-batch, for functions given to ``gradient_of``: a sequence, mapping or tensor.

        Raises:
            ClosureError: The task offers no ``objectives``.
        """
        return self._required(self._objectives_fn, "objectives", "objectives(batch)")(batch)

    def outputs(self, batch: Any) -> Tensor:
        """What the loss of a micro-batch looks at (logits, predictions), for functions given to ``gradient_of``.

        Raises:
            ClosureError: The task offers no ``outputs``.
        """
        return self._required(self._outputs_fn, "outputs", "outputs(batch)")(batch)

    def output_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """The mean loss of a micro-batch whose outputs are given, for functions given to ``gradient_of``.

        Raises:
            ClosureError: The task offers no ``output_loss``.
        """
        return self._required(self._output_loss_fn, "output_loss", "output_loss(outputs, batch)")(outputs, batch)

    def batch_sizes(self) -> list[int]:
        """Samples of each micro-batch of this rank: the length of its leading axis.

        Raises:
            ClosureError: No batch was given to count in.
        """
        sizes = [leading_size(batch) or 0 for batch in self._batches]
        if not all(sizes):
            raise ClosureError(
                "the closure cannot count the samples of a micro-batch",
                found="a loss function that closes over its batch, or an empty batch",
                allowed="lightrail.Closure(loss_fn, params, batch)",
                remedy="Pass the batch to lightrail.Closure.",
            )
        return sizes

    def window_size(self) -> int:
        """Samples of the whole window, over all ranks."""
        total = torch.tensor([float(sum(self.batch_sizes()))], dtype=torch.float64, device=self.params[0].device)
        self._average([total])
        return round(float(total) * self._world_size)

    def num_samples(self) -> int:
        """How many terms the mean loss has, over the whole window and all ranks.

        Raises:
            ClosureError: No batch was given to count in.
        """
        count = sum(self._num_samples_fn(*b) if self._num_samples_fn else leading_size(b) or 0 for b in self._batches)
        if not count:
            raise ClosureError(
                "the closure cannot count the samples of its loss",
                found="a loss function that closes over its batch",
                allowed="lightrail.Closure(loss_fn, params, batch), or num_samples_fn",
                remedy="Pass the batch to lightrail.Closure, or give the method its batch size.",
            )
        total = torch.tensor([float(count)], dtype=torch.float64, device=self.params[0].device)
        self._average([total])
        return round(float(total) * self._world_size)


def as_scalars(objectives: Any) -> list[Tensor]:
    """Losses in a sequence, a mapping or a 1-d tensor, as a list."""
    if isinstance(objectives, Mapping):
        return list(objectives.values())
    if isinstance(objectives, Tensor):
        return list(objectives.unbind())
    return list(objectives)


def _row_gradients(losses: Tensor, params: list[Tensor]) -> list[Tensor]:
    """The gradients of ``[n]`` losses, ``[n, *shape]`` for each parameter: at once, or one by one where that fails."""
    each = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
    try:
        found = torch.autograd.grad(
            losses, params, each, is_grads_batched=True, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    except RuntimeError:  # an operation that has no rule for a batch of vectors
        rows = [
            torch.autograd.grad(
                loss, params, retain_graph=row + 1 < len(losses), allow_unused=True, materialize_grads=True
            )
            for row, loss in enumerate(losses.unbind())
        ]
        return [torch.stack(column) for column in zip(*rows, strict=True)]
    return [
        each if each.dim() == p.dim() + 1 else each.expand(len(losses), *p.shape)
        for each, p in zip(found, params, strict=True)
    ]
