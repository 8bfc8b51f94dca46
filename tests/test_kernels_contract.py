"""What holds for every kernel op: errors, torch.compile, offsets, memory, and that the Triton source compiles."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels_common import INTERPRETING, over_implementations, running

from benchmarks.harness import peak_memory
from distill_kernels import backend, checks, linear_distill_loss, linear_reverse_kl, reverse_kl, sample
from distill_kernels.chunks import ROW_ALIGNMENT, row_buffer, rows_per_chunk, workspace

RUNS_TRITON = INTERPRETING or torch.cuda.is_available()
if RUNS_TRITON:
    import triton
    import triton.language as tl

    from distill_kernels.triton_math import offset_of

    @triton.jit
    def store_offsets(out, index, stride):
        tl.store(out, offset_of(index, stride))
        tl.store(out + 1, tl.sum(offset_of(index + tl.arange(0, 1), stride), 0))


def logits_and_ids(K=4, V=9, device="cpu"):
    return torch.randn(K, V, device=device), torch.randn(K, V, device=device), torch.arange(K, device=device)


def linear_arguments(K=4, V=9, Hs=3, Ht=5, device="cpu"):
    return [
        torch.randn(K, Hs, device=device),
        torch.randn(V, Hs, device=device),
        torch.randn(K, Ht, device=device),
        torch.randn(V, Ht, device=device),
        torch.arange(K, device=device) % V,
        torch.rand(K, device=device),
    ]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"student": torch.randn(9)}, ValueError, ["student_logits", "[9]"]),
        ({"teacher": torch.randn(5, 9)}, ValueError, ["teacher_logits", "[4, 9]", "[5, 9]"]),
        ({"teacher": torch.randn(4, 8)}, ValueError, ["vocab_size", "9 and 8"]),
        ({"ids": torch.arange(3)}, ValueError, ["token_ids", "[4]", "[3]"]),
        ({"ids": torch.arange(4).int()}, ValueError, ["token_ids", "int64", "int32"]),
        ({"student": torch.ones(4, 9, dtype=torch.int32)}, ValueError, ["student_logits", "int32"]),
        ({"teacher": torch.randn(4, 9, device="meta")}, ValueError, ["teacher_logits", "meta", "cpu"]),
        ({"ids": torch.tensor([0, 1, 2, 9])}, IndexError, ["token_ids", "[0, 9)", "9"]),
        ({"ids": torch.tensor([0, -1, 2, 3])}, IndexError, ["token_ids", "-1"]),
        ({"vocab_size": 10}, ValueError, ["vocab_size", "10"]),
        ({"vocab_size": 0}, ValueError, ["vocab_size", "0"]),
        ({"vocab_size": 3}, IndexError, ["token_ids", "[0, 3)"]),
        ({"temperature": 0.0}, ValueError, ["temperature", "0.0"]),
    ],
)
def test_errors_of_reverse_kl(change, error, words):
    student, teacher, ids = logits_and_ids()
    arguments = {"student": student, "teacher": teacher, "ids": ids} | change
    with pytest.raises(error) as raised:
        reverse_kl(arguments.pop("student"), arguments.pop("teacher"), arguments.pop("ids"), **arguments)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, torch.randn(4), ["student_hidden", "[4]"]),
        (0, torch.randn(4, 4), ["student_hidden", "student_weight", "[4, 4]", "[9, 3]"]),
        (2, torch.randn(6, 5), ["student_hidden", "teacher_hidden", "[4, 3]", "[6, 5]"]),
        (3, torch.randn(8, 5), ["vocab_size", "9 and 8"]),
        (4, torch.arange(5), ["token_ids", "[4]", "[5]"]),
        (5, torch.rand(3), ["token_weight", "[4]", "[3]"]),
        (5, torch.ones(4, dtype=torch.int64), ["token_weight", "int64"]),
        (1, torch.randn(9, 3, device="meta"), ["student_weight", "meta"]),
    ],
)
def test_errors_of_linear_ops(position, value, words):
    arguments = linear_arguments()
    arguments[position] = value
    with pytest.raises(ValueError, match=words[0]) as raised:
        linear_distill_loss(*arguments)
    assert all(word in str(raised.value) for word in words), raised.value
    if position < 5:
        with pytest.raises(ValueError, match=words[0]):
            linear_reverse_kl(*arguments[:5])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "kl"}, ["objective", "'kl'", "reverse_kl"]),
        ({"objective": "jsd", "beta": 1.0}, ["beta", "1.0"]),
        ({"objective": "jsd", "importance_clip": 2.0}, ["importance_clip", "sampled_reverse_kl"]),
        ({"objective": "reverse_kl", "advantage": torch.zeros(4)}, ["advantage", "sampled_reverse_kl", "'reverse_kl'"]),
        ({"sampling_logprob": torch.zeros(5)}, ["sampling_logprob", "[4]", "[5]"]),
        ({"advantage": torch.zeros(5)}, ["advantage", "[4]", "[5]"]),
        ({"task_advantage": torch.zeros(5)}, ["task_advantage", "[4]", "[5]"]),
        ({"student_bias": torch.zeros(8)}, ["student_bias", "[9]", "[8]"]),
        ({"teacher_softcap": -1.0}, ["teacher_softcap", "-1.0"]),
        ({"temperature": float("nan")}, ["temperature", "nan"]),
    ],
)
def test_errors_of_options(options, words):
    with pytest.raises(ValueError, match=words[0]) as raised:
        linear_distill_loss(*linear_arguments(), **options)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher_weight": torch.randn(9, 5)}, ["teacher_hidden", "teacher_weight alone"]),
        ({"teacher_logprob": None}, ["teacher_logprob or advantage"]),
        ({"teacher_logprob": torch.zeros(3)}, ["teacher_logprob", "[4]", "[3]"]),
        ({"objective": "reverse_kl"}, ["sampled_reverse_kl only", "'reverse_kl'"]),
        ({"teacher_scale": 2.0}, ["teacher_scale", "teacher_hidden"]),
        ({"teacher_hidden": torch.randn(4, 5), "teacher_weight": torch.randn(9, 5)}, ["teacher_logprob", "None"]),
        ({"vocab_size": 10}, ["vocab_size", "10"]),
    ],
)
def test_errors_without_a_teacher(change, words):
    student_hidden, student_weight, _, _, ids, token_weight = linear_arguments()
    teacher = [change.pop(name, None) for name in ("teacher_hidden", "teacher_weight")]
    options = {"teacher_logprob": torch.zeros(4)} | change
    with pytest.raises(ValueError, match=r"teacher|vocab_size") as raised:
        linear_distill_loss(student_hidden, student_weight, *teacher, ids, token_weight, **options)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": torch.arange(2)},
        {"seed": torch.tensor(1.0)},
        {"step": torch.arange(2)},
        {"step": torch.tensor(1, device="meta")},
    ],
    ids=str,
)
def test_errors_of_sample(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        sample(torch.randn(2, 5), **({"seed": 0, "step": 0} | options))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_range_checks_on_cuda_are_for_those_who_ask():
    """Without the check an id out of range gives NaN for its row, and nothing waits for the GPU."""
    student, teacher, ids = logits_and_ids(device="cuda")
    ids[2] = 9
    with torch.cuda.device("cuda"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            stats = reverse_kl(student, teacher, ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert stats.student_logprob.isnan().tolist() == [False, False, True, False]
    checks.check_cuda_values(True)
    try:
        with pytest.raises(IndexError):
            reverse_kl(student, teacher, ids)
    finally:
        checks.check_cuda_values(False)


@over_implementations
def test_compile_whole_graphs(implementation):
    """torch.compile(fullgraph=True) of functions around each op gives the eager values and gradients."""
    torch.manual_seed(0)
    with running(implementation, block=16) as device:
        arguments = linear_arguments(device=device)
        hidden, weight = (tensor.requires_grad_() for tensor in arguments[:2])
        logits, teacher, ids = logits_and_ids(device=device)

        def linear(hidden, weight):
            loss, stats = linear_distill_loss(hidden * 2, weight, *arguments[2:], objective="jsd")
            alone, _ = linear_distill_loss(
                hidden, weight, None, None, *arguments[4:], teacher_logprob=stats.teacher_logprob
            )
            scores = linear_reverse_kl(hidden, weight, *arguments[2:5])
            return loss + alone + scores.reverse_kl.sum() + stats.reward.sum()

        def from_logits(logits):
            stats = reverse_kl(logits * 1.5, teacher, ids, temperature=0.7)
            return (stats.reverse_kl * stats.reward + stats.student_entropy).sum()

        for function, leaves in ((linear, (hidden, weight)), (from_logits, (logits.requires_grad_(),))):
            eager, compiled = function(*leaves), torch.compile(function, fullgraph=True)(*leaves)
            torch.testing.assert_close(compiled, eager)
            for ours, truth in zip(
                torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True
            ):
                torch.testing.assert_close(ours, truth)

        def draw(logits, seed, step):
            drawn = sample(logits * 2, top_p=0.9, seed=seed, step=step)
            return drawn.token_ids, drawn.logprob + drawn.sampling_logprob

        step = torch.tensor(3, device=device)
        for seed in (1, step):
            given = logits.detach(), seed, step
            for ours, truth in zip(torch.compile(draw, fullgraph=True)(*given), draw(*given), strict=True):
                torch.testing.assert_close(ours, truth)


@over_implementations
def test_registration(implementation):
    """Schema, fake implementation, autograd registration and dynamic shapes, as PyTorch's own checker sees them."""
    with running(implementation, block=16) as device:
        logits, teacher, ids = logits_and_ids(device=device)
        ops = torch.ops.distill_kernels
        torch.library.opcheck(ops.reverse_kl.default, (logits.requires_grad_(), teacher, ids, 0.7, 8))
        hidden, weight, *teacher_side, ids, token_weight = linear_arguments(device=device)
        needed = [True, True, False]
        student_side = (hidden.requires_grad_(), weight.requires_grad_(), None)
        options = (None, None, token_weight, needed, 1, None, 0.5, 1.0, 9, None, None, 1.0, 1.0, None, True)
        torch.library.opcheck(
            ops.linear_distill_loss.default, (*student_side, *teacher_side, None, ids, token_weight, *options)
        )
        alone = (None, None, token_weight, token_weight, needed, None, 1.0, 9, None, 1.0, None, True)
        # Without the check that traces: what is not known is NaN, which equals nothing. The test above compiles it.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(
            ops.linear_student_loss.default, (*student_side, ids, token_weight, *alone), test_utils=checks
        )
        scoring = (*linear_arguments(device=device)[:5], None, None, None, None, 1.0, 1.0, 1.0, 9, None, False)
        torch.library.opcheck(ops.linear_reverse_kl.default, scoring)
        step, seed = torch.tensor([0, 7], device=device)
        torch.library.opcheck(ops.sample.default, (teacher, ids, step, seed, 1.0, 3, 0.9, 0.0))


def test_autocast_leaves_the_ops_alone():
    torch.manual_seed(1)
    arguments = linear_arguments(K=6, V=50)
    plain = linear_distill_loss(*arguments)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_distill_loss(*arguments)[0], plain)


def test_memory_of_a_cpu_call():
    """Extra memory is the workspace and the gradients, whatever K is: no [K, V] tensor (here 160 MiB) exists."""
    K, V, H = 2048, 20_480, 16
    hidden, weight, *rest = linear_arguments(K, V, H, H)
    hidden.requires_grad_(), weight.requires_grad_()

    def step(rows=slice(None)):
        of_rows = [rest[0][rows], rest[1], rest[2][rows], rest[3][rows]]
        loss, _ = linear_distill_loss(hidden[rows], weight, *of_rows, objective="jsd", workspace_bytes=16 * 2**20)
        return torch.autograd.grad(loss, (hidden, weight))

    step(slice(64))
    assert peak_memory(step) < 48 * 2**20
    logits, teacher = torch.randn(2, 1024, V)
    reverse_kl(logits[:64], teacher[:64], rest[2][:64])
    assert peak_memory(lambda: reverse_kl(logits, teacher, rest[2][:1024])) < 32 * 2**20


def test_rows_per_chunk():
    cpu = torch.device("cpu")
    assert rows_per_chunk(2048, 49_152, 8, 128 * 2**20, cpu) == 336
    assert rows_per_chunk(100, 49_152, 8, 128 * 2**20, cpu) == 100
    assert rows_per_chunk(5, 10**9, 8, 1, cpu) == 1
    assert rows_per_chunk(0, 10, 8, None, cpu) == 1
    cuda = torch.device("cuda")
    assert rows_per_chunk(10**6, 151_936, 10, 2**31, cuda) == 1408
    assert rows_per_chunk(10**6, 151_936, 8, 2**31, cuda) == 1664  # 1,766 fit
    if not torch.cuda.is_available():
        assert workspace(cuda, 80 * 2**30) == 4 * 2**30
        assert workspace(cuda, 24 * 2**30) == 3 * 2**29
    assert rows_per_chunk(100, 151_936, 8, None, cuda) == 100
    assert rows_per_chunk(200, 65, 8, 8 * 128 * 100, cuda) == 96  # columns are padded to 128


def test_row_buffer(monkeypatch):
    """Rows are as wide as asked for, and begin at multiples of the alignment."""
    cpu = torch.device("cpu")
    assert row_buffer(3, 65, torch.float32, cpu).is_contiguous()
    monkeypatch.setitem(ROW_ALIGNMENT, "cpu", 64)
    buffer = row_buffer(3, 65, torch.bfloat16, cpu)
    assert (buffer.shape, buffer.stride()) == ((3, 65), (128, 1))


@pytest.mark.skipif(not RUNS_TRITON, reason="needs a process that runs Triton source")
def test_offsets_pass_2_to_the_31_interpreted():
    """Row and column offsets, as the kernels compute them from int32 arguments."""
    out = torch.zeros(2, dtype=torch.int64, device="cuda" if torch.cuda.is_available() else "cpu")
    store_offsets[(1,)](out, 14_200, 151_936)
    assert out.tolist() == [14_200 * 151_936] * 2
    assert out[0] > 2**31


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_rows_past_2_to_the_31_elements():
    """The last rows of a tensor of more than 2^31 logits give what they give alone, gradient included."""
    K, V = 14_200, 151_936
    student = torch.randn(1, V, device="cuda", dtype=torch.bfloat16).repeat(K, 1)
    student[-2:] = torch.randn(2, V, device="cuda", dtype=torch.bfloat16)
    teacher = torch.randn(1, V, device="cuda", dtype=torch.bfloat16).expand(K, -1)
    ids = torch.arange(K, device="cuda")
    leaf, alone = student.requires_grad_(), student[-2:].detach().clone().requires_grad_()
    all_rows, last = reverse_kl(leaf, teacher, ids), reverse_kl(alone, teacher[-2:], ids[-2:])
    assert torch.equal(all_rows.reverse_kl[-2:], last.reverse_kl)
    (gradient,) = torch.autograd.grad(all_rows.reverse_kl[-2:].sum(), leaf)
    assert torch.equal(gradient[-2:], torch.autograd.grad(last.reverse_kl.sum(), alone)[0])
    del gradient
    drawn = sample(student.detach(), top_p=0.9, seed=0, step=0)
    assert torch.equal(
        drawn.token_ids[-2:], sample(student[-2:].detach(), top_p=0.9, seed=0, step=0, row_ids=ids[-2:]).token_ids
    )


@pytest.mark.skipif(INTERPRETING, reason="the interpreter replaces the kernels")
def test_interpreter_is_never_silent():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), backend.interpreted():
        pass


@pytest.mark.skipif(INTERPRETING, reason="the interpreter replaces the kernels")
def test_triton_source_compiles_for_a_gpu():
    """Every kernel, in all its variants, becomes machine code for compute capability 9.0 and 8.0, without a GPU."""
    script = Path(__file__).with_name("kernels_compile.py")
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, str(script)], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("compiled") >= 40


@pytest.mark.parametrize("path", sorted(Path(backend.__file__).parent.glob("triton_*.py")), ids=lambda path: path.stem)
def test_every_launch_says_whether_products_and_sums_are_fused(path):
    """triton's default is another one from 3.10 on."""
    launches = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and "kernel" in ast.unparse(node.func)
    ]
    for launch in launches:
        expanded = [ast.unparse(keyword.value) for keyword in launch.keywords if keyword.arg is None]
        assert any(name in ("FUSION", "options", "launch_options(V)") for name in expanded), f"line {launch.lineno}"
