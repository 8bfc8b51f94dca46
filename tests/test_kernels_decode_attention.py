"""`decode_attention`: agreement with attention on whole rows, and what it must never read."""

import pytest
import torch
from kernels_common import assert_as_good_as_pytorch, over_implementations, running

from distill_kernels import decode_attention, reference

NAN = float("nan")


def arguments(counts, P, T, position, *, Hkv=2, G=2, D=16, dtype=torch.float32, padded=True, ended=()):
    """Random tensors; NaN wherever nothing may be read. `counts` are the rows of each prompt, None for no prompts."""
    generator = torch.Generator().manual_seed(P * 1000 + T)
    R = 3 if counts is None else sum(counts)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    made = {
        "query": normal(R, Hkv * G, D) * 2,
        "keys": normal(R, Hkv, T, D),
        "values": normal(R, Hkv, T, D),
        "position": torch.tensor([position]),
        "scale": D**-0.5,
    }
    padded_kind, holders, slots = "", R, position + 1
    if counts is not None:
        padded_kind, holders, slots = "prompt_", len(counts), P
        made |= {"prompt_keys": normal(len(counts), Hkv, P, D), "prompt_values": normal(len(counts), Hkv, P, D)}
        made |= {"row_start": torch.tensor([0, *counts]).cumsum(0), "rows_a_prompt": max(counts)}
    padding = torch.randint(slots, (holders,), generator=generator) if padded else torch.zeros(holders, dtype=int)
    padding[-1] = 0
    if padded:
        made["left_padding"] = padding
    for name in ("keys", "values"):
        made[name][:, :, position + 1 :] = NAN
        for holder, first in enumerate(padding.tolist()):
            made[padded_kind + name][holder, :, :first] = NAN
    if ended:
        made["ended"] = torch.zeros(R, dtype=torch.bool)
        made["ended"][list(ended)] = True
        made["keys"][list(ended)] = made["values"][list(ended)] = NAN
    return made


def check(made, implementation, constant=2e-6):
    with running(implementation) as device:
        ours = decode_attention(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in made.items()})
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in made.items()}
    assert ours.dtype == made["query"].dtype
    assert ours.isfinite().all()
    truth = reference.decode_attention(**wide)
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
        made = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in made.items()}
        out = decode_attention(**made)
        assert out.isfinite().all()
        assert not out[list(ended)].any()
        without = arguments(None, 20, 40, 21, ended=tuple(row for row in ended if row < 3))
        out = decode_attention(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in without.items()})
        assert not out[without["ended"].to(device)].any()


@over_implementations
@pytest.mark.parametrize("counts", [(2, 1), None], ids=str)
def test_strides_and_no_padding(implementation, counts):
    """As models give them: heads inside tokens; buffers of which a part is used."""
    made = arguments(counts, 9, 30, 12, padded=False)
    for name, tensor in list(made.items()):
        if isinstance(tensor, torch.Tensor) and tensor.dim() == 4:
            made[name] = tensor.transpose(1, 2).contiguous().transpose(1, 2)
    made["query"] = made["query"][:, None].transpose(1, 2).contiguous().squeeze(2)
    made["keys"], made["values"] = made["keys"][:, :, :17], made["values"][:, :, :17]
    check(made, implementation)


@over_implementations
def test_half_precision(implementation):
    """The scores stay float32: no further from float64 than rounding the weights and the output."""
    dtypes = [torch.float16] if implementation == "interpreted" else [torch.float16, torch.bfloat16]
    for dtype in dtypes:
        made = arguments((3, 2), 40, 60, 41, D=64, dtype=dtype)
        made["query"] *= 4
        check(made, implementation, constant=torch.finfo(dtype).eps)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    ("dtype", "D"), [*((torch.bfloat16, D) for D in (64, 80, 128, 256)), (torch.float16, 128), (torch.float32, 64)]
)
@pytest.mark.parametrize("counts", [(16,) * 4, (16, 3, 9, 16), None], ids=str)
def test_a_captured_graph_follows_the_position_and_the_ends(dtype, counts, D):
    made = arguments(counts, 256, 512, 0, Hkv=8, G=2, D=D, dtype=dtype)
    for name in ("keys", "values"):
        made[name] = torch.randn(made[name].shape).to(dtype)
    made["ended"] = torch.zeros(len(made["query"]), dtype=torch.bool)
    if counts is None:
        made["left_padding"] = torch.tensor([0, 3, 5])
    on_gpu = {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in made.items()}
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
        truth = reference.decode_attention(**{n: v.double() if n in FLOATS else v for n, v in on_gpu.items()})
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
    ],
)
def test_errors(change, words):
    made = arguments((3, 1, 2), 7, 8, 4) | change
    with pytest.raises(ValueError, match=words[0].replace("[", r"\[")) as raised:
        decode_attention(**made)
    assert all(word in str(raised.value) for word in words), raised.value


def test_heads_that_are_too_large():
    with pytest.raises(ValueError, match="256"):
        decode_attention(**arguments(None, 3, 4, 1, D=257))


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
        made = {name: v.to(device).nan_to_num() if isinstance(v, torch.Tensor) else v for name, v in made.items()}
        values = (*(made[name] for name in names), made["left_padding"], None, 0.25)
        torch.library.opcheck(torch.ops.distill_kernels.decode_attention.default, values)
