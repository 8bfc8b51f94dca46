"""The products of a decode step and what stands around them: against float64, and against nothing but themselves."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from kernels_common import assert_as_good_as_pytorch, over_implementations, running
from torch import Tensor

from distill_kernels import added, begun, normed_gate, normed_heads
from distill_kernels.types import Norm, Stream

EPS = 1e-5


class Case(NamedTuple):
    """Sizes of a layer; `rotary` columns of a head turn."""

    rows: int
    hidden: int = 96
    heads: int = 4
    kv_heads: int = 2
    size: int = 16
    rotary: int = 16
    inner: int = 80
    bias: bool = False
    head_norms: bool = True


CASES = [
    Case(5),
    Case(1, hidden=200, heads=2, bias=True),
    Case(17, heads=3, kv_heads=1, size=24, rotary=8, head_norms=False, bias=True),
    Case(64, hidden=32, inner=33),
    Case(67, bias=True),
    Case(130, hidden=40, heads=3, kv_heads=3, size=24, rotary=24, inner=600),
]
over_cases = pytest.mark.parametrize("case", CASES, ids=str)


def arguments(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, list]:
    """Of each function, those before numbers and flags; weights of a call lie apart from one another."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    R, H, D, inner = case.rows, case.hidden, case.size, case.inner
    numbers = case.heads, case.kv_heads, case.kv_heads
    hidden, norm = draw(R, H), 1 + draw(H, scale=0.1)
    stream = begun(hidden, norm)
    thirds = torch.tensor([0.5, 0.25, 0.25])[:, None]  # as a product in three tiles leaves them
    stream = stream._replace(squares=stream.squares * thirds.to(stream.squares.dtype))
    weights = [draw(number * D, H, scale=H**-0.5) for number in numbers]
    biases = [draw(number * D) if case.bias else None for number in numbers]
    norms = [Norm(1 + draw(D, scale=0.1), 1e-6) for _ in range(2)] if case.head_norms else None
    cos, sin = (draw(R, case.rotary).to(stream.squares.dtype) for _ in range(2))
    return {
        "heads": [stream, EPS, weights, biases, D, norms, cos, sin],
        "gate": [stream, EPS, draw(inner, H, scale=H**-0.5), draw(inner, H, scale=H**-0.5)],
        "added": [draw(R, inner), draw(H, inner, scale=inner**-0.5), draw(H) if case.bias else None, hidden, norm],
    }


FUNCTIONS: dict[str, Callable] = {"heads": normed_heads, "gate": normed_gate, "added": added}


def mapped(value, function: Callable[[Tensor], Tensor]):
    """`value` with `function` of each tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(each, function) for each in value))
    return [mapped(each, function) for each in value] if isinstance(value, list | tuple) else value


def results(name: str, given: list, device: str | torch.device = "cpu") -> list[Tensor]:
    """All that a function returns; of a stream the sums of its squares."""
    found = FUNCTIONS[name](*mapped(given, lambda tensor: tensor.to(device)))
    if isinstance(found, Stream):
        found = found._replace(squares=found.squares.sum(0))
    return [found] if isinstance(found, Tensor) else list(found)


def check(case: Case, dtype: torch.dtype, implementation: str, constant: float = 4e-6) -> None:
    for name, given in arguments(case, dtype).items():
        with running(implementation) as device:
            ours = results(name, given, device)
        truth = results(name, mapped(given, Tensor.double))
        for number, (each, pytorch, right) in enumerate(zip(ours, results(name, given), truth, strict=True)):
            assert each.isfinite().all()
            assert_as_good_as_pytorch(each, pytorch, right, f"{name}, result {number}", constant)


@over_implementations
@over_cases
def test_agrees_with_float64(implementation, case):
    check(case, torch.float32, implementation)


@pytest.mark.parametrize("implementation", [pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("case", [*CASES, Case(16, 1024, 16, 8, 128, 128, 3072), Case(300, 576, 9, 3, 64, 64, 1536)])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter multiplies no bfloat16")
def test_half_precision(implementation, case):
    """Rounded where the twin rounds: a last place of the largest result is what another order of sums may move."""
    check(case, torch.bfloat16, implementation, constant=2**-8)


@over_implementations
def test_weights_that_lie_one_behind_the_other(implementation):
    """Which are multiplied at once where the rows are many."""
    for name, given in arguments(Case(70), torch.float32).items():
        apart = mapped(given, Tensor.clone)
        weights = given[2] if name == "heads" else given[2:4] if name == "gate" else [given[1]]
        joined = torch.cat(weights).split([len(weight) for weight in weights])
        if name == "heads":
            given[2] = joined
        elif name == "gate":
            given[2:4] = joined
        with running(implementation) as device:
            on_device = mapped(given, lambda tensor: tensor.to(device))
            for each, other in zip(results(name, on_device, device), results(name, apart, device), strict=True):
                torch.testing.assert_close(each, other, rtol=1e-5, atol=1e-5)


@over_implementations
def test_large_weights(implementation, monkeypatch):
    """Which another than our kernel multiplies, of few rows too."""
    if implementation != "twin":
        from distill_kernels import triton_decode_linear

        monkeypatch.setattr(triton_decode_linear, "LARGEST_WEIGHT", 0)
        monkeypatch.setattr(triton_decode_linear, "plan", None)
    check(Case(5, bias=True, inner=600), torch.float32, implementation)


@over_implementations
def test_every_launch_leaves_the_counters_as_it_found_them(implementation):
    if implementation == "twin":
        return
    from distill_kernels import triton_decode_linear

    with running(implementation) as device:
        for name, given in arguments(Case(20, inner=600), torch.float32).items():
            for _ in range(2):
                found = results(name, given, device)
            counters = triton_decode_linear.counters(found[0].device)
            assert not counters.any(), name


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("heads", {2: lambda w: [w[0], w[1], w[2][:-16]]}, ["heads of 16", "[16, 96]"]),
        ("heads", {2: lambda w: [each[:, :-1] for each in w]}, ["query", "[.., 96]", "[64, 95]"]),
        ("heads", {3: lambda b: [torch.zeros(64), None, None]}, ["bias"]),
        ("heads", {6: lambda cos: cos[:, :7]}, ["cos and sin", "[5, 7]"]),
        ("heads", {6: lambda cos: cos.double()}, ["cos and sin", "float32"]),
        ("gate", {2: lambda gate: gate[:-1]}, ["gate and up", "[79, 96]"]),
        ("gate", {3: lambda up: up.half()}, ["up", "float16"]),
        ("added", {0: lambda x: x.t().contiguous().t()}, ["x", "contiguous", "strides"]),
        ("added", {3: lambda residual: residual[:-1]}, ["residual", "[5, 96]", "[4, 96]"]),
        ("added", {4: lambda norm: norm[:-1]}, ["norm", "[96]", "[95]"]),
        ("added", {1: lambda weight: weight.to("meta")}, ["one device", "meta"]),
    ],
)
def test_errors(name, change, words):
    given = arguments(Case(5), torch.float32)[name]
    for place, function in change.items():
        given[place] = function(given[place])
    with pytest.raises(ValueError) as raised:  # noqa: PT011 # the words are looked for below
        FUNCTIONS[name](*given)
    assert all(word in str(raised.value) for word in words), raised.value
