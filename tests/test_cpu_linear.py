"""Float32 linear layers on oneDNN: the same results, gradients included, and only where they are asked for."""

import pytest
import torch
from conftest import tiny_model
from torch import nn

from distill.forward import completion_hidden
from distill.forward.cpu_linear import OneDnnLinears
from distill_kernels import cpu_product


@pytest.fixture
def products(monkeypatch):
    """Counts the products that oneDNN is given."""
    counted = []
    real = cpu_product.product
    monkeypatch.setattr(cpu_product, "product", lambda *args: counted.append(1) or real(*args))
    return counted


def test_a_result_may_be_changed_in_place():
    """As some models do; the gradient is that of the changed result."""
    inputs, weight = torch.randn(2, 3, 12, requires_grad=True), torch.randn(9, 12, requires_grad=True)
    with OneDnnLinears():
        output = nn.functional.linear(inputs, weight)
    output += 1
    output.square().sum().backward()
    expected = torch.autograd.grad((nn.functional.linear(inputs, weight) + 1).square().sum(), (inputs, weight))
    torch.testing.assert_close((inputs.grad, weight.grad), expected)


@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 12), (1, 5, 12)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("inputs",), ("bias",)])
def test_results_and_gradients_are_those_of_float64(shape, bias, frozen, products):
    torch.manual_seed(0)
    inputs, weight, offset = torch.randn(shape), torch.randn(9, 12), torch.randn(9) if bias else None
    upstream = torch.randn(*shape[:-1], 9)

    def run(dtype, context):
        tensors = {"inputs": inputs, "weight": weight, "bias": offset}
        leaves = {
            name: tensor.to(dtype).detach().requires_grad_(name not in frozen)
            for name, tensor in tensors.items()
            if tensor is not None
        }
        with context:
            output = nn.functional.linear(leaves["inputs"], leaves["weight"], leaves.get("bias"))
        output.backward(upstream.to(dtype))
        return [output.detach(), *(leaf.grad for leaf in leaves.values())]

    expected = run(torch.float64, torch.enable_grad())
    assert not products
    for found, exact in zip(run(torch.float32, OneDnnLinears()), expected, strict=True):
        if exact is None:
            assert found is None
        else:
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert len(products) == 1 + ("inputs" not in frozen) + ("weight" not in frozen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_left_alone(dtype, products):
    layer = nn.Linear(4, 3, dtype=dtype)
    with OneDnnLinears():
        layer(torch.ones(2, 4, dtype=dtype))
        with torch.autocast("cpu", torch.bfloat16):
            nn.Linear(4, 3)(torch.ones(2, 4))
    assert not products


def test_the_training_forward_uses_it_and_nothing_lasts(products):
    model = tiny_model("llama")
    layers = sum(type(module) is nn.Linear for module in model.model.modules())
    ids = torch.arange(3, 9)[None]
    rows = (model.model, ids, torch.ones_like(ids).bool(), ids, [4], [0])
    completion_hidden(*rows).sum().backward()
    assert len(products) == 3 * layers
    model(ids)
    assert len(products) == 3 * layers
    completion_hidden(*rows, checkpointing=True).sum().backward()
    assert len(products) == 3 * layers
