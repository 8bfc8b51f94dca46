"""A working copy: gradients reach the float32 weights, sampling shares its weights, and both follow an update."""

from types import MethodType

import pytest
import torch
from conftest import tiny_model
from test_train import execute, metrics_of
from torch import nn

from distill.loss import ModelParts
from distill.models import WorkingCopy, split_head
from distill.rollout import SamplingOptions, local_engine
from distill.run.loading import computes_alike, on_copy

PROMPTS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
SAID = torch.randint(3, 97, (4, 7), generator=torch.Generator().manual_seed(1))


def gradients(student, parts: ModelParts, passes: int = 1) -> dict[str, torch.Tensor]:
    """Of a sum over hidden states and head, which a tied embedding gets parts of from both sides."""
    student.zero_grad()
    for _ in range(passes):
        mask, index = torch.ones_like(PROMPTS, dtype=torch.bool), torch.arange(4) // 2
        hidden = parts.hidden(PROMPTS, mask, SAID, torch.tensor([7, 3, 5, 6]), index)
        (hidden.to(parts.head.weight.dtype) @ parts.head.weight.T).square().mean().backward()
    return {name: weight.grad.clone() for name, weight in student.named_parameters()}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gemma3"])
def test_a_pass_gives_what_autocast_gives_bit_for_bit(family, tied, passes):
    student = tiny_model(family, tie_word_embeddings=tied)
    plain = ModelParts(*split_head(student), torch.bfloat16)
    working = WorkingCopy(student, torch.bfloat16)
    assert len(working.copies) >= 4 * student.config.num_hidden_layers
    expected, found = gradients(student, plain, passes), gradients(student, on_copy(plain, working), passes)
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], gradient), name
    assert all(weight.grad is None for weight in working.copies.values())


def test_a_frozen_weight_gets_no_gradient():
    student = tiny_model("llama")
    frozen = next(name for name, _ in student.named_parameters() if name.endswith("q_proj.weight"))
    student.get_parameter(frozen).requires_grad_(False)
    parts = on_copy(ModelParts(*split_head(student), torch.bfloat16), WorkingCopy(student, torch.bfloat16))
    mask, index = torch.ones_like(PROMPTS, dtype=torch.bool), torch.arange(4) // 2
    parts.hidden(PROMPTS, mask, SAID, torch.tensor([7, 3, 5, 6]), index).float().sum().backward()
    without = {name for name, weight in student.model.named_parameters() if weight.grad is None}
    assert without == {frozen.removeprefix("model.")}


def test_sampling_has_the_same_tensors_and_follows_an_update(monkeypatch):
    """On a GPU; on a CPU sampling lays its weights out in another way."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    student = tiny_model("qwen3")
    working = WorkingCopy(student, torch.bfloat16)
    options = {"sampling": SamplingOptions(5), "eos_token_ids": [], "pad_token_id": 0, "seed": 1}
    shared = local_engine(student, precision="bfloat16", working=working, **options)
    alone = local_engine(student, precision="bfloat16", **options)

    def sampled(engine):
        engine.refresh()
        mask = torch.ones_like(PROMPTS, dtype=torch.bool)
        return engine.generate(PROMPTS, mask, num_rollouts=2, prompt_keys=torch.arange(2)).sampling_logprob

    addresses = {weight.data_ptr() for weight in working.copies.values()}
    inside = [weight for name, weight in shared._model.named_parameters() if name.endswith("proj.weight")]
    assert {weight.data_ptr() for weight in inside} == addresses
    before = sampled(shared)
    assert torch.equal(before, sampled(alone))
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.05 * torch.randn_like(weight)
    working.refresh()
    after = sampled(shared)
    assert torch.equal(after, sampled(alone))
    assert not torch.equal(before, after)


def test_a_run_through_a_copy_gives_the_same_numbers_stopped_and_resumed_too(write_config, tmp_path, monkeypatch):
    changes = {"training.precision": "bfloat16", "training.max_steps": 4, "prompts.eval": None}
    execute(write_config(changes | {"training.output_dir": str(tmp_path / "plain")}))
    monkeypatch.setattr(
        "distill.run.parts.make_working_copy", lambda student, parts, *_: WorkingCopy(student, parts.dtype)
    )
    execute(write_config(changes | {"training.max_steps": 2}))
    parts = execute(write_config(changes)).parts
    assert parts.student_parts.body is not split_head(parts.student)[0]
    for one, other in zip(metrics_of(tmp_path / "run"), metrics_of(tmp_path / "plain"), strict=True):
        assert (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"])


def test_a_layer_that_computes_in_float32_is_noticed():
    def in_float32(layer, inputs):
        with torch.autocast("cpu", enabled=False):
            return nn.functional.linear(inputs.float(), layer.weight.float())

    student = tiny_model("qwen3")
    plain = ModelParts(*split_head(student), torch.bfloat16)
    assert computes_alike(plain, on_copy(plain, WorkingCopy(student, torch.bfloat16)))
    student.model.layers[0].mlp.up_proj.forward = MethodType(in_float32, student.model.layers[0].mlp.up_proj)
    assert not computes_alike(plain, on_copy(plain, WorkingCopy(student, torch.bfloat16)))


def test_memory_that_runs_out_while_a_gradient_is_handed_on_leaves_nothing(monkeypatch):
    student = tiny_model("llama")
    working = WorkingCopy(student, torch.bfloat16)
    parts = on_copy(ModelParts(*split_head(student), torch.bfloat16), working)
    expected = gradients(student, parts)
    student.zero_grad()
    mask, index = torch.ones_like(PROMPTS, dtype=torch.bool), torch.arange(4) // 2
    loss = parts.hidden(PROMPTS, mask, SAID, torch.tensor([7, 3, 5, 6]), index).float().sum()

    def short(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", short)
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()
    for name, gradient in gradients(student, parts).items():
        assert torch.equal(gradient, expected[name])
