"""Rollouts of a real model in several shapes: the native engine, stock `generate` and a vLLM server, side by side.

The same weights, prompts and lengths, stock generation once and the others in interleaved rounds, the server stopped
while others are timed. Each is shown as a fraction of what the machine's limits, measured in the same run, allow: the
products and the bytes of the weights and of all keys, those of a prompt read once for its rollouts.
The server gets all prompts in one request, without a seed: 53 seeded requests at once end vLLM 0.32 on a CPU.
Refreshing its weights is timed by itself.
The server is there with DISTILL_VLLM_PYTHON naming the interpreter that tests/vllm/environment.sh made.
"""

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig

from benchmarks.harness import Row, copy_bandwidth, gemm_rate, interleave
from benchmarks.test_rollout import (
    SMOLLM2,
    check_logprobs,
    engine_of,
    model_of,
    native,
    prompts_of,
    stock,
    stock_of,
)
from benchmarks.vllm_server import PYTHON, VllmServer
from distill.models import load_tokenizer
from distill.rollout import SamplingOptions, ServedWeights, VllmEngine
from distill.servers import Server

# Prompts, their tokens, rollouts a prompt, tokens of a rollout: those of the default run's batch and longer ones.
CELLS = [(4, 40, 4, 32), (4, 40, 16, 64), (4, 256, 16, 64), (10, 32, 4, 64)]


class Served:
    """A vLLM server with the model's weights, and what asks it."""

    def __init__(self, folder: Path, precision: str) -> None:
        self.model, tokenizer = model_of("SmolLM2-135M"), load_tokenizer(SMOLLM2)
        self.model.save_pretrained(folder / "rollout-model")
        tokenizer.save_pretrained(folder / "rollout-model")
        self.server = VllmServer(folder / "rollout-model", precision, folder / "server.log")
        self.started = self.server.start()
        self.client = Server(self.server.url, "rollout.server", timeout_seconds=600, retries=0)
        self.weights = ServedWeights(self.model, self.client, folder / "rollout-model", tokenizer, precision)
        start = time.perf_counter()
        self.weights.snapshot(self.model)
        self.weights.ensure()
        self.refresh = time.perf_counter() - start

    def engine(self, tokens: int) -> VllmEngine:
        return VllmEngine(
            self.model,
            self.weights,
            sampling=SamplingOptions(tokens),
            eos_token_ids=[],
            pad_token_id=0,
            seed=1,
            vocab_size=self.model.config.vocab_size,
            corrects_sampler=False,
        )


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def served(request, tmp_path_factory) -> Iterator[tuple[str, Served | None]]:
    """The precision, and a server that computes in it, if there is an environment for one."""
    if PYTHON is None:
        yield request.param, None
        return
    made = Served(tmp_path_factory.mktemp("vllm"), request.param)
    yield request.param, made
    made.server.stop()


@functools.cache
def machine(precision: str) -> tuple[float, float]:
    """Bytes and FLOPs a second."""
    return copy_bandwidth(), gemm_rate(2048, 2048, 2048, dtype=getattr(torch, precision))


def limit_seconds(config: PretrainedConfig, precision: str, cell: tuple[int, int, int, int]) -> float:
    """What a batch takes at the machine's limits, whichever of the two is the nearer one in a step."""
    B, P, N, T = cell
    bandwidth, rate = machine(precision)
    H, heads = config.hidden_size, config.num_attention_heads + 2 * config.num_key_value_heads
    width, itemsize = H // config.num_attention_heads, getattr(torch, precision).itemsize
    layer = H * width * heads + H * H + 3 * H * config.intermediate_size
    body, head = config.num_hidden_layers * layer, config.vocab_size * H
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * width * itemsize

    def step(rows: int, heads: int, keys: int) -> float:
        moved = itemsize * (body + head) + token * keys
        return max(moved / bandwidth, 2 * (body * rows + head * heads) / rate)

    return step(B * P, B, B * P) + sum(step(B * N, B * N, B * P + B * N * t) for t in range(1, T))


def while_paused(server: VllmServer, call: Callable[[], None]) -> None:
    with server.paused():
        call()


@pytest.mark.real_model
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_rollouts_in_a_cell(cell: tuple[int, int, int, int], served: tuple[str, Served | None], record) -> None:
    (B, P, N, T), (precision, server) = cell, served
    model, prompt_ids = model_of("SmolLM2-135M"), prompts_of("SmolLM2-135M", B, P)
    ours = engine_of("SmolLM2-135M", precision).variant(seed=1, max_new_tokens=T)
    check_logprobs(model, ours, prompt_ids[:1], 0.2 if precision == "bfloat16" else 1e-3)
    made = {
        "ours": lambda: native(ours, prompt_ids, N),
        "stock": lambda: stock(stock_of("SmolLM2-135M", precision), prompt_ids, N, T),
    }
    if server is not None:
        theirs = server.engine(T)
        check_logprobs(model, theirs, prompt_ids[:1], 0.2 if precision == "bfloat16" else 1e-3)
        body = theirs._body([], 0, N) | {"prompt": prompt_ids.tolist(), "seed": None}
        made = {name: functools.partial(while_paused, server.server, call) for name, call in made.items()}
        made["vllm"] = lambda: server.client.request("/v1/completions", body)
    timings = interleave({"stock": made.pop("stock")}, rounds=1, warmup=0) | interleave(made, rounds=2)
    group = f"cells, SmolLM2-135M, {precision}: {B} prompts of {P} tokens, {N} rollouts of {T} tokens each"
    limit = limit_seconds(model.config, precision, cell)
    for name, timing in timings.items():
        fraction = limit / timing.median
        record(Row(group, name, timing.median, timing.spread, fraction=fraction, tokens=B * N * T))
    assert timings["ours"].median < timings["stock"].median


@pytest.mark.real_model
def test_weights_of_a_server(served: tuple[str, Served | None], record) -> None:
    precision, server = served
    if server is None:
        pytest.skip("DISTILL_VLLM_PYTHON names no interpreter; make test-vllm builds one")
    group = f"vLLM, SmolLM2-135M, {precision}"
    record(Row(group, "vllm, new weights", server.refresh))
    record(Row(group, "vllm, start", server.started))
