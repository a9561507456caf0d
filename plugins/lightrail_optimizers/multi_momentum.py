"""Momentum SGD on a gradient whose noise between clusters of the data is taken out by a momentum a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import ClosureError, ConfigurationError
from lightrail.options import at_least, between, non_negative
from lightrail.step import Closure
from lightrail.traits import Claim, Traits
from lightrail_optimizers.closure_answers import answers_for, moving
from lightrail_optimizers.momentum_rule import momentum_step_
from lightrail_optimizers.tensor_lists import gather
from lightrail_optimizers.tensorwise import MethodOptimizer, require_closure

__all__ = ["MultiMomentum", "multi_momentum"]


def multi_momentum(
    g: list[Tensor],
    m: list[list[Tensor]],
    g_of: list[list[Tensor]],
    *,
    share: Sequence[float],
    p: Sequence[float],
    alpha: Sequence[float],
) -> list[Tensor]:
    """``v = g + sum_k (p_k - share_k) m_k``, then ``m_k = alpha_k m_k + (1-alpha_k) g_k`` in place where k was seen.

    Args:
        g: The gradient of the batch; it stays as it is.
        m: The momentum of each cluster.
        g_of: The gradient of each cluster's samples in the batch.
        share: The share of each cluster in the batch; 0 where it has no sample there.
        p: The share of each cluster in the data.
        alpha: How much of each momentum stays; 0 where it is the cluster's first gradient.

    Returns:
        v, as new tensors: the mean of the batch where the shares are those of the data.
    """
    v = [g_i.clone() for g_i in g]
    for k, m_k in enumerate(m):
        if p[k] != share[k]:
            torch._foreach_add_(v, m_k, alpha=p[k] - share[k])
        if share[k]:
            torch._foreach_lerp_(m_k, g_of[k], 1 - alpha[k])
    return v


class MultiMomentum(MethodOptimizer):
    """SGD with momentum on a gradient that a momentum for each cluster of the data makes less noisy.

    The samples fall into clusters, such as classes; ``n_k`` of the B in a batch are of cluster k, ``p_k`` of all, and
    g_k is the gradient of their mean loss. ``v = g + sum_k (p_k - n_k/B) m_k``; then
    ``m_k = alpha m_k + (1-alpha) g_k`` for the clusters in the batch; ``b = momentum b + v``; ``x -= lr b``. What a
    batch has too many or too few of is made up for from the momenta, so v is as unbiased as g, and the nearer the m_k
    are to the gradients of their clusters, the less it depends on which clusters were drawn.

    Needs a task with ``clusters(batch)``; for ``classification`` they are the classes. Costs a second pass over the
    batch, cluster by cluster, and a copy of the parameters for each cluster.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, >= 0; as for SGD with momentum.
        clusters: How many clusters the task numbers, >= 1; the momenta of numbers that never come up stay 0.
        momentum: Of the steps, in [0, 1).
        alpha: Of the clusters, in [0, 1).
        weight_decay: Added to v as ``weight_decay x``, >= 0.
        frequencies: ``p_k``, numbers >= 0 that sum to 1; ``None`` for the shares among all samples seen so far.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.
        ClosureError: The closure is not a :class:`lightrail.Closure`, or its task offers no clusters, or more of them.

    Deviations:
        The paper draws a batch from one cluster at a time; v is the same for such batches, and is defined for mixed
        ones here. The first gradient of a cluster is its momentum as it stands. With BatchNorm, a cluster's gradient is
        that of its samples with their own statistics.

    Example:
        >>> from lightrail import Closure
        >>> w = torch.nn.Parameter(torch.zeros(()))
        >>> optimizer = MultiMomentum([w], lr=1.0, clusters=2, momentum=0.0, frequencies=[0.5, 0.5])
        >>> loss_fn = lambda x: (w * x).mean()  # the gradient is the mean of x: 1 in cluster 0, 3 in cluster 1
        >>> for x in ([1.0, 3.0], [1.0, 1.0], [3.0, 3.0]):
        ...     closure = Closure(loss_fn, [w], torch.tensor(x), clusters_fn=lambda x: (x > 2).long())
        ...     _ = optimizer.step(closure)
        ...     print(w.item())
        -2.0
        -4.0
        -6.0

    Reference:
        Tondji, Kashubin and Cisse, 2021, "Variance Reduction in Deep Learning: More Momentum is All You Need",
        arXiv:2111.11828.
    """

    traits = Traits(
        scales_with_gradient=True,
        rule="x -= lr momentum of v, v = g + sum_k (p_k - n_k/B) m_k, m_k the average gradient of cluster k",
        paper=(
            "Tondji, Kashubin, Cisse, 2021, Variance Reduction in Deep Learning: More Momentum is All You Need, "
            "arXiv:2111.11828"
        ),
        state=11,  # one a cluster and one for the steps
        extra_evaluations=1,
        needs_clusters=True,
        example={"lr": 0.01, "clusters": 3},
        claim=Claim(
            sentence="faster than SGD with momentum",
            baseline="sgd",
            baseline_options={"momentum": 0.9},
            problems=("digits",),
            options={"clusters": 10},
        ),
    )

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        clusters: int = 10,
        momentum: float = 0.9,
        alpha: float = 0.9,
        weight_decay: float = 0.0,
        frequencies: list[float] | None = None,
    ) -> None:
        non_negative(lr=lr, weight_decay=weight_decay)
        at_least(1, clusters=clusters)
        between(0.0, 1.0, momentum=momentum, alpha=alpha)
        self.clusters = clusters
        self.frequencies = None if frequencies is None else _checked(frequencies, clusters)
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "alpha": alpha, "weight_decay": weight_decay, "samples_seen": None}
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "clusters": self.clusters, "frequencies": self.frequencies}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        # One count for all groups: what has been seen of the data does not depend on the parameter.
        self.param_groups[-1]["samples_seen"] = self.param_groups[0]["samples_seen"] or [0] * self.clusters

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: A :class:`lightrail.Closure` over a batch whose clusters are known.

        Returns:
            The loss at the point where the step began.

        Raises:
            ClosureError: It is another closure, or none, or the task offers no clusters.
        """
        oracle = require_closure(self, closure, "takes the gradient of each cluster")
        loss = oracle()
        moving(self, oracle)  # refuses what the closure does not know, before anything moves
        counts, gradients = self._by_cluster(oracle)
        size = sum(counts)
        share = [count / size for count in counts]
        seen = [before + now for before, now in zip(self.param_groups[0]["samples_seen"], counts, strict=True)]
        p = self.frequencies or [count / sum(seen) for count in seen]
        for group in self.param_groups:
            group["samples_seen"] = seen
            for x, g, b, *m in self._lists(group):
                v = multi_momentum(
                    g,
                    m,
                    [answers_for(x, oracle, of_cluster) for of_cluster in gradients],
                    share=share,
                    p=p,
                    alpha=self._alphas(x, group["alpha"], counts),
                )
                momentum_step_(x, v, b, lr=float(group["lr"]), b=group["momentum"], wd=group["weight_decay"])
        return loss

    def _by_cluster(self, closure: Closure) -> tuple[list[int], list[list[Tensor]]]:
        """How many samples each cluster has in the batch, and its gradient."""
        try:
            found = closure.clusters(self.clusters)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ClosureError(
                "a cluster has one sample in the batch, and BatchNorm needs two",
                found=str(error),
                allowed="two samples of each cluster that is in a batch, or a model without BatchNorm",
                remedy="Choose a model with another normalisation, raise data.batch_size, or choose another optimizer.",
            ) from error
        return [count for count, _ in found], [gradients for _, gradients in found]

    def _lists(self, group: dict[str, Any]) -> Iterator[tuple[list[Tensor], ...]]:
        """``(x, g, b, m_0, m_1, …)``, of parameters that have seen the same clusters."""
        names = ("momentum", *(f"momentum_{k}" for k in range(self.clusters)))
        return gather(type(self).__name__, group, self.state, names, lambda kept: kept.setdefault("clusters_seen", 0))

    def _alphas(self, x: list[Tensor], alpha: float, counts: Sequence[int]) -> list[float]:
        """``alpha``, or 0 for clusters that these parameters see for the first time; notes which they have seen."""
        seen: int = self.state[x[0]]["clusters_seen"]  # bit k says whether cluster k was
        now = seen | sum(1 << k for k, count in enumerate(counts) if count)
        for x_i in x:
            self.state[x_i]["clusters_seen"] = now
        return [alpha if seen >> k & 1 else 0.0 for k in range(self.clusters)]


def _checked(frequencies: Sequence[float], clusters: int) -> list[float]:
    found = [float(p) for p in frequencies]
    if len(found) != clusters or min(found) < 0 or abs(sum(found) - 1) > 1e-3:
        raise ConfigurationError(
            "frequencies are not the shares of the clusters",
            found=f"{len(found)} numbers that sum to {sum(found):g}, for clusters={clusters}",
            allowed="one number of at least 0 for each cluster, with sum 1",
            remedy="Count the samples of each cluster in the training data, or leave frequencies out.",
        )
    return found
