"""Compiles every Triton kernel to machine code, which needs no GPU; a line a variant. A process of its own runs it."""

import re
import subprocess
import tempfile
from collections import defaultdict
from functools import partial
from itertools import product
from pathlib import Path

import torch
import triton
from kernels_common import tensor_cores
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from distill_kernels import (
    PrefixLayout,
    Sample,
    Shared,
    TopTokens,
    backend,
    chunks,
    linear_distill_loss,
    prefix_attention,
    record_draw,
    sample,
    student_product,
    triton_decode_attention,
    triton_decode_linear,
    triton_math,
    triton_prefix_attention,
    triton_prefix_blocks,
    triton_prefix_gradients,
    triton_product_rows,
    triton_record_draw,
    triton_rest_rows,
    triton_reverse_kl,
    triton_rows,
    triton_sample,
    triton_student_product,
    triton_student_rows,
)

FLOATS = "*fp32"
POINTERS = {
    "student_ptr": FLOATS, "teacher_ptr": FLOATS, "student_bias": FLOATS, "teacher_bias": FLOATS, "logits": "*bf16",
    "token_ids": "*i64", "at_sampling_ptr": FLOATS, "advantage_ptr": FLOATS, "task_ptr": FLOATS, "weight_ptr": FLOATS,
    "stats": FLOATS, "normalisers": FLOATS, "losses": FLOATS, "lost": FLOATS,
    "row_scale": FLOATS, "grad_ptr": "*bf16", "gradient_ptr": "*bf16", "upstream": FLOATS, "row_ids": "*i64",
    "step_ptr": "*i64", "logprobs": FLOATS,
    "hidden": "*bf16", "weight": "*bf16", "teacher": FLOATS, "e_ptr": "*bf16",
    "per_row": FLOATS, "part": FLOATS, "shifts": FLOATS,
    "out": "*bf16", "lse": FLOATS, "other_out": "*bf16", "other_lse": FLOATS,
    "drawn_token_ids": "*i64", "drawn_logprob": FLOATS, "drawn_sampling_logprob": FLOATS, "rows": "*i64",
    "ended": "*i1", "ends": "*i64", "lengths": "*i64", "logprob": FLOATS, "sampling_logprob": FLOATS, "finished": "*i1",
    "found": FLOATS, "log_total_ptr": FLOATS, "coefficient_ptr": FLOATS,
    "go_on": "*i64", "seed_ptr": "*i64", "peaks": FLOATS, "thresholds": FLOATS, "pieces": FLOATS, "winners": "*i32",
}  # fmt: skip
INTEGERS = {"V", "R", "M", "E", "T", "pad_token_id", "top_k", "tiles"}
SHARED_MEMORY = 227 * 1024  # bytes, of a block on compute capability 9.0
CAPABILITIES = 80, 90, 100
REGISTERS = 2**16  # of a multiprocessor
MOST_STACK = 32  # bytes: no spill of a loop


def type_of(name: str) -> str:
    if name in POINTERS:
        return POINTERS[name]
    return "i32" if name in INTEGERS or name.endswith(("stride", "step")) else "fp32"


def build(kernel, capability: int, types, constants: dict, aligned=lambda name, kind: False, **options):
    """A kernel whose parameters have `types(name)` but for the constants; 16 divides those that are `aligned`."""
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else types(name) for name in names}
    source = ASTSource(
        fn=kernel, signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(signature.items())
               if kind != "constexpr" and aligned(name, kind)},
    )  # fmt: skip
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={**options, **triton_math.FUSION})


def counted(compiled, *instructions: str) -> list[int]:
    return [len(re.findall(name, compiled.asm["sass"])) for name in instructions]


def compile_kernel(kernel, warps: int, **constants) -> list[str]:
    """As a launch on contiguous logits with a number of columns that 16 divides compiles it: steps of 1 are constants,
    and pointers and strides that are specialised are known to be aligned. The PTX for each of the CAPABILITIES."""
    names = [parameter.name for parameter in kernel.params]
    specialised = [parameter for parameter in kernel.params if not parameter.do_not_specialize]
    constants |= {p.name: 1 for p in specialised if p.name.endswith("_step")}
    aligned = [p.name for p in specialised if not p.do_not_specialize_on_alignment]
    divides = lambda name, kind: name in aligned and kind[0] in "*i"  # noqa: E731
    made = []
    for capability in CAPABILITIES:
        compiled = build(kernel, capability, type_of, constants, divides, num_warps=warps)
        registers, stack = resources(compiled.asm["cubin"])
        used = f"{registers} registers, {stack} bytes of stack"
        assert registers * 32 * warps <= REGISTERS, f"{kernel.__name__}: {used}"
        assert stack <= MOST_STACK, f"{kernel.__name__}: {used}"
        if constants.get("BLOCK", 0) >= 128 * warps and "student_ptr" in names:
            assert "ld.global.v4" in compiled.asm["ptx"], f"{kernel.__name__} loads column by column"
        print(f"compiled {kernel.__name__} for {capability}: {constants}, {used}")
        made.append(compiled.asm["ptx"])
    return made


def compile_prefix_attention() -> None:
    """The memory of each kind of card holds what a program needs; on Hopper its matrix instructions overlap."""
    module, gradients = triton_prefix_blocks, triton_prefix_gradients
    kernels = triton_prefix_attention._forward_kernel, gradients.query_kernel, gradients.key_kernel
    plain, whole = ({"WINDOW": extra, "CAP": extra, "SINKS": extra} for extra in (False, True))
    for (capability, table, memory), D, extras in product(
        ((80, module.LARGE, 163), (90, module.LARGE, 227), (100, module.LARGE, 227), (89, module.SMALL, 99)),
        (64, 128, 256),
        (plain, whole),
    ):
        if extras is whole and capability != 90:  # the same memory
            continue
        chosen = next(found for most, found in table.items() if most >= D)
        for kernel, block in zip(kernels, chosen, strict=True):
            constants = {
                "HEADS": 16, "KV_HEADS": 8, "GROUP": 2, "D": D, "BLOCK_D": D, "DV": D, "BLOCK_DV": D, **extras,
                "PRECISION": "ieee", **module.sizes(block),
            }  # fmt: skip
            warps, names = constants.pop("num_warps"), [parameter.name for parameter in kernel.params]
            constants = {name: value for name, value in constants.items() if name in names}
            divides = lambda name, kind: kind[0] in "*i" and name not in ("L", "window")  # noqa: E731
            compiled = build(kernel, capability, prefix_type_of, constants, divides, num_warps=warps)
            used = f"{compiled.metadata.shared} bytes of shared memory"
            print(f"compiled {kernel.__name__} for {capability}: D {D}, {block}, {extras}, {used}")
            assert compiled.metadata.shared <= memory * 1024, used
            if capability == 90:  # as many waits as products would run them one after another
                products, waits = (
                    len(re.findall(name, compiled.asm["sass"])) for name in ("HGMMA", r"WARPGROUP\.DEPBAR")
                )
                assert waits <= max(8, products // 8), f"{kernel.__name__}: {waits} waits for {products} products"


def prefix_type_of(name: str) -> str:
    floats = dict.fromkeys(("sinks", "lse", "delta", "key_parts", "value_parts"), FLOATS)
    integers = dict.fromkeys(("tiles", "jobs", "places", "sums"), "*i32")
    halves = ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value")
    kinds = {**floats, **integers, **dict.fromkeys(halves, "*bf16")}
    return kinds.get(name) or ("fp32" if name.startswith(("scale", "cap")) else "i32")


def compile_product() -> None:
    """The student's product as it runs: it fits, its matrix instructions overlap, and registers hold its numbers."""
    tile, kernel = triton_student_product.TILE, triton_student_product._product_kernel
    part = f"{tile.rows},{tile.columns // triton_student_product.PARTS}"
    descriptors = {
        "hidden_desc": f"tensordesc<bf16[{tile.rows},{tile.inner}]>",
        "weight_desc": f"tensordesc<bf16[{tile.columns},{tile.inner}]>",
        "teacher_desc": f"tensordesc<fp32[{part}]>",
        "e_desc": f"tensordesc<bf16[{part}]>",
    }
    constants = {"STEPS": 16, "GROUP": 16, "PROGRAMS": 132, "BM": tile.rows, "BN": tile.columns, "BK": tile.inner}
    types = lambda name: descriptors.get(name) or type_of(name)  # noqa: E731
    compiled = build(kernel, 90, types, constants, num_warps=tile.warps, num_stages=tile.stages)
    assert compiled.metadata.shared <= SHARED_MEMORY, f"{compiled.metadata.shared} bytes of shared memory"
    products, waits, spilled = counted(compiled, "HGMMA", r"WARPGROUP\.DEPBAR", "STL")
    assert products == tile.inner // 16, f"{products} matrix instructions in the loop"
    assert waits <= 3, f"{waits} waits: more than one a step, which runs the matrix instructions one after another"
    assert spilled < 64, f"{spilled} registers stored; a few are addresses, once before the loop, 128 hold the tile"
    print(f"compiled {kernel.__name__} for 90: {compiled.metadata.shared} bytes")


def compile_product_rows() -> None:
    """What comes before and after the student's product."""
    rows, tile = triton_product_rows, triton_student_product.TILE
    compile_kernel(triton_student_product._references_kernel, 4, H=1024, BLOCK=1024)
    for extras in (False, True):
        compile_kernel(rows._finish_kernel, 8, IMPORTANCE=extras, ADVANTAGE=extras, ROWS=32, TILES=32)
    compile_kernel(rows._target_kernel, 4, COLUMNS=tile.columns, COUNT=8)


def loss_of(rows: int, dtype: torch.dtype = torch.float32) -> None:
    """In chunks of 16 rows."""
    hidden, weight = torch.randn(2, rows, 8).to(dtype), torch.randn(2, 96, 8).to(dtype)
    arguments = hidden[0].requires_grad_(), weight[0], hidden[1], weight[1], torch.zeros(rows, dtype=torch.int64)
    options = {"sampling_logprob": torch.zeros(rows + 1)[1:], "advantage": torch.zeros(rows)}
    if not student_product.STUDENT_PRODUCT:  # which leaves a task's advantage to the row kernel
        options["task_advantage"] = torch.zeros(rows + 1)[1:]
    linear_distill_loss(*arguments, torch.ones(rows), workspace_bytes=16 * 10 * 128, **options)


def student_loss_of(rows: int, dtype: torch.dtype = torch.float32) -> None:
    """`loss_of` with a teacher elsewhere."""
    hidden, weight, vectors = torch.randn(rows, 8).to(dtype), torch.randn(96, 8).to(dtype), torch.zeros(3, rows + 1)
    vectors = vectors[:, 1:]
    said = dict(zip(("teacher_logprob", "sampling_logprob", "advantage"), vectors, strict=True))
    said["task_advantage"] = vectors[0]
    arguments = hidden.requires_grad_(), weight, None, None, torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    linear_distill_loss(*arguments, workspace_bytes=16 * 6 * 128, **said)


def rounded_losses_of(rows: int) -> None:
    """Both in half precision, whose row kernels weigh the gradient and say what they rounded off."""
    with tensor_cores():
        loss_of(rows, torch.bfloat16), student_loss_of(rows, torch.bfloat16)


def top_loss_of(rows: int) -> None:
    """`loss_of` with a teacher elsewhere that names two tokens."""
    hidden, weight, ids = torch.randn(rows, 8), torch.randn(96, 8), torch.zeros(rows, dtype=torch.int64)
    top = TopTokens(torch.arange(2).expand(rows, 2), torch.full((rows, 2), -2.0))
    arguments = hidden.requires_grad_(), weight, None, None, ids, torch.ones(rows)
    linear_distill_loss(*arguments, objective="reverse_kl", teacher_top=top, workspace_bytes=16 * 6 * 128)


def product_of(rows: int) -> None:
    """`loss_of` through the student's product."""
    student_product.STUDENT_PRODUCT = True
    loss_of(rows)
    student_product.STUDENT_PRODUCT = False


def statistics_of(rows: int) -> None:
    logits, upstream = torch.randn(2, rows, 96), torch.randn(6, rows)
    token_ids = torch.zeros(rows + 1, dtype=torch.int64)[1:]
    stats, normalisers = triton_reverse_kl.reverse_kl_forward(*logits, token_ids, 1.0)
    triton_reverse_kl.reverse_kl_backward(
        *logits, token_ids, stats, normalisers, upstream, torch.empty_like(logits[0]), 1.0
    )


def sample_of(rows: int) -> None:
    sample(torch.randn(rows, 96), temperature=0.7, top_k=rows, seed=rows, step=rows)


def attention_of(rows: int, **options) -> None:
    """Of `rows` completions of 5 tokens, with gradients."""
    segments, shared = [3] + [5] * rows, [Shared(0, 3, 3, 5 * rows)]
    query, key, value = (torch.zeros(3 + 5 * rows, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    layout = PrefixLayout(segments, shared, lambda index: index)
    prefix_attention(query, key, value, layout, 0.25, **options).sum().backward()


def windowed_attention_of(rows: int) -> None:
    attention_of(rows, window=rows, softcap=0.5)


def draw_of(rows: int) -> None:
    """In the last of as many completions' slots as there are rows."""
    whole, vector = torch.zeros(2, rows, rows), torch.zeros(rows, dtype=torch.int64)
    ended, numbers = torch.zeros(2, rows, dtype=torch.bool), torch.zeros(rows, rows, dtype=torch.int64)
    out = {"token_ids": numbers, "lengths": vector + 0, "logprob": whole[0], "sampling_logprob": whole[1]}
    drawn = Sample(vector + 1, *torch.zeros(2, rows))
    record_draw(drawn, rows - 1, torch.arange(rows), ended[0], vector[:3], rows, **out, finished=ended[1])


def record(bind, kinds: set, *args, grid, warmup, num_warps, num_stages=None, enable_fp_fusion, **options) -> None:
    kinds.add(str(bind(*args, **options)[1]))


def check_specialisations() -> None:
    """A launcher compiles one kernel, whatever the number of rows is: launches are recorded, and nothing runs."""
    backend._interpreting = True  # the launchers of CUDA, for tensors on a CPU
    target, seen = make_backend(GPUTarget("cuda", 90, 32)), defaultdict(set)
    kernels = (
        triton_rest_rows._sums_kernel, triton_rest_rows._gradient_kernel,
        triton_rows._rows_kernel, triton_student_rows._student_rows_kernel, triton_reverse_kl._backward_kernel,
        triton_sample._threshold_kernel, triton_sample._race_kernel, triton_sample._merge_kernel,
        triton_student_product._references_kernel, triton_student_product._product_kernel,
        triton_product_rows._finish_kernel, triton_product_rows._target_kernel, triton_record_draw._record_kernel,
        triton_prefix_attention._forward_kernel, triton_prefix_gradients.query_kernel,
        triton_prefix_gradients.key_kernel, triton_prefix_gradients.sum_kernel,
    )  # fmt: skip
    chunks.ROW_ALIGNMENT["cpu"] = 64
    student_product.STUDENT_PRODUCT = False
    for launch in (
        loss_of, student_loss_of, rounded_losses_of, top_loss_of, product_of, statistics_of, sample_of, draw_of,
        attention_of,
        windowed_attention_of,
    ):  # fmt: skip
        for kernel in kernels:
            bind = create_function_from_signature(kernel.signature, kernel.params, target)
            kernel.run = partial(record, bind, seen[launch.__name__, kernel.__name__])
        for rows in (1, 2, 15, 16, 17, 64):
            launch(rows)
    for kernel in kernels:
        del kernel.run
    assert sum(map(len, seen.values())) >= 10
    for key, kinds in seen.items():
        assert len(kinds) <= 1, f"{key}: compiled {len(kinds)} times\n" + "\n".join(sorted(kinds))


def attention_type_of(name: str, floats: str) -> str:
    types = {"pieces": FLOATS, "piece_lse": FLOATS, "ended": "*i1", "scale_log2": "fp32", "cap_log2": "fp32"}
    types |= dict.fromkeys(("position", "row_start", "left_padding"), "*i64")
    tensors = ("query", "keys", "values", "prompt_keys", "prompt_values", "new_keys", "new_values", "out", "sinks")
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
    types = partial(attention_type_of, floats=floats)
    divides = lambda name, kind: kind[0] == "*" or name.endswith(("row", "head", "slot"))  # noqa: E731 # or a stride
    for capability in CAPABILITIES:
        constants["EARLY"] = capability >= 90
        compiled = build(kernel, capability, types, constants, divides, num_warps=warps, num_stages=stages)
        registers, stack = resources(compiled.asm["cubin"])
        shared = compiled.metadata.shared
        assert ("griddepcontrol.wait" in compiled.asm["ptx"]) == constants["EARLY"]
        used = f"{registers} registers, {stack} bytes of stack, {shared} of shared memory"
        print(f"compiled {kernel.__name__} for {capability}: {floats} {constants}, {used}")
        # 99 KB of shared memory are what the smallest cards have.
        assert registers <= (most_registers if capability < 100 else 168), used  # 168: three blocks of four warps
        assert stack <= MOST_STACK, used
        assert shared <= 99 * 1024, used


def attention() -> None:
    plain = {"WINDOW": False, "CAP": False}
    for dtype, D, DV, most_registers, extras in (
        (torch.bfloat16, 64, 64, 128, plain),
        (torch.bfloat16, 64, 64, 128, {"WINDOW": True, "CAP": False}),
        (torch.bfloat16, 64, 64, 128, {"WINDOW": True, "CAP": True}),
        (torch.bfloat16, 80, 80, 168, plain),
        (torch.bfloat16, 128, 128, 168, plain),
        (torch.bfloat16, 128, 128, 168, {"WINDOW": True, "CAP": True}),
        (torch.bfloat16, 192, 128, 168, plain),
        (torch.bfloat16, 256, 256, 128, plain),
        (torch.bfloat16, 256, 256, 128, {"WINDOW": True, "CAP": True}),
        (torch.float32, 64, 64, 168, plain),
        (torch.float32, 128, 128, 168, plain),
    ):
        floats = "*bf16" if dtype == torch.bfloat16 else FLOATS
        blocks = {"BLOCK_D": triton.next_power_of_2(D), "BLOCK_DV": triton.next_power_of_2(DV)}
        for prompts, new in product((4, 0), (False, True)):
            plan = triton_decode_attention.plan(64, 16, 8, D, 512, dtype.itemsize, B=prompts, P=256, rows=16)
            compile_attention(
                triton_decode_attention._pieces_kernel, floats, most_registers, plan.warps, plan.stages,
                HQ=16, HKV=8, D=D, DV=DV, **blocks, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, OWN_M=16,
                PROMPT=prompts > 0, PADDED=True, ENDED=True, NEW=new, ONLY=False, **extras, PRECISION="ieee",
            )  # fmt: skip
    for sinks in (False, True):
        compile_attention(
            triton_decode_attention._merge_kernel, "*bf16", 64,
            HQ=16, D=128, BLOCK_D=128, HEADS=8, PIECES=5, ENDED=True, SINKS=sinks,
        )  # fmt: skip


def decode_linear_type_of(name: str) -> str:
    types = {"counters": "*i32", "R": "i32", "up_offset": "i64"}
    types |= dict.fromkeys(("squares", "cos", "sin", "parts"), FLOATS)
    return types.get(name) or ("fp32" if name.endswith("eps") else "*bf16")


def compile_decode_linear() -> None:
    """At Qwen3-0.6B's sizes, of few rows, of the most that a kernel multiplies, and of products that are ready: copies
    ahead of use, and nothing but what follows a product is spilled."""
    module = triton_decode_linear
    own = {
        module._heads_kernel: {"HQ": 16, "HKV": 8, "D": 128, "ROTARY": 128, "BIAS": True, "HEAD_NORM": True},
        module._gate_kernel: {"N": 3072},
        module._add_kernel: {"N": 1024, "BIAS": True},
    }
    squares = {"SQUARES": 32, "BLOCK_S": 32}
    for capability, (kernel, constants), rows in product((80, 90, 100), own.items(), (16, 64, None)):
        columns, K, width = {
            module._heads_kernel: (4096, 1024, 128), module._gate_kernel: (6144, 1024, None),
            module._add_kernel: (1024, 2048, None),
        }[kernel]  # fmt: skip
        ready = rows is None
        held = rows or (16 if width else 2)
        plan = module.ready_plan(width) if ready else module.plan(columns, K, 2, rows, width=width)
        stages = module.stages_of(plan, held, 2, 163 * 1024 if capability == 80 else SHARED_MEMORY)
        names = [parameter.name for parameter in kernel.params]
        constants = constants | {
            "K": K, "READY": ready, "ROWS": held, "COLUMNS": plan.columns, "PARTS": plan.parts, "INNER": plan.inner,
            "STAGES": stages, "PRECISION": "ieee",
        } | {name: value for name, value in squares.items() if name in names}  # fmt: skip
        divides = lambda name, kind: kind[0] == "*" or name == "up_offset"  # noqa: E731
        compiled = build(kernel, capability, decode_linear_type_of, constants, divides, num_warps=plan.warps)
        registers, stack = resources(compiled.asm["cubin"])
        shared, ptx = compiled.metadata.shared, compiled.asm["ptx"]
        used = f"{registers} registers, {stack} bytes of stack, {shared} of shared memory"
        print(f"compiled {kernel.__name__} for {capability}: {rows} rows, {plan}, {used}")
        assert stack <= MOST_STACK, used
        assert shared <= (163 * 1024 if capability == 80 else SHARED_MEMORY), used
        assert ready or len(re.findall(r"cp\.async\.cg", ptx)) >= 8, "nothing is copied ahead"


def main() -> None:
    attention()
    compile_decode_linear()
    check_specialisations()
    block, warps = triton_math.BLOCK, triton_math.WARPS
    for objective in range(-1, 4):
        for extras in (False, True):  # a task's advantage with any objective
            compile_kernel(
                triton_rows._rows_kernel, warps, BLOCK=block, OBJECTIVE=objective, GRADIENT=objective >= 0,
                STUDENT_BIAS=extras, TEACHER_BIAS=extras, STUDENT_CAP=extras, TEACHER_CAP=extras,
                IMPORTANCE=extras and objective >= 0, ADVANTAGE=extras and objective == 0, WEIGHT=objective >= 0,
                NORMALISERS=objective == -1, TASK=extras and objective >= 0,
                LOST=objective == 0 or (extras and objective > 0),
            )  # fmt: skip
    for extras in (False, True):
        compile_kernel(
            triton_student_rows._student_rows_kernel, warps, BLOCK=block, GRADIENT=True, STUDENT_BIAS=extras,
            STUDENT_CAP=extras, TEACHER=extras, IMPORTANCE=extras, ADVANTAGE=True, TASK=extras, WEIGHT=True, LOST=True,
        )  # fmt: skip
    for extras in (False, True):
        for kernel in (triton_rest_rows._sums_kernel, triton_rest_rows._gradient_kernel):
            compile_kernel(kernel, warps, BLOCK=block, STUDENT_BIAS=extras, STUDENT_CAP=extras)
    compile_product()
    compile_product_rows()
    compile_prefix_attention()
    compile_kernel(triton_reverse_kl._backward_kernel, warps, BLOCK=block)
    for top_k, top_p, min_p in ((True, True, True), (False, True, False)):
        compile_kernel(
            triton_sample._threshold_kernel, triton_sample.WARPS, BLOCK=triton_sample.BLOCK,
            TOP_K=top_k, TOP_P=top_p, MIN_P=min_p,
        )  # fmt: skip
    for filtered, tempered in product((False, True), repeat=2):
        compile_kernel(
            triton_sample._race_kernel, triton_sample.RACE_WARPS, BLOCK=triton_sample.RACE_BLOCK,
            FILTERED=filtered, TEMPERED=tempered,
        )  # fmt: skip
    compile_kernel(triton_sample._merge_kernel, triton_sample.MERGE_WARPS, TILES=64)
    compile_kernel(triton_record_draw._record_kernel, triton_record_draw.WARPS, BLOCK=triton_record_draw.BLOCK)


if __name__ == "__main__":
    main()
