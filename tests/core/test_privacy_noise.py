"""The noise of private training: its distribution, its secrecy and the coins of Poisson sampling."""

from __future__ import annotations

import copy
import math
import os
import pickle
import random
import sys

import numpy as np
import pytest
import torch
from lightning import seed_everything
from scipy import stats

from lightrail.errors import ConfigurationError, PluginError
from lightrail.privacy.noise import DeterministicNoise, NoiseSource, SystemNoise

COUNT = 200_000
# So small that a right source as good as never fails.
P = 1e-7
SOURCES = [SystemNoise(), DeterministicNoise(seed=5)]


def _normals(source: NoiseSource, count: int = COUNT, std: float = 1.0, dtype: torch.dtype = torch.float32):
    return source.normal_like([torch.empty(count, dtype=dtype)], std)[0]


def _digits(*values: int) -> NoiseSource:
    """A source whose random digits are told."""
    source = DeterministicNoise(seed=0)
    told = iter(values)
    source._digits = lambda count: torch.tensor([next(told) for _ in range(count)], dtype=torch.int32)  # type: ignore[method-assign]
    return source


# The distribution.


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: type(source).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_normal_of_the_scale_asked_for(source: NoiseSource, dtype: torch.dtype) -> None:
    drawn = _normals(source, std=3.0, dtype=dtype).double().numpy()
    assert stats.kstest(drawn, "norm", args=(0, 3.0)).pvalue > P
    for wrong in (0.9, 1.1):
        assert stats.kstest(drawn, "norm", args=(0, 3.0 * wrong)).pvalue < P


@pytest.mark.parametrize("draws", [1, 4, 5])
def test_the_scale_does_not_depend_on_the_number_of_draws(draws: int) -> None:
    drawn = _normals(SystemNoise(draws=draws)).double().numpy()
    assert stats.kstest(drawn, "norm").pvalue > P


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: type(source).__name__)
def test_moments_and_tails(source: NoiseSource) -> None:
    drawn = _normals(source, 400_000, dtype=torch.float64)
    # Five standard deviations of each mean.
    for power, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((drawn**power).mean()) - expected) < 5 * math.sqrt(spread / len(drawn))
    for bound in (2.0, 3.0, 4.0):
        share = math.erfc(bound / math.sqrt(2))
        seen = float((drawn.abs() > bound).double().mean())
        assert abs(seen - share) < 5 * math.sqrt(share / len(drawn)) + 5 / len(drawn)


def test_neighbours_are_independent_across_calls_tensors_and_the_two_halves_of_a_block() -> None:
    source = SystemNoise()
    first, second = source.normal_like([torch.empty(COUNT), torch.empty(COUNT)], 1.0)
    third = _normals(source)
    half = len(third) // 2
    for a, b in ((first, second), (first, third), (first[:-1], first[1:]), (third[:half], third[half:])):
        bound = 5 / math.sqrt(len(a))
        assert abs(float((a * b).mean())) < bound
        assert abs(float(((a**2 - 1) * (b**2 - 1)).mean())) < 2 * bound
    # The normals of one pair of Box and Muller stand half a block apart.
    block = _normals(SystemNoise(), 16_384)
    assert abs(float((block[:8192] * block[8192:]).mean())) < 5 / math.sqrt(8192)


def test_low_precision_is_drawn_in_float32_and_cast_last() -> None:
    parts = [torch.zeros(50_000, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    wide = DeterministicNoise(seed=1).normal_like([part.float() for part in parts], 2.0)
    cast = DeterministicNoise(seed=1).normal_like(parts, 2.0)
    for narrow, full, part in zip(cast, wide, parts, strict=True):
        assert narrow.dtype == part.dtype
        assert torch.equal(narrow, full.to(part.dtype))


def test_float64_has_more_than_the_digits_of_float32() -> None:
    drawn = _normals(SystemNoise(), 1000, dtype=torch.float64)
    assert not torch.equal(drawn, drawn.float().double())


def test_complex_numbers_have_noise_in_both_parts() -> None:
    drawn = _normals(SystemNoise(), 50_000, std=2.0, dtype=torch.complex64)
    for part in (drawn.real, drawn.imag):
        assert stats.kstest(part.double().numpy(), "norm", args=(0, 2.0)).pvalue > P


def test_shapes_of_every_kind() -> None:
    shapes = [torch.zeros(()), torch.zeros(0), torch.zeros(3, 1, 2), torch.zeros(4, 6).T, torch.zeros(20_001)]
    for source in SOURCES:
        for drawn, asked in zip(source.normal_like(shapes, 1.0), shapes, strict=True):
            assert drawn.shape == asked.shape
            assert bool((drawn != 0).all())
            assert not drawn.requires_grad


# Adding.


def test_add_to_adds_what_normal_like_would_give() -> None:
    tensors = [torch.randn(5, 3).T, torch.randn(4, dtype=torch.float64), torch.randn(2, dtype=torch.complex64)]
    expected = [a + b for a, b in zip(tensors, DeterministicNoise(seed=2).normal_like(tensors, 0.5), strict=True)]
    DeterministicNoise(seed=2).add_to(tensors, 0.5)
    for got, wanted in zip(tensors, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_sum_of_low_precision_is_rounded_once() -> None:
    tensor = torch.full((1000,), 1.0, dtype=torch.bfloat16)
    noise = DeterministicNoise(seed=2).normal_like([tensor.float()], 0.01)[0]
    DeterministicNoise(seed=2).add_to([tensor], 0.01)
    assert torch.equal(tensor, (1 + noise).bfloat16())


def test_add_to_reaches_parameters_and_works_after_inference_mode() -> None:
    source = SystemNoise()
    with torch.inference_mode():
        source.normal_like([torch.zeros(3)], 1.0)
    parameter = torch.nn.Parameter(torch.zeros(30_000))
    source.add_to([parameter], 1.0)
    assert parameter.requires_grad
    assert bool((parameter != 0).all())


def test_no_deviation_is_no_noise() -> None:
    tensor = torch.ones(3)
    for source in SOURCES:
        source.add_to([tensor], 0.0)
        assert torch.equal(tensor, torch.ones(3))
        assert torch.equal(source.normal_like([tensor], 0)[0], torch.zeros(3))


# Secrecy.


def test_a_seed_for_everything_does_not_make_the_noise_public() -> None:
    drawn, coins = [], []
    for _ in range(2):
        seed_everything(7, verbose=False)
        source = SystemNoise()
        drawn.append(_normals(source, 1000))
        coins.append(source.bernoulli(1000, 1, 2))
    assert not bool((drawn[0] == drawn[1]).any())
    assert not torch.equal(*coins)


@pytest.mark.parametrize("make", [SystemNoise, lambda: DeterministicNoise(seed=1)])
def test_generators_of_others_are_left_alone(make) -> None:
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    source = make()
    source.normal_like([torch.zeros(10), torch.zeros(10, dtype=torch.float64)], 1.0)
    source.bernoulli(10, 1, 3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


def _in_a_fork(source: NoiseSource) -> tuple[list[float], list[bool]]:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, pickle.dumps((_normals(source, 100).tolist(), source.bernoulli(100, 1, 2).tolist())))
        os._exit(0)
    os.waitpid(child, 0)
    found = os.read(read, 1 << 16)
    os.close(read)
    os.close(write)
    return pickle.loads(found)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_forked_process_does_not_repeat_its_parent() -> None:
    source = SystemNoise()
    _normals(source, 10)
    children = [_in_a_fork(source) for _ in range(2)]
    mine = _normals(source, 100).tolist(), source.bernoulli(100, 1, 2).tolist()
    for normals, coins in children:
        assert not set(normals) & set(mine[0])
        assert coins != mine[1]
    assert not set(children[0][0]) & set(children[1][0])


def test_copies_have_noise_of_their_own() -> None:
    source = SystemNoise()
    _normals(source, 10)
    others = [copy.deepcopy(source), pickle.loads(pickle.dumps(source))]
    drawn = [_normals(each, 100) for each in (source, *others)]
    assert not bool((drawn[0] == drawn[1]).any() or (drawn[0] == drawn[2]).any() or (drawn[1] == drawn[2]).any())
    assert others[0].name == source.name


def test_an_accelerators_generator_is_seeded_by_the_system() -> None:
    generators = [SystemNoise()._generator(torch.device("cpu")) for _ in range(2)]
    assert generators[0].initial_seed() != generators[1].initial_seed()
    source = SystemNoise()
    assert source._generator(torch.device("cpu")) is source._generator(torch.device("cpu"))


def test_what_a_source_says_of_itself() -> None:
    assert SystemNoise().is_secret
    assert not DeterministicNoise(seed=1).is_secret
    assert SystemNoise().state_dict() == {}
    assert SystemNoise().name == "AES-256-CTR keyed by the system, 4 draws"
    assert SystemNoise("cuda").name == "Philox on cuda (64 bits) keyed by the system, 4 draws"
    assert SystemNoise("cuda", source="system").name == SystemNoise().name


def test_without_the_library_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith("cryptography.hazmat.primitives"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(PluginError, match="cryptography") as error:
        SystemNoise()
    assert "lightrail[privacy]" in error.value.remedy


# The coins of Poisson sampling.


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: type(source).__name__)
@pytest.mark.parametrize(("batch", "records"), [(1, 3), (64, 1797), (99, 100), (1, 1_000_003)])
def test_records_are_drawn_with_the_exact_rate(source: NoiseSource, batch: int, records: int) -> None:
    count = 1_000_000
    drawn = int(source.bernoulli(count, batch, records).sum())
    rate = batch / records
    assert stats.binomtest(drawn, count, rate).pvalue > P


def test_draws_of_neighbours_are_independent() -> None:
    drawn = SystemNoise().bernoulli(300_000, 1, 3)
    pairs = torch.bincount(drawn[::2].long() * 2 + drawn[1::2].long(), minlength=4).double()
    expected = torch.tensor([4.0, 2.0, 2.0, 1.0], dtype=torch.float64) / 9 * 150_000
    assert stats.chisquare(pairs.numpy(), expected.numpy()).pvalue > P


def test_a_full_batch_takes_all_and_an_empty_one_none() -> None:
    for source in SOURCES:
        assert bool(source.bernoulli(1000, 93, 93).all())
        assert not bool(source.bernoulli(1000, 0, 93).any())
        none = source.bernoulli(0, 1, 2)
        assert none.dtype == torch.bool
        assert none.shape == (0,)


def test_the_digits_of_the_rate_decide() -> None:
    # 1/3 is 0.(01)₂, whose first 32 digits are 0x55555555; signed digits are counted from −2³¹.
    first = 0x55555555 - (1 << 31)
    assert _digits(first - 1, first + 1).bernoulli(2, 1, 3).tolist() == [True, False]
    # Equal so far: the next 32 decide, which are the same again.
    assert _digits(first, first, first - 1, first + 1).bernoulli(2, 1, 3).tolist() == [True, False]
    # 1/2 ends after one digit: what is equal to it is not below it.
    assert _digits(0, -1).bernoulli(2, 1, 2).tolist() == [False, True]
    # A rate of less than 2⁻³².
    assert _digits(-(1 << 31), -(1 << 31)).bernoulli(1, 1, 1 << 40).tolist() == [True]
    assert _digits(-(1 << 31), 1 - (1 << 31) + (1 << 24)).bernoulli(1, 1, 1 << 40).tolist() == [False]


# The source for tests.


def test_a_seed_repeats_and_ranks_differ() -> None:
    drawn = [_normals(DeterministicNoise(*key), 100) for key in ((1, 0), (1, 0), (2, 0), (1, 1))]
    assert torch.equal(drawn[0], drawn[1])
    assert not bool((drawn[0] == drawn[2]).any() or (drawn[0] == drawn[3]).any() or (drawn[2] == drawn[3]).any())


def test_a_seeded_source_goes_on_from_its_state() -> None:
    source = DeterministicNoise(seed=4)
    _normals(source, 33)
    source.bernoulli(10, 1, 3)
    state = copy.deepcopy(source.state_dict())
    expected = _normals(source, 10), source.bernoulli(50, 1, 3)
    again = DeterministicNoise(seed=0)
    again.load_state_dict(state)
    assert torch.equal(_normals(again, 10), expected[0])
    assert torch.equal(again.bernoulli(50, 1, 3), expected[1])


def test_coins_do_not_move_the_normals() -> None:
    plain, other = DeterministicNoise(seed=4), DeterministicNoise(seed=4)
    other.bernoulli(77, 1, 3)
    assert torch.equal(_normals(plain, 10), _normals(other, 10))


# Mistakes.


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: SystemNoise(source="dice"),
        lambda: SystemNoise(draws=0),
        lambda: DeterministicNoise(seed=-1),
        lambda: SystemNoise().normal_like([torch.zeros(2)], -1.0),
        lambda: SystemNoise().normal_like([torch.zeros(2)], math.nan),
        lambda: SystemNoise().add_to([torch.zeros(2)], math.inf),
        lambda: SystemNoise().normal_like([torch.zeros(2, dtype=torch.int64)], 1.0),
        lambda: SystemNoise().bernoulli(3, 4, 3),
        lambda: SystemNoise().bernoulli(3, 0, 0),
        lambda: SystemNoise().bernoulli(-1, 1, 2),
        lambda: SystemNoise().bernoulli(3, -1, 2),
    ],
)
def test_mistakes_are_told(mistake) -> None:
    with pytest.raises(ConfigurationError):
        mistake()
