# pyright: reportArgumentType=false
"""MASHA: extragradient without compression, the equilibrium with it, and bytes as promised."""

from __future__ import annotations

import pytest
import torch
from federated_games import client_fields, game_rounds

from lightrail.errors import ConfigurationError, UserError
from lightrail.federated.feedback import error_feedback
from lightrail.testing.federated_runs import ClientGames
from lightrail_federated.compressors.rand_k import RandK
from lightrail_federated.compressors.top_k import TopK
from lightrail_federated.local_eg import extragradient
from lightrail_federated.masha import kept_share, looked_ahead
from lightrail_federated.masha1 import MASHA1

M, m = client_fields()
ONE, TWO = "lightrail_federated.masha1.MASHA1", "lightrail_federated.masha2.MASHA2"
GAMMA = 0.3 / 1.42


def fields(z):
    return torch.einsum("kij,j->ki", M, z) + m


def joined(z):
    return M.mean(0) @ z + m.mean(0)


@pytest.mark.parametrize("full", ["true", "false"])
def test_without_a_compressor_both_are_the_extragradient_method_in_two_rounds_a_step(tmp_path, full):
    rounds = [
        game_rounds(tmp_path, method, 6, f"federated.lr={GAMMA}", f"federated.full_gradients={full}")
        for method in (ONE, TWO)
    ]
    z = torch.zeros(20, dtype=torch.float64)
    for _ in range(3):
        z = extragradient(z, joined, joined, GAMMA, GAMMA)
    for each in rounds:
        assert torch.allclose(each.state["weights"], z, rtol=0, atol=4e-16)
        assert torch.equal(each.model.weights(), each.state["weights"])


def masha(compressor, is_second, steps):
    """The methods as the paper writes them, without rounds and messages."""
    generator = torch.Generator().manual_seed(0)
    tau = 1 - kept_share(compressor, 20)
    z = w = torch.zeros(20, dtype=torch.float64)
    own, e, e_server = fields(w), torch.zeros(10, 20, dtype=torch.float64), torch.zeros_like(z)

    def sent_as(v):
        return compressor.compress(v, generator).decoded()

    for _ in range(steps):
        half = looked_ahead(z, w, own.mean(0), tau, GAMMA)
        differences = GAMMA * (fields(half) - own)
        if is_second:
            pairs = [error_feedback(x, before, sent_as) for x, before in zip(differences, e, strict=True)]
            arrived, e = (torch.stack(each) for each in zip(*pairs, strict=True))
            step, e_server = error_feedback(arrived.mean(0), e_server, sent_as)
        else:
            step = sent_as(torch.stack([sent_as(x) for x in differences]).mean(0))
        z = half - step
        if float(torch.rand(1, generator=generator)) < 1 - tau:
            w, own = z, fields(z)
    return z


@pytest.mark.parametrize(("compressor", "is_second"), [(RandK(0.5), False), (TopK(0.5), True)])
def test_with_compression_both_go_to_the_equilibrium(compressor, is_second):
    away = masha(compressor, is_second, 400) - ClientGames().equilibrium
    assert float(away.norm() / ClientGames().equilibrium.norm()) < 1e-6


@pytest.mark.parametrize(("method", "compressor"), [(ONE, "rand_k"), (TWO, "top_k")])
def test_rounds_with_a_compressor_follow_the_iterate_and_send_as_much_as_promised(tmp_path, method, compressor):
    options = [f"federated.lr={GAMMA}", f"federated.compressor={compressor}", "federated.compressor.ratio=0.5"]
    rounds = game_rounds(tmp_path, method, 60, *options)
    assert float((rounds.state["weights"] - ClientGames().equilibrium).norm()) < 0.5 * float(
        ClientGames().equilibrium.norm()
    )
    received = {each["received"]["0"] for each in rounds.record.rounds}
    # 20 numbers of 8 bytes in full; else 10 of them, and a seed or ten places of 4 bytes.
    assert received == {160, 88 if compressor == "rand_k" else 120}
    # Down: the same, and whether there is a new reference point.
    assert {each["sent"] for each in rounds.record.rounds} == {10 * (size + 8) for size in received}
    # The clients' copies of the iterate are the server's.
    assert not rounds.record.rounds[-1]["left_out"]


def test_a_round_of_error_feedback_is_that_of_the_paper(tmp_path):
    options = [f"federated.lr={GAMMA}", "federated.compressor=top_k", "federated.compressor.ratio=0.5"]
    rounds = game_rounds(tmp_path, TWO, 2, *options)
    own, compressor = fields(torch.zeros(20, dtype=torch.float64)), TopK(0.5)
    half = -GAMMA * own.mean(0)
    sent = torch.stack([compressor.compress(x, None).decoded() for x in GAMMA * (fields(half) - own)])
    step, e = error_feedback(sent.mean(0), torch.zeros(20, dtype=torch.float64), lambda v: compressor.compress(v, None))
    assert torch.allclose(rounds.state["weights"], half - step.decoded(), rtol=0, atol=4e-16)
    assert torch.allclose(rounds.state["error"], e, rtol=0, atol=4e-16)


def test_what_a_compressor_keeps_is_the_probability_of_a_new_reference_point():
    assert kept_share(None, 20) == 1
    assert kept_share(RandK(0.25), 20) == pytest.approx(0.25)
    assert kept_share(TopK(0.1), 20) == pytest.approx(0.1)
    assert MASHA1(tau=0.9).share(20) == pytest.approx(0.1)


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"tau": 1.0}, {"fraction": 0.5}, {"sampling": "poisson"}])
def test_refused_options(wrong):
    with pytest.raises(ConfigurationError):
        MASHA1(**wrong)


def test_compressors_that_theory_does_not_allow_are_refused(tmp_path):
    for method, compressor in ((ONE, "top_k"), (TWO, "rand_k")):
        with pytest.raises(UserError, match="does not allow"):
            game_rounds(tmp_path, method, 0, f"federated.compressor={compressor}")
