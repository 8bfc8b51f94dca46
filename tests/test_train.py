"""The command on tiny models: output, determinism, resuming, signals, exit statuses, and every configuration key."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ship_code, tiny_model, tiny_tokenizer
from rich.console import Console
from serving import ModelServer
from transformers import AutoModelForCausalLM, AutoTokenizer

import distill.loss.model_parts
import distill.runtime.memory
from distill.config import ConfigError, load_config
from distill.config.config import known_keys
from distill.models import ModelError
from distill.prompts import PromptError
from distill.run import Run, StoppedError
from distill.runtime import read_json_lines
from distill.servers import ServerError, UnavailableError
from distill.train import main

ROOT = Path(__file__).parent.parent
SECONDS = {"seconds_rollout", "seconds_score", "seconds_update", "tokens_per_second", "peak_memory_bytes"}


def execute(config_path) -> Run:
    run = Run(load_config(config_path), Console(file=open(os.devnull, "w")), lambda: None)  # noqa: SIM115
    assert run.execute() == 0
    return run


def metrics_of(folder) -> list[dict]:
    """The metrics without what a clock or the operating system says."""
    told = SECONDS | {"seconds_rewards"}
    return [{k: v for k, v in line.items() if k not in told} for line in read_json_lines(folder / "metrics.jsonl")]


def events_of(folder) -> list[dict]:
    """The events, but for what nearly every run of a tiny random model says: that it seldom ends a completion."""
    return [event for event in read_json_lines(folder / "events.jsonl") if event["event"] != "truncated"]


def weights_of(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "final", dtype=torch.float32).state_dict()


def assert_same_run(one: Path, other: Path) -> None:
    assert metrics_of(one) == metrics_of(other)
    assert (one / "rollouts.jsonl").read_text() == (other / "rollouts.jsonl").read_text()
    ours, theirs = weights_of(one), weights_of(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_writes_everything_that_the_design_names(write_config, tmp_path, capsys):
    path = write_config({"training.seed": 2, "training.save_every": 2, "training.eval_every": 3})
    assert main(["--config", str(path)]) == 0
    run = tmp_path / "run"
    lines = read_json_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]  # 5 prompts, one a step
    assert set(lines[0]) >= SECONDS | {
        *("step", "epoch", "loss", "reverse_kl", "reverse_kl_exact", "student_entropy", "teacher_entropy"),
        *("grad_norm", "learning_rate", "completion_tokens", "completion_length", "truncated_fraction"),
    }
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 5
    assert summary["device"] == "cpu"
    assert summary["wall_seconds"] > 0
    assert summary["cpu_seconds"] > 0
    assert [line["step"] for line in read_json_lines(run / "evaluations.jsonl")] == [0, 3, 5]
    evaluations = read_json_lines(run / "evaluations.jsonl")
    assert summary["eval_reverse_kl_before"] == evaluations[0]["reverse_kl"]
    assert summary["eval_reverse_kl_after"] == evaluations[-1]["reverse_kl"]
    rollouts = read_json_lines(run / "rollouts.jsonl")
    assert len(rollouts) == 5 * 2
    assert {line["prompt"] for line in rollouts} == {
        f"Say {word}." for word in ("red", "green", "blue", "grey", "pink")
    }
    assert load_config(run / "config.yaml").training.save_every == 2
    best = min(evaluations[1:], key=lambda line: line["reverse_kl"])["step"]
    assert summary["eval_best_step"] == best == 3  # kept beside the last two
    assert sorted(path.name[-1] for path in (run / "checkpoints").iterdir()) == ["3", "4", "5"]
    assert 'id="chart-0"' in (run / "report.html").read_text()
    text = capsys.readouterr().out
    assert "held-out reverse KL" in text
    assert f"python -m distill.chat {run}" in text.replace("\n", "")


def test_the_final_model_is_an_ordinary_one_and_generates(write_config, tmp_path):
    run = execute(write_config({"student.drop_layers": [1]}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    ids = torch.tensor([tokenizer("Hello")["input_ids"]])
    torch.testing.assert_close(model(ids).logits, run.parts.student(ids).logits)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


def test_training_moves_the_student_towards_the_teacher(write_config, tmp_path):
    changes = {"training.num_epochs": 6, "training.learning_rate": 1e-2, "training.num_rollouts_per_prompt": 8}
    execute(write_config(changes))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_reverse_kl_after"] < 0.5 * summary["eval_reverse_kl_before"]


def test_student_and_teacher_alike_have_no_divergence(write_config, tiny_pair, tmp_path):
    execute(write_config({"teacher.model": str(tiny_pair["student"]), "training.max_steps": 1}))
    (line,) = metrics_of(tmp_path / "run")
    assert abs(line["reverse_kl_exact"]) < 1e-6
    assert abs(line["reverse_kl"]) < 1e-6


@pytest.mark.parametrize(("per_step", "per_batch", "steps"), [(1, 2, 5), (2, 2, 3), (5, 5, 1), (2, 4, 3), (1, None, 5)])
def test_one_optimizer_step_a_group(write_config, monkeypatch, tmp_path, per_step, per_batch, steps):
    counted = []
    real = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *args: counted.append(1) or real(self, *args))
    changes = {"training.prompts_per_step": per_step, "rollout.prompts_per_batch": per_batch}
    execute(write_config(changes | {"prompts.eval": None}))
    assert len(counted) == steps == len(metrics_of(tmp_path / "run"))


def test_the_same_seed_gives_the_same_numbers(write_config, tmp_path):
    execute(write_config({"training.output_dir": str(tmp_path / "one")}))
    execute(write_config({"training.output_dir": str(tmp_path / "two")}))
    assert_same_run(tmp_path / "one", tmp_path / "two")


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"student.model": "/nowhere"}, "'/nowhere': no such directory"),
        ({"prompts.train": "/nowhere.txt"}, "/nowhere.txt: there is no such file"),
        ({"rollout.max_new_tokens": 4096}, "rollout.max_new_tokens: found 4096"),
        ({"student.drop_layers": [9]}, "does not fit a model of 3 layers"),
        ({"training.attention": "flash_attention_2"}, "flash_attention_2 needs a GPU"),
        ({"training.resume": "/nowhere"}, "/nowhere is not a complete checkpoint"),
        ({"training.lerning_rate": 1}, "mean 'training.learning_rate'"),
    ],
)
def test_what_the_user_can_mend_is_one_message_and_status_2(write_config, capsys, changes, expected):
    assert main(["--config", str(write_config(changes))]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "Traceback" not in captured.err


def test_a_gpu_that_is_not_there_is_named(write_config):
    with pytest.raises(ConfigError, match=r"training\.device: found 'cuda:77'"):
        execute(write_config({"training.device": "cuda:77"}))


def test_prompts_left_out_are_reported(write_config, tmp_path, capsys):
    path = write_config({"training.max_steps": 1, "prompts.eval": None})
    (tmp_path / "prompts.txt").write_text("Say red.\n\n" + "long " * 300 + "\n")
    assert main(["--config", str(path)]) == 0
    output = capsys.readouterr().out
    assert "1 prompts used; left out: 1 empty, 1 of more than" in output


def test_tokenizers_without_chat_template_or_pad_token(write_config, tiny_pair, tmp_path):
    for name in ("student", "teacher"):
        shutil.copytree(tiny_pair[name], tmp_path / name)
        tiny_tokenizer(chat_template=None, pad=None).save_pretrained(tmp_path / name)
    changes = {"student.model": str(tmp_path / "student"), "teacher.model": str(tmp_path / "teacher")}
    execute(write_config(changes))
    assert all(line["reverse_kl_exact"] > 0 for line in metrics_of(tmp_path / "run"))


# ---- Every configuration key has an effect -------------------------------------------------------------------------

# key: (changes before and after the key is set, its value, what is looked at). "numbers": the metrics differ.
SAMPLED = {"loss.objective": "sampled_reverse_kl"}
ON_VLLM = {"rollout.engine": "vllm", "rollout.precision": "auto", "prompts.eval": None}
ANSWERED = {"prompts.train": "answered"}
WARM = ANSWERED | {"training.warm_start.steps": 2}
EFFECTS = {
    "student.model": ({}, "other", "numbers"),
    "student.drop_layers": ({}, [1], "numbers"),
    "student.lora.rank": ({"student.lora.rank": 4}, 2, "numbers"),
    "student.lora.alpha": ({"student.lora.rank": 4}, 2, "numbers"),
    "student.lora.target_modules": ({"student.lora.rank": 4}, ["q_proj"], "numbers"),
    "student.trust_remote_code": ({"student.model": "remote"}, True, "accepted"),
    "teacher.model": ({}, "other", "numbers"),
    "teacher.trust_remote_code": ({"teacher.model": "remote"}, True, "accepted"),
    "teacher.others": ({"prompts.train": "named"}, "two", "accepted"),
    "student.chat_template_kwargs": ({}, {"opening": "Well"}, "numbers"),
    "teacher.update": ({"teacher.model": "base", "teacher.system_prompt": "Be brief."}, "every:1", "numbers"),
    "teacher.system_prompt": ({}, "Be brief.", "numbers"),
    "teacher.column": ({"prompts.train": "columns", "prompts.eval": None}, "other", "numbers"),
    "teacher.prompt_template": ({}, "{{ prompt }} Be brief.", "numbers"),
    "teacher.chat_template_kwargs": ({}, {"opening": "Well"}, "numbers"),
    "teacher.precision": ({}, "bfloat16", "numbers"),
    "teacher.offload": ({}, True, "refused"),
    "teacher.server": (SAMPLED, "served", "numbers"),
    "teacher.server_gives": ({"loss.objective": "reverse_kl", "teacher.server": "served"}, "sampled", "refused"),
    "teacher.server_top_k": ({"loss.objective": "reverse_kl", "teacher.server": "served"}, 3, "numbers"),
    "teacher.timeout_seconds": (SAMPLED | {"teacher.server": "slow", "teacher.retries": 0}, 0.1, "accepted"),
    "teacher.retries": (SAMPLED | {"teacher.server": "failing"}, 0, "accepted"),
    "prompts.train": ({}, "other", "numbers"),
    "prompts.eval": ({}, "other", lambda run: run.progress.evaluations[0]["reverse_kl"]),
    "prompts.column": ({"prompts.train": "columns"}, "other", lambda run: run.parts.prompts.student.texts),
    "prompts.limit": ({}, 2, lambda run: len(run.parts.prompts.student)),
    "prompts.eval_limit": ({}, 1, lambda run: len(run.parts.held_out.student)),
    "prompts.streaming": ({}, True, "refused"),
    "prompts.chat_template": ({}, "never", "numbers"),
    "prompts.system_prompt": ({}, "Be brief.", "numbers"),
    "prompts.max_tokens": ({"prompts.eval": None}, 28, lambda run: run.parts.prompts.student.too_long),
    "prompts.control_tokens": ({"prompts.train": "controls"}, "special", "numbers"),
    "prompts.answers": (WARM, "replies", "numbers"),
    "prompts.answers_limit": (WARM | {"prompts.answers": "replies"}, 1, "numbers"),
    "prompts.answer_column": (WARM, "other", "numbers"),
    "prompts.shuffle": ({}, False, "numbers"),
    "rollout.max_new_tokens": ({}, 3, "numbers"),
    "rollout.temperature": ({}, 0.5, "numbers"),
    "rollout.top_p": ({}, 0.5, "numbers"),
    "rollout.top_k": ({}, 2, "numbers"),
    "rollout.min_p": ({}, 0.5, "numbers"),
    "rollout.prompts_per_batch": ({}, 5, "numbers"),
    "rollout.engine": ({}, "transformers", lambda run: run.parts.engine.engine),
    "rollout.server": ({}, "http://127.0.0.1:9", "refused"),
    "rollout.timeout_seconds": (ON_VLLM | {"rollout.server": "slow", "rollout.retries": 0}, 0.1, "accepted"),
    "rollout.retries": (ON_VLLM | {"rollout.server": "failing"}, 0, "accepted"),
    "rollout.async_batches": (ON_VLLM | {"rollout.server": "student"}, 1, "numbers"),
    "rollout.precision": ({}, "bfloat16", lambda run: run.parts.engine.precision),
    "rollout.memory_gib": ({}, 0.5, lambda run: run.parts.engine._memory_budget_bytes),
    "rollout.stop_ids": ({}, list(range(4, 260, 2)), "numbers"),
    "rollout.mask_truncated": ({}, True, "numbers"),
    "training.num_rollouts_per_prompt": ({}, 3, "numbers"),
    "training.prompts_per_step": ({}, 2, "numbers"),
    "training.learning_rate": ({}, 1e-2, "numbers"),
    "training.lr_schedule": ({}, "cosine", "numbers"),
    "training.warmup_steps": ({}, 3, "numbers"),
    "training.adam_betas": ({}, [0.5, 0.9], "numbers"),
    "training.max_grad_norm": ({}, 1e-8, "numbers"),
    "training.max_bad_steps": ({"teacher.model": "poisoned", "prompts.eval": None}, 0, "accepted"),
    "training.num_epochs": ({}, 2, "numbers"),
    "training.max_steps": ({}, 2, "numbers"),
    "training.warm_start.steps": (ANSWERED, 2, "numbers"),
    "training.warm_start.epochs": (ANSWERED, 2, "numbers"),
    "training.warm_start.objective": (WARM, "forward_kl", "numbers"),
    "training.warm_start.learning_rate": (WARM, 1e-2, "numbers"),
    "training.warm_start.answers_per_step": (WARM, 1, "numbers"),
    "training.off_policy_fraction": (ANSWERED, 0.5, "numbers"),
    "training.off_policy_objective": (
        ANSWERED | {"training.off_policy_fraction": 0.5},
        "cross_entropy",
        "numbers",
    ),
    "training.tokens_per_micro_batch": ({}, 30, "calls"),
    "training.activation_checkpointing": ({}, True, "calls"),
    "training.compile": ({}, True, "refused"),  # on a CPU; see test_compiling.py
    "training.device": ({}, "cuda:77", "refused"),
    "training.precision": ({}, "bfloat16", "numbers"),
    "training.attention": ({}, "eager", lambda run: run.parts.student.config._attn_implementation),
    "training.seed": ({}, 1, "numbers"),
    "training.output_dir": ({}, "elsewhere", lambda run: run.output.path.name),
    "training.save_every": ({}, 4, "checkpoints"),
    "training.keep_last": ({"training.save_every": 1}, 4, "checkpoints"),
    "training.eval_every": ({}, 2, lambda run: len(run.progress.evaluations)),
    "training.resume": ({}, "never", lambda run: (run.output.path.with_name("run.1")).exists()),
    "training.report_to": ({}, ["tensorboard"], lambda run: (run.output.path / "tensorboard").exists()),
    "loss.objective": ({}, "sampled_reverse_kl", "numbers"),
    "loss.reduction": ({"rollout.max_new_tokens": 99, "rollout.temperature": 10.0}, "token", "numbers"),
    "loss.temperature": ({}, 2.0, "numbers"),
    "loss.importance_clip": (SAMPLED | {"training.learning_rate": 0.1}, None, "numbers"),
    "loss.importance_sampling": (SAMPLED | {"rollout.temperature": 2.0}, "sampler", "numbers"),
    "loss.baseline": (SAMPLED, "exact", "numbers"),
    "loss.discount": (SAMPLED, 0.5, "numbers"),
    "loss.reward_clip": (SAMPLED, 0.1, "numbers"),
    "loss.beta": ({"loss.objective": "jsd"}, 0.1, "numbers"),
    "loss.scale_rewards": ({"rewards": "spaces"}, True, "numbers"),
    "rewards": ({}, "spaces", "numbers"),
    "evaluation.num_rollouts_per_prompt": ({}, 2, lambda run: run.progress.evaluations[0]["completion_tokens"]),
    "evaluation.max_new_tokens": ({}, 2, lambda run: run.progress.evaluations[0]["completion_tokens"]),
    "evaluation.seed": ({}, 7, lambda run: run.progress.evaluations[0]["reverse_kl"]),
    "evaluation.metrics": ({}, ["json_valid"], lambda run: run.progress.evaluations[0].get("metrics")),
    "evaluation.timeout_seconds": (
        {"evaluation.metrics": "sleepy", "evaluation.timeout_seconds": 60, "training.max_steps": 1},
        0.2,
        lambda run: run.progress.evaluations[0]["metrics"]["sleepy"]["failed"],
    ),
    "evaluation.sets": ({}, "far", lambda run: run.progress.evaluations[0].get("sets")),
    "training.early_stopping.metric": (
        {"evaluation.metrics": "json_valid", "training.eval_every": 1, "training.early_stopping.patience": 1},
        "json_valid",
        lambda run: run.progress.step,
    ),
    "training.early_stopping.patience": (
        {"evaluation.metrics": "json_valid", "training.eval_every": 1, "training.early_stopping.metric": "json_valid"},
        1,
        lambda run: run.progress.step,
    ),
    "training.early_stopping.min_delta": (
        {"training.eval_every": 1, "training.early_stopping.patience": 1},
        100.0,
        lambda run: run.progress.step,
    ),
}


# Looked at in test_distributed.py, as they change nothing on one process, in test_rewards.py and in test_hub.py.
ELSEWHERE = {"training.parallel", "training.rank_timeout_s", "training.accept_changed_rewards"}
ELSEWHERE |= {"training.hub_id", "training.hub_private"}


def test_the_walk_below_leaves_out_no_key():
    assert set(EFFECTS) | ELSEWHERE == set(known_keys())


PARTS = {"teacher": "teacher", "rollout": "student"}


@pytest.fixture
def servers(tiny_pair):
    """What other processes could serve, by the key that names the server."""
    running = {f"{part}.server": ModelServer(tiny_pair[name]) for part, name in PARTS.items()}
    yield running
    for server in running.values():
        server.stop()


@pytest.fixture
def others(tmp_path, tiny_pair, poisoned, servers):
    """What `other`, `remote`, `poisoned` and `elsewhere` stand for in the walk, by key."""
    folder = tmp_path / "other"
    tiny_model("llama", vocab_size=270, seed=9).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (tmp_path / "other.txt").write_text("Say one.\nSay two.\nSay three.\nSay four.\nSay five.\n")
    remote = tmp_path / "remote"
    shutil.copytree(tiny_pair["student"], remote)
    ship_code(remote)

    (tmp_path / "columns.jsonl").write_text('{"prompt": "Say red.", "other": "Say blue."}\n')

    def stand_in(key: str, value):
        if key in ("prompts.column", "prompts.answer_column", "teacher.column"):
            return value
        if value in ("answered", "replies"):
            said = [{"prompt": f"Say {word}.", "completion": f"{word}, {value}", "other": "no"} for word in ("a", "b")]
            (tmp_path / f"{value}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in said))
            return str(tmp_path / f"{value}.jsonl")
        if key == "rewards":
            (tmp_path / "spaces.py").write_text("def spaces(record, said):\n    return len(said) + said.count(' ')\n")
            return [{"function": f"{tmp_path / 'spaces.py'}:{value}"}]
        if value == "columns":
            return str(tmp_path / "columns.jsonl")
        if value == "other":
            return str(tmp_path / "other.txt") if key.startswith("prompts") else str(folder)
        if value == "controls":
            (tmp_path / "controls.txt").write_text("Say <|end|>.\nSay <|start|>.\n")
            return str(tmp_path / "controls.txt")
        if value in ("served", "slow", "failing", "student"):
            server = servers[key]
            server.faults.extend({"slow": [2.0], "failing": [503]}.get(value, []))
            return server.url
        if value == "named":
            (tmp_path / "named.jsonl").write_text('{"prompt": "Say one.", "teacher": "two"}\n{"prompt": "Say two."}\n')
            return str(tmp_path / "named.jsonl")
        if value == "two":
            return {"two": str(folder)}
        if value == "sleepy":
            (tmp_path / "own.py").write_text("import time\ndef sleepy(record, completion):\n    time.sleep(1)\n")
            return f"{tmp_path}/own.py:sleepy"
        if value == "far":
            return {"far": {"prompts": str(tmp_path / "other.txt")}}
        if value == "poisoned":
            return poisoned("k")
        return (
            {"remote": str(remote), "elsewhere": str(tmp_path / "elsewhere")}.get(value, value)
            if isinstance(value, str)
            else value
        )

    return stand_in


@pytest.mark.parametrize("key", EFFECTS)
def test_every_key_has_an_effect(key, write_config, tmp_path, others, monkeypatch):
    context, value, look = EFFECTS[key]
    calls = []
    real_split, real_hidden = distill.runtime.memory.micro_batches, distill.loss.model_parts.completion_hidden
    monkeypatch.setattr(
        distill.runtime.memory, "micro_batches", lambda *args: calls.append(batches := real_split(*args)) or batches
    )
    monkeypatch.setattr(
        distill.loss.model_parts,
        "completion_hidden",
        lambda *args, **options: calls.append(options.get("checkpointing")) or real_hidden(*args, **options),
    )

    def observe(changes):
        calls.clear()
        try:
            run = execute(write_config({k: others(k, v) for k, v in changes.items()}))
        except (ConfigError, ModelError, PromptError, ServerError, StoppedError) as error:
            return type(error)
        if look == "numbers":
            return metrics_of(run.output.path)
        if look == "calls":
            return [len(call) if isinstance(call, list) else call for call in calls]
        if look == "checkpoints":
            return [path.name for path in sorted((run.output.path / "checkpoints").iterdir())]
        return look(run) if callable(look) else "ran"

    without = observe(context)
    if key not in ("training.resume", "training.output_dir"):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    with_key = observe({**context, key: value})
    assert without != with_key
    if key.endswith("trust_remote_code"):
        assert (without, with_key) == (ModelError, "ran")
    if key.endswith((".timeout_seconds", ".retries")) and not key.startswith("evaluation."):
        assert (without, with_key) == ("ran", UnavailableError)
    if key == "training.max_bad_steps":
        assert (without, with_key) == ("ran", StoppedError)


# ---- The real model -----------------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_the_default_run_heals_a_real_model(tmp_path):
    """The first 12 steps of configs/default.yaml on the real weights, as a user starts it."""
    config = yaml.safe_load((ROOT / "configs/default.yaml").read_text())
    config["training"] |= {"max_steps": 12, "output_dir": str(tmp_path / "run"), "eval_every": None, "save_every": 100}
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump(config))
    environment_online = {k: v for k, v in environment().items() if k != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-m", "distill.train", "--config", str(path)]
    result = subprocess.run(command, cwd=ROOT, env=environment_online, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "rollouts come from" not in result.stdout, "transformers' own loop, at half the speed"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_reverse_kl_before"] > 1.5  # two layers short, it writes gibberish
    assert summary["eval_reverse_kl_after"] < 0.7 * summary["eval_reverse_kl_before"]
    assert summary["peak_memory_bytes"] < 4.5 * 2**30
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    ids = torch.tensor([tokenizer("The sky is")["input_ids"]])
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4
