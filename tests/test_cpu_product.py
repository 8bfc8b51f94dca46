"""Which library multiplies on which CPU."""

import pytest
import torch

from distill_kernels import cpu_product
from distill_kernels.chunks import HeadProducts


@pytest.mark.parametrize(
    ("about", "as_fast"),
    [
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\n", True),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\n", True),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\n", False),
        ("CPU implementer\t: 0x41\nFeatures\n", False),
        (None, False),
    ],
)
def test_the_cpu_says_which(monkeypatch, tmp_path, about, as_fast):
    if about is not None:
        (tmp_path / "cpuinfo").write_text(about)
    monkeypatch.setattr(cpu_product, "CPU", tmp_path / "cpuinfo")
    cpu_product.mkl_is_as_fast.cache_clear()
    assert cpu_product.mkl_is_as_fast() is as_fast
    cpu_product.mkl_is_as_fast.cache_clear()


@pytest.mark.parametrize("as_fast", [True, False])
def test_a_heads_products_by_both(monkeypatch, as_fast):
    """Logits, and both gradients over two chunks, the weight's in several blocks of oneDNN."""
    monkeypatch.setattr(cpu_product, "mkl_is_as_fast", lambda: as_fast)
    monkeypatch.setattr("distill_kernels.chunks._BLOCK_BYTES", 4 * 8 * 100)
    torch.manual_seed(0)
    hidden, weight, grad = torch.randn(12, 8), torch.randn(300, 8), torch.randn(12, 300)
    products = HeadProducts(weight, hidden, torch.float32)
    assert products.room(12) is None
    torch.testing.assert_close(products.logits(hidden, None), hidden @ weight.T)
    torch.testing.assert_close(products.hidden_gradient(grad, torch.empty(12, 8)), grad @ weight)
    total = torch.full((300, 8), torch.nan)
    for part in (slice(0, 7), slice(7, 12)):
        products.weight_gradient(grad[part], hidden[part], total, first=part.start == 0)
    torch.testing.assert_close(total, grad.T @ hidden)
