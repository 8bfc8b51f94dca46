"""Any causal language model is trained by the default configuration, the way its architecture allows, and it is said.

`families.py` has the table; it is checked against the model's own forward and plain autograd, token by token.
"""

import copy
import json
import re
import warnings

import pytest
import torch
import transformers
from conftest import tiny_tokenizer
from families import EXPECTED, PAGE, examine, mapping, tiny_config
from transformers import AttentionInterface, BloomForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import distill.forward.hidden as hidden_states
import distill.rollout.choice
import distill.rollout.native
from distill.loss import ModelParts, check_sharing
from distill.models import ModelError, check_pair, load_model, split_head, without_layers
from distill.models.head_inputs import HeadInputs
from distill.rollout import SamplingOptions, local_engine

OPTIONS = {"sampling": SamplingOptions(6), "eos_token_ids": (2,), "pad_token_id": 0, "seed": 0, "precision": "float32"}


def made(family: str, *, seed: int = 1, **changes):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
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


def test_the_page_has_every_family_and_agrees_with_the_table():
    text = PAGE.read_text()
    if f"transformers {transformers.__version__} knows" not in text:
        pytest.skip("the page is of another version of transformers: `make models` writes it")
    chapters = {chapter.split("\n")[0]: set(re.findall(r"`([^` ]+)`", chapter)) for chapter in text.split("\n## ")[1:]}
    assert set(mapping()) <= set().union(*chapters.values())
    ours = chapters["Both by our own way"]
    assert {family for family, way in EXPECTED.items() if (way.engine, way.shared) == ("native", True)} <= ours
    assert not ours & {family for family, way in EXPECTED.items() if way.why}


def test_auto_falls_back_with_the_reason_and_native_does_not():
    model = made("bloom")
    engine = local_engine(model, **OPTIONS)
    assert (engine.engine, local_engine(made("llama"), **OPTIONS).fallback) == ("transformers", None)
    assert "BloomForCausalLM computes attention itself" in engine.fallback
    with pytest.raises(NotImplementedError, match=r"rollout\.engine native: .* set rollout\.engine: auto"):
        local_engine(model, engine="native", **OPTIONS)


@torch.no_grad()
def test_a_model_that_makes_much_of_rounding_decodes_natively_in_half_precision():
    model = made("llama", num_hidden_layers=16)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj):
            linear.weight.mul_(10)
    ids = torch.arange(9)[None]
    exact, rounded = (m(ids).logits for m in (model, copy.deepcopy(model).bfloat16()))
    assert (rounded - exact).abs().max() > 0.1 * exact.abs().max()
    engine = local_engine(model, **(OPTIONS | {"precision": "bfloat16"}))
    assert (engine.fallback, engine.repeats) == (None, True)


def test_a_probe_that_memory_does_not_allow_in_float32_is_made_in_half_precision(monkeypatch):
    def full(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(distill.rollout.choice, "GenerationCopy", full)
    engine = local_engine(made("llama"), **(OPTIONS | {"precision": "bfloat16"}))
    assert (engine.engine, engine.fallback) == ("native", None)


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


def test_prompts_of_one_length_go_together_where_padding_is_not_seen(monkeypatch):
    model, forward = made("bloom"), BloomForCausalLM.forward
    assert not local_engine(model, **OPTIONS).one_length
    monkeypatch.setattr(BloomForCausalLM, "forward", lambda self, attention_mask=None, **given: forward(self, **given))
    engine = local_engine(model, **OPTIONS)
    assert engine.one_length, "it takes padding for tokens"
    assert local_engine(model, **(OPTIONS | {"precision": "bfloat16"})).one_length, "found in float32"
    ids, mask = torch.arange(3, 15).view(3, 4), torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    keys = torch.arange(3)
    together = engine.generate(ids, mask, num_rollouts=2, prompt_keys=keys)
    for prompt in range(3):
        alone = slice(prompt, prompt + 1)
        one = engine.generate(
            ids[alone, -int(mask[prompt].sum()) :],
            mask[alone, -int(mask[prompt].sum()) :],
            num_rollouts=2,
            prompt_keys=keys[alone],
        )
        rows = slice(2 * prompt, 2 * prompt + 2)
        width = one.completion_ids.shape[1]
        torch.testing.assert_close(together.completion_ids[rows, :width], one.completion_ids)
        torch.testing.assert_close(together.logprob[rows, :width], one.logprob)


def test_a_model_whose_own_loop_samples_something_else_is_refused(monkeypatch):
    model, forward = made("bloom"), BloomForCausalLM.forward

    def forgetful(self, input_ids, **given):
        output = forward(self, input_ids=input_ids, **given)
        output.logits = output.logits * (1 + (input_ids.shape[1] == 1))  # a step of one token goes otherwise
        return output

    monkeypatch.setattr(BloomForCausalLM, "forward", forgetful)
    with pytest.raises(ModelError, match=r"'bloom' cannot be sampled from: .* off by .* from those of the model's own"):
        local_engine(model, **OPTIONS)
    monkeypatch.setattr(BloomForCausalLM, "forward", lambda self, **_: 1 / 0)
    with pytest.raises(ModelError, match="'bloom' cannot be sampled from: ZeroDivisionError"):
        local_engine(model, **OPTIONS)


def test_a_run_says_which_way_it_went(write_config, tmp_path):
    from test_train import events_of, execute

    folder = tmp_path / "bloom"
    made("bloom").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    run = execute(write_config({"student.model": str(folder), "training.max_steps": 1}))
    said = {event["event"]: event["message"] for event in events_of(run.output.path)}
    assert list(said) == ["sharing", "engine"]
    assert said["sharing"].startswith("the student computes a prompt once for each of its rows, as its attention")
    assert "transformers' own loop, as BloomForCausalLM" in said["engine"]


THREE = {"dense": "llama", "experts": "mixtral", "states": "qwen3_5_text"}


@pytest.mark.parametrize("student", THREE)
@pytest.mark.parametrize("teacher", THREE)
def test_students_and_teachers_of_different_families(student, teacher, write_config, tmp_path):
    from test_train import execute

    for seed, (name, kind) in enumerate((("student", student), ("teacher", teacher))):
        made(THREE[kind], seed=seed).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    models = {"student.model": str(tmp_path / "student"), "teacher.model": str(tmp_path / "teacher")}
    models["prompts.eval"] = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a prompt is computed once per row
        run = execute(write_config(models | {"training.max_steps": 2, "training.num_rollouts_per_prompt": 4}))
    metrics = [json.loads(line) for line in (run.output.path / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2
    assert all(line["grad_norm"] > 0 for line in metrics)


def test_experts_learn_nothing_but_the_loss():
    """Models that were saved with their router's own loss switched on would add it to every step's gradient."""
    assert examine("mixtral", output_router_logits=True).gradient_error < 1e-4


def test_what_a_class_does_before_its_output_layer_is_done_by_the_class(tmp_path):
    """Found when the model is loaded; what its base and its output layer alone give is something else."""
    made("modernbert-decoder").save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    ids = torch.arange(3, 13)[None]
    body, head = split_head(loaded)
    assert isinstance(body, HeadInputs)
    torch.testing.assert_close(head.logits(body(input_ids=ids).last_hidden_state), loaded(ids).logits)
    assert (head.logits(loaded.base_model(input_ids=ids).last_hidden_state) - loaded(ids).logits).abs().max() > 0.1
    kept = split_head(without_layers(loaded, [1]))[0]
    assert isinstance(kept, HeadInputs), "a copy is split like the model"
    assert loaded(ids).logits.shape == (1, 10, 264), "and the model itself is as it was"


def test_a_model_that_means_more_than_it_tells_is_computed_row_by_row():
    """A soft cap that a layer applies by itself, where attention is not ours."""
    model = made("llama")
    assert check_sharing(parts_of(model)) is None
    attention = {"told": 0}

    def capped(module, query, key, value, mask, **given):
        attention["told"] += 1
        return sdpa_attention_forward(module, query, 2 * key, value, mask, **given)

    AttentionInterface.register("doubles_keys", capped)
    model.set_attn_implementation("doubles_keys")
    assert "off where a prompt is computed once" in check_sharing(parts_of(model))
    assert attention["told"] > 0
    prompt, said = torch.arange(20)[None], torch.arange(30).view(3, 10)
    mine = hidden_states.shared_hidden(model.base_model, prompt, said, hidden_states.Rows([20], [10] * 3, [0] * 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = parts_of(model).hidden(prompt, prompt >= 0, said, [10] * 3, [0] * 3)
    assert (rows - mine).abs().max() > 0.01, "it is computed row by row from then on"


def parts_of(model) -> ModelParts:
    return ModelParts(*split_head(model), torch.float32)


def test_auto_takes_what_a_class_supports(tmp_path):
    for family, attention in (("llama", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager"), ("bloom", "eager")):
        made(family).save_pretrained(tmp_path / family)
        assert load_model(str(tmp_path / family)).config._attn_implementation == attention
    with pytest.raises(ModelError, match="does not support"):
        load_model(str(tmp_path / "bloom"), attention="sdpa")


def test_a_class_that_has_no_backward_without_dropout_ends_in_a_message(tmp_path):
    model = made("reformer")
    with pytest.raises(ModelError, match="'reformer' has no gradient, so it cannot be distilled: AssertionError"):
        check_pair(model, model, tiny_tokenizer(), tiny_tokenizer())
    encoder = made("bert", is_decoder=False)
    with pytest.raises(ModelError, match="'bert' cannot be sampled from"):
        local_engine(encoder, **OPTIONS)
