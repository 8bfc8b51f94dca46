"""Packed attention with shared keys against a masked softmax over all packed tokens, in float64."""

import pytest
import torch

from distill_kernels import PrefixLayout, Shared, prefix_attention, reference

SCALE = 0.3


def layout(device="cpu"):
    """Prompts of 7 and 3 tokens that are shared, one lone row of 5, and completions of (4, 4, 1) and (6, 2)."""
    shared = [Shared(0, 7, 15, 9), Shared(7, 3, 24, 8)]
    return PrefixLayout([7, 3, 5, 4, 4, 1, 6, 2], shared, lambda index: index.to(device))


def random_layout(seed):
    """Up to three shared prompts of up to 20 tokens, with two to five completions of up to 20 each."""
    draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=generator))  # noqa: E731
    generator = torch.Generator().manual_seed(seed)
    prompts = [draw(1, 20) for _ in range(draw(1, 3))]
    segments, shared = [*prompts, draw(1, 20)], []
    for index, length in enumerate(prompts):
        completions = sorted((draw(1, 20) for _ in range(draw(2, 5))), reverse=True)
        shared.append(Shared(sum(prompts[:index]), length, sum(segments), sum(completions)))
        segments += completions
    return PrefixLayout(segments, shared, lambda index: index)


def errors(function, inputs, upstream, layout, exact, **options):
    """Largest error of the output and of each gradient."""
    inputs = [each.detach().requires_grad_() for each in inputs]
    out = attend(function, inputs, layout, **options)
    found = [out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]
    return [(a.double() - b).abs().max().item() for a, b in zip(found, exact, strict=True)]


def attend(function, inputs, layout, **options):
    """Of query, key and value, and of the sinks if there are any."""
    return function(*inputs[:3], layout, SCALE, sinks=inputs[3] if len(inputs) > 3 else None, **options)


def inputs_and_exact(heads, groups, head_size, value_size, place, *, sinks=False, dtype=torch.float64, **options):
    """Inputs in `dtype`; the oracle sees them rounded, else their rounding is counted as an error of the attention."""
    torch.manual_seed(0)
    L, device = sum(place.segments), place.to_device(torch.empty(0)).device
    shapes = [(L, heads, head_size), (L, heads // groups, head_size), (L, heads // groups, value_size)]
    # Scores come to about 1, so that soft caps and sinks of that size are not without effect.
    inputs = [torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes + [(heads,)] * sinks]
    inputs = [each.to(dtype) for each in inputs]
    upstream = torch.randn(L, heads, value_size, dtype=torch.float64, device=device)
    wide = [each.double().requires_grad_() for each in inputs]
    out = attend(reference.prefix_attention, wide, place, **options)
    return inputs, upstream, [out, *torch.autograd.grad(out, wide, upstream)]


@pytest.mark.parametrize(("groups", "value_size"), [(1, 8), (2, 8), (1, 6), (4, 6), (2, 12)])
def test_float64_equals_a_masked_softmax(groups, value_size):
    place = layout()
    inputs, upstream, exact = inputs_and_exact(4, groups, 8, value_size, place)
    assert max(errors(prefix_attention, inputs, upstream, place, exact)) < 1e-12


OPTIONS = [
    *({"window": window} for window in (1, 2, 3, 5, 8, 12, 13, 100)),
    {"softcap": 0.8},
    {"sinks": True},
    {"window": 4, "softcap": 0.8},
    {"window": 6, "sinks": True},
    {"softcap": 0.8, "sinks": True},
    {"window": 5, "softcap": 0.8, "sinks": True},
]


@pytest.mark.parametrize(("groups", "value_size"), [(1, 8), (2, 6)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_windows_soft_caps_and_sinks_equal_a_masked_softmax(options, groups, value_size):
    """Prompts and completions shorter and longer than the window, and of lengths that share buckets or do not."""
    plain = {name: value for name, value in options.items() if name != "sinks"}
    for place in (layout(), random_layout(1), random_layout(2)):
        inputs, upstream, exact = inputs_and_exact(4, groups, 8, value_size, place, **options)
        assert max(errors(prefix_attention, inputs, upstream, place, exact, **plain)) < 1e-12


@pytest.mark.parametrize("window", [3, 40, 600, 1100])
def test_a_window_over_rows_of_several_blocks(window):
    """The flash call for CPUs goes by blocks of some hundred keys; a query may see none of the first ones."""
    place = PrefixLayout([600, 700, 300], [Shared(0, 600, 600, 1000)], lambda index: index)
    inputs, upstream, exact = inputs_and_exact(2, 2, 4, 4, place, window=window)
    assert max(errors(prefix_attention, inputs, upstream, place, exact, window=window)) < 1e-12


def test_of_sinks_that_nobody_trains_no_gradient_is_asked():
    place = layout()
    inputs, upstream, exact = inputs_and_exact(4, 2, 8, 8, place, sinks=True)
    inputs = [each.requires_grad_(i < 3) for i, each in enumerate(inputs)]
    out = attend(prefix_attention, inputs, place)
    for found, right in zip(torch.autograd.grad(out, inputs[:3], upstream), exact[1:], strict=False):
        torch.testing.assert_close(found, right)


def test_what_a_window_lets_be_seen_is_planned_once():
    place, planned = layout(), []
    place.to_device = lambda index: planned.append(index.shape) or index
    assert place.prefixes(4) is place.prefixes(4)
    (first, second), sizes = place.prefixes(4), list(planned)
    # Of each completion the first three tokens, and of the first prompt the last three.
    assert first.keys == slice(4, 7)
    assert first.queries.tolist() == [15, 16, 17, 19, 20, 21, 23]
    assert first.seen.sum(1).tolist() == [3, 2, 1, 3, 2, 1, 3]
    assert (second.keys, second.queries.tolist()) == (slice(7, 10), [24, 25, 26, 30, 31])
    assert sizes == [(7,), (7, 3), (5,), (5, 3)]
    assert place.prefixes(1) == []
    assert place.prefixes(11)[0].seen is None, "a window as long as the longest row of a prompt hides nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value_size", [8, 6])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 0.8}, {"window": 5, "sinks": True}], ids=str)
def test_lower_precision_is_no_worse_than_a_masked_softmax(dtype, value_size, options):
    place, plain = layout(), {name: value for name, value in options.items() if name != "sinks"}
    inputs, upstream, exact = inputs_and_exact(4, 2, 8, value_size, place, dtype=dtype, **options)
    ours = errors(prefix_attention, inputs, upstream, place, exact, **plain)
    usual = errors(reference.prefix_attention, inputs, upstream, place, exact, **plain)
    for found, other in zip(ours, usual, strict=True):
        assert found <= other + 4 * torch.finfo(dtype).eps


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"window": 5, "softcap": 0.8}], ids=str)
def test_the_gpu_kernels_are_no_worse_than_a_masked_softmax(dtype, groups, options):
    place, plain = layout("cuda"), {name: value for name, value in options.items() if name != "sinks"}
    inputs, upstream, exact = inputs_and_exact(4, groups, 64, 64, place, dtype=dtype, **options)
    ours = errors(prefix_attention, inputs, upstream, place, exact, **plain)
    usual = errors(reference.prefix_attention, inputs, upstream, place, exact, **plain)
    for found, other, result in zip(ours, usual, exact, strict=True):
        # float32 has no flash kernel here. The backward then starts from a rounded log-sum-exp and output, as a flash
        # backward does, and a softmax's does not: units in the last place of the largest result, not of 1.
        units = 4 if dtype == torch.bfloat16 else 16 * result.abs().max().item()
        assert found <= other + units * torch.finfo(dtype).eps
