"""`merge_attention`: two softmaxes over different keys as one, in place, against float64."""

import pytest
import torch
from kernels_common import assert_as_good_as_pytorch, over_implementations, running

from distill_kernels import twin_merge
from distill_kernels.flash_prefix import merge_attention

INF = float("inf")
# Of the interpreter's NumPy: shares that come to 0 or 1, and infinities less infinities.
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp:RuntimeWarning", "ignore:invalid value encountered in subtract:RuntimeWarning"
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def parts(M, h, d, dtype=torch.bfloat16, spread=2.0):
    """Two outputs and their log-sum-exps, as the flash kernels lay them out, among what must not be touched: NaN."""
    generator = torch.Generator().manual_seed(M * 100 + d)
    made = []
    for before, more_heads in ((3, 0), (0, 1)):  # a slice of all tokens, and of wider heads
        out = torch.full((before + M + 2, h + more_heads, d + 8 * more_heads), torch.nan, dtype=dtype)
        lse = torch.full((h, before + M + 2), torch.nan)
        view, lse_view = out[before : before + M, :h, :d], lse[:, before : before + M].t()
        view.copy_(torch.randn(M, h, d, generator=generator))
        lse_view.copy_(5 + spread * torch.randn(M, h, generator=generator))
        made += [(out, view), (lse, lse_view)]
    return made


def check(made, implementation):
    plain, wide = ([convert(view) for _, view in made] for convert in (torch.clone, torch.Tensor.double))
    twin_merge.merge(*plain)
    twin_merge.merge(*wide)
    with running(implementation) as device:
        buffers = [buffer.to(device) for buffer, _ in made]
        places = [(view.shape, view.stride(), view.storage_offset()) for _, view in made]
        views = [buffer.as_strided(*place) for buffer, place in zip(buffers, places, strict=True)]
        merge_attention(*views)
    # The interpreter cuts bfloat16 off, where a card rounds it.
    cut = implementation == "interpreted" and plain[0].dtype == torch.bfloat16
    for name, i, constant in (("output", 0, torch.finfo(torch.bfloat16).eps if cut else 2e-6), ("lse", 1, 2e-6)):
        assert views[i].dtype == plain[i].dtype
        assert views[i].isfinite().all()
        assert_as_good_as_pytorch(views[i], plain[i], wide[i], name, constant)
    for buffer, view in zip(buffers, views, strict=True):
        assert buffer.isfinite().sum() == view.numel(), "written where nothing lay"
    for view, before in zip(views[2:], plain[2:], strict=True):
        assert torch.equal(view.cpu(), before), "the other part is only read"


@over_implementations
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "h", "d"), [(1, 1, 64), (33, 3, 128), (130, 2, 64), (7, 2, 80), (50, 1, 24), (17, 2, 256)]
)
def test_agrees_with_float64(implementation, dtype, M, h, d):
    for spread in (0.1, 2.0, 30.0):
        check(parts(M, h, d, dtype, spread), implementation)


@over_implementations
def test_infinite_log_sum_exps_do_what_pytorch_does_with_them(implementation):
    """A part without a key counts for nothing; of two such parts the output is not a number."""
    values = torch.tensor([-INF, -200.0, -3.0, 0.0, 2.0, 90.0, INF, torch.nan])
    lse, other_lse = (each.contiguous() for each in torch.cartesian_prod(values, values)[:, None].unbind(-1))
    out, other_out = torch.randn(2, len(lse), 1, 32)
    expected = out.clone(), lse.clone()
    twin_merge.merge(*expected, other_out, other_lse)
    with running(implementation) as device:
        found = [each.to(device, copy=True) for each in (out, lse)]
        merge_attention(*found, other_out.to(device), other_lse.to(device))
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), right, rtol=1e-6, atol=1e-6, equal_nan=True)
    alone = (other_lse == -INF) & lse.isfinite()
    for ours, before in ((found[0], out), (found[1], lse)):
        assert torch.equal(ours.cpu()[alone[:, 0]], before[alone[:, 0]])
    alone = (lse == -INF) & other_lse.isfinite()
    for ours, other in ((found[0], other_out), (found[1], other_lse)):
        assert torch.equal(ours.cpu()[alone[:, 0]], other[alone[:, 0]])


@over_implementations
def test_no_tokens_at_all(implementation):
    with running(implementation) as device:
        out, lse = torch.empty(2, 0, 2, 16, device=device), torch.empty(2, 2, 0, device=device)
        merge_attention(out[0], lse[0].t(), out[1], lse[1].t())


@over_implementations
def test_registration(implementation):
    with running(implementation) as device:
        out, lse = torch.randn(2, 5, 2, 16, device=device), torch.randn(2, 2, 5, device=device)
        values = out[0], lse[0].t(), out[1], lse[1].t()
        torch.library.opcheck(torch.ops.distill_kernels.merge_attention.default, values)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_offsets_past_32_bits_on_cuda():
    """Tokens so far apart that the last lies past 2**31 elements."""
    M, apart = 40, 2**31 // 32
    buffer = torch.empty(M * apart, dtype=torch.float16, device="cuda")
    made = parts(M, 2, 64, torch.float16)
    out, lse, other_out, other_lse = (view.cuda() for _, view in made)
    spread = buffer.as_strided((M, 2, 64), (apart, 64, 1))
    spread.copy_(out)
    expected = out, lse.clone()
    twin_merge.merge(*expected, other_out, other_lse)
    merge_attention(spread, lse, other_out, other_lse)
    torch.testing.assert_close(spread, expected[0])
    torch.testing.assert_close(lse, expected[1])
