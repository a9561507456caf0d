"""Compressors: their means, bounds, bytes and refusals, and encodings by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lightrail.errors import ConfigurationError
from lightrail.federated.feedback import ef21, error_feedback
from lightrail_federated.compressors.identity import Identity
from lightrail_federated.compressors.natural import Natural
from lightrail_federated.compressors.packing import packed, unpacked
from lightrail_federated.compressors.qsgd import QSGD
from lightrail_federated.compressors.rand_k import RandK, random_places
from lightrail_federated.compressors.sign import Sign
from lightrail_federated.compressors.top_k import TopK

ALL = [Identity(), RandK(0.3), TopK(0.3), QSGD(1), QSGD(7, bucket=4), QSGD(200), Natural(), Sign()]
CONTRACTIVE = [each for each in ALL if each.is_contractive]


def named(compressor):
    return type(compressor).__name__ + str(getattr(compressor, "levels", ""))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def vector(size=6, seed=1, dtype=torch.float32):
    return torch.randn(size, generator=generator(seed), dtype=dtype)


DRAWS = 20_000


def many(compressor, x):
    """As many draws of C(x): entries are rounded apart from each other, so that copies in one vector are draws."""
    if isinstance(compressor, RandK):
        k = round(compressor.ratio * len(x))
        found = torch.zeros(DRAWS, len(x), dtype=torch.float64)
        places = torch.stack([random_places(seed, len(x), k) for seed in range(DRAWS)])
        return found.scatter(1, places, x.double()[places] * (len(x) / k))
    return compressor.compress(x.repeat(DRAWS), generator(5)).decoded().double().view(DRAWS, -1)


@pytest.mark.parametrize("compressor", [RandK(0.3), QSGD(1, 6), QSGD(3, 6), QSGD(200, 6), Natural()], ids=named)
def test_mean_and_variance_of_many_draws(compressor):
    x = vector()
    found = many(compressor, x)
    error = (found.mean(0) - x).abs()
    assert bool((error <= 3 * found.std(0) / math.sqrt(DRAWS)).all())
    variance = float((found - x).square().sum(1).mean() / x.double().square().sum())
    assert variance <= compressor.variance(6) * 1.02
    if isinstance(compressor, RandK):
        assert variance == pytest.approx(6 / 2 - 1, rel=0.02)


@pytest.mark.parametrize("compressor", CONTRACTIVE, ids=named)
def test_contraction(compressor):
    for size in (1, 2, 7, 40):
        for seed in range(20):
            x = vector(size, seed) ** 3
            # The mean of the one that draws is that of many copies.
            x = x.repeat(2000) if isinstance(compressor, Natural) else x
            left = (compressor.compress(x, generator(2)).decoded() - x).double().square().sum()
            bound = (1 - compressor.contraction(len(x))) * (1.05 if isinstance(compressor, Natural) else 1 + 1e-6)
            assert float(left) <= bound * float(x.double().square().sum()) + 1e-12


def test_bounds_of_the_papers():
    assert RandK(0.25).variance(8) == 3
    assert TopK(0.25).contraction(8) == 0.25
    assert TopK(0.001).contraction(8) == 1 / 8
    assert QSGD(4).variance(64) == min(64 / 16, 8 / 4)
    assert QSGD(16).variance(64) == 64 / 256
    assert QSGD(4, bucket=16).variance(64) == 1
    assert (Natural().variance(9), Natural().contraction(9)) == (1 / 8, 7 / 8)
    assert Sign().contraction(8) == 1 / 8
    # E (C - t)² = (t - 1)(2 - t), which is t² / 8 at its worst, t = 4/3.
    found = Natural().compress(torch.full((DRAWS,), 4 / 3), generator()).decoded().double()
    assert float((found - 4 / 3).square().mean() * 9 / 16) == pytest.approx(1 / 8, rel=0.03)


def test_encodings_by_hand():
    x = torch.tensor([0.0, -4.0, 1.0, 4.0, 3.0])
    parts = TopK(0.2).encode(x, generator())
    assert (parts["values"].tolist(), parts["places"].tolist()) == ([-4.0], [1])
    parts = TopK(0.4).encode(torch.ones(5), generator())
    assert parts["places"].tolist() == [0, 1]
    parts = RandK(0.4).encode(x, generator())
    places = random_places(int(parts["seed"]), 5, 2)
    assert torch.equal(parts["values"], x[places] * 2.5)
    found = RandK(0.4).decode(parts, 5, torch.float32)
    assert torch.equal(found[places], parts["values"])
    assert int((found != 0).sum()) <= 2
    parts = Sign().encode(x, generator())
    assert (parts["signs"].tolist(), parts["size"].tolist()) == ([0b10111000], [pytest.approx(2.4)])
    # |x| / ‖x‖ is 1/2 for each, so that two levels leave nothing to chance: codes 2 + (1, -1, 1, 1) in 3 bits.
    parts = QSGD(2).encode(torch.tensor([3.0, -3.0, 3.0, 3.0]), generator())
    assert (parts["levels"].tolist(), parts["norms"].tolist()) == ([0b01100101, 0b10110000], [6.0])
    # 1 is exponent 127, -2 is 128 with the sign: 001111111 110000000.
    parts = Natural().encode(torch.tensor([1.0, -2.0]), generator())
    assert parts["codes"].tolist() == [0b00111111, 0b11100000, 0b00000000]
    found = {float(Natural().compress(torch.tensor([-3.0]), generator(i)).decoded()) for i in range(20)}
    assert found == {-2.0, -4.0}


@pytest.mark.parametrize(
    ("compressor", "nbytes"),
    [
        (Identity(), 400),
        (RandK(0.1), 48),
        (TopK(0.1), 80),
        (QSGD(1), 25 + 4),
        (QSGD(7), 50 + 4),
        (QSGD(127), 100 + 4),
        (QSGD(32767), 200 + 4),
        (QSGD(7, bucket=32), 50 + 16),
        (Natural(), 113),
        (Sign(), 13 + 4),
    ],
    ids=lambda value: named(value) if not isinstance(value, int) else "",
)
def test_bytes_on_the_wire(compressor, nbytes):
    assert compressor.compress(vector(100), generator()).nbytes == nbytes
    # Float64 doubles numbers, and only them; exponents have three bits more.
    extra = {"Identity": 400, "RandK": 40, "TopK": 40, "Natural": 37, "Sign": 4}
    more = extra.get(type(compressor).__name__, 16 if nbytes == 66 else 4)
    assert compressor.compress(vector(100, dtype=torch.float64), generator()).nbytes == nbytes + more


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compressor", ALL, ids=named)
def test_edges(compressor, dtype):
    for x in (torch.zeros(5), torch.tensor([-3.0]), 1e37 * vector(9).clamp(-2, 2), 1e-30 * vector(9), vector(17)):
        x = x.to(dtype)
        before = x.clone()
        found = compressor.compress(x, generator()).decoded()
        assert (found.shape, found.dtype) == (x.shape, dtype)
        assert bool(found.isfinite().all())
        assert torch.equal(x, before)
        assert torch.equal(found, compressor.compress(x, generator()).decoded())
        if not x.any():
            assert not found.any()
    assert isinstance(compressor, Natural) or float(compressor.compress(x[:1], generator()).decoded()) == float(x[0])


def test_sizes_of_every_order_of_magnitude():
    tiny = torch.tensor([1e-45, 3e-39, 0.0, 1e-20])
    found = torch.stack([Natural().compress(tiny, generator(i)).decoded() for i in range(400)]).double()
    assert found[:, 1].unique().tolist() == [0.0, 2.0**-126]
    assert float(found[:, 1].mean()) == pytest.approx(3e-39, rel=0.25)
    assert Sign().compress(torch.full((3,), 3e38), generator()).decoded().tolist() == pytest.approx([3e38] * 3)
    assert float(QSGD(3).compress(torch.tensor([1e-300, 0.0], dtype=torch.float64), generator()).decoded()[0]) == 1e-300


@pytest.mark.parametrize("compressor", [RandK(0.5), QSGD(3), Natural()], ids=named)
def test_what_leaves_the_range_is_refused(compressor):
    with pytest.raises(ValueError, match=r"range|not finite"):
        compressor.compress(torch.full((100,), 3e38), generator())


def replaced(name, change):
    return lambda parts: {**parts, name: change(parts[name].clone())}


def with_entry(place, value):
    def change(part):
        part[place] = value
        return part

    return change


LIES = [
    *((each, lambda parts: {name: part[:-1] for name, part in parts.items()}) for each in ALL),
    *((each, lambda parts: {}) for each in ALL),
    *((each, lambda parts: {**parts, "more": torch.zeros(1)}) for each in ALL),
    *((each, lambda parts: {name: part[None] for name, part in parts.items()}) for each in ALL),
    (Identity(), replaced("values", with_entry(0, math.nan))),
    (Identity(), replaced("values", torch.Tensor.double)),
    (RandK(0.3), replaced("values", with_entry(1, math.inf))),
    (RandK(0.3), replaced("seed", torch.Tensor.int)),
    (TopK(0.3), replaced("values", with_entry(1, math.inf))),
    (TopK(0.3), replaced("places", with_entry(0, -1))),
    (TopK(0.3), replaced("places", with_entry(-1, 10))),
    (TopK(0.3), replaced("places", lambda part: part[[0, 0, 2]])),
    (TopK(0.3), replaced("places", lambda part: part.flip(0))),
    (QSGD(2), replaced("levels", with_entry(0, 255))),
    (QSGD(2), replaced("levels", with_entry(-1, 1))),
    (QSGD(2), replaced("norms", with_entry(0, math.nan))),
    (QSGD(2), replaced("norms", with_entry(0, -1.0))),
    (Natural(), replaced("codes", with_entry(slice(0, 2), 255))),
    (Natural(), replaced("codes", with_entry(-1, 1))),
    (Sign(), replaced("signs", with_entry(-1, 1))),
    (Sign(), replaced("size", with_entry(0, math.inf))),
    (Sign(), replaced("size", with_entry(0, -1.0))),
]


@pytest.mark.parametrize(
    ("compressor", "lie"), LIES, ids=lambda value: named(value) if hasattr(value, "decode") else ""
)
def test_lies_are_refused(compressor, lie):
    parts = compressor.encode(vector(10), generator())
    compressor.decode(parts, 10, torch.float32)
    with pytest.raises(ValueError, match=r"part|place|level|norm|bits|exponent|size"):
        compressor.decode(lie(parts), 10, torch.float32)


@pytest.mark.parametrize("compressor", ALL, ids=named)
def test_what_is_no_vector_is_refused(compressor):
    for x in (torch.tensor([1.0, math.nan]), torch.tensor([math.inf]), torch.zeros(0), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="vector"):
            compressor.compress(x, generator())


@pytest.mark.parametrize("bits", [1, 3, 9, 16])
def test_packing_of_several_lots(bits):
    codes = torch.randint(2**bits, (300_001,), generator=generator())
    assert torch.equal(unpacked(packed(codes, bits), 300_001, bits), codes)


def test_options_out_of_range():
    for wrong in (lambda: RandK(0.0), lambda: TopK(1.1), lambda: QSGD(0), lambda: QSGD(32768), lambda: QSGD(1, 0)):
        with pytest.raises(ConfigurationError):
            wrong()


def test_feedback_over_the_wire():
    xs, e, total, draws = [vector(12, seed) for seed in range(30)], torch.zeros(12), torch.zeros(12), generator()
    for x in xs:
        message, e = error_feedback(x, e, lambda v: Sign().compress(v, draws))
        total += message.decoded()
        assert message.nbytes == 6
    assert torch.allclose(total + e, torch.stack(xs).sum(0), atol=1e-5)
    g = torch.zeros(12)
    for _ in range(12):
        message, g = ef21(xs[0], g, lambda v: TopK(0.1).compress(v, draws))
    assert torch.allclose(g, xs[0])
    assert message.nbytes == 8
