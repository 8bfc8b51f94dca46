"""Windows, soft caps, sinks, shared keys and latents: what models compute by them, trained and decoded by our own ways.

Every model is one of a real family, tiny and random, with a window shorter than prompts and completions.
"""

import pytest
import torch
from conftest import TINY_SIZES
from test_forward import gradients, padded_logprobs, random_rows, valid_tokens
from transformers import AutoConfig, AutoModelForCausalLM

from distill.forward import completion_hidden
from distill.forward import hidden as ways
from distill.forward.packing import host_rows
from distill.models import split_head
from distill.models.attention import prefer
from distill.rollout import SamplingOptions, local_engine

WINDOW, V = 5, 101
SIZES = TINY_SIZES | {"vocab_size": V, "num_hidden_layers": 2}
EVERYWHERE = {"sliding_window": WINDOW}
BY_TURNS = EVERYWHERE | {"layer_types": ["sliding_attention", "full_attention"]}
SWITCHED_ON = BY_TURNS | {"use_sliding_window": True}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GEMMA4 = BY_TURNS | {"vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 8, "global_head_dim": 16}
LATENTS = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
FAMILIES = {
    "gemma2": EVERYWHERE | {"attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gemma3_text": BY_TURNS,
    "gemma4_text": GEMMA4,
    "gpt_oss": BY_TURNS | EXPERTS,
    "granite_swa": BY_TURNS,
    "olmo3": BY_TURNS,
    "cohere2": BY_TURNS | {"logit_scale": 1.0},
    "exaone4": BY_TURNS,
    "mistral": EVERYWHERE,
    "smollm3": SWITCHED_ON,
    "deepseek_v2": LATENTS,
    "deepseek_v3": LATENTS,
    "minicpm3": LATENTS,
}


def model_of(family, options, std=0.3):
    """Weights so large that distributions are far from uniform, sinks as large as scores."""
    config = AutoConfig.for_model(family, **(SIZES | options))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    prefer(model, model.device)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=std / 2)
            elif "sinks" in name:
                weight.normal_()
    return model


def rows_beyond_the_window():
    """Ragged rows: prompts of up to two windows, completions of none to two."""
    lengths = [3, 12, 7, 9, 5, 0, 12, 1, 8, 10]
    return random_rows([12, 4, 9], lengths, [0, 0, 0, 1, 1, 1, 2, 2, 2, 2], vocab_size=V)


def our_logprobs(model, rows, **options):
    """Log-probabilities [K] with every prompt shared, or NotShareableError."""
    body, head = split_head(model)
    hidden = ways.shared_hidden(body, rows[0], rows[2], host_rows(*rows), **options)
    return head.logits(hidden).log_softmax(-1).gather(-1, valid_tokens(rows)[:, None])[:, 0]


def assert_trained_alike(model, **options):
    rows = rows_beyond_the_window()
    expected, found = padded_logprobs(model, *rows), our_logprobs(model, rows, **options)
    assert expected.std() > 0.1, "such a model would hide errors"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    expected, found = gradients(model, expected), gradients(model, found)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4 * max(1.0, gradient.abs().max().item()), rtol=0)
    assert all(found[name].any() for name in found if "sinks" in name)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompts_equal_the_models_own_attention(family):
    assert_trained_alike(model_of(family, FAMILIES[family]))


def test_layers_that_share_keys_train_on_shared_prompts():
    shared = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": 2 * BY_TURNS["layer_types"]}
    assert_trained_alike(model_of("gemma4_text", GEMMA4 | shared))


def test_a_layer_with_sinks_and_a_window_is_computed_again_in_the_backward():
    assert_trained_alike(model_of("gpt_oss", FAMILIES["gpt_oss"]), checkpointing=True)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"granite_swa", "mistral", "smollm3", "minicpm3"}))
def test_the_native_engine_says_what_the_stock_engine_says(family):
    """Token by token, three rollouts of prompts padded on the left; of the rest, test_decode.py has the parts."""
    model = model_of(family, FAMILIES[family])
    P = T = 2 * WINDOW
    prompts = torch.randint(3, V, (3, P), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(P) >= torch.tensor([0, 7, 3])[:, None]
    options = {"eos_token_ids": [2], "pad_token_id": 0, "seed": 2, "precision": "float32"}
    native, stock = (
        local_engine(model, engine=engine, sampling=SamplingOptions(T), **options).generate(
            prompts, mask, num_rollouts=3, prompt_keys=torch.arange(3)
        )
        for engine in ("native", "transformers")
    )
    assert torch.equal(native.completion_ids, stock.completion_ids)
    assert native.completion_lengths.max() > WINDOW
    torch.testing.assert_close(native.logprob, stock.logprob, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "options"), [("qwen2_moe", SWITCHED_ON), ("phimoe", EVERYWHERE | EXPERTS)])
def test_a_window_in_the_mask_alone_is_noticed(family, options):
    model = model_of(family, options | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16})
    rows = rows_beyond_the_window()
    with pytest.raises(ways.NotShareableError, match="layers have a window, and 0 tell their attention so"):
        our_logprobs(model, rows)
    ways._warn_once.cache_clear()
    with torch.no_grad():
        with pytest.warns(UserWarning, match=f"model type '{family}' .* 0 tell their attention so"):
            found = completion_hidden(model.base_model, *rows)
        torch.testing.assert_close(found, ways.padded_hidden(model.base_model, rows[0], rows[2], host_rows(*rows)))
    kept = {"sampling": SamplingOptions(4), "eos_token_ids": [2], "pad_token_id": 0, "seed": 1}
    with pytest.raises(NotImplementedError, match=r"windows in their mask alone; set rollout\.engine: auto"):
        local_engine(model, engine="native", precision="float32", **kept)


def test_within_a_window_nothing_is_special_and_a_key_that_no_layer_reads_is_none():
    model = model_of("qwen2_moe", SWITCHED_ON | {"sliding_window": 24, "num_experts": 4, "moe_intermediate_size": 16})
    assert_trained_alike(model)
    assert_trained_alike(model_of("llama", EVERYWHERE))
