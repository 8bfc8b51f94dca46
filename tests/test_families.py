"""Any causal language model is trained by the default configuration, the way its architecture allows, and it is said.

`families.py` has the table; it is checked against the model's own forward and plain autograd, token by token.
"""

import json
import warnings

import pytest
import torch
from conftest import tiny_tokenizer
from families import EXPECTED, examine, mapping, tiny_config

import distill.rollout.native
from distill.models import ModelError
from distill.rollout import SamplingOptions, local_engine

OPTIONS = {"sampling": SamplingOptions(6), "eos_token_ids": (2,), "pad_token_id": 0, "seed": 0, "precision": "float32"}


def made(family: str, **changes):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()


@pytest.mark.parametrize("family", EXPECTED)
def test_a_family_goes_its_way_and_is_exact(family):
    expected, found = EXPECTED[family], examine(family)
    assert not found.refused, found.refused
    assert (found.engine, found.plain_rows == "") == (expected.engine, expected.shared), found
    assert expected.why in found.fallback + found.plain_rows, found
    assert found.logprob_error < 1e-4, "recorded log-probabilities against a rescoring row by row"
    assert found.engines_differ < 1e-4, "our loop against that of transformers"
    assert found.gradient_error < 1e-4, "the loss's gradients against plain autograd"


def test_the_table_names_families_that_there_are():
    assert set(EXPECTED) <= set(mapping()), "transformers has renamed a family"
    assert len(EXPECTED) <= 60


def test_auto_falls_back_with_the_reason_and_native_does_not():
    model = made("bloom")
    engine = local_engine(model, **OPTIONS)
    assert (engine.engine, local_engine(made("llama"), **OPTIONS).fallback) == ("transformers", None)
    assert "BloomForCausalLM computes attention itself" in engine.fallback
    with pytest.raises(NotImplementedError, match=r"rollout\.engine native: .* set rollout\.engine: auto"):
        local_engine(model, engine="native", **OPTIONS)


def test_a_probe_that_fails_for_whatever_reason_is_a_reason_to_fall_back(monkeypatch):
    def broken(*arguments, **options):
        raise KeyError("no_such_state")

    monkeypatch.setattr(distill.rollout.native, "prefill", broken)
    engine = local_engine(made("llama"), **OPTIONS)
    assert engine.engine == "transformers"
    assert "KeyError: 'no_such_state'" in engine.fallback


def test_a_probe_that_runs_out_of_memory_is_no_reason(monkeypatch):
    def full(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(distill.rollout.native, "prefill", full)
    with pytest.raises(MemoryError):
        local_engine(made("llama"), **OPTIONS)


def test_prompts_of_one_length_go_together_where_padding_is_not_seen():
    assert local_engine(made("openai-gpt"), **OPTIONS).one_length, "its positions count the padding"
    assert not local_engine(made("bloom"), **OPTIONS).one_length


def test_a_model_whose_own_loop_samples_something_else_is_refused(monkeypatch):
    model = made("bloom")
    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", lambda self, ids, **_: {"input_ids": ids[:, -2:]})
    with pytest.raises(ModelError, match=r"'bloom' cannot be sampled from: the log-probabilities .* are off by"):
        local_engine(model, **OPTIONS)
    monkeypatch.setattr(type(model), "forward", lambda self, **_: 1 / 0)
    with pytest.raises(ModelError, match="'bloom' cannot be sampled from: ZeroDivisionError"):
        local_engine(model, **OPTIONS)


def test_a_run_says_which_way_it_went(write_config, tmp_path):
    from test_train import execute

    folder = tmp_path / "bloom"
    made("bloom").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    run = execute(write_config({"student.model": str(folder), "training.max_steps": 1}))
    (event,) = [json.loads(line) for line in (run.output.path / "events.jsonl").read_text().splitlines()]
    assert event["event"] == "engine"
    assert "transformers' own loop, as BloomForCausalLM" in event["message"]


THREE = {"dense": "llama", "experts": "mixtral", "states": "qwen3_5_text"}


@pytest.mark.parametrize("student", THREE)
@pytest.mark.parametrize("teacher", THREE)
def test_students_and_teachers_of_different_families(student, teacher, write_config, tmp_path):
    from test_train import execute

    for name, kind in (("student", student), ("teacher", teacher)):
        made(THREE[kind]).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    models = {"student.model": str(tmp_path / "student"), "teacher.model": str(tmp_path / "teacher")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a prompt is computed once per row
        run = execute(write_config(models | {"training.max_steps": 2, "training.num_rollouts_per_prompt": 4}))
    metrics = [json.loads(line) for line in (run.output.path / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2
    assert all(line["grad_norm"] > 0 for line in metrics)
    summary = json.loads((run.output.path / "summary.json").read_text())
    assert summary["eval_reverse_kl_after"] == summary["eval_reverse_kl_after"]


def test_experts_learn_nothing_but_the_loss():
    """Models that were saved with their router's own loss switched on would add it to every step's gradient."""
    assert examine("mixtral", output_router_logits=True).gradient_error < 1e-4
