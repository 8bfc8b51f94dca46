"""A vLLM server and the native engine side by side: the same weights, prompts and lengths, in interleaved rounds.

`vllm` is what `rollout.engine: vllm` does, a seeded request a prompt with a probe before; `vllm, one request` sends
all prompts in one, which gives them one seed, so none is sent. Refreshing the weights is timed by itself.
Run with DISTILL_VLLM_PYTHON naming the interpreter that tests/vllm/environment.sh made.
"""

import time

import pytest

from benchmarks.harness import Row, interleave
from benchmarks.test_rollout import SMOLLM2, TOKENS, check_logprobs, engine_of, model_of, native, prompts_of
from benchmarks.vllm_server import PYTHON, VllmServer
from distill.models import load_tokenizer
from distill.rollout import SamplingOptions, ServedWeights, VllmEngine
from distill.servers import Server

B, P, N = 10, 32, 4


@pytest.mark.skipif(PYTHON is None, reason="DISTILL_VLLM_PYTHON names no interpreter; make test-vllm builds one")
@pytest.mark.real_model
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_vllm_beside_the_native_engine(precision: str, record, tmp_path) -> None:
    model, tokenizer = model_of("SmolLM2-135M"), load_tokenizer(SMOLLM2)
    folder = tmp_path / "rollout-model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    server = VllmServer(folder, precision, tmp_path / "server.log")
    try:
        started = server.start()
        client = Server(server.url, "rollout.server", timeout_seconds=600, retries=0)
        weights = ServedWeights(model, client, folder, tokenizer, precision)
        served = VllmEngine(
            model,
            weights,
            sampling=SamplingOptions(TOKENS),
            eos_token_ids=[],
            pad_token_id=0,
            seed=1,
            vocab_size=model.config.vocab_size,
            corrects_sampler=False,
        )
        start = time.perf_counter()
        weights.snapshot(model)
        weights.ensure()
        refresh = time.perf_counter() - start
        prompt_ids, ours = prompts_of("SmolLM2-135M", B, P), engine_of("SmolLM2-135M", precision)
        for engine in (ours, served):
            check_logprobs(model, engine, prompt_ids[:1], 0.2 if precision == "bfloat16" else 1e-3)
        body = served._body([], 0, N) | {"prompt": prompt_ids.tolist(), "seed": None}
        made = {
            "ours": lambda: native(ours, prompt_ids, N),
            "vllm": lambda: native(served, prompt_ids, N),
            "vllm, one request": lambda: client.request("/v1/completions", body),
        }
        timings = interleave(made, rounds=2)
    finally:
        server.stop()
    group = f"vLLM, SmolLM2-135M, {precision}: {B} prompts of {P} tokens, {N} rollouts of {TOKENS} tokens each"
    for name, timing in timings.items():
        record(Row(group, name, timing.median, timing.spread, tokens=B * N * TOKENS))
    record(Row(group, "vllm, new weights", refresh))
    record(Row(group, "vllm, start", started))
