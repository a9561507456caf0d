# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""GGEUR: covariances pooled exactly, samples filled up, and federated averaging around them."""

from __future__ import annotations

import pytest
import torch
from federated_games import client_of, game_rounds, states_of

from lightrail.errors import CompositionError, ConfigurationError
from lightrail_federated.ggeur import GGEUR, augmented, class_statistics, covering, factor, pooled

OPTIONS = ["federated.clients=3", "data.clients=3", "optimizer=sgd", "optimizer.lr=0.5"]


def separated(folder, method, count, *overrides):
    return game_rounds(folder, method, count, *OPTIONS, *overrides, task="Separation", data="ClientClusters")


def ggeur(folder, count, *overrides):
    return separated(folder, "lightrail_federated.ggeur.GGEUR", count, "federated.classes=4", *overrides)


def generator():
    return torch.Generator().manual_seed(0)


def test_the_pooled_covariance_is_that_of_the_joined_samples():
    x = torch.randn(60, 5, generator=generator(), dtype=torch.float64) + torch.arange(60)[:, None] / 20
    y = torch.randint(3, (60,), generator=generator())
    parts = zip(x.split([5, 15, 40]), y.split([5, 15, 40]), strict=True)
    sent = [class_statistics(own, labels, 3) for own, labels in parts]
    n, m, S = (torch.stack(each) for each in zip(*sent, strict=True))
    for c in range(3):
        mean, covariance = pooled(n[:, c], m[:, c], S[:, c])
        assert torch.allclose(mean, x[y == c].mean(0), rtol=0, atol=1e-14)
        assert torch.allclose(covariance, x[y == c].T.cov(correction=0), rtol=0, atol=1e-14)


def test_what_clients_send_is_pooled_as_it_is():
    method = GGEUR(classes=3, cover=1.0)
    x = torch.randn(30, 4, generator=generator(), dtype=torch.float64)
    y = torch.arange(30) % 2  # of the third class there is none
    answers = [method.statistics(x[a:b], y[a:b]) for a, b in ((0, 7), (7, 30))]
    found = method.averaged(answers, [7, 23])["covariances"]
    rows, columns = torch.triu_indices(4, 4)
    for c in (0, 1):
        expected = x[y == c].T.cov(correction=0)[rows, columns].float()
        assert torch.allclose(found[c], expected, rtol=0, atol=1e-6)
    assert not found[2].any()
    assert answers[0]["class_covariances"].shape == (3, 10)


def test_the_fewest_clients_that_cover_a_class():
    n = torch.tensor([10.0, 50.0, 30.0, 10.0, 0.0], dtype=torch.float64)
    assert covering(n, 0.8).tolist() == [1, 2]
    assert covering(n, 0.81).tolist() == [1, 2, 0]
    assert covering(n, 1.0).tolist() == [1, 2, 0, 3]


def test_classes_are_filled_up_with_samples_of_the_covariance():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(augmented(x, torch.eye(2), 2, generator()), x)
    assert torch.equal(augmented(x, torch.zeros(2, 2), 5, generator()), x[[0, 1, 0, 1, 0]])
    S = torch.tensor([[2.0, 2.0], [2.0, 2.0]], dtype=torch.float64)  # singular
    assert torch.allclose(factor(S) @ factor(S).T, S, atol=1e-12)
    made = augmented(torch.zeros(1, 2), factor(S).float(), 20_001, generator())[1:]
    assert torch.allclose(made.T.cov().double(), S, atol=0.08)


def test_where_nothing_is_missing_it_is_federated_averaging_after_the_first_round(tmp_path):
    own = ggeur(tmp_path, 3, "federated.samples_per_class=1", "federated.cover=1.0")
    plain = separated(tmp_path, "lightrail_federated.fedavg.FedAvg", 2)
    assert torch.allclose(own.model.weights(), plain.model.weights(), rtol=0, atol=1e-14)
    # The statistics cross once: up 4 · (1 · 8 + 4 · 4 + 10 · 4) bytes, and the 10 · 4 · 4 of the covariances down.
    up, down = ([each["received"]["0"] for each in own.record.rounds], [each["sent"] for each in own.record.rounds])
    assert up == [256, 128, 128]
    assert down == [3 * 128, 3 * (128 + 160), 3 * 128]


def test_clients_train_on_as_many_samples_of_each_of_their_classes(tmp_path):
    rounds = ggeur(tmp_path, 2, "federated.samples_per_class=20")
    assert set(rounds.state) == {"weights"}
    client = client_of(rounds, 1, 2)
    state = states_of(rounds)[1]
    x, y = (torch.cat(each) for each in zip(*rounds.method.loader(client, state), strict=True))
    assert y.bincount().tolist() == [20, 20, 20, 20]
    assert (x.shape, x.dtype) == ((80, 4), torch.float64)
    again = torch.cat([each for each, _ in rounds.method.loader(client, state)])
    assert torch.equal(again.sort(0).values, x.sort(0).values)  # the same samples in every round
    own, labels, _ = rounds.method.samples_of(client)
    assert all((x[y == c] == each).all(1).any() for each, c in zip(own, labels, strict=True))


def test_refused_options_and_data(tmp_path):
    for wrong in ({"classes": 1}, {"samples_per_class": 0}, {"cover": 0.0}):
        with pytest.raises(ConfigurationError):
            GGEUR(**wrong)
    with pytest.raises(CompositionError, match="inputs and labels"):
        ggeur(tmp_path, 1, "federated.classes=3")
