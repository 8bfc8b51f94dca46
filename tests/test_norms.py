"""Norms of models as PyTorch's one kernel."""

import copy

import pytest
import torch
from conftest import tiny_model
from torch import nn

from distill.models.norms import RmsNorm, fuse_norms


@pytest.mark.parametrize(("family", "norms"), [("llama", 7), ("qwen3", 13), ("gemma3", 0), ("gpt_neox", 0)])
def test_a_model_says_the_same(family, norms):
    """Gemma's norm multiplies by 1 + weight, GPT-NeoX's subtracts the mean: these stay."""
    model = tiny_model(family)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight += 0.5 * torch.rand_like(weight)
    ours, ids = copy.deepcopy(model), torch.arange(3, 40)[None]
    fuse_norms(ours)
    assert sum(isinstance(module, RmsNorm) for module in ours.modules()) == norms
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_in_half_precision_it_is_no_further_from_the_truth():
    model = tiny_model("llama", dtype=torch.bfloat16)
    norm, hidden = model.base_model.norm, torch.randn(50, 32, dtype=torch.bfloat16)
    exact = nn.functional.rms_norm(hidden.double(), (32,), norm.weight.double(), norm.variance_epsilon)
    usual = (norm(hidden).double() - exact).norm()
    fuse_norms(model)
    assert isinstance(model.base_model.norm, RmsNorm)
    assert (model.base_model.norm(hidden).double() - exact).norm() <= usual
    assert model.base_model.norm.weight is norm.weight, "it is refreshed where the copy's weights are"


def test_a_mixture_of_dtypes_is_computed_in_the_wider():
    norm = RmsNorm(nn.Parameter(torch.rand(32) + 0.5), 1e-6)
    hidden = torch.randn(5, 32, dtype=torch.bfloat16)
    assert torch.equal(norm(hidden), norm(hidden.float()))
    assert norm.bfloat16()(hidden.float()).dtype == torch.float32


def test_a_norm_with_a_gate_stays():
    """It may be called with more than the hidden states."""

    class Gated(RmsNorm):
        def forward(self, hidden_states, gate=None):
            return super().forward(hidden_states) * (1 if gate is None else gate.sigmoid())

    model = nn.Sequential(Gated(nn.Parameter(torch.ones(8)), 1e-6), RmsNorm(nn.Parameter(torch.ones(8)), 1e-6))
    fuse_norms(model)
    assert [type(module) for module in model] == [Gated, RmsNorm]
