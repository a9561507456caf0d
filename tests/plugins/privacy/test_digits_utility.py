"""What privacy costs in accuracy: softmax regression on the digits, in 200 steps over a tenth of them."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from lightrail.privacy.accounting import calibrated
from lightrail.privacy.events import Event
from lightrail.testing.privacy_runs import private_run
from lightrail_privacy.dp_sgd import DPSGD

RECORDS, BATCH, STEPS, DELTA = 1437, 144, 200, 1e-5

# epsilon, noise multiplier at the rate 0.1, clip, clipping norm, learning rate, test accuracy over five seeds
TABLE = [
    ("inf", 0.0, "flat", 1e9, 1.0, 0.951),
    ("8", 1.1297, "flat", 1.0, 2.0, 0.946),
    ("3", 2.1781, "flat", 1.0, 2.0, 0.931),
    ("1", 5.4281, "flat", 1.0, 1.0, 0.888),
    ("8", 1.1297, "automatic", 1.0, 2.0, 0.932),
    ("3", 2.1781, "automatic", 1.0, 2.0, 0.927),
    ("1", 5.4281, "automatic", 1.0, 2.0, 0.884),
]


@functools.cache
def digits():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=360, stratify=y, random_state=0)
    train_x, test_x, train_y, test_y = (torch.from_numpy(each) for each in parts)
    return (train_x.float(), train_y.long()), (test_x.float(), test_y.long())


def accuracy(seed, noise, clip, clip_norm, lr):
    """Of one run under the engine, whose noise can be repeated so that this can."""
    train, test = digits()
    network = nn.Linear(64, 10)
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    method = DPSGD(clip=clip, clip_norm=clip_norm, noise=noise, delta=DELTA, deterministic_noise=True)
    end = private_run(method, train, batch_size=BATCH, epochs=20, lr=lr, network=network, seed=seed)
    assert sum(event.steps for event in end.ledger.events) == STEPS
    return end.accuracy(test)


@pytest.mark.parametrize(("epsilon", "noise", "clip", "clip_norm", "lr", "expected"), TABLE)
def test_accuracy_on_the_digits(epsilon, noise, clip, clip_norm, lr, expected):
    assert accuracy(0, noise, clip, clip_norm, lr) == pytest.approx(expected, abs=0.02)


def test_the_noise_of_the_table_is_what_is_calibrated():
    found = calibrated(lambda z: [Event(z, STEPS, BATCH, RECORDS)], 3.0, DELTA)
    assert found == pytest.approx(2.1781, rel=5e-3)
