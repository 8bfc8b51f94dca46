"""Linear layers that read the same input, as one product."""

import copy

import torch
from conftest import tiny_model
from torch import nn

from distill.models.siblings import Sibling, join_siblings
from distill.rollout.generation_copy import GenerationCopy


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


def test_layers_are_found_by_what_they_read_whatever_they_are_called():
    """With biases as without; a layer that is called twice, or reads another tensor of the same values, stays apart."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 4), nn.Linear(8, 6)
            self.bare, self.other = nn.Linear(8, 3, bias=False), nn.Linear(8, 3, bias=False)
            self.copied, self.twice = nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x):
            made = [self.first(x), self.bare(x), self.second(x), self.other(x), self.copied(x.clone())]
            return torch.cat([*made, self.twice(x), self.twice(x)], -1)

    model = tiny_model("llama").requires_grad_(False)
    block, inputs = Block().requires_grad_(False), torch.randn(5, 8)
    expected = block(inputs)
    body = model.base_model
    body.forward = lambda input_ids, use_cache: block(inputs)
    body.block = block
    join_siblings(model, list(block.parameters()))
    joined = [name for name, child in block.named_children() if isinstance(child, Sibling)]
    assert joined == ["first", "second", "bare", "other"]
    torch.testing.assert_close(block(inputs), expected)
    assert block.first._together is block.second._together is not block.bare._together
    block.second.bias.fill_(3.0)
    block.second.weight.zero_()
    assert (block(inputs)[:, 7:13] == 3).all(), "weights and biases are written where the product reads them"


def test_a_model_that_does_not_run_keeps_its_layers():
    model = tiny_model("llama").requires_grad_(False)
    model.base_model.forward = lambda **_: 1 / 0
    join_siblings(model, list(model.parameters()))
    assert not any(isinstance(module, Sibling) for module in model.modules())


def test_on_a_cpu_packed_weights_are_joined_and_follow_the_student(family):
    model, ids = tiny_model(family), torch.arange(3, 12)[None]
    kept = {"eos_token_ids": [], "pad_token_id": 0}
    made = GenerationCopy(model, torch.float32, pack=True, **kept)
    joined = sum(isinstance(module, Sibling) for module in made.model.modules())
    assert joined == (0 if family == "gpt_neox" else 5 * model.config.num_hidden_layers)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(made.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
            for parameter in model.parameters():
                parameter.mul_(1.05)
        made.refresh()
