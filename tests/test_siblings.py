"""Linear layers that read the same input, as one product."""

import copy

import torch
from conftest import tiny_model
from torch import nn

from distill.models.siblings import Sibling, join_siblings


def joined(model):
    model = copy.deepcopy(model).requires_grad_(False)
    join_siblings(model, list(model.parameters()))
    return model


def test_a_model_says_the_same_with_fewer_products(family, monkeypatch):
    model = tiny_model(family)
    ours, ids = joined(model), torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, model(ids).logits)
    replaced = [module for module in ours.modules() if isinstance(module, Sibling)]
    assert len(replaced) == (0 if family == "gpt_neox" else 5 * model.config.num_hidden_layers)
    products = []
    monkeypatch.setattr(nn.functional, "linear", lambda inputs, weight, bias: products.append(1) or inputs @ weight.T)
    for layer in ours.base_model.layers if replaced else ():
        inputs = torch.randn(1, 3, 32)
        layer.self_attn.q_proj(inputs), layer.self_attn.k_proj(inputs), layer.self_attn.v_proj(inputs)
        assert layer.self_attn.v_proj._together.product is None, "a product that nobody needs any more is kept"
    assert len(products) == (model.config.num_hidden_layers if replaced else 0)


def test_other_inputs_and_another_order_are_computed_for_themselves():
    model = tiny_model("llama")
    ours, theirs = (m.base_model.layers[0].self_attn for m in (joined(model), model))
    first, second = torch.randn(2, 1, 3, 32)
    for inputs, name in (
        (first, "v_proj"),
        (first, "q_proj"),
        (second, "k_proj"),
        (first, "k_proj"),
        (second, "q_proj"),
    ):
        torch.testing.assert_close(getattr(ours, name)(inputs), getattr(theirs, name)(inputs))


def test_weights_are_written_where_the_product_reads_them():
    model = joined(tiny_model("llama"))
    mlp, inputs = model.base_model.layers[0].mlp, torch.randn(2, 32)
    with torch.no_grad():
        mlp.up_proj.weight.copy_(torch.ones_like(mlp.up_proj.weight))
    mlp.gate_proj(inputs)
    torch.testing.assert_close(mlp.up_proj(inputs), inputs.sum(-1, keepdim=True).expand(-1, 64))


def test_weights_of_others_stay_where_they_are():
    model = tiny_model("llama").requires_grad_(False)
    join_siblings(model, [])
    assert not any(isinstance(module, Sibling) for module in model.modules())
