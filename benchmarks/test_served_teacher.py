"""A teacher on a server, asked for each of the three things that it can say: seconds, bytes and exactness side by side.

One vLLM server that gives hidden states, on the cores of this machine, and the teacher here beside it. Every call has
rollouts of its own, so that what the server remembers is only a prompt that several of them share, as in training. What
is timed is from rollouts to what the loss takes; the server's processes are stopped while the teacher here is timed.
The server is there with DISTILL_VLLM_PYTHON naming the interpreter that tests/vllm/environment.sh made.
"""

import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import Row, interleave
from benchmarks.test_rollout import SMOLLM2, model_of
from benchmarks.vllm_server import PYTHON, VllmServer
from distill.loss import HeadPair, ModelParts
from distill.models import load_end, load_tokenizer, split_head, without_layers
from distill.servers import PLUGIN, PromptStates, Server
from distill.teachers.served import ServedScores, ServedStates, connect, server_options

pytestmark = pytest.mark.skipif(PYTHON is None, reason="needs an environment with vLLM: make test-vllm")

PROMPTS, PROMPT_TOKENS, NUM_ROLLOUTS, TOKENS, TOP_K, ROUNDS = 8, 40, 4, 64, 20, 3
WAYS = ("sampled", "top_k", "hidden")


class CountedServer(Server):
    """Counts the bytes of answers."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.received, self._counting = 0, threading.Lock()

    def count(self, size: int) -> None:
        with self._counting:
            self.received += size

    def request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = super().request(path, body)
        self.count(len(json.dumps(answer)))
        return answer


class CountedStates(PromptStates):
    """Counts those of files, too."""

    def _awaited(self, path: Path, said: str) -> dict[str, torch.Tensor]:
        found = super()._awaited(path, said)
        self.server.count(path.stat().st_size)
        return found


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def served(request, tmp_path_factory) -> Iterator[tuple[VllmServer, dict[str, ServedScores | ServedStates]]]:
    folder = tmp_path_factory.mktemp("vllm")
    model, tokenizer = model_of("SmolLM2-135M"), load_tokenizer(SMOLLM2)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    options = server_options(model.config.num_hidden_layers, str(folder / "states"))
    server = VllmServer(folder / "model", request.param, folder / "log", options=options, imports=PLUGIN)
    server.start()
    load = partial(load_end, str(folder / "model"), dtype=getattr(torch, request.param), device=torch.device("cpu"))
    teachers = {}
    for way in WAYS:
        client = CountedServer(server.url, "teacher.server", timeout_seconds=600, retries=0)
        teacher, _ = connect(client, SMOLLM2, tokenizer, gives=way, top_k=TOP_K, load=load)
        if way == "hidden":
            teacher = teacher._replace(
                body=teacher.body._replace(asked=CountedStates(client, teacher.body.asked.model))
            )
        teachers[way] = teacher
    yield server, teachers
    server.stop()


def rollouts(seed: int) -> tuple[torch.Tensor, ...]:
    """As `completion_hidden` takes them, of random tokens."""
    generator, rows = torch.Generator().manual_seed(seed), PROMPTS * NUM_ROLLOUTS
    prompts = torch.randint(1000, 40_000, (PROMPTS, PROMPT_TOKENS), generator=generator)
    said = torch.randint(1000, 40_000, (rows, TOKENS), generator=generator)
    mask, index = torch.ones_like(prompts, dtype=torch.bool), torch.arange(rows) // NUM_ROLLOUTS
    return prompts, mask, said, torch.full((rows,), TOKENS), index


@pytest.mark.real_model
def test_what_a_server_says(served, record) -> None:
    server, teachers = served
    model, dtype = model_of("SmolLM2-135M"), getattr(torch, server.dtype)
    here, exact = (ModelParts(*split_head(model), kind) for kind in (dtype, torch.float32))
    rounds = iter(range(10_000))

    @torch.no_grad()
    def local() -> None:
        with server.paused():
            here.hidden(*rollouts(next(rounds)))

    made = {way: (lambda teacher=teacher: teacher.hidden(*rollouts(next(rounds)))) for way, teacher in teachers.items()}
    timings = interleave(made | {"here": local}, rounds=ROUNDS)
    asked, tokens = rollouts(0), PROMPTS * NUM_ROLLOUTS * TOKENS
    group = (
        f"a teacher's server, SmolLM2-135M, {server.dtype}: {PROMPTS} x {NUM_ROLLOUTS} completions of {TOKENS} tokens"
    )
    student = ModelParts(*split_head(without_layers(model, [12])), torch.float32)
    with torch.no_grad():
        ours, theirs = student.hidden(*asked), exact.hidden(*asked)
    ids, weights = asked[2].flatten(), torch.full((tokens,), 1 / tokens)
    pairs = {"here": (exact, theirs)}
    for way, teacher in teachers.items():
        before = teacher.body.server.received
        pairs[way] = teacher, teacher.hidden(*asked)
        received = teacher.body.server.received - before
        print(f"\n{server.dtype}, {way}: {received / tokens:.0f} bytes a token", end="")
        record(Row(group, way, timings[way].median, timings[way].spread, bytes=received, tokens=tokens))
    record(Row(group, "here", timings["here"].median, timings["here"].spread, tokens=tokens))
    losses = {}
    for way, (teacher, said) in pairs.items():
        objective = "sampled_reverse_kl" if way == "sampled" else "reverse_kl"
        _, stats = HeadPair(student, teacher, 1.0, None).loss(ours, said, ids, weights, objective=objective)
        losses[way] = stats
    truth = losses["here"]
    for way in WAYS:
        gap = (losses[way].teacher_logprob - truth.teacher_logprob).abs()
        print(f"\n{server.dtype}, {way}: log q(y) off by {gap.mean():.1e} in the mean, {gap.max():.1e} at most", end="")
    gap = (losses["hidden"].reverse_kl - truth.reverse_kl).abs()
    print(f"\n{server.dtype}, hidden: reverse KL off by {gap.mean():.1e} in the mean, {gap.max():.1e} at most")
    assert gap.max() < 1e-3 or server.dtype == "bfloat16"
