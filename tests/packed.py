"""Packed tokens to try attention with: layouts, inputs, and what a masked softmax makes of them in float64."""

import torch

from distill_kernels import PrefixLayout, Shared, reference

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


def sharing(*lengths):
    """Prompts of so many keys and queries, (256, 8192) for one."""
    keys, queries = zip(*lengths, strict=True)
    return [Shared(sum(keys[:i]), keys[i], sum(keys) + sum(queries[:i]), queries[i]) for i in range(len(lengths))]


def check_ops(inputs, upstream, place, heads_first, window=None):
    """That the ops do what a compiler is told of them; `heads_first` lays heads out before tokens."""
    inputs = [each.detach() for each in inputs]
    if heads_first:
        inputs[:3] = [each.transpose(0, 1).contiguous().transpose(0, 1) for each in inputs[:3]]
    inputs += [None] * (4 - len(inputs))
    ops, options, tests = (
        torch.ops.distill_kernels,
        (place.handle(), SCALE, window, None),
        ("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(ops.prefix_attention.default, (*inputs, *options), test_utils=tests)
    results = ops.prefix_attention(*inputs, *options)
    backward = ops.prefix_attention_backward.default
    torch.library.opcheck(backward, (upstream, *inputs, *results, *options), test_utils=tests)
