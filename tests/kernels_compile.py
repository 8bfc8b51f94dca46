"""Compiles every Triton kernel to machine code, which needs no GPU; a line a variant. A process of its own runs it."""

import re
import subprocess
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from distill_kernels import (
    backend,
    linear_distill_loss,
    sample,
    triton_decode_attention,
    triton_math,
    triton_reverse_kl,
    triton_rows,
    triton_sample,
)

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
    """As a launch on contiguous logits with a number of columns that 16 divides compiles it: steps of 1 are constants,
    and pointers and strides that are specialised are known to be aligned."""
    names = [parameter.name for parameter in kernel.params]
    specialised = [parameter for parameter in kernel.params if not parameter.do_not_specialize]
    constants |= {p.name: 1 for p in specialised if p.name.endswith("_step")}
    signature = {name: "constexpr" if name in constants else type_of(name) for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = [p for p in specialised if not p.do_not_specialize_on_alignment and signature[p.name][0] in "*i"]
    for capability in (80, 90):
        compiled = triton.compile(
            ASTSource(
                fn=kernel, signature=signature, constexprs=values,
                attrs={(names.index(p.name),): [["tt.divisibility", 16]] for p in aligned},
            ),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": warps},
        )  # fmt: skip
        assert compiled.asm["cubin"]
        if constants.get("BLOCK", 0) >= 128 * warps and "student_ptr" in names:
            assert "ld.global.v4" in compiled.asm["ptx"], f"{kernel.__name__} loads column by column"
        print(f"compiled {kernel.__name__} for {capability}: {constants}")


def loss_of(rows: int) -> None:
    """In chunks of 16 rows."""
    hidden, weight = torch.randn(2, rows, 8), torch.randn(2, 96, 8)
    arguments = hidden[0].requires_grad_(), weight[0], hidden[1], weight[1], torch.zeros(rows, dtype=torch.int64)
    options = {"sampling_logprob": torch.zeros(rows + 1)[1:], "advantage": torch.zeros(rows)}
    linear_distill_loss(*arguments, torch.ones(rows), workspace_bytes=16 * 8 * 96, **options)


def statistics_of(rows: int) -> None:
    logits, upstream = torch.randn(2, rows, 96), torch.randn(6, rows)
    token_ids = torch.zeros(rows + 1, dtype=torch.int64)[1:]
    stats, normalisers = triton_reverse_kl.reverse_kl_forward(*logits, token_ids, 1.0)
    triton_reverse_kl.reverse_kl_backward(
        *logits, token_ids, stats, normalisers, upstream, torch.empty_like(logits[0]), 1.0
    )


def sample_of(rows: int) -> None:
    sample(torch.randn(rows, 96), temperature=0.7, top_k=rows, seed=rows, step=rows)


def record(bind, kinds: set, *args, grid, warmup, num_warps, **options) -> None:
    kinds.add(str(bind(*args, **options)[1]))


def check_specialisations() -> None:
    """A launcher compiles one kernel, whatever the number of rows is: launches are recorded, and nothing runs."""
    backend._interpreting = True  # the launchers of CUDA, for tensors on a CPU
    target, seen = make_backend(GPUTarget("cuda", 90, 32)), defaultdict(set)
    kernels = triton_rows._rows_kernel, triton_reverse_kl._backward_kernel, triton_sample._sample_kernel
    for launch in loss_of, statistics_of, sample_of:
        for kernel in kernels:
            bind = create_function_from_signature(kernel.signature, kernel.params, target)
            kernel.run = partial(record, bind, seen[launch.__name__, kernel.__name__])
        for rows in (1, 2, 15, 16, 17, 64):
            launch(rows)
    for kernel in kernels:
        del kernel.run
    assert sum(map(len, seen.values())) >= 4
    for key, kinds in seen.items():
        assert len(kinds) <= 1, f"{key}: compiled {len(kinds)} times\n" + "\n".join(sorted(kinds))


def attention_type_of(name: str, floats: str) -> str:
    types = {"pieces": FLOATS, "piece_lse": FLOATS, "ended": "*i1", "scale_log2": "fp32"}
    types |= dict.fromkeys(("position", "row_start", "left_padding"), "*i64")
    tensors = ("query", "keys", "values", "prompt_keys", "prompt_values", "out")
    return types.get(name, floats if name in tensors else "i32")


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of its stack, which holds what found no register."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", shown.stdout).groups()
    return int(registers), int(stack)


def compile_attention(kernel, floats: str, most_registers: int, warps: int = 4, stages: int = 3, **constants) -> None:
    names = [parameter.name for parameter in kernel.params]
    signature = {n: "constexpr" if n in constants else attention_type_of(n, floats) for n in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = [
        name
        for name, kind in signature.items()
        if kind.startswith("*") or name.endswith(("row", "head", "slot"))  # pointers and strides
    ]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    for capability in (80, 90):
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": warps, "num_stages": stages},
        )
        registers, stack = resources(compiled.asm["cubin"])
        shared = compiled.metadata.shared
        used = f"{registers} registers, {stack} bytes of stack, {shared} of shared memory"
        print(f"compiled {kernel.__name__} for {capability}: {floats} {constants}, {used}")
        # 32 bytes of stack are no spill of the loop; 99 KB of shared memory are what the smallest cards have.
        assert registers <= most_registers, used
        assert stack <= 32, used
        assert shared <= 99 * 1024, used


def attention() -> None:
    for dtype, D, most_registers in (
        (torch.bfloat16, 64, 128),
        (torch.bfloat16, 80, 168),
        (torch.bfloat16, 128, 168),
        (torch.bfloat16, 256, 128),
        (torch.float32, 64, 168),
        (torch.float32, 128, 168),
    ):
        floats = "*bf16" if dtype == torch.bfloat16 else FLOATS
        block_d = triton.next_power_of_2(D)
        for prompts in (4, 0):
            plan = triton_decode_attention.plan(64, 16, 8, D, 512, dtype.itemsize, B=prompts, P=256, rows=16)
            compile_attention(
                triton_decode_attention._pieces_kernel, floats, most_registers, plan.warps, plan.stages,
                HQ=16, HKV=8, D=D, BLOCK_D=block_d, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, OWN_M=16,
                PROMPT=prompts > 0, PADDED=True, ENDED=True, ONLY=False, PRECISION="ieee",
            )  # fmt: skip
    compile_attention(
        triton_decode_attention._merge_kernel, "*bf16", 64, HQ=16, D=128, BLOCK_D=128, HEADS=8, PIECES=5, ENDED=True
    )


def main() -> None:
    attention()
    check_specialisations()
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
