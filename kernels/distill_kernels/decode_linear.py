"""The products of a decode step, each in one launch with what comes before and after it in a plain decoder layer.

For x [R, H], one new token a row, and W x the product with a weight [N, H]:

    normed_heads   rope(head_norm(W norm(x) + b)), the heads of query, key and value; values have neither norm nor rope
    normed_gate    silu(G norm(x)) * (U norm(x))
    added          x + W y + b, and what the next norm needs of it

norm(x) is w * x / sqrt(mean(x^2) + eps). A `Stream` holds w * x and sums of x^2, which whoever makes x has at hand, so
that a product begins at once and divides by the root when it is done. Sums are in float32; w * x, x and results are
rounded once where they are stored.

Bytes: the weight's; of more than 64 rows, and of large weights, where cuBLAS multiplies, also the float32 product's,
written and read. Left out on purpose: gradients, and activations but SiLU.
"""

from collections.abc import Sequence

from torch import Tensor

from distill_kernels import backend, checks, twin_decode_linear
from distill_kernels.chunks import accumulation_dtype
from distill_kernels.types import Norm, Stream


def begun(hidden: Tensor, norm: Tensor) -> Stream:
    """The stream of x [R, H] with the weight [H] of its next norm, where no product makes it."""
    _check(hidden=hidden)
    _check_norm(norm, hidden)
    return twin_decode_linear.begin(hidden, norm)


def normed_heads(
    stream: Stream,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    size: int,
    norms: tuple[Norm, Norm] | None,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [R, Hq, D] and keys and values [R, Hkv, D] of a stream.

    `weights` are those of query, key and value, [Hq D, H] and twice [Hkv D, H], `biases` as many vectors or none at
    all, `size` is D, `norms` are those of queries and keys over a head's D columns. `cos` and `sin` [R, E] float32, E
    at most D and even, turn the first E columns of a head: d < E / 2 with d + E / 2. Raises ValueError for a wrong
    shape, dtype or layout.
    """
    x = stream.scaled
    _check(x=x, query=weights[0], key=weights[1], value=weights[2])
    if len(weights[1]) != len(weights[2]) or any(len(weight) % size for weight in weights):
        raise ValueError(f"weights must be of heads of {size}; found {[list(weight.shape) for weight in weights]}")
    R, E = cos.shape
    wide = accumulation_dtype(x)
    if cos.shape != sin.shape or len(x) != R or size < E or E % 2 or {cos.dtype, sin.dtype} != {wide}:
        raise ValueError(
            f"cos and sin must be {wide} [{len(x)}, E], E even and at most {size}; found {list(cos.shape)}"
        )
    if len({bias is None for bias in biases}) > 1:
        raise ValueError("query, key and value have a bias each, or none has")
    heads = [len(weight) // size for weight in weights]
    out = x.new_empty(R, sum(heads), size)
    implementation = backend.implementation("decode_linear", x.device)
    implementation.heads(stream, eps, weights, biases, norms, cos.contiguous(), sin.contiguous(), out)
    return out.split(heads, 1)


def normed_gate(stream: Stream, eps: float, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate norm(x)) * (up norm(x)), [R, I], of a stream and two weights [I, H]."""
    _check(x=stream.scaled, gate=gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(f"gate and up must be alike; found {list(gate.shape)} and {list(up.shape)}")
    out = stream.scaled.new_empty(len(stream.scaled), len(gate))
    backend.implementation("decode_linear", out.device).gate(stream, eps, gate, up, out)
    return out


def added(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm: Tensor) -> Stream:
    """The stream of residual + weight x + bias, [R, H], of x [R, I], weight [H, I] and bias [H] or None.

    `norm` [H] is the weight of the norm that follows.
    """
    _check(x=x, weight=weight)
    _check(residual=residual)
    _check_norm(norm, residual)
    if residual.shape != (len(x), len(weight)) or residual.dtype != x.dtype:
        raise ValueError(f"residual must be {x.dtype} {[len(x), len(weight)]}; found {list(residual.shape)}")
    return backend.implementation("decode_linear", x.device).add(x, weight, bias, residual, norm)


def _check(**matrices: Tensor) -> None:
    """The first is what the others, weights, are multiplied with."""
    checks.check_floats(**matrices)
    x = next(iter(matrices.values()))
    for name, tensor in matrices.items():
        if tensor.dim() != 2 or not tensor.is_contiguous() or tensor.dtype != x.dtype or tensor.shape[1] != x.shape[1]:
            raise ValueError(
                f"{name} must be a contiguous matrix [.., {x.shape[-1]}] of {x.dtype}; found {tensor.dtype} "
                f"{list(tensor.shape)} of strides {list(tensor.stride())}"
            )


def _check_norm(norm: Tensor, hidden: Tensor) -> None:
    checks.check_floats(hidden=hidden, norm=norm)
    if norm.shape != hidden.shape[1:]:
        raise ValueError(f"the norm's weight must be [{hidden.shape[1]}]; found {list(norm.shape)}")
