"""Packed attention with shared keys against a masked softmax over all packed tokens, in float64."""

import pytest
import torch

from distill_kernels import PrefixLayout, Shared, prefix_attention


def layout(device="cpu"):
    """Prompts of 7 and 3 tokens that are shared, one lone row of 5, and completions of (4, 4, 1) and (6, 2)."""
    shared = [Shared(0, 7, 15, 9), Shared(7, 3, 24, 8)]
    return PrefixLayout([7, 3, 5, 4, 4, 1, 6, 2], shared, lambda index: index.to(device))


def visible(layout):
    """Which of the packed tokens each one sees, bool [L, L]."""
    L = sum(layout.segments)
    mask, at = torch.zeros(L, L, dtype=torch.bool), 0
    for length in layout.segments:
        mask[at : at + length, at : at + length] = torch.ones(length, length).tril().bool()
        at += length
    for key, keys, query, queries in layout.shared:
        mask[query : query + queries, key : key + keys] = True
    return mask


def masked_attention(query, key, value, layout, scale):
    g = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(g, 1), value.repeat_interleave(g, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    weight = scores.masked_fill(~visible(layout).to(scores.device), -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weight, value)


def errors(function, inputs, upstream, layout, exact):
    """Largest error of the output and of each gradient."""
    inputs = [each.detach().requires_grad_() for each in inputs]
    out = function(*inputs, layout, 0.3)
    found = [out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]
    return [(a.double() - b).abs().max().item() for a, b in zip(found, exact, strict=True)]


def inputs_and_exact(heads, groups, head_size, value_size, place):
    torch.manual_seed(0)
    L, device = sum(place.segments), place.to_device(torch.empty(0)).device
    shapes = [(L, heads, head_size), (L, heads // groups, head_size), (L, heads // groups, value_size)]
    inputs = [torch.randn(shape, dtype=torch.float64, device=device).requires_grad_() for shape in shapes]
    upstream = torch.randn(L, heads, value_size, dtype=torch.float64, device=device)
    out = masked_attention(*inputs, place, 0.3)
    return inputs, upstream, [out, *torch.autograd.grad(out, inputs, upstream)]


@pytest.mark.parametrize(("groups", "value_size"), [(1, 8), (2, 8), (1, 6), (4, 6)])
def test_float64_equals_a_masked_softmax(groups, value_size):
    place = layout()
    inputs, upstream, exact = inputs_and_exact(4, groups, 8, value_size, place)
    assert max(errors(prefix_attention, inputs, upstream, place, exact)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value_size", [8, 6])
def test_lower_precision_is_no_worse_than_a_masked_softmax(dtype, value_size):
    place = layout()
    inputs, upstream, exact = inputs_and_exact(4, 2, 8, value_size, place)
    inputs = [each.to(dtype) for each in inputs]
    # The oracle has to see the rounded inputs, else their rounding is counted as an error of the attention.
    wide = [each.double().detach().requires_grad_() for each in inputs]
    out = masked_attention(*wide, place, 0.3)
    exact = [out, *torch.autograd.grad(out, wide, upstream)]
    ours = errors(prefix_attention, inputs, upstream, place, exact)
    plain = errors(masked_attention, inputs, upstream, place, exact)
    for found, usual in zip(ours, plain, strict=True):
        assert found <= usual + 4 * torch.finfo(dtype).eps


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_gpu_kernels_are_no_worse_than_a_masked_softmax(dtype, groups):
    place = layout("cuda")
    inputs, upstream, _ = inputs_and_exact(4, groups, 64, 64, place)
    inputs = [each.to(dtype) for each in inputs]
    wide = [each.double().detach().requires_grad_() for each in inputs]
    out = masked_attention(*wide, place, 0.3)
    exact = [out, *torch.autograd.grad(out, wide, upstream)]
    ours = errors(prefix_attention, inputs, upstream, place, exact)
    plain = errors(masked_attention, inputs, upstream, place, exact)
    for found, usual, result in zip(ours, plain, exact, strict=True):
        # float32 has no flash kernel here. The backward then starts from a rounded log-sum-exp and output, as a flash
        # backward does, and a softmax's does not: units in the last place of the largest result, not of 1.
        units = 4 if dtype == torch.bfloat16 else 16 * result.abs().max().item()
        assert found <= usual + units * torch.finfo(dtype).eps
