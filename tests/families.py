"""Tiny random models of every family that transformers knows as a causal language model, and what becomes of them.

`python tests/families.py` examines every entry of transformers' mapping and writes docs/models.md.
"""

import contextlib
import io
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# What most configurations call their sizes; each family takes the names that it knows.
SIZES: dict[str, Any] = {
    "vocab_size": 264,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_dim", "embedding_size", "emb_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "n_positions": 256,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "n_group": 2,
    "topk_group": 1,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
PER_LAYER = {
    "vocab_size_per_layer_input": 264,
    "hidden_size_per_layer_input": 8,
    "head_dim": None,
    "global_head_dim": 8,
}
# Of the towers of pictures and sounds.
PARTS = {"depth": 1, "num_heads": 4, "out_hidden_size": 32, "image_size": 28, "patch_size": 14}
STATES = ("linear_attention", "full_attention") * 2
WINDOWS = ("sliding_attention", "full_attention") * 2
MAMBA_1 = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8}

# What a family needs beside or instead of SIZES; None leaves its own default.
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), LATENT),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), LATENT),
    "bailing_hybrid": LATENT | {"layer_types": STATES, "qk_nope_head_dim": 8},
    "bamba": MAMBA | {"attn_layer_indices": (1, 3)},
    "beam": {"n_group": 2, "topk_group": 1},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"layer_types": WINDOWS},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon": {"head_dim": None},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 1,
        "layer_types": ("sliding_attention", "sliding_attention", "full_attention", "full_attention"),
        "vocab_size_per_layer_input": 264,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "activation_sparsity_pattern": (0.0,) * 4,
    },
    "gemma4_text": PER_LAYER,
    "gemma4_unified_text": PER_LAYER,
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "num_heads": 4},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": MAMBA | {"layer_types": ("mamba", "attention") * 2},
    "jamba": MAMBA_1,
    "kimi_linear": LATENT | {"layer_types": STATES, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ("conv", "full_attention") * 2},
    "lfm2_moe": {"layer_types": ("conv", "full_attention") * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16},
    "olmo_hybrid": DELTA,
    "prophetnet": {"num_decoder_layers": 4, "num_encoder_layers": 4, "num_hidden_layers": None},
    "qwen3_5_moe_text": DELTA,
    "qwen3_5_text": DELTA,
    "qwen3_next": DELTA | {"layer_types": STATES},
    "xlnet": {"max_position_embeddings": None},
    "zamba": MAMBA_1 | {"num_key_value_heads": 4, "attention_head_dim": 16},
    "zamba2": {"layers_block_type": ("linear_attention", "hybrid") * 2, "mamba_d_state": 8, "chunk_size": 16},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def tiny_config(family: str, **changes: Any) -> Any:
    """The configuration of a random model of `family` of four layers and hidden size 32, far from uniform."""
    from transformers import AutoConfig

    default = AutoConfig.for_model(family)
    options = _sizes(default) | OWN.get(family, {}) | changes
    # Of pictures and text: each part has its sizes.
    for name in getattr(default, "sub_configs", {}):
        if getattr(default, name, None) is not None:
            options[name] = _plain(_sizes(getattr(default, name)) | PARTS | OWN.get(f"{family}.{name}", {}))
    config = AutoConfig.for_model(family, **_plain(options))
    for part in (config, config.get_text_config()):
        if hasattr(part, "initializer_range"):
            part.initializer_range = 0.2
    return config


def _sizes(default: Any) -> dict[str, Any]:
    return {name: value for name, value in SIZES.items() if _knows(default, name)}


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Without those that are None; sequences here are tuples, which nobody can change, and configurations want lists."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in options.items() if v is not None}


def _knows(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # some raise where it differs between layers
        return True


class Outcome(NamedTuple):
    """What became of a family: `engine` that samples and why not the native one, whether prompts are shared in training
    and why not; or why it cannot be trained. The errors are the largest found; nats, and relative for gradients.
    """

    engine: str = ""
    fallback: str = ""
    plain_rows: str = ""
    refused: str = ""
    logprob_error: float = 0.0
    engines_differ: float = 0.0
    gradient_error: float = 0.0


PROMPT_LENGTHS, NUM_ROLLOUTS, NUM_TOKENS = (9, 5, 12), 3, 10


def examine(family: str, *, seed: int = 0, **changes: Any) -> Outcome:
    """Saves a tiny model, loads it as a run does, samples with both engines, and trains on what was sampled."""
    from conftest import tiny_tokenizer
    from transformers import AutoModelForCausalLM

    from distill.models import ModelError, check_pair, load_model, load_tokenizer

    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        AutoModelForCausalLM.from_config(tiny_config(family, **changes)).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        try:
            model, tokenizer = load_model(folder), load_tokenizer(folder)
            vocab_size = check_pair(model, model, tokenizer, tokenizer)
            return _trained(model, vocab_size)
        except ModelError as error:
            return Outcome(refused=str(error).replace(folder, family))


def _trained(model: nn.Module, vocab_size: int) -> Outcome:
    from distill.rollout import SamplingOptions, local_engine

    longest = max(PROMPT_LENGTHS)
    mask = torch.arange(longest) >= longest - torch.tensor(PROMPT_LENGTHS)[:, None]
    ids = torch.randint(4, vocab_size, mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    options = {
        "sampling": SamplingOptions(NUM_TOKENS),
        "eos_token_ids": range(4, 20),  # rows end at different times
        "pad_token_id": 0,
        "seed": 3,
        "precision": "float32",
        "vocab_size": vocab_size,
    }
    engines = [local_engine(model, **options)]
    if engines[0].engine == "native":
        engines.append(local_engine(model, engine="transformers", **options))
    keys = torch.arange(len(ids))
    found, *others = [e.generate(ids, mask, num_rollouts=NUM_ROLLOUTS, prompt_keys=keys) for e in engines]
    difference = 0.0
    for other in others:
        same = found.completion_ids.shape == other.completion_ids.shape
        same = same and torch.equal(found.completion_ids, other.completion_ids)
        difference = float((found.logprob - other.logprob).abs().max()) if same else float("inf")
    plain_rows, logprob_error, gradient_error = _against_autograd(model, found, vocab_size)
    return Outcome(
        engines[0].engine,
        engines[0].fallback or "",
        plain_rows,
        logprob_error=logprob_error,
        engines_differ=difference,
        gradient_error=gradient_error,
    )


def _against_autograd(model: nn.Module, rollouts: Any, vocab_size: int) -> tuple[str, float, float]:
    """Why prompts are not shared, and the errors of log-probabilities and gradients against the model row by row."""
    from distill.loss import Group, LossOptions, ModelParts, accumulate_gradients, score
    from distill.models import split_head

    parts = ModelParts(*split_head(model, vocab_size), torch.float32)
    group, options = Group.of(rollouts), LossOptions(objective="sampled_reverse_kl", importance_clip=None)
    everything = [torch.arange(len(group.completion_lengths))]
    trained = [p for p in model.parameters() if p.requires_grad]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hidden = [each * 0.5 for each in score([parts], group, everything)]  # of a teacher that differs
        accumulate_gradients(parts, [parts], hidden, group, everything, options, vocab_size=vocab_size)
    ours = [p.grad for p in trained]
    said = [str(each.message) for each in caught if "once per row" in str(each.message)]
    logprob_error, loss = 0.0, 0.0
    for row, length in enumerate(group.completion_lengths.tolist()):
        prompt = rollouts.prompt_ids[row // NUM_ROLLOUTS][rollouts.prompt_mask[row // NUM_ROLLOUTS]]
        tokens = rollouts.completion_ids[row, :length]
        logits = model(input_ids=torch.cat([prompt, tokens])[None], use_cache=False).logits[0, -length - 1 : -1]
        logprob = _picked(logits[:, :vocab_size], tokens)
        logprob_error = max(logprob_error, float((logprob - rollouts.logprob[row, :length]).abs().max()))
        reward = _picked(parts.head.logits(hidden[row]), tokens) - logprob
        loss = loss - (reward.detach() * logprob).mean() / len(group.completion_lengths)
    plain = torch.autograd.grad(loss, trained, allow_unused=True)
    return (said[0] if said else ""), logprob_error, _relative(ours, plain)


def _picked(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def _relative(found: list[Tensor | None], expected: tuple[Tensor | None, ...]) -> float:
    """The largest difference of two gradients, in units of the largest entry."""
    pairs = [
        (torch.zeros_like(e if f is None else f) if f is None else f, torch.zeros_like(f) if e is None else e)
        for f, e in zip(found, expected, strict=True)
        if f is not None or e is not None
    ]
    largest = max(float(e.abs().max()) for _, e in pairs if e.numel())
    return max(float((f - e).abs().max()) for f, e in pairs if f.numel()) / largest


def mapping() -> Iterator[str]:
    """The families of transformers' own mapping."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    yield from MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
