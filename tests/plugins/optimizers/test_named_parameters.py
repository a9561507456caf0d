"""Which parameters are hidden matrices, and groups of named parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightrail.errors import ConfigurationError
from lightrail_optimizers.named_parameters import is_hidden_matrix, named_groups


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "head.weight",
        "classifier.weight",
        "output.weight",
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "patch_embed.weight",
        "token_embedding.weight",
        "position_embeddings.weight",
        "unembedding.weight",
    ],
)
def test_embeddings_and_outputs_are_not_hidden(name):
    assert not is_hidden_matrix(name, torch.zeros(4, 4))
    assert is_hidden_matrix(name, torch.zeros(4, 4), ())


@pytest.mark.parametrize("name", ["blocks.0.attention.output_projection.weight", "heads.0.weight", "0.weight", "w"])
def test_other_matrices_are(name):
    assert is_hidden_matrix(name, torch.zeros(4, 4))
    for shape in ((), (4,), (4, 4, 3, 3)):
        assert not is_hidden_matrix(name, torch.zeros(shape))


def test_a_pattern_may_be_a_part_or_a_full_name():
    weight = torch.zeros(2, 2)
    assert not is_hidden_matrix("blocks.2.weight", weight, ["2"])
    assert not is_hidden_matrix("blocks.2.weight", weight, ["blocks.2.*"])
    assert is_hidden_matrix("blocks.2.weight", weight, ["blocks.2"])


def test_groups_of_named_parameters():
    pairs = list(nn.Linear(2, 2).named_parameters())
    assert named_groups("A", iter(pairs)) == [{"params": pairs}]
    given = [{"params": iter(pairs[:1]), "lr": 0.5}, {"params": pairs[1:]}]
    assert named_groups("A", given) == [{"params": pairs[:1], "lr": 0.5}, {"params": pairs[1:]}]
    assert named_groups("A", []) == [{"params": []}]


def test_the_error_names_the_method():
    for bare in (nn.Linear(2, 2).parameters(), [{"params": nn.Linear(2, 2).parameters()}]):
        with pytest.raises(ConfigurationError, match="FrugalAdamW is built from named parameters") as error:
            named_groups("FrugalAdamW", bare)
        assert "Parameter" in error.value.found
        assert "named_parameters()" in error.value.remedy
