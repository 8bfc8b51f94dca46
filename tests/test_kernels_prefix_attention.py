"""Packed attention by each implementation against a masked softmax in float64: all masks, lengths that fit no block."""

import itertools

import pytest
import torch
from kernels_common import over_implementations, running
from packed import SCALE, attend, check_ops, errors, inputs_and_exact, layout, random_layout, sharing

from distill_kernels import PrefixLayout, Shared, prefix_attention, prefix_layout, reference

# Of padding, which sees nothing, in the interpreter's NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
OPTIONS = [
    {},
    *({"window": window} for window in (1, 4, 9, 30)),
    {"softcap": 0.8},
    {"sinks": True},
    {"window": 6, "softcap": 0.8, "sinks": True},
]
HEADS = [(1, 16, 16), (2, 24, 24), (4, 8, 6), (2, 12, 40)]  # query heads a key-value head, sizes of keys and values


def on(place, device):
    return PrefixLayout(place.segments, place.shared, lambda index: index.to(device))


def check(place, heads, groups, head_size, value_size, dtype, **options):
    """As good as a masked softmax in the same dtype."""
    plain = {name: value for name, value in options.items() if name != "sinks"}
    inputs, upstream, exact = inputs_and_exact(heads, groups, head_size, value_size, place, dtype=dtype, **options)
    ours = errors(prefix_attention, inputs, upstream, place, exact, **plain)
    usual = errors(reference.prefix_attention, inputs, upstream, place, exact, **plain)
    # A backward starts from a rounded log-sum-exp and output, and a softmax's does not: units in the last place of what
    # it subtracts, where the gradient itself may be 0.
    offset = (upstream * exact[0]).sum(-1)
    for found, other, result in zip(ours, usual, exact, strict=True):
        size = max(each.abs().max().item() for each in (result, offset, torch.ones(())))
        assert found <= other + 8 * size * torch.finfo(dtype).eps
    if inputs[0].is_cuda:
        assert errors(prefix_attention, inputs, upstream, place, exact, **plain) == ours, "the same each time"


def dtypes_of(implementation):
    return [torch.float32, torch.float16, *([] if implementation == "interpreted" else [torch.bfloat16])]


@over_implementations
@pytest.mark.parametrize(("options", "heads"), [*zip(OPTIONS, itertools.cycle(HEADS), strict=False)], ids=str)
def test_every_mask_equals_a_masked_softmax(monkeypatch, implementation, options, heads):
    """Prompts in several parts, some of them seen by nobody through a window."""
    monkeypatch.setattr(prefix_layout, "QUERIES_A_PART", 5)
    groups, head_size, value_size = heads
    for dtype in dtypes_of(implementation):
        with running(implementation) as device:
            place = random_layout(1) if dtype == torch.float16 else layout()
            check(on(place, device), 4, groups, head_size, value_size, dtype, **options)


@over_implementations
@pytest.mark.parametrize("options", [{}, {"window": 20}, {"window": 45, "softcap": 0.8}], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_segments_of_several_blocks(implementation, options, shared):
    """Whole blocks, the rest of one, and one token more than a block, of a prompt and of completions."""
    for lengths in ((33, 40, 17), (32, 16, 1)):
        place = PrefixLayout([*lengths], [Shared(0, lengths[0], lengths[0], sum(lengths[1:]))] * shared, None)
        with running(implementation) as device:
            check(on(place, device), 2, 1, 16, 16, torch.float32, **options)


@over_implementations
def test_of_one_token_and_of_none(implementation):
    with running(implementation) as device:
        for segments in ([1], [1, 1, 1]):
            check(on(PrefixLayout(segments, [], None), device), 2, 1, 16, 16, torch.float32)
        inputs = [torch.empty(0, 2, 16, device=device, requires_grad=True) for _ in range(3)]
        out = prefix_attention(*inputs, on(PrefixLayout([], [], None), device), SCALE)
        grads = torch.autograd.grad(out, inputs, torch.empty_like(out))
        assert [each.shape for each in (out, *grads)] == [(0, 2, 16)] * 4


@over_implementations
def test_inputs_and_gradients_of_any_layout(implementation):
    with running(implementation) as device:
        place = on(layout(), device)
        inputs, upstream, exact = inputs_and_exact(4, 2, 16, 16, place, dtype=torch.float32)
        heads_first = [each.transpose(0, 1).contiguous().transpose(0, 1) for each in inputs]
        every_other = [torch.stack([each, each.new_full((), torch.nan).expand_as(each)], -1)[..., 0] for each in inputs]
        wide = [torch.cat([each, torch.full_like(each, torch.nan)], -1)[..., :16] for each in inputs]
        for given in (heads_first, every_other, wide):
            assert max(errors(prefix_attention, given, upstream, place, exact)) < 1e-5
        given = [each.requires_grad_() for each in inputs]
        out = attend(prefix_attention, given, place)
        wide = [each.detach().double().requires_grad_() for each in inputs]
        found = torch.autograd.grad(out.sum(), given)
        wanted = torch.autograd.grad(attend(reference.prefix_attention, wide, place).sum(), wide)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


@over_implementations
@pytest.mark.parametrize("options", [{}, {"sinks": True, "window": 4}], ids=str)
@pytest.mark.parametrize("heads_first", [False, True])
def test_what_a_compiler_is_told_of_the_ops_is_so(implementation, options, heads_first):
    with running(implementation) as device:
        place = on(layout(), device)
        dtype = torch.float16 if implementation == "cuda" else torch.float32
        inputs, upstream, _ = inputs_and_exact(4, 2, 16, 16, place, dtype=dtype, **options)
        check_ops(inputs, upstream.to(dtype), place, heads_first, options.get("window"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"window": 200}, {"window": 700, "softcap": 0.8, "sinks": True}], ids=str)
@pytest.mark.parametrize("heads", [(1, 64, 64), (2, 128, 128), (2, 80, 80), (1, 192, 128), (2, 256, 256)], ids=str)
def test_long_rows_on_a_gpu(dtype, options, heads):
    """Two prompts with completions of all lengths, as large as the blocks are meant for."""
    completions = [500, 430, 400, 399, 300], [411, 200, 89]
    place = PrefixLayout(
        [300, 40, *completions[0], *completions[1]],
        sharing(*zip((300, 40), map(sum, completions), strict=True)),
        lambda index: index.to("cuda"),
    )
    check(place, 4, *heads, dtype, **options)
