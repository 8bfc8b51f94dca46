"""Adapters: what is trained, sampled, saved and exported with them, and a teacher that shares the student's weights."""

import shutil
import sys

import pytest
import torch
from conftest import tiny_model
from test_train import execute, metrics_of, weights_of
from transformers import AutoModelForCausalLM

from distill.config import LoraConfig
from distill.loss import Group, LossOptions, ModelParts, accumulate_gradients, score, statistics
from distill.models import ModelError, add_adapters, is_adapted, load_model, merged, split_head
from distill.models.lora import ADAPTER
from distill.rollout.generation_copy import GenerationCopy
from distill.run.prompt_sets import evaluation_arguments
from distill.train import main

IDS = torch.arange(3, 13)[None]
LORA = {"student.lora.rank": 4, "training.learning_rate": 1e-2}


def adapted(family: str = "llama", *, moved: bool = True, **options):
    """A tiny model with adapters, of which B is not 0 any more where `moved`."""
    model = tiny_model(family)
    add_adapters(model, LoraConfig(rank=3, **options), seed=0)
    if moved:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return model


def test_adapters_change_nothing_at_first_and_leave_the_random_numbers_alone(family):
    model, same, other = adapted(family, moved=False), adapted(family, moved=False), tiny_model(family)
    before = torch.random.get_rng_state()
    add_adapters(other, LoraConfig(rank=3), seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(model(IDS).logits, tiny_model(family)(IDS).logits)
    lows = [[p for n, p in m.named_parameters() if "lora_A" in n] for m in (model, same, other)]
    assert all(map(torch.equal, lows[0], lows[1]))
    assert not any(map(torch.equal, lows[0], lows[2]))


def test_every_linear_layer_but_the_head_gets_one_or_those_that_are_named():
    model = adapted()
    assert sum(map(is_adapted, model.modules())) == 3 * 7
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 3 * 7
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    named = adapted(target_modules=["q_proj", "down_proj"])
    assert {n.split(".")[-1] for n, m in named.named_modules() if is_adapted(m)} == {"q_proj", "down_proj"}
    scaled = next(m for m in adapted(alpha=12).modules() if is_adapted(m))
    assert (scaled.scaling[ADAPTER], next(filter(is_adapted, model.modules())).scaling[ADAPTER]) == (4, 2)


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["q_proj", "lm_head"], "'lm_head' is the output layer"),
        (["embed_tokens"], "'model.embed_tokens' is the output layer or no plain linear layer"),
        (["qproj"], "qproj.*not found"),
    ],
)
def test_adapters_that_would_be_ignored_are_refused(modules, expected):
    with pytest.raises(ModelError, match=f"student.lora.target_modules: .*{expected}"):
        adapted(target_modules=modules)


def test_without_peft_the_message_says_what_to_install(write_config, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["--config", str(write_config(LORA))]) == 2
    assert "pip install 'distill-on-policy[lora]'" in capsys.readouterr().err


def test_a_merged_model_is_a_plain_one_with_the_same_logits(family):
    model = adapted(family)
    plain = merged(model)
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in tiny_model(family).named_parameters()}
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits)
    assert not torch.allclose(plain(IDS).logits, tiny_model(family)(IDS).logits, atol=0.1)
    assert sum(map(is_adapted, model.modules()))


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_generation_copy_follows_the_adapters(family, pack, dtype):
    model = adapted(family)
    copied = GenerationCopy(model, dtype, eos_token_ids=[2], pad_token_id=0, pack=pack)
    for _ in range(2):
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
        expected = model(IDS).logits
        error = (copied.model(IDS).logits - expected).abs().max() / expected.abs().max()
        assert error < tolerance
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.2)
        assert (copied.model(IDS).logits - model(IDS).logits).abs().max() / expected.abs().max() > 3 * tolerance
        copied.refresh()


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_after_a_step_the_sampled_logprobs_are_those_of_the_trained_model(write_config, engine):
    run = execute(write_config(LORA | {"rollout.engine": engine}))
    ids, mask = evaluation_arguments(run.config, run.parts.held_out, 0)["prompts"]
    rollouts = run.parts.engine.generate(ids, mask, num_rollouts=3, prompt_keys=torch.arange(len(ids)))
    group = Group.of(rollouts)
    rows = torch.arange(len(rollouts.finished))
    sampled = group.valid(rollouts.logprob, rows)
    found = statistics(
        run.parts.student_parts, run.parts.teachers, group, [rows], vocab_size=run.parts.vocab_size
    ).student_logprob
    torch.testing.assert_close(sampled, found, atol=2e-5, rtol=1e-4)
    untrained = ModelParts(*split_head(load_model(run.config.student.model)), torch.float32)
    before = statistics(untrained, run.parts.teachers, group, [rows], vocab_size=run.parts.vocab_size).student_logprob
    assert (before - sampled).abs().max() > 0.05


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_merged_weights(checkpointing):
    """With W' = W + s·B·A, the gradient of B is s·dW'·Aᵀ and that of A is s·Bᵀ·dW'."""
    model, teacher = adapted(), tiny_model("qwen3")
    whole = merged(model).requires_grad_(True)
    torch.manual_seed(0)
    prompts, completions = torch.randint(3, 90, (2, 6)), torch.randint(3, 90, (8, 9))
    group = Group(
        prompts,
        torch.ones(2, 6, dtype=torch.bool),
        completions,
        torch.tensor([9, 4, 1, 9, 2, 9, 9, 5]),
        torch.arange(8) // 4,
        torch.zeros(8, 9),
    )
    teachers, parts = [ModelParts(*split_head(teacher), torch.float32)], [torch.arange(8)]
    hidden = score(teachers, group, parts)
    for student in (model, whole):
        accumulate_gradients(
            ModelParts(*split_head(student), torch.float32),
            teachers,
            hidden,
            group,
            parts,
            LossOptions(objective="reverse_kl"),
            checkpointing=checkpointing,
        )
    plain = dict(whole.named_modules())
    for name, layer in model.named_modules():
        if is_adapted(layer):
            low, high, scaling = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]
            gradient = plain[name].weight.grad
            torch.testing.assert_close(high.grad, scaling * gradient @ low.detach().T, atol=1e-6, rtol=1e-3)
            torch.testing.assert_close(low.grad, scaling * high.detach().T @ gradient, atol=1e-6, rtol=1e-3)
            assert layer.base_layer.weight.grad is None


def test_only_adapters_are_trained_and_kept_in_checkpoints(write_config, tiny_pair, tmp_path, capsys):
    path = write_config(LORA | {"training.save_every": 2})
    assert main(["--config", str(path)]) == 0
    assert "LoRA: 6,144 parameters are trained" in (text := capsys.readouterr().out), text
    folder = tmp_path / "run" / "checkpoints" / "step-000004"
    weights = 4 * 6144
    assert weights < (folder / "student.safetensors").stat().st_size < weights + 8192
    assert 2 * weights < (folder / "optimizer.safetensors").stat().st_size < 2 * weights + 32768
    before = AutoModelForCausalLM.from_pretrained(tiny_pair["student"]).state_dict()
    after = weights_of(tmp_path / "run")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name not in same} == {name for name in before if "_proj" in name}


def test_a_resumed_run_is_the_same_bit_for_bit(write_config, tmp_path):
    whole = tmp_path / "whole"
    run = execute(
        write_config(LORA | {"training.save_every": 2, "training.keep_last": 9, "training.output_dir": str(whole)})
    )
    resumed = {"training.resume": str(whole / "checkpoints" / "step-000002")}
    again = execute(write_config(LORA | resumed | {"training.output_dir": str(tmp_path / "resumed")}))
    assert metrics_of(whole) == metrics_of(tmp_path / "resumed")
    ours, theirs = run.parts.student.state_dict(), again.parts.student.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dropped", [[], [1]])
def test_what_is_exported_gives_the_trained_models_logits(write_config, tmp_path, dropped):
    run = execute(write_config(LORA | {"student.drop_layers": dropped}))
    expected = run.parts.student(IDS).logits
    # W·x + s·B(A·x) against (W + s·BA)·x: the same sums, rounded in another order.
    rounding = {"rtol": 0, "atol": 64 * torch.finfo(torch.float32).eps * expected.abs().max().item()}
    merged = AutoModelForCausalLM.from_pretrained(run.output.path / "final")(IDS).logits
    torch.testing.assert_close(merged, expected, **rounding)
    # The README beside the adapter says how it is loaded: that very code.
    code = (run.output.path / "adapter" / "README.md").read_text().split("```")[1].removeprefix("python\n")
    names: dict = {}
    exec(code, names)
    torch.testing.assert_close(names["model"](IDS).logits, expected, **rounding)
    with names["model"].disable_adapter():
        assert not torch.allclose(names["model"](IDS).logits, expected, atol=1e-2)


def bytes_of(*models) -> int:
    """Memory of the models' weights, what they share counted once."""
    return sum({t.data_ptr(): t.nbytes for model in models for t in model.parameters()}.values())


def test_a_teacher_of_the_base_shares_its_weights_and_never_changes(write_config, tiny_pair, tmp_path):
    copied = shutil.copytree(tiny_pair["student"], tmp_path / "copied")
    changes = LORA | {"student.drop_layers": [1]}
    shared = execute(write_config(changes | {"teacher.model": "base"}))
    apart = execute(
        write_config(changes | {"teacher.model": str(copied), "training.output_dir": str(tmp_path / "apart")})
    )
    assert metrics_of(shared.output.path) == metrics_of(apart.output.path)
    bodies = [[run.parts.student, run.parts.teachers[0].body] for run in (shared, apart)]
    adapters = sum(p.nbytes for p in shared.parts.student.parameters() if p.requires_grad)
    assert bytes_of(*bodies[0]) - adapters == bytes_of(AutoModelForCausalLM.from_pretrained(tiny_pair["student"]))
    assert bytes_of(*bodies[0]) < 0.65 * bytes_of(*bodies[1])
    whole = AutoModelForCausalLM.from_pretrained(tiny_pair["student"])
    found = shared.parts.teachers[0].head.logits(shared.parts.teachers[0].body(IDS).last_hidden_state)
    torch.testing.assert_close(found, whole(IDS).logits, rtol=0, atol=0)
    assert not torch.allclose(shared.parts.student(IDS).logits, whole(IDS).logits, atol=0.1)


def test_without_adapters_a_teacher_of_the_base_is_a_copy(write_config, tiny_pair):
    run = execute(write_config({"teacher.model": "base", "student.drop_layers": [1]}))
    whole = AutoModelForCausalLM.from_pretrained(tiny_pair["student"])
    found = run.parts.teachers[0].head.logits(run.parts.teachers[0].body(IDS).last_hidden_state)
    torch.testing.assert_close(found, whole(IDS).logits, rtol=0, atol=0)
    assert bytes_of(run.parts.student, run.parts.teachers[0].body) == bytes_of(run.parts.student) + bytes_of(
        run.parts.teachers[0].body
    )


def test_adapters_heal_a_pruned_model(write_config):
    changes = {"teacher.model": "base", "student.drop_layers": [1], "student.lora.rank": 16}
    changes |= {"training.learning_rate": 3e-3, "training.num_epochs": 6, "training.num_rollouts_per_prompt": 8}
    changes |= {"evaluation.num_rollouts_per_prompt": 32}  # of two prompts, and six tokens long
    run = execute(write_config(changes))
    assert run.progress.evaluations[-1]["reverse_kl"] < 0.75 * run.progress.evaluations[0]["reverse_kl"]
