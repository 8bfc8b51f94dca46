"""Decode steps of our own: which models they fit, that they say what the model's own layers say, and who takes them."""

import pytest
import torch
from families import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from distill.models import fuse_norms, plain_layers, split_head
from distill.rollout import SamplingOptions, local_engine
from distill.rollout.choice import _takes_plain_steps
from distill.rollout.decode import decode_step
from distill.rollout.decode_probe import can_repeat, check_decode
from distill.rollout.plain_step import plain_step

FIT = ["llama", "qwen2", "qwen3", "mistral", "ministral", "seed_oss", "granite", "cwm"]


def body_of_family(family: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()
    with torch.no_grad():  # norms of 1 and biases of 0 would hide where they go
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    fuse_norms(model)
    return split_head(model)[0]


@pytest.mark.parametrize("family", FIT)
def test_says_what_the_layers_of_a_family_say(family):
    body = body_of_family(family)
    check_decode(body, plain_step)
    assert can_repeat(body, plain_step)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"head_dim": 24, "partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    ],
    ids=str,
)
def test_variants_of_a_layer(changes):
    check_decode(body_of_family("llama", **changes), plain_step)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("smollm3", {}),  # some layers have no rotation
        ("helium", {}),  # turns neighbouring columns
        ("ministral3", {}),  # scales queries far on
        ("granite", {"residual_multiplier": 0.2}),
        ("granite", {"embedding_multiplier": 3.0}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        ("gemma2", {}),
        ("olmo2", {}),
        ("phi3", {}),
        ("qwen3_moe", {}),
        ("gpt2", {}),
    ],
    ids=str,
)
def test_layers_of_another_kind_are_refused(family, changes):
    body = body_of_family(family, **changes)
    with pytest.raises(NotImplementedError):
        check_decode(body, plain_step)


def test_windows_are_told():
    """A layer that sees less is given its window, also one whose model says so in its configuration alone."""
    for family in ("mistral", "qwen2"):
        changes = {"sliding_window": 5, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 4}
        changes = changes if family == "qwen2" else {"sliding_window": 5}
        assert {layer.window for layer in plain_layers(body_of_family(family, **changes))} == {5}
    assert {layer.window for layer in plain_layers(body_of_family("qwen2"))} == {None}


def test_an_engine_samples_the_same_tokens_either_way(monkeypatch):
    """In float32, in which both steps agree to a rounding or two; prompts of two lengths, rows that end at once."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # whose weights only it can read
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3")).eval()
    options = {"sampling": SamplingOptions(9), "eos_token_ids": [7], "pad_token_id": 0, "seed": 3}
    engine = local_engine(model, engine="native", precision="float32", **options)
    assert engine.step is decode_step, "a CPU has recorded steps of the model's own layers"
    assert _takes_plain_steps(model, engine, torch.float32)
    prompt_ids = torch.randint(8, 200, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    mask[1, :2] = False
    found = []
    for step in (decode_step, plain_step):
        engine.step = step
        engine.release()
        found.append(engine.generate(prompt_ids, mask, num_rollouts=4, prompt_keys=torch.arange(3)))
    assert torch.equal(found[0].completion_ids, found[1].completion_ids)
    torch.testing.assert_close(found[0].logprob, found[1].logprob, rtol=1e-4, atol=1e-4)


DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [4, 80])
def test_half_precision_is_as_exact_as_the_layers_of_the_model(device, rows, monkeypatch):
    """Of few rows and of more than one kernel takes, on a GPU captured: log-probabilities against float32."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.manual_seed(0)
    changes = {"hidden_size": 256, "num_attention_heads": 8, "head_dim": 64, "intermediate_size": 512}
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3", **changes)).to(device).eval()
    options = {"sampling": SamplingOptions(24), "eos_token_ids": [7], "pad_token_id": 0, "seed": 3}
    engine = local_engine(model, engine="native", precision="bfloat16", **options)
    assert (engine.step is plain_step) == (device == "cuda")
    assert engine.repeats or device == "cpu"
    prompt_ids = torch.randint(8, 200, (2, 16), device=device)
    mask = torch.ones_like(prompt_ids, dtype=torch.bool)

    def apart(step) -> float:
        """Nats on the average, of the rollouts that a step makes."""
        engine.step = step
        engine.release()
        rollouts = engine.generate(prompt_ids, mask, num_rollouts=rows // 2, prompt_keys=torch.arange(2))
        ids = torch.cat([prompt_ids.repeat_interleave(rows // 2, 0), rollouts.completion_ids], 1)
        with torch.no_grad():
            logprobs = model(ids).logits[:, 15:-1].float().log_softmax(-1)
        theirs = logprobs.gather(2, rollouts.completion_ids[..., None])[..., 0]
        written = torch.arange(theirs.shape[1], device=device) < rollouts.completion_lengths[:, None]
        return (theirs - rollouts.logprob)[written].abs().mean().item()

    ours, of_the_model = apart(plain_step), apart(decode_step)
    assert ours < 1.1 * of_the_model, f"{ours:.4f} nats, with the model's own layers {of_the_model:.4f}"
