"""`rollout.engine: vllm` against a real small server that samples, takes weights, fails, stops and starts again.

tests/vllm/ runs the same against vLLM itself.
"""

import io
import json
from concurrent.futures import wait
from signal import SIGTERM, Signals

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from rich.console import Console
from serving import ModelServer
from test_train import SAMPLED, events_of, execute, metrics_of, weights_of
from transformers import AutoModelForCausalLM

from distill.config import ConfigError, load_config
from distill.run import Run
from distill.servers import ServerError
from distill.train import main

pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture(scope="module")
def served_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    tiny_model("llama", vocab_size=264, seed=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def served(server: ModelServer, **changes) -> dict:
    model = {"student.model": str(server.folder), "rollout.engine": "vllm", "rollout.server": server.url}
    # A large step, so that weights left behind would show.
    return SAMPLED | model | {"rollout.precision": "auto", "training.learning_rate": 1e-2} | changes


def test_a_run_samples_from_the_weights_of_each_step(server, write_config, tmp_path):
    run = execute(write_config(served(server, **{"rollout.prompts_per_batch": 1, "training.num_epochs": 2})))
    lines = metrics_of(tmp_path / "run")
    assert len(lines) == 10
    # A token's rounding, and the padded columns that the server's softmax has and ours has not.
    assert max(line["sampler_logprob_gap_max"] for line in lines) < 0.3
    assert sum(line["sampler_logprob_gap"] for line in lines) / len(lines) < 0.05
    reloads = [path for path, _ in server.calls if path == "/collective_rpc"]
    assert len(reloads) == 11  # before each of ten batches and the last evaluation
    resets = [path for path, _ in server.calls if path == "/reset_prefix_cache"]
    assert len(resets) == len(reloads)
    prompt = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(server.model(prompt).logits, run.parts.student(prompt).logits, rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rollout_precision"] == "float32"


def test_stale_rollouts_show_in_the_gap(server, write_config, tmp_path):
    execute(write_config(served(server, **{"rollout.prompts_per_batch": 5})))
    fresh, *stale = [line["sampler_logprob_gap"] for line in metrics_of(tmp_path / "run")]
    assert min(stale) > 3 * fresh


def test_the_same_seed_gives_the_same_numbers_and_each_prompt_its_own(server, write_config, tmp_path):
    for name in ("one", "two"):
        execute(write_config(served(server, **{"training.output_dir": str(tmp_path / name)})))
    assert metrics_of(tmp_path / "one") == metrics_of(tmp_path / "two")
    seeds = [body["seed"] for path, body in server.calls if path == "/v1/completions" and "n" in body]
    assert len(set(seeds)) == len(seeds) // 2 - 2  # two runs; an evaluation's two prompts have the same ones twice


def at_the_sixth_rollout(server, call) -> None:
    """Lets the server call this when a run asks for its sixth rollout: a run like the one it has just served."""
    rollout = ["n" in body for path, body in server.calls if path == "/v1/completions"]
    sixth = [at for at, is_one in enumerate(rollout) if is_one][5]
    server.faults.extend([None] * sixth + [call])


def test_a_restarted_server_gets_the_weights_again(server, write_config, tmp_path):
    execute(write_config(served(server, **{"training.output_dir": str(tmp_path / "calm")})))
    noticed = tmp_path / "rough" / "events.jsonl"
    # It starts again with the weights that it began with.
    at_the_sixth_rollout(server, lambda: server.go_away(until=lambda: noticed.stat().st_size > 0))
    changes = {"training.output_dir": str(tmp_path / "rough"), "rollout.retries": 14}
    execute(write_config(served(server, **changes)))
    assert metrics_of(tmp_path / "calm") == metrics_of(tmp_path / "rough")
    assert {event["event"] for event in events_of(tmp_path / "rough")} == {"server"}


def test_another_run_that_uses_the_server_is_noticed(server, write_config):
    run = execute(write_config(served(server)))
    with torch.no_grad():
        for parameter in server.model.parameters():
            parameter.mul_(1.5)
    before = len(server.calls)
    ids = torch.tensor([[5, 6, 7]])
    run.parts.engine.generate(ids, torch.ones_like(ids).bool(), num_rollouts=2, prompt_keys=torch.arange(1))
    assert "/collective_rpc" in [path for path, _ in server.calls[before:]]
    torch.testing.assert_close(server.model(ids).logits, run.parts.student(ids).logits, rtol=1e-4, atol=1e-4)


def test_weights_that_do_not_arrive_end_the_run_resumably(server, write_config, tmp_path, capsys):
    execute(write_config(served(server, **{"training.output_dir": str(tmp_path / "calm")})))
    path = write_config(served(server))
    at_the_sixth_rollout(server, lambda: setattr(server, "deaf", True))
    assert main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert "its log-probabilities of a fixed text are off by" in error
    assert "Saved after step" in error
    server.deaf = False
    assert main(["--config", str(path)]) == 0
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "calm")
    ours, theirs = weights_of(tmp_path / "run"), weights_of(tmp_path / "calm")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_server_with_another_architecture_is_refused_with_the_command(server, write_config, tmp_path, capsys):
    changes = {"student.drop_layers": [1], "rollout.retries": 1}
    assert main(["--config", str(write_config(served(server, **changes)))]) == 2
    error = capsys.readouterr().err
    assert "another architecture" in error
    folder = tmp_path / "run" / "rollout-model"
    assert f"VLLM_SERVER_DEV_MODE=1 vllm serve {folder}" in error.replace("\n", "")
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2
    server.stop()
    other = ModelServer(folder)
    try:
        execute(write_config(served(other, **changes | {"student.model": str(server.folder)})))
    finally:
        other.stop()
        server.start_again()


@pytest.mark.parametrize(
    ("attribute", "value", "changes", "expected"),
    [
        ("dtype", "torch.bfloat16", {"rollout.precision": "float32"}, "computes in bfloat16"),
        ("logprobs_mode", "raw_logits", {}, "needs --logprobs-mode raw_logprobs"),
        ("logprobs_mode", "processed_logprobs", {"rollout.temperature": 0.7}, "needs --logprobs-mode raw_logprobs"),
        (
            "logprobs_mode",
            "raw_logprobs",
            {"rollout.temperature": 0.7, "loss.importance_sampling": "sampler"},
            "needs --logprobs-mode processed_logprobs",
        ),
        ("_server_info", None, {}, "VLLM_SERVER_DEV_MODE=1"),
    ],
)
def test_servers_that_cannot_be_used_are_refused(server, write_config, capsys, attribute, value, changes, expected):
    setattr(server, attribute, value)
    assert main(["--config", str(write_config(served(server, **changes)))]) == 2
    assert expected in capsys.readouterr().err


def test_another_vocabulary_is_refused(server, write_config):
    server.tokenizer.add_tokens(["Paris"])
    with pytest.raises(ServerError, match="has another vocabulary"):
        execute(write_config(served(server)))


def test_the_sampler_is_corrected_for(server, write_config, tmp_path):
    """Tempered log-probabilities are those of the distribution sampled from; the plain ones are unknown then."""
    server.logprobs_mode = "processed_logprobs"
    changes = {"rollout.temperature": 0.7, "loss.importance_sampling": "sampler"}
    run = execute(write_config(served(server, **changes)))
    ids = torch.tensor([[5, 6, 7]])
    rollouts = run.parts.engine.generate(ids, torch.ones_like(ids).bool(), num_rollouts=3, prompt_keys=torch.arange(1))
    for row, length in enumerate(rollouts.completion_lengths.tolist()):
        whole = torch.cat([ids[0], rollouts.completion_ids[row, :length]])[None]
        with torch.no_grad():
            logits = run.parts.student(whole).logits[0, 2:-1, :260] / 0.7
        own = logits.log_softmax(-1).gather(1, whole[0, 3:, None])[:, 0]
        torch.testing.assert_close(rollouts.sampling_logprob[row, :length], own, rtol=1e-3, atol=1e-3)
        assert rollouts.logprob[row, :length].isnan().all()
    assert all(line["sampler_logprob_gap"] is None and line["loss"] is not None for line in metrics_of(run.output.path))


def test_a_folder_that_cannot_be_written_is_one_message(server, write_config, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rollout-model").write_text("in the way")
    assert main(["--config", str(write_config(served(server)))]) == 2
    error = capsys.readouterr().err
    assert "the student could not be written to" in error
    assert not list((tmp_path / "run").glob(".rollout-model*"))


AHEAD = {"rollout.prompts_per_batch": 2, "rollout.async_batches": 1, "training.save_every": 2, "prompts.eval": None}


def test_the_next_batch_is_sampled_while_this_one_is_trained_on(server, write_config, tmp_path):
    path = write_config(served(server, **AHEAD))
    run = Run(load_config(path), Console(file=io.StringIO()), lambda: None)
    first = next(run.parts.trainer.steps())
    wait([run.parts.trainer.ahead])
    prompts = [body["prompt"] for path, body in server.calls if path == "/v1/completions" and "n" in body]
    assert len(prompts) == 4  # of two batches, after one step
    ids = torch.tensor([prompts[-1]])
    before = AutoModelForCausalLM.from_pretrained(server.folder)
    torch.testing.assert_close(server.model(ids).logits, before(ids).logits, rtol=1e-4, atol=1e-4)
    assert first.metrics["sampler_logprob_gap"] < 0.05
    run.output.release()
    execute(path)
    lines = metrics_of(tmp_path / "run")
    assert [line["rollout_staleness"] for line in lines] == [0, 1, 2, 3, 2]
    assert min(line["sampler_logprob_gap"] for line in lines[1:]) > 3 * lines[0]["sampler_logprob_gap"]


def test_evaluations_do_not_disturb_the_batch_under_way(server, write_config, tmp_path):
    changes = AHEAD | {"prompts.eval": str(tmp_path / "eval.txt"), "training.output_dir": str(tmp_path / "often")}
    execute(write_config(served(server, **AHEAD)))
    execute(write_config(served(server, **changes, **{"training.eval_every": 1})))
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "often")


def test_a_held_out_set_is_sampled_by_the_server_with_its_own_sampler(server, write_config, tmp_path):
    sets = {"greedy": {"prompts": str(tmp_path / "eval.txt"), "limit": 1, "top_k": 1, "max_new_tokens": 3}}
    execute(write_config(served(server, **{"evaluation.sets": sets, "training.max_steps": 1})))
    asked = [body for path, body in server.calls if path == "/v1/completions" and "n" in body]
    # Of an evaluation its two prompts, then the set's; a batch of two prompts between them.
    an_evaluation = [(0, 6), (0, 6), (1, 3)]
    assert [(body["top_k"], body["max_tokens"]) for body in asked] == [*an_evaluation, *[(0, 6)] * 2, *an_evaluation]


@pytest.mark.parametrize("stop_after", [2, 3], ids=["between-batches", "within-a-batch"])
def test_a_run_stopped_with_a_batch_under_way_continues_to_the_same_numbers(server, write_config, tmp_path, stop_after):
    execute(write_config(served(server, **AHEAD, **{"training.output_dir": str(tmp_path / "calm")})))
    config = load_config(write_config(served(server, **AHEAD)))

    def signal() -> Signals | None:
        return SIGTERM if run.parts.trainer.position.step == stop_after else None

    run = Run(config, Console(file=io.StringIO()), signal)
    assert run.execute() == 128 + SIGTERM
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == list(range(1, stop_after + 1))
    execute(write_config(served(server, **AHEAD)))
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "calm")
    ours, theirs = weights_of(tmp_path / "run"), weights_of(tmp_path / "calm")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_batch_under_way_that_fails_continues_from_the_checkpoint_before(server, write_config, tmp_path, capsys):
    execute(write_config(served(server, **AHEAD, **{"training.output_dir": str(tmp_path / "calm")})))
    # Probe and rows of the first two batches are answered; the third batch, begun after step 2, is not.
    server.faults.extend([None] * 6 + [503] * 50)
    path = write_config(served(server, **AHEAD, **{"rollout.retries": 2}))
    assert main(["--config", str(path)]) == 2
    assert "Given up after 3 attempts" in capsys.readouterr().err
    server.faults.clear()
    assert main(["--config", str(path)]) == 0
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "calm")


def test_adapters_are_merged_into_what_is_served(server, write_config):
    run = execute(write_config(served(server, **{"student.lora.rank": 4})))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(server.model(ids).logits, run.parts.student(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rollout.engine": "vllm"}, "vllm needs a server"),
        ({"rollout.server": "http://127.0.0.1:9"}, "vllm needs a server"),
        ({"rollout.async_batches": 1}, r"async_batches needs the engine vllm"),
        ({"rollout.engine": "vllm", "rollout.server": "http://x", "rollout.memory_gib": 1}, r"rollout\.memory_gib"),
    ],
)
def test_settings_that_do_not_go_together(write_config, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(write_config(changes))


def test_a_server_ends_completions_on_the_tokens_that_the_run_names(server, write_config, tmp_path):
    execute(write_config(served(server, **{"rollout.stop_ids": [40, "<|unknown|>"], "training.max_steps": 1})))
    stops = [body["stop_token_ids"] for path, body in server.calls if path == "/v1/completions" and "n" in body]
    assert stops
    assert all(ids == [3, 40] for ids in stops)
    for folder in ("rollout-model", "final"):
        written = json.loads((tmp_path / "run" / folder / "generation_config.json").read_text())
        assert written["eos_token_id"] == [3, 40], folder
