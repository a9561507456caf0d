"""What a method cannot work with is refused by name: a schedule over a line search, parameters cut over devices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.optim.lr_scheduler import LambdaLR

from lightrail import Closure
from lightrail.catalogue import available, load
from lightrail.errors import ConfigurationError
from lightrail.traits import traits_of
from lightrail_optimizers import LBFGS, MFAC, SMB, Lion, MARSShampoo


@pytest.mark.parametrize("make", [lambda p: SMB(p), lambda p: LBFGS(p, line_search_fn="strong_wolfe")])
def test_a_schedule_over_a_line_search_is_refused(make) -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = make([w])
    optimizer.step(Closure(lambda: (w**2).sum(), [w]))
    LambdaLR(optimizer, lambda _: 0.5)
    with pytest.raises(ConfigurationError, match="sets its own step size"):
        optimizer.step(Closure(lambda: (w**2).sum(), [w]))


def test_a_line_search_makes_the_difference() -> None:
    assert not traits_of(LBFGS).sets_step_size
    assert traits_of(LBFGS, {"line_search_fn": "strong_wolfe"}).sets_step_size


@pytest.fixture
def sharded() -> Iterator[nn.Parameter]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        yield nn.Parameter(distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)]))
    finally:
        torch.distributed.destroy_process_group()


def test_methods_of_whole_tensors_refuse_parameters_that_are_cut(sharded: nn.Parameter) -> None:
    for cls in (MFAC, MARSShampoo):
        with pytest.raises(ConfigurationError, match=f"{cls.__name__} works on whole tensors, which sharding cuts"):
            cls([sharded])
    Lion([sharded])


def test_methods_of_matrices_say_that_they_need_them_whole() -> None:
    matrix = {
        "muon",
        "mars_shampoo",
        "soap",
        "psgd_lra",
        "mfac",
        "efcp_ggt",
        "efcp_topk_mfac",
        "osd_adamw",
        "scaled_gd",
    }
    assert matrix <= set(available("optimizer"))
    for name in matrix:
        assert traits_of(load("optimizer", name)).needs_whole_tensors, name
