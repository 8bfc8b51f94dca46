"""Compiles every Triton kernel to machine code, which needs no GPU; a line a variant. A process of its own runs it."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distill_kernels import triton_math, triton_reverse_kl, triton_rows, triton_sample

FLOATS = "*fp32"
POINTERS = {
    "student_ptr": FLOATS, "teacher_ptr": FLOATS, "student_bias": FLOATS, "teacher_bias": FLOATS, "logits": "*bf16",
    "token_ids": "*i64", "at_sampling_ptr": FLOATS, "advantage_ptr": FLOATS,
    "stats": FLOATS, "normalisers": FLOATS, "losses": FLOATS,
    "row_scale": FLOATS, "grad_ptr": "*bf16", "gradient_ptr": "*bf16", "upstream": FLOATS, "row_ids": "*i64",
    "step_ptr": "*i64", "logprobs": FLOATS,
}  # fmt: skip


def type_of(name: str) -> str:
    if name in POINTERS:
        return POINTERS[name]
    if name == "seed":
        return "i64"
    return "i32" if name == "V" or name == "top_k" or name.endswith(("stride", "step")) else "fp32"


def compile_kernel(kernel, warps: int, **constants) -> None:
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else type_of(name) for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    for capability in (80, 90):
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=values),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": warps},
        )
        assert compiled.asm["cubin"]
        print(f"compiled {kernel.__name__} for {capability}: {constants}")


def main() -> None:
    block, warps = triton_math.BLOCK, triton_math.WARPS
    for objective in range(-1, 4):
        for extras in (False, True):
            compile_kernel(
                triton_rows._rows_kernel, warps, BLOCK=block, OBJECTIVE=objective, GRADIENT=objective >= 0,
                STUDENT_BIAS=extras, TEACHER_BIAS=extras, STUDENT_CAP=extras, TEACHER_CAP=extras,
                IMPORTANCE=extras and objective == 0, ADVANTAGE=extras and objective == 0,
                NORMALISERS=objective == -1,
            )  # fmt: skip
    compile_kernel(triton_reverse_kl._backward_kernel, warps, BLOCK=block)
    for top_k, top_p, min_p in ((False, False, False), (True, True, True), (False, True, False)):
        compile_kernel(
            triton_sample._sample_kernel, triton_sample.WARPS, BLOCK=triton_sample.BLOCK,
            TOP_K=top_k, TOP_P=top_p, MIN_P=min_p,
        )  # fmt: skip


if __name__ == "__main__":
    main()
