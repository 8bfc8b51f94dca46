"""Packed attention with shared keys against a masked softmax over all packed tokens, in float64."""

import weakref
from collections import Counter

import pytest
import torch
from packed import attend, check_ops, errors, inputs_and_exact, layout, random_layout

from distill_kernels import PrefixLayout, Shared, prefix_attention, prefix_layout, reference


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


def test_a_query_is_in_one_tile_and_the_costly_come_first():
    place = layout()
    for size in (1, 2, 4, 16):
        tiles = place.tiles(size)
        assert place.tiles(size) is tiles
        assert tiles.dtype == torch.int32
        queries = [start + i for start, n, first, *_ in tiles.tolist() for i in range(first, min(first + size, n))]
        assert sorted(queries) == list(range(sum(place.segments)))
        costs = [first + prompt for _, _, first, _, prompt in tiles.tolist()]
        assert costs == sorted(costs, reverse=True)
    assert [15, 4, 2, 0, 7] in place.tiles(2).tolist(), "the last two tokens of the first prompt's first completion"
    assert [10, 5, 4, 0, 0] in place.tiles(4).tolist(), "the last token of a row that shares nothing"


def pairs_of(plan, window=None):
    """How often the jobs of a plan have each pair of a key and a query that may see it, and each key's parts."""
    pairs, parts = Counter(), {}
    for key, keys, query, queries, part in plan.jobs.tolist():
        for n in range(keys):
            parts.setdefault(key + n, []).append(part + n if part >= 0 else -1)
            pairs.update((key + n, query + m) for m in range(queries) if key != query or m >= n)
    return pairs, parts


@pytest.mark.parametrize("size", [2, 4, 16])
@pytest.mark.parametrize("window", [None, 1, 4, 9])
def test_key_jobs_have_every_pair_once(monkeypatch, size, window):
    monkeypatch.setattr(prefix_layout, "QUERIES_A_PART", 4)
    place = layout()
    plan = place.jobs(size, 2, window)
    assert place.jobs(size, 2, window) is plan
    pairs, parts = pairs_of(plan)
    needed = {(key, query) for query, key in reference.seen_keys(place, window).nonzero().tolist()}
    assert set(pairs.values()) == {1}
    assert needed <= set(pairs)
    if window is None:
        assert needed == set(pairs)
    written = [part for each in parts.values() for part in each if part >= 0]
    assert len(written) == len(set(written)), "a part is written once"
    assert max(written) < plan.part_rows
    summed = {}
    for key, keys, part, stride, number in plan.sums.tolist():
        summed |= {key + n: [part + n + i * stride for i in range(number)] for n in range(keys)}
    assert summed == {key: sorted(each) for key, each in parts.items() if each != [-1]}
    assert set(summed) == set(range(10)), "the two prompts' keys, and no others"
    assert (plan.places is None) == (window is None)


def test_parts_are_as_many_as_fill_a_card():
    counts = lambda programs, length: [n for _, n in Shared(0, 1, 7, length).pieces(programs)]  # noqa: E731
    assert counts(16, 8192) == [1024] * 8
    assert counts(16, 1024) == [1024]
    assert counts(16, 1025) == [512, 513]
    assert counts(264, 8192) == [4096] * 2
    assert counts(600, 8192) == [8192]
    assert Shared(0, 1, 7, 2000).pieces(1) == [(7, 1000), (1007, 1000)]


def test_places_go_on_from_a_prompts():
    assert layout().places.tolist() == [
        *range(7),
        *range(3),
        *range(5),
        7,
        8,
        9,
        10,
        7,
        8,
        9,
        10,
        7,
        *range(3, 9),
        3,
        4,
    ]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("heads_first", [False, True])
def test_what_a_compiler_is_told_of_the_ops_is_so(sinks, heads_first):
    """Shapes, strides, dtypes and what is an alias of what."""
    place = layout()
    inputs, upstream, _ = inputs_and_exact(4, 2, 8, 8, place, sinks=sinks)
    check_ops(inputs, upstream, place, heads_first)


@pytest.mark.parametrize("sinks", [False, True])
def test_a_compiler_takes_it_whole_once_for_all_layouts(sinks):
    torch._dynamo.reset()
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
