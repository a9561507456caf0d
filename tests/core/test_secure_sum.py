"""Masked sums: exact, uniform, and whole again when clients vanish; and error feedback, which loses nothing."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from lightrail.errors import ConfigurationError, PluginError
from lightrail.federated.feedback import ef21, error_feedback
from lightrail.federated.fixed_point import FixedPoint, weighted_mean, with_weight
from lightrail.federated.masks import opened, sealed, stream
from lightrail.federated.secure_sum import SecureClient, SecureServer, TooFewClients
from lightrail.federated.shamir import PRIME, joined_secret, shared_secret

FORM = FixedPoint(clip=1.0, bits=16)


def drawn(count, size=7, seed=0):
    return [*torch.randn(count, size, generator=torch.Generator().manual_seed(seed)).mul(0.6)]


class Protocol:
    """One sum, step by step, with clients that vanish in between."""

    def __init__(self, count, threshold):
        self.clients = [SecureClient(i, threshold) for i in range(count)]
        self.server = SecureServer(threshold)

    def share(self, gone=()):
        keys = self.server.gather({each.index: each.advertise() for each in self.clients})
        sent = {each.index: each.share(keys) for each in self.clients if each.index not in gone}
        self.received = self.server.route(sent)

    def mask(self, q, gone=()):
        self.masked = {i: self.clients[i].mask(q[i], self.received[i]) for i in self.received if i not in gone}
        return self.server.collect(self.masked)

    def unmask(self, survivors, gone=()):
        return self.server.unmask({i: self.clients[i].reveal(survivors) for i in survivors if i not in gone})


def test_sum_is_exact_whoever_vanishes_and_whenever():
    q = [FORM.encode(x) for x in drawn(6)]
    for before, middle, after in [((), (), ()), ((), (1, 4), ()), ((0,), (5,), (2,)), ((3,), (), (0, 1))]:
        run = Protocol(6, threshold=3)
        run.share(before)
        survivors = run.mask(q, middle)
        assert survivors == sorted({*range(6)} - {*before, *middle})
        assert torch.equal(run.unmask(survivors, after), torch.stack([q[i] for i in survivors]).sum(0).int())


def test_sum_wraps_modulo_two_to_the_32():
    q = [torch.full((2,), 2**31 - 1, dtype=torch.int32), torch.tensor([1, 5], dtype=torch.int32)]
    run = Protocol(2, threshold=2)
    run.share()
    assert run.unmask(run.mask(q)).tolist() == [-(2**31), -(2**31) + 4]


def test_a_masked_vector_is_uniform():
    run = Protocol(3, threshold=2)
    run.share()
    run.mask([torch.full((100_000,), i, dtype=torch.int32) for i in range(3)])
    for masked in run.masked.values():
        for shift in (0, 8, 24):
            counts = torch.bincount(masked.long() >> shift & 255, minlength=256).double()
            chi2 = float((counts - 100_000 / 256).square().sum() / (100_000 / 256))
            assert 140 < chi2 < 400  # of 255 degrees of freedom: five deviations below, six above
    # Nor does a pair of them tell more: only all three together lose their masks.
    for a, b in itertools.combinations(run.masked.values(), 2):
        assert len((a + b).unique()) > 99_000


def test_too_few_are_refused_by_name_at_every_step():
    q = [FORM.encode(x) for x in drawn(4)]
    with pytest.raises(TooFewClients, match="too few clients are left") as caught:
        Protocol(2, threshold=3).share()
    assert caught.value.found == "2 that advertised keys"
    run = Protocol(4, threshold=3)
    with pytest.raises(TooFewClients):
        run.share(gone=(0, 1))
    run = Protocol(4, threshold=3)
    run.share()
    with pytest.raises(TooFewClients):
        run.mask(q, gone=(0, 1))
    run = Protocol(4, threshold=3)
    run.share()
    survivors = run.mask(q)
    with pytest.raises(TooFewClients, match="too few"):
        run.unmask(survivors, gone=(0, 1))


def test_a_client_guards_its_vector():
    q = [FORM.encode(x) for x in drawn(3)]
    run = Protocol(3, threshold=2)
    run.share()
    survivors = run.mask(q)
    with pytest.raises(ValueError, match="behind one mask"):
        run.clients[0].mask(q[0], run.received[0])
    run.clients[0].reveal(survivors)
    with pytest.raises(ValueError, match="both secrets"):
        run.clients[0].reveal([0, 1])
    with pytest.raises(ValueError, match="never sent"):
        run.clients[1].reveal([0, 1, 2, 9])
    with pytest.raises(ValueError, match="not those that it advertised"):
        SecureClient(0, 2).share(dict(run.server._keys))


def test_changed_messages_and_lies_are_told():
    run = Protocol(3, threshold=2)
    run.share()
    run.received[0][1] = run.received[0][1][:-1] + bytes([run.received[0][1][-1] ^ 1])
    survivors = run.mask([FORM.encode(x) for x in drawn(3)])
    with pytest.raises(ValueError, match="1 to 0 was changed"):
        run.clients[0].reveal(survivors)
    with pytest.raises(ValueError, match="changed"):
        opened(bytes(32), sealed(bytes(32), b"x", b"0 to 1"), b"0 to 2")
    run = Protocol(4, threshold=2)
    run.share()
    survivors = run.mask([FORM.encode(x) for x in drawn(4)], gone=(3,))
    revealed = {i: run.clients[i].reveal(survivors) for i in survivors}
    revealed[0] = type(revealed[0])(revealed[0].seeds, {3: 7})
    with pytest.raises(ValueError, match=r"client 3 do not make the key|one secret"):
        run.server.unmask(revealed)
    with pytest.raises(ValueError, match="int32 of one length"):
        run.server.collect({0: torch.zeros(3), 1: torch.zeros(3)})


def told(shares):
    """What shares make, which need not be a secret."""
    try:
        return joined_secret(shares)
    except ValueError:
        return None


def test_shares_tell_a_secret_from_t_on_only():
    secret = bytes([255] * 32)
    shares = shared_secret(secret, [1, 2, 5, 9], threshold=3)
    for three in itertools.combinations(shares, 3):
        assert joined_secret({x: shares[x] for x in three}) == secret
    assert joined_secret(shares) == secret
    for two in itertools.combinations(shares, 2):
        assert told({x: shares[x] for x in two}) != secret
    # Two shares fit every secret: each third value makes another one.
    found = [told({1: shares[1], 2: shares[2], 5: third}) for third in (8, 11, PRIME // 7)]
    assert len({*found, secret}) == 4


def test_fixed_point_by_hand():
    form = FixedPoint(clip=2.0, bits=4)
    assert form.levels == 7
    q = form.encode(torch.tensor([0.0, 1.0, -9.0, 2.0, 0.15]))
    assert (q.tolist(), q.dtype) == ([0, 4, -7, 7, 1], torch.int32)  # 1 · 7 / 2 = 3.5 goes to the even 4
    assert form.decode(q)[2].item() == -2.0
    with pytest.raises(ValueError, match="not finite"):
        form.encode(torch.tensor([float("nan")]))


def summed(vectors, form, dropped=()):
    """By the whole protocol, with clients that vanish after they have shared their secrets."""
    run = Protocol(len(vectors), threshold=2)
    run.share()
    return form.decode(run.unmask(run.mask([form.encode(x) for x in vectors], gone=dropped)))


def test_sum_of_clipped_vectors_and_weighted_mean():
    vectors = drawn(5)
    wanted = torch.stack([vectors[i].clamp(-1, 1) for i in (0, 2, 4)]).sum(0)
    found = summed(vectors, FixedPoint(clip=1.0, bits=24), dropped=(1, 3))
    assert float((found - wanted).abs().max()) < 3 / (2**24 - 2) + 5e-7
    weights = [1.0, 0.25, 0.5, 0.75, 0.125]
    sums = summed([with_weight(x, w) for x, w in zip(vectors, weights, strict=True)], FixedPoint(bits=28))
    wanted = sum(w * x for x, w in zip(vectors, weights, strict=True)) / sum(weights)
    assert float((weighted_mean(sums) - wanted).abs().max()) < 1e-6
    with pytest.raises(ValueError, match="not above 0"):
        weighted_mean(torch.zeros(3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SecureClient(0, threshold=1),
        lambda: SecureClient(-1, threshold=2),
        lambda: SecureServer(threshold=1),
        lambda: FixedPoint(bits=1),
        lambda: FixedPoint(bits=32),
        lambda: FixedPoint(clip=0.0),
    ],
)
def test_options_out_of_range(make):
    with pytest.raises(ConfigurationError):
        make()


def test_without_the_library(monkeypatch):
    for name in ("cryptography.exceptions", "cryptography.hazmat.primitives"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PluginError, match="secure aggregation needs"):
        stream(bytes(32), 2)


def test_stream_is_that_of_the_standard():
    # AES-256 of a block of zeros under a key of zeros: dc95c078 a2408989 ...
    assert stream(bytes(32), 1).numpy().tobytes().hex() == "dc95c078"


def test_error_feedback_loses_nothing():
    xs, e, total = drawn(50, size=9, seed=3), torch.zeros(9), torch.zeros(9)
    for x in xs:
        message, e = error_feedback(x, e, lambda v: torch.where(v.abs() >= v.abs().max(), v, 0.0))
        total = total + message
    assert torch.allclose(total + e, torch.stack(xs).sum(0), atol=1e-5)
    assert float(e.norm()) > 1
    message, e = error_feedback(xs[0], torch.zeros(9), torch.clone)
    assert torch.equal(message, xs[0])
    assert not e.any()


def test_ef21_reaches_what_stands_still():
    x, g = drawn(1)[0], torch.zeros(7)
    assert torch.equal(ef21(x, g, torch.clone)[1], x)
    for _ in range(7):
        message, g = ef21(x, g, lambda v: torch.where(v.abs() >= v.abs().max(), v, 0.0))
        assert int((message != 0).sum()) == 1
    assert torch.allclose(g, x)
