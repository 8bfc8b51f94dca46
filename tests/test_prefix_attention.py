"""Packed attention with shared keys against a masked softmax over all packed tokens, in float64."""

import sys
import weakref
from itertools import pairwise

import pytest
import torch

from distill_kernels import PrefixLayout, Shared, flash_prefix, prefix_attention, prefix_layout, reference
from distill_kernels.prefix_layout import pieces_of

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


def sharing(*lengths):
    """Prompts of so many keys and queries, (256, 8192) for one."""
    keys, queries = zip(*lengths, strict=True)
    return [Shared(sum(keys[:i]), keys[i], sum(keys) + sum(queries[:i]), queries[i]) for i in range(len(lengths))]


def test_few_prompts_are_cut_up_and_many_are_not():
    pieces = lambda heads, *lengths: pieces_of(sharing(*lengths), heads)  # noqa: E731
    assert pieces(16, (256, 8192)) == [4], "32 programs a piece"
    assert pieces(16, (256, 1600)) == [3], "of 512 queries or more"
    assert pieces(16, (256, 1000)) == [1]
    assert pieces(16, (100, 8192), (60, 300)) == [4, 1]
    assert pieces(16, (100, 8192)) == [8]
    assert pieces(16, *[(256, 8192)] * 2) == [4, 4]
    assert pieces(16, *[(256, 8192)] * 3) == [1] * 3, "two pieces of each would be two for a multiprocessor"
    assert pieces(16, *[(256, 8192)] * 8) == [1] * 8
    assert pieces(32, (2048, 8192)) == [1]
    assert pieces_of([], 16) == []
    assert PrefixLayout([5], [], lambda index: index).cut(16) is None
    assert PrefixLayout([256] + [512] * 2, sharing((256, 1024)), lambda index: index).cut(64) is None


def test_the_cut_is_planned_once_and_covers_every_query_and_key(monkeypatch):
    monkeypatch.setattr(prefix_layout, "SHORTEST_PIECE", 4)
    place, planned = layout(), []
    place.to_device = lambda index: planned.append(index.dtype) or index
    cut = place.cut(4)
    assert place.cut(4) is cut
    assert planned == [torch.int32, torch.int32, torch.int64]
    assert cut.pieces == [2, 2]
    assert cut.keys.tolist() == [*range(7)] * 2 + [*range(7, 10)] * 2
    query_ends, key_ends, longest_query, longest_key = cut.lengths
    assert (query_ends.tolist(), key_ends.tolist()) == ([0, 4, 9, 13, 17], [0, 7, 14, 17, 20])
    assert (longest_query, longest_key) == (5, 7)


def spans(query_ends, key_ends, longest_query, longest_key):
    """The queries and the keys of each sequence that a variable-length call is given."""
    found = [[slice(*ends) for ends in pairwise(each.tolist())] for each in (query_ends, key_ends)]
    lengths = [[span.stop - span.start for span in each] for each in found]
    assert [max(each) for each in lengths] == [longest_query, longest_key]
    assert min(min(each) for each in lengths) > 0
    return list(zip(*found, strict=True))


def scores_of(query, key, scale, causal):
    """[h, q, k] of [q, h, d] and [k, h / g, d], and the keys for each head."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf) if causal else scores, key


def flash_forward_here(query, key, value, *arguments, scale):
    *lengths, _, causal, _ = arguments
    out, lse = torch.full_like(query, torch.nan), query.new_full(query.shape[1::-1], torch.nan)
    for q, k in spans(*lengths):
        scores, _ = scores_of(query[q], key[k], scale, causal)
        lse[:, q] = scores.logsumexp(-1)
        values = value[k].repeat_interleave(query.shape[1] // value.shape[1], 1)
        out[q] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out, lse, None, None, None


def flash_backward_here(grad_out, query, key, value, out, lse, *arguments, scale):
    *lengths, _, causal, _, _ = arguments
    assert lse.is_contiguous()
    grads = [torch.full_like(each, torch.nan) for each in (query, key, value)]
    for q, k in spans(*lengths):
        scores, keys = scores_of(query[q], key[k], scale, causal)
        weights = (scores - lse[:, q, None]).exp()
        values = value[k].repeat_interleave(query.shape[1] // value.shape[1], 1)
        offset = (grad_out[q] * out[q]).sum(-1).t()[..., None]
        grad_scores = weights * (torch.einsum("qhd,khd->hqk", grad_out[q], values) - offset) * scale
        grads[0][q] = torch.einsum("hqk,khd->qhd", grad_scores, keys)
        grouped = (-1, query.shape[1] // key.shape[1])
        grads[1][k] = torch.einsum("hqk,qhd->khd", grad_scores, query[q]).unflatten(1, grouped).sum(2)
        grads[2][k] = torch.einsum("hqk,qhd->khd", weights, grad_out[q]).unflatten(1, grouped).sum(2)
    return tuple(grads)


@pytest.fixture
def flash_here(monkeypatch):
    """A stand-in for the flash kernels, which there are none of on a CPU."""
    monkeypatch.setattr(sys.modules["distill_kernels.prefix_attention"], "_has_flash", lambda *_: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_forward_here)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", flash_backward_here)


@pytest.mark.parametrize("shortest", [1, 2, 6, 512])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.usefixtures("flash_here")
def test_the_flash_way_and_its_cut_prompts_equal_a_masked_softmax(monkeypatch, shortest, groups, sinks):
    monkeypatch.setattr(prefix_layout, "SHORTEST_PIECE", shortest)
    for place in (layout(), random_layout(1), random_layout(2), random_layout(3)):
        inputs, upstream, exact = inputs_and_exact(4, groups, 8, 8, place, sinks=sinks)
        assert max(errors(prefix_attention, inputs, upstream, place, exact)) < 1e-12
        assert (place.cut(4) is None) == (max(s.query_length for s in place.shared) < 2 * shortest)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("heads_first", [False, True])
def test_what_a_compiler_is_told_of_the_ops_is_so(request, flash, heads_first):
    """Shapes, strides, dtypes and what is an alias of what."""
    if flash:
        request.getfixturevalue("flash_here")
    place = layout()
    inputs, upstream, _ = inputs_and_exact(4, 2, 8, 8, place)
    inputs = [each.detach() for each in inputs]
    if heads_first:
        inputs = [each.transpose(0, 1).contiguous().transpose(0, 1) for each in inputs]
    ops, options, tests = (
        torch.ops.distill_kernels,
        (place.handle(), SCALE, None, None),
        ("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(ops.prefix_attention.default, (*inputs, *options), test_utils=tests)
    results = ops.prefix_attention(*inputs, *options)
    backward = ops.prefix_attention_backward.default
    torch.library.opcheck(backward, (upstream, *inputs, *results, *options), test_utils=tests)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_compiler_takes_it_whole_once_for_all_layouts(request, flash, sinks):
    torch._dynamo.reset()
    # Some of what it imports at first use has to see the kernels that the stand-in replaces.
    torch.compile(torch.sin, backend="aot_eager")(torch.zeros(1))
    if flash:
        request.getfixturevalue("flash_here")
    compiled = torch.compile(prefix_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for place in (layout(), random_layout(1), random_layout(2)):
            inputs, upstream, _ = inputs_and_exact(4, 2, 8, 8, place, sinks=sinks)
            inputs = [each.requires_grad_() for each in inputs]
            pairs = []
            for function, given in ((prefix_attention, place), (compiled, place.handle())):
                out = attend(function, inputs, given)
                pairs.append([out, *torch.autograd.grad(out, inputs, upstream)])
            assert all(map(torch.equal, *pairs))


def test_a_layout_lives_as_long_as_a_backward_may_need_it():
    inputs, upstream, _ = inputs_and_exact(4, 2, 8, 8, layout())
    compiled = torch.compile(prefix_attention, backend="aot_eager", fullgraph=True)
    for function in (prefix_attention, compiled):
        place = layout()
        handle, alive = place.handle(), weakref.ref(place)
        out = attend(function, [each.requires_grad_() for each in inputs], handle)
        del place, handle
        assert alive() is not None
        torch.autograd.grad(out, inputs, upstream)
        del out
        assert alive() is None


def test_gradients_of_copied_keys_are_rounded_once():
    place, generator = layout(), torch.Generator().manual_seed(0)
    cut = prefix_layout.Cut([3, 2], torch.empty(0), ())
    grad = torch.randn(32, 2, 8, generator=generator).bfloat16()
    part = torch.randn(3 * 7 + 2 * 3, 2, 8, generator=generator).bfloat16()
    truth = grad.double()
    truth[:7] += part[:21].double().unflatten(0, (3, 7)).sum(0)
    truth[7:10] += part[21:].double().unflatten(0, (2, 3)).sum(0)
    flash_prefix._add_copies(grad, part, place.shared, cut)
    assert torch.equal(grad, truth.float().bfloat16())


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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("head_size", "shortest"), [(64, 512), (128, 512), (128, 100)])
def test_cut_prompts_are_no_worse_than_a_masked_softmax_on_a_gpu(monkeypatch, dtype, groups, head_size, shortest):
    """Two prompts, of which the default plan cuts the first."""
    monkeypatch.setattr(prefix_layout, "SHORTEST_PIECE", shortest)
    completions = [500, 430, 400, 399, 300], [411, 200, 89]
    place = PrefixLayout(
        [300, 40, *completions[0], *completions[1]],
        sharing(*zip((300, 40), map(sum, completions), strict=True)),
        lambda index: index.to("cuda"),
    )
    assert place.cut(4).pieces == ([3, 1] if shortest == 512 else [16, 7])
    inputs, upstream, exact = inputs_and_exact(4, groups, head_size, head_size, place, dtype=dtype)
    ours = errors(prefix_attention, inputs, upstream, place, exact)
    usual = errors(reference.prefix_attention, inputs, upstream, place, exact)
    for found, other, result in zip(ours, usual, exact, strict=True):
        assert found <= other + 4 * result.abs().max().clamp(min=1).item() * torch.finfo(dtype).eps
