"""`decode_attention`: agreement with attention on whole rows, and what it must never read."""

import pytest
import torch
from kernels_common import assert_as_good_as_pytorch, over_implementations, running

from distill_kernels import backend, decode_attention, reference, twin_decode_attention

NAN = float("nan")

# The interpreter's NumPy says so where rows that have ended, full of NaN, stand in a block beside living ones.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")


def arguments(
    counts, P, T, position, *, Hkv=2, G=2, D=16, DV=None, dtype=torch.float32, padded=True, ended=(), spare=0,
    window=None, softcap=None, sinks=False, filler=NAN,
):  # fmt: skip
    """Random tensors; `filler` wherever nothing may be read. `counts` are each prompt's rows, None for no prompts.

    `spare` rows beyond those have ended, as have the rows `ended`.
    """
    generator = torch.Generator().manual_seed(P * 1000 + T)
    R = (3 if counts is None else sum(counts)) + spare
    DV = D if DV is None else DV

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    made = {
        "query": normal(R, Hkv * G, D) * 2,
        "keys": normal(R, Hkv, T, D),
        "values": normal(R, Hkv, T, DV),
        "position": torch.tensor([position]),
        "scale": D**-0.5,
    }
    of_holders, holders, slots, newest = "", R, position + 1, position
    if counts is not None:
        of_holders, holders, slots, newest = "prompt_", len(counts), P, P + position
        made |= {"prompt_keys": normal(len(counts), Hkv, P, D), "prompt_values": normal(len(counts), Hkv, P, DV)}
        made |= {"row_start": torch.tensor([0, *counts]).cumsum(0), "rows_a_prompt": max(counts)}
    made |= {"window": window, "softcap": softcap, "sinks": normal(Hkv * G) if sinks else None}
    first = 0 if window is None else max(0, newest + 1 - window)
    padding = torch.randint(slots, (holders,), generator=generator) if padded else torch.zeros(holders, dtype=int)
    padding[-1] = 0
    if padded:
        made["left_padding"] = padding
    for name in ("keys", "values"):
        made[name][:, :, position + 1 :] = filler
        made[of_holders + name][:, :, :first] = filler
        for holder, missing in enumerate(padding.tolist()):
            made[of_holders + name][holder, :, :missing] = filler
        if counts is not None:
            made[name][:, :, : max(0, first - P)] = filler
            made[of_holders + name][[n == 0 for n in counts]] = filler
    ended = [*ended, *range(R - spare, R)]
    if ended:
        made["ended"] = torch.zeros(R, dtype=torch.bool)
        made["ended"][ended] = True
        made["query"][ended] = made["keys"][ended] = made["values"][ended] = filler
    return made


def on(device, made):
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in made.items()}


def widened(made):
    """In float64."""
    return {n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in made.items()}


def check(made, implementation, constant=2e-6):
    with running(implementation) as device:
        ours = decode_attention(**on(device, made))
    assert ours.dtype == made["query"].dtype
    assert ours.isfinite().all()
    truth = reference.decode_attention(**widened(made))
    assert_as_good_as_pytorch(ours, reference.decode_attention(**made), truth, "attention", constant)


@over_implementations
@pytest.mark.parametrize("counts", [(4,), (3, 1, 2), (1, 7), (1, 1), None], ids=str)
@pytest.mark.parametrize(("P", "T", "position"), [(7, 5, 0), (33, 70, 37), (70, 9, 8), (130, 200, 199), (1, 1, 0)])
def test_agrees_with_attention_on_the_whole_row(implementation, counts, P, T, position):
    check(arguments(counts, P, T, position), implementation)


@over_implementations
@pytest.mark.parametrize(("Hkv", "G", "D"), [(1, 8, 64), (2, 4, 24), (2, 1, 80), (3, 3, 8), (1, 20, 32), (1, 2, 256)])
def test_heads(implementation, Hkv, G, D):
    """Groups of every size, heads that are no power of two, with and without prompts."""
    for counts in ((2, 5), None):
        check(arguments(counts, 19, 40, 21, Hkv=Hkv, G=G, D=D), implementation)


@over_implementations
@pytest.mark.parametrize("ended", [(1,), (0, 1, 2), (0, 1, 2, 3, 4, 5)], ids=str)
def test_ended_rows_are_zero_and_unread(implementation, ended):
    made = arguments((3, 1, 2), 20, 40, 21, ended=ended)
    check(made, implementation)
    if len(ended) == 3:
        made["prompt_keys"][0] = NAN  # none of its rows is left
    with running(implementation) as device:
        out = decode_attention(**on(device, made))
        assert out.isfinite().all()
        assert not out[list(ended)].any()
        without = arguments(None, 20, 40, 21, ended=tuple(row for row in ended if row < 3))
        out = decode_attention(**on(device, without))
        assert not out[without["ended"].to(device)].any()


@over_implementations
@pytest.mark.parametrize("counts", [(2, 1), None], ids=str)
def test_strides_and_no_padding(implementation, counts):
    """As models give them: heads inside tokens; buffers of which a part is used."""
    made = arguments(counts, 9, 30, 12, padded=False)
    for name, tensor in list(made.items()):
        if isinstance(tensor, torch.Tensor) and tensor.dim() == 4:
            made[name] = tensor.transpose(1, 2).contiguous().transpose(1, 2)
    made["keys"], made["values"] = made["keys"][:, :, :17], made["values"][:, :, :17]
    projected = torch.randn(3, 100)
    for query in (projected[:, :64].view(3, 4, 16), torch.randn(4, 3, 16).transpose(0, 1)):
        check(made | {"query": query}, implementation)


OPTIONS = {
    "short": {"window": 9},  # than the own keys
    "token": {"window": 1},
    "prompt": {"window": 40},  # reaches into the prompt
    "long": {"window": 1000},
    "cap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "narrow": {"DV": 8},
    "wide": {"DV": 40},
    "all": {"window": 40, "softcap": 3.0, "sinks": True, "DV": 24},
}
over_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@over_implementations
@over_options
@pytest.mark.parametrize("counts", [(3, 3), (3, 0, 2), None], ids=str)
def test_options(implementation, counts, options):
    """Windows, caps, sinks and values of another size; with padding, ended rows, and buffers larger than the batch."""
    check(arguments(counts, 30, 33, 25, **options), implementation)
    check(arguments(counts, 30, 33, 25, ended=(1,), spare=2, padded=False, **options), implementation)


@over_implementations
@pytest.mark.parametrize(("Hkv", "G", "D", "DV"), [(1, 8, 64, 64), (2, 3, 24, 64), (3, 1, 80, 56), (1, 2, 192, 128)])
def test_heads_with_options(implementation, Hkv, G, D, DV):
    heads = {"Hkv": Hkv, "G": G, "D": D, "DV": DV}
    check(arguments((2, 4), 70, 90, 66, window=100, softcap=2.0, sinks=True, **heads), implementation)


@over_implementations
def test_windows_that_cut_pieces(implementation):
    """Long enough for several pieces of each kind; a window may leave nothing of some, or of the whole prompt."""
    for window in (70, 131, 205, 400):
        check(arguments((2, 1), 200, 300, 130, window=window), implementation)
        check(arguments(None, 0, 300, 250, window=window), implementation)


@over_implementations
@pytest.mark.parametrize("counts", [(0, 2, 0, 3, 0), (0, 0, 4), (2, 2, 0), (0, 0)], ids=str)
def test_buffers_larger_than_the_batch(implementation, counts):
    """Prompts without rows, and rows without a prompt, between and behind those in use."""
    for filler in (NAN, 7.0):
        check(arguments(counts, 20, 40, 21, spare=3, filler=filler), implementation)
        check(
            arguments(counts, 20, 40, 21, spare=1, padded=False, ended=range(sum(counts)), filler=filler),
            implementation,
        )


@over_implementations
@pytest.mark.parametrize("counts", [(3, 3, 3), (1, 4, 2), None], ids=str)
def test_padding_may_hold_anything(implementation, counts):
    """A model leaves finite numbers there; here also prompts of padding alone, or of more than a block of it."""
    P = 600 if implementation == "twin" else 70
    for filler in (7.0, 3e38, float("inf")):
        made = arguments(counts, P, 40, 21, filler=filler)
        if counts is not None:
            made["left_padding"][:2] = torch.tensor([P - 30, P] if filler == 7 else [P - 40, P - 30])
        for options in ({}, {"softcap": 2.0}):
            check(made | options, implementation)


@over_implementations
def test_padding_of_rows_that_have_ended_may_be_anything(implementation):
    for filler in (NAN, 7.0):
        made = arguments(None, 0, 40, 21, spare=2, ended=(1,), filler=filler)
        made["left_padding"][[1, 3, 4]] = torch.tensor([1000, 39, 40])
        check(made, implementation)


@over_options
@pytest.mark.parametrize("filler", [NAN, 7.0])
@pytest.mark.parametrize("counts", [(3, 3), (3, 0, 2), None], ids=str)
def test_float64(counts, filler, options):
    made = widened(arguments(counts, 30, 33, 25, ended=(1,), spare=1, filler=filler, **options))
    ours, truth = decode_attention(**made), reference.decode_attention(**made)
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)


@over_implementations
def test_a_cap_is_accurate_near_zero(implementation):
    """Small scores under a large cap are all but unchanged: a tanh rounded at 1 would lose their digits."""
    check(arguments((2, 3), 60, 40, 21, softcap=1000.0), implementation)


@over_implementations
def test_half_precision(implementation):
    """The scores stay float32: no further from float64 than rounding the weights and the output."""
    dtypes = [torch.float16] if implementation == "interpreted" else [torch.float16, torch.bfloat16]
    for dtype in dtypes:
        for options in ({}, {"window": 70, "softcap": 5.0, "sinks": True, "DV": 32}):
            made = arguments((3, 2), 40, 60, 41, D=64, dtype=dtype, **options)
            made["query"] *= 4
            check(made, implementation, constant=torch.finfo(dtype).eps)


@pytest.mark.parametrize("counts", [(3, 2), None], ids=str)
def test_the_twin_takes_queries_narrower_than_its_keys(counts):
    """A model may compute in bfloat16 where float32 keys are faster: only the output is rounded."""
    made = arguments(counts, 40, 60, 41)
    query = made.pop("query").bfloat16()
    truth = reference.decode_attention(query.float(), **made)
    made = dict.fromkeys(("prompt_keys", "prompt_values", "row_start", "rows_a_prompt", "ended")) | made
    twin_decode_attention.attend(query, **made, out=(out := torch.empty_like(query)))
    torch.testing.assert_close(out.float(), truth, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    ("dtype", "D"), [*((torch.bfloat16, D) for D in (64, 80, 128, 256)), (torch.float16, 128), (torch.float32, 64)]
)
@pytest.mark.parametrize("counts", [(16,) * 4, (16, 3, 9, 16), None], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 128}, {"window": 400, "softcap": 20.0, "sinks": True}], ids=str)
def test_a_captured_graph_follows_the_position_and_the_ends(dtype, counts, D, options):
    made = arguments(counts, 256, 512, 0, Hkv=8, G=2, D=D, dtype=dtype, **options)
    for name in FLOATS[1 : 3 if counts is None else 5]:
        made[name] = torch.randn(made[name].shape).to(dtype)
    made["ended"] = torch.zeros(len(made["query"]), dtype=torch.bool)
    if counts is None:
        made["left_padding"] = torch.tensor([0, 3, 5])
    on_gpu = on("cuda", made)
    on_gpu["position"] += 10
    decode_attention(**on_gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(**on_gpu)
    constant = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for position, ended in ((10, []), (300, [1]), (511, [0, 1, 2])):
        on_gpu["position"].fill_(position)
        on_gpu["ended"][ended] = True
        graph.replay()
        truth = reference.decode_attention(**widened(on_gpu))
        assert_as_good_as_pytorch(out, reference.decode_attention(**on_gpu), truth, f"at {position}", constant)


FLOATS = ("query", "keys", "values", "prompt_keys", "prompt_values")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": torch.randn(6, 4)}, ["query", "[6, 4]"]),
        ({"query": torch.randn(6, 3, 16)}, ["Hkv", "[6, 3, 16]"]),
        ({"keys": torch.randn(5, 2, 8, 16)}, ["[R, Hkv, T, D]", "[5, 2, 8, 16]"]),
        ({"values": torch.randn(6, 2, 9, 16)}, ["values", "[6, 2, 9, 16]"]),
        ({"prompt_values": torch.randn(3, 2, 7, 8)}, ["prompt_values", "[3, 2, 7, 8]"]),
        ({"prompt_values": None}, ["prompt_values", "together"]),
        ({"prompt_keys": torch.randn(3, 2, 7, 16).half()}, ["prompt_keys", "float16"]),
        ({"keys": torch.randn(6, 2, 16, 8).mT}, ["keys", "stride"]),
        ({"row_start": None}, ["row_start", "prompt_keys"]),
        ({"row_start": torch.arange(3)}, ["row_start", "[4]", "[3]"]),
        ({"position": torch.tensor([1, 2])}, ["position", "[1]", "[2]"]),
        ({"position": torch.tensor([1.0])}, ["position", "int64"]),
        ({"left_padding": torch.zeros(6, dtype=torch.int64)}, ["left_padding", "[3]", "[6]"]),
        ({"ended": torch.zeros(6)}, ["ended", "bool", "float32"]),
        ({"values": torch.randn(6, 2, 8, 8)}, ["prompt_values", "8]", "16]"]),
        ({"window": 0}, ["window", "1", "0"]),
        ({"softcap": 0.0}, ["softcap", "positive", "0.0"]),
        ({"sinks": torch.zeros(3)}, ["sinks", "[4]", "[3]"]),
        ({"sinks": torch.zeros(4, dtype=torch.int64)}, ["sinks", "int64"]),
    ],
)
def test_errors(change, words):
    made = arguments((3, 1, 2), 7, 8, 4) | change
    with pytest.raises(ValueError, match=words[0].replace("[", r"\[")) as raised:
        decode_attention(**made)
    assert all(word in str(raised.value) for word in words), raised.value


def test_slots_too_far_apart_for_the_offsets_in_a_head():
    """Offsets of rows, heads and pieces have 64 bits, those of a head's slots 32."""
    from distill_kernels import triton_decode_attention

    made = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in arguments((3, 1), 7, 8, 4).items()}
    made["values"] = torch.empty_strided((4, 2, 8, 16), (32, 16, 2**28, 1), device="meta")
    made |= {"out": torch.empty_like(made["query"]), "ended": None}
    with pytest.raises(ValueError, match="2147483648"):
        triton_decode_attention.attend(**made)


def test_heads_that_are_too_large_for_the_kernel(monkeypatch):
    """A CPU takes any."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for widths in ({"D": 257}, {"DV": 257}):
        made = arguments((2, 1), 3, 4, 1, **widths)
        torch.testing.assert_close(decode_attention(**made), reference.decode_attention(**made))
        with backend.interpreted(), pytest.raises(ValueError, match=r"256.*257"):
            decode_attention(**made)


@over_implementations
def test_no_rows_at_all(implementation):
    made = arguments(None, 3, 4, 1, padded=False)
    with running(implementation) as device:
        none = {n: v[:0].to(device) if n in FLOATS else v for n, v in made.items()}
        assert decode_attention(**none | {"position": made["position"].to(device)}).shape == (0, 4, 16)


@over_implementations
def test_registration(implementation):
    made = arguments((3, 1), 7, 8, 4)
    names = ("query", "keys", "values", "position", "prompt_keys", "prompt_values", "row_start", "rows_a_prompt")
    with running(implementation) as device:
        made = {n: v.nan_to_num() if isinstance(v, torch.Tensor) else v for n, v in on(device, made).items()}
        values = (*(made[name] for name in names), made["left_padding"], None, 0.25)
        for options in ((), (5, 2.0, torch.zeros(4, device=device))):
            torch.library.opcheck(torch.ops.distill_kernels.decode_attention.default, (*values, *options))
