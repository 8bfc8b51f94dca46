"""A model most of whose layers keep a state: rollouts and gradients with the prompt computed once, against without.

Four layers in Qwen3.5's shape (three of the gated delta rule, one of attention; hidden 512, V 32,000, random, float32).
Rollouts: the native engine beside stock `generate`, and beside what sharing the prompt allows stock code, which is a
prefill of one row and then decode steps of N rows. Gradients: `completion_hidden` beside plain rows, head left out.
All candidates of a test run in turn in one process; ratios are of medians.
"""

import functools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from benchmarks.harness import Row, interleave
from benchmarks.test_rollout import TOKENS, check_logprobs, native, stock
from benchmarks.test_shared_prefix import inputs_of, plain
from distill.forward import completion_hidden
from distill.rollout import SamplingOptions, local_engine

N, VOCAB_SIZE = 16, 32_000


@functools.cache
def qwen3_5() -> PreTrainedModel:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    states = {"linear_num_key_heads": 8, "linear_num_value_heads": 16}
    states |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    config = AutoConfig.for_model(
        "qwen3_5_text",
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        tie_word_embeddings=True,
        **heads,
        **states,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def prompt_once(model: PreTrainedModel, prompt_ids: torch.Tensor) -> None:
    """What stock code can do: the prompt as one row, then TOKENS - 1 steps of N rows, drawn from the plain softmax."""
    cache = DynamicCache(config=model.config)
    logits = model(prompt_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    cache.reorder_cache(torch.zeros(N, dtype=torch.int64))
    logits = logits.expand(N, -1)
    for _ in range(TOKENS - 1):
        token_ids = torch.multinomial(logits.softmax(-1), 1)
        logits = model(token_ids, past_key_values=cache, use_cache=True).logits[:, -1]
    torch.multinomial(logits.softmax(-1), 1)


@pytest.mark.parametrize(
    ("P", "times_stock", "of_once"), [(1024, 2.0, 0.8), pytest.param(256, 1.0, 0.8, marks=pytest.mark.whole_grid)]
)
def test_rollouts(P: int, times_stock: float, of_once: float, record) -> None:
    model, prompt_ids = qwen3_5(), torch.randint(VOCAB_SIZE, (1, P), generator=torch.Generator().manual_seed(P))
    options = {"sampling": SamplingOptions(TOKENS), "eos_token_ids": [], "pad_token_id": 0, "seed": 1}
    engine = local_engine(model, engine="native", precision="float32", **options)
    check_logprobs(model, engine, prompt_ids[:, :32], 1e-3)
    timings = interleave(
        {
            "ours": lambda: native(engine, prompt_ids, N),
            "stock": lambda: stock(model, prompt_ids, N),
            "stock steps after a prompt of one row": lambda: prompt_once(model, prompt_ids),
        },
        rounds=3,
        warmup=0,
    )
    seconds = {name: timing.median for name, timing in timings.items()}
    over_stock, over_once = (seconds[name] / seconds["ours"] for name in list(seconds)[1:])
    print(f"\nP {P}, N {N}, T {TOKENS}: {over_stock:.2f} x stock, {over_once:.2f} of what sharing the prompt allows it")
    for name, timing in timings.items():
        group = f"rollouts, Qwen3.5's shape, float32: 1 prompt of {P} tokens, {N} rollouts of {TOKENS} tokens each"
        record(Row(group, name, timing.median, timing.spread, tokens=N * TOKENS))
    assert over_stock >= times_stock
    assert over_once >= of_once


@pytest.mark.parametrize(("P", "T", "rows", "wanted"), [(256, 64, 16, 2.0)])
def test_gradients(P: int, T: int, rows: int, wanted: float, record) -> None:
    model, inputs = qwen3_5(), inputs_of(P, T, rows)

    def gradient(hidden_of) -> torch.Tensor:
        model.zero_grad()
        hidden_of(model.model, *inputs).square().mean().backward()
        return torch.cat([each.grad.flatten() for each in model.model.parameters()])

    ours, theirs = gradient(completion_hidden), gradient(plain)
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    candidates = {"ours": completion_hidden, "plain rows": plain}
    timings = interleave({name: functools.partial(gradient, way) for name, way in candidates.items()}, rounds=3)
    times, bound = timings["plain rows"].median / timings["ours"].median, rows * (P + T) / (P + rows * T)
    print(f"\n(P, T, N) = ({P}, {T}, {rows}): {times:.2f} x plain rows, of {bound:.2f} by tokens")
    group = f"a prompt's state shared, forward and backward, Qwen3.5's shape, (P, T, N) = ({P}, {T}, {rows})"
    for name, timing in timings.items():
        record(Row(group, name, timing.median, timing.spread))
    assert times >= wanted
