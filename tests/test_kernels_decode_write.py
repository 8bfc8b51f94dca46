"""`decode_attention` with new keys and values: as if they had been in the buffers, and what is written there."""

import pytest
import torch
from kernels_common import assert_as_good_as_pytorch, over_implementations, running
from test_kernels_decode_attention import NAN, arguments, on, over_options, widened

from distill_kernels import decode_attention, reference

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")
BUFFERS = ("keys", "values")


def with_new(made, seed=3):
    """New keys and values, as slices of a projection, for a slot that holds NaN; NaN for rows that have ended."""
    (R, Hkv, _, D), DV = made["keys"].shape, made["values"].shape[3]
    projected = torch.randn(R, Hkv, D + DV + 3, generator=torch.Generator().manual_seed(seed)).to(made["keys"].dtype)
    made = made | {"new_keys": projected[..., :D], "new_values": projected[..., 3 + D :]}
    if "ended" in made:
        projected[made["ended"]] = NAN
    for name in BUFFERS:
        made[name][:, :, made["position"]] = NAN
    return made


def copied(made):
    return made | {name: made[name].clone() for name in BUFFERS}


def check(made, implementation, constant=2e-6):
    with running(implementation) as device:
        given = on(device, copied(made))
        ours = decode_attention(**given)
    assert ours.isfinite().all()
    truth = reference.decode_attention(**widened(made))
    assert_as_good_as_pytorch(ours, reference.decode_attention(**copied(made)), truth, "attention", constant)
    check_written(made, given, everywhere=implementation == "twin")


def check_written(made, given, *, everywhere=False):
    """The slot holds what it was given to the bit, and all others what they held; of rows that have ended too, which
    are written `everywhere` or not at all."""
    ended = made.get("ended", torch.zeros(len(made["query"]), dtype=torch.bool)) & (not everywhere)
    for name in BUFFERS:
        expected = made[name].clone()
        expected[~ended, :, made["position"].item()] = made[f"new_{name}"][~ended]
        torch.testing.assert_close(given[name].cpu(), expected, rtol=0, atol=0, equal_nan=True)


@over_implementations
@pytest.mark.parametrize("counts", [(4,), (3, 1, 2), None], ids=str)
@pytest.mark.parametrize(("P", "T", "position"), [(7, 5, 0), (33, 70, 37), (1, 1, 0), (130, 70, 69)])
def test_agrees_with_attention_on_the_whole_row(implementation, counts, P, T, position):
    check(with_new(arguments(counts, P, T, position)), implementation)


@over_implementations
@pytest.mark.parametrize("position", [0, 64, 65, 299])
def test_pieces(implementation, position):
    """Of which one alone writes; several are empty where little is seen, and all but it at the first position."""
    for window in (None, 70):
        check(with_new(arguments((2, 1), 40, 300, position, window=window)), implementation)
        check(with_new(arguments(None, 0, 300, position, window=window)), implementation)


@over_implementations
@over_options
@pytest.mark.parametrize("counts", [(3, 3), (3, 0, 2), None], ids=str)
def test_options(implementation, counts, options):
    """With padding, ended rows, and buffers larger than the batch."""
    check(with_new(arguments(counts, 30, 33, 25, ended=(1,), spare=2, **options)), implementation)


@over_implementations
@pytest.mark.parametrize(("Hkv", "G", "D", "DV"), [(1, 8, 64, 64), (2, 3, 24, 64), (3, 1, 80, 56), (1, 2, 192, 128)])
def test_heads(implementation, Hkv, G, D, DV):
    made = arguments((2, 4), 70, 90, 66, Hkv=Hkv, G=G, D=D, DV=DV, window=100, softcap=2.0, sinks=True)
    check(with_new(made), implementation)


@over_implementations
def test_ended_rows(implementation):
    """One of several, and all of them."""
    for ended in ((1,), range(6)):
        check(with_new(arguments((3, 1, 2), 20, 140, 121, ended=ended)), implementation)
        check(with_new(arguments(None, 0, 140, 121, ended=[row for row in ended if row < 3])), implementation)


@over_implementations
def test_strides(implementation):
    """Buffers of which a part is used, with heads inside tokens."""
    for counts in ((2, 1), None):
        made = with_new(arguments(counts, 9, 30, 12))
        for name in BUFFERS:
            made[name] = made[name].transpose(1, 2).contiguous().transpose(1, 2)[:, :, :17]
        check(made, implementation)


@over_implementations
def test_half_precision(implementation):
    for dtype in [torch.float16] if implementation == "interpreted" else [torch.float16, torch.bfloat16]:
        for options in ({}, {"window": 70, "softcap": 5.0, "sinks": True, "DV": 32}):
            made = with_new(arguments((3, 2), 40, 150, 141, D=64, dtype=dtype, **options))
            check(made, implementation, constant=torch.finfo(dtype).eps)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("dtype", "D"), [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64)])
@pytest.mark.parametrize("counts", [(16,) * 4, None], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 128}, {"window": 400, "softcap": 20.0, "sinks": True}], ids=str)
def test_a_captured_graph_on_cuda_fills_the_buffers_slot_by_slot(dtype, counts, D, options):
    """From the first slot on, in buffers full of NaN, as a decode does."""
    made = arguments(counts, 256, 300, 299, Hkv=8, G=2, D=D, dtype=dtype, padded=False, filler=0.5, **options)
    made = on("cuda", with_new(made) | {"ended": torch.zeros(len(made["query"]), dtype=torch.bool)})
    made["position"].zero_()
    filled = {name: torch.full_like(made[name], NAN) for name in BUFFERS}
    given = made | {name: filled[name].clone() for name in BUFFERS}
    decode_attention(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(**given)
    constant = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for position in range(300):
        given["position"].fill_(position)
        for name in BUFFERS:
            given[f"new_{name}"].normal_()
            filled[name][:, :, position] = given[f"new_{name}"]
        graph.replay()
        if position in (0, 1, 64, 200, 299):
            asked = given | filled | {"new_keys": None, "new_values": None}
            truth = reference.decode_attention(**widened(asked))
            assert_as_good_as_pytorch(out, reference.decode_attention(**asked), truth, f"at {position}", constant)
            for name in BUFFERS:
                torch.testing.assert_close(given[name], filled[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"new_values": None}, ["new_values", "together"]),
        ({"new_keys": torch.randn(6, 2, 1, 16)}, ["new_keys", "[6, 2, 16]", "[6, 2, 1, 16]"]),
        ({"new_values": torch.randn(6, 2, 8)}, ["new_values", "[6, 2, 16]", "[6, 2, 8]"]),
        ({"new_keys": torch.randn(6, 2, 16).half()}, ["new_keys", "float32", "float16"]),
        ({"new_keys": torch.randn(6, 16, 2).mT}, ["new_keys", "stride"]),
    ],
)
def test_errors(change, words):
    made = with_new(arguments((3, 1, 2), 7, 8, 4)) | change
    with pytest.raises(ValueError, match=words[0]) as raised:
        decode_attention(**made)
    assert all(word in str(raised.value) for word in words), raised.value


@over_implementations
def test_registration(implementation):
    made = with_new(arguments((3, 1), 7, 8, 4))
    names = ("query", "keys", "values", "position", "prompt_keys", "prompt_values", "row_start", "rows_a_prompt")
    with running(implementation) as device:
        made = {n: v.nan_to_num() if isinstance(v, torch.Tensor) else v for n, v in on(device, made).items()}
        values = (*(made[name] for name in names), made["left_padding"], None, 0.25, None, None, None)
        new = made["new_keys"], made["new_values"]
        torch.library.opcheck(torch.ops.distill_kernels.decode_attention.default, (*values, *new))
