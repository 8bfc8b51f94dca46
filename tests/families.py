"""Tiny random models of every family that transformers knows as a causal language model, and what becomes of them.

`python tests/families.py` examines every entry of transformers' mapping and writes docs/models.md.
"""

import re
import sys
import tempfile
import traceback
from pathlib import Path
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
    "cohere_compass_text": {
        "layer_types": ("full_attention",) * 4,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "dbrx.attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
    "dbrx.ffn_config": {"moe_num_experts": 4, "moe_top_k": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
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
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attention_head_size": 8},
    "qwen4_exp_text": DELTA
    | {
        "layer_types": ("linear_attention", "indexed_attention") * 2,
        "ple_layer_ids": (),
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32, "is_decoder": True},
    **{name: {"is_decoder": True} for name in ("bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie")},
    **{name: {"is_decoder": True} for name in ("megatron-bert", "roberta", "roberta-prelayernorm", "roc_bert")},
    **{name: {"is_decoder": True} for name in ("roformer", "xlm-roberta", "xlm-roberta-xl", "bert-generation")},
    "xmod": {"default_language": "en_XX", "languages": ("en_XX",), "is_decoder": True},
    "xlnet": {"max_position_embeddings": None},
    "zamba": MAMBA_1 | {"num_key_value_heads": 4, "attention_head_dim": 16},
    "zamba2": {"layers_block_type": ("linear_attention", "hybrid") * 2, "mamba_d_state": 8, "chunk_size": 16},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


# Smaller where rounding grows through such layers, in the model's own forward as well.
INITIALIZER_RANGE = {
    **dict.fromkeys(("ctrl", "gemma4_text", "nemotron_h", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), 0.1),
    **dict.fromkeys(("hy_v4", "zamba2"), 0.05),
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
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        if hasattr(part, "initializer_range"):
            part.initializer_range = INITIALIZER_RANGE.get(family, 0.2)
    return config


def _sizes(default: Any) -> dict[str, Any]:
    return {name: value for name, value in SIZES.items() if _knows(default, name)}


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Without those that are None, and with lists, which configurations check for, where OWN has tuples."""
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
TOLERANCE = 1e-4  # nats, and of the largest entry of a gradient


class UnmadeError(Exception):
    """transformers makes no small model of this family here."""


def examine(family: str, *, seed: int = 0, **changes: Any) -> Outcome:
    """Saves a tiny model, loads it as a run does, samples with both engines, and trains on what was sampled."""
    from conftest import tiny_tokenizer
    from transformers import AutoModelForCausalLM

    from distill.models import ModelError, check_pair, load_model, load_tokenizer

    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            AutoModelForCausalLM.from_config(tiny_config(family, **changes)).save_pretrained(folder)
        except Exception as error:
            raise UnmadeError(f"{type(error).__name__}: {error}") from error
        tiny_tokenizer().save_pretrained(folder)
        try:
            model, tokenizer = load_model(folder), load_tokenizer(folder)
            return _trained(model, check_pair(model, model, tokenizer, tokenizer))
        except ModelError as error:
            return Outcome(refused=str(error).replace(folder, family))


def _trained(model: nn.Module, vocab_size: int) -> Outcome:
    from distill.rollout import SamplingOptions, local_engine

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):  # at its kink a rounding becomes another gradient
                setattr(module, name, nn.GELU())
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
    from distill.loss import Group, LossOptions, ModelParts, accumulate_gradients, check_sharing, score
    from distill.models import split_head

    parts = ModelParts(*split_head(model, vocab_size), torch.float32)
    group, options = Group.of(rollouts), LossOptions(objective="sampled_reverse_kl", importance_clip=None)
    everything = [torch.arange(len(group.completion_lengths))]
    trained = [p for p in model.parameters() if p.requires_grad]
    plain_rows = check_sharing(parts) or ""
    hidden = {key: each * 0.5 for key, each in score([parts], group, everything).items()}  # of a teacher that differs
    accumulate_gradients(parts, [parts], hidden, group, everything, options, vocab_size=vocab_size)
    ours = [p.grad for p in trained]
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # a loop over experts, in plain operations
    logprob_error, loss = 0.0, 0.0
    for row, length in enumerate(group.completion_lengths.tolist()):
        prompt = rollouts.prompt_ids[row // NUM_ROLLOUTS][rollouts.prompt_mask[row // NUM_ROLLOUTS]]
        tokens = rollouts.completion_ids[row, :length]
        logits = model(input_ids=torch.cat([prompt, tokens])[None], use_cache=False).logits[0, -length - 1 : -1]
        logprob = _picked(logits[:, :vocab_size], tokens)
        logprob_error = max(logprob_error, float((logprob.detach() - rollouts.logprob[row, :length]).abs().max()))
        reward = _picked(parts.head.logits(hidden[0, row]), tokens) - logprob
        loss = loss - (reward.detach() * logprob).mean() / len(group.completion_lengths)
    plain = torch.autograd.grad(loss, trained, allow_unused=True)
    return plain_rows, logprob_error, _relative(ours, plain)


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


def mapping() -> list[str]:
    """The families of transformers' own mapping."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


class Way(NamedTuple):
    """What is expected of a family: the engine that samples, and whether training computes a prompt once."""

    engine: str
    shared: bool
    why: str = ""
    """Part of what is said where one of the two is not so."""


OURS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "olmo2", "gpt2", "gpt_neox", "opt", "glm4", "granite")
OURS += ("smollm3", "starcoder2", "ernie4_5", "hunyuan_v1_dense", "seed_oss")
EXPERTS = ("mixtral", "qwen3_moe", "olmoe", "granitemoe", "glm4_moe", "minimax_m2", "dbrx", "gpt_oss")
WINDOWED = ("gemma2", "gemma3_text", "gemma4_text", "cohere2", "exaone4", "olmo3", "ministral")
OF_LATENTS = ("deepseek_v2", "deepseek_v3")
HYBRID = (
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "qwen3_next",
    "olmo_hybrid",
    "granitemoehybrid",
    "falcon_h1",
    "nemotron_h",
)
HYBRID += ("lfm2", "bamba", "zaya")
MORE_AT_ITS_HEAD = ("modernbert-decoder", "bert")

# The families that are examined in every run of the tests, at most sixty.
EXPECTED: dict[str, Way] = {
    **dict.fromkeys(
        (*OURS, *EXPERTS, *WINDOWED, *OF_LATENTS, *HYBRID, *MORE_AT_ITS_HEAD),
        Way("native", True),
    ),
    **dict.fromkeys(("jamba", "mamba"), Way("native", False, "the gradient through a prompt's states is")),
    "doge": Way("native", False, "a mask of its own"),
    **dict.fromkeys(
        ("bloom", "codegen", "gptj", "mpt", "falcon", "stablelm"),
        Way("transformers", False, "computes attention itself"),
    ),
    "nemotron": Way("transformers", False, "passes no arguments on to attention"),
    "gemma3n_text": Way("transformers", True, "layers share one another's keys and values"),
    "llama4_text": Way("transformers", False, "['chunked_attention'] keep no keys and values of every position"),
    "minimax": Way("transformers", False, "uses cache of its own"),
}

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
HEAD = """# Models

<!-- Written by `python tests/families.py`; changes made by hand are lost. -->

What `AutoModelForCausalLM` loads is trained with the default configuration, or refused in a message before the first
step; a line at the start of a run says so where it goes another way than the fastest. Of the {count} families that
transformers {version} knows, {made} could be made as a tiny random model, which was loaded, sampled from and trained
on for a step. The log-probabilities that were recorded while sampling are those of the model's own forward, row by
row, within {logprob:.0e} nats (float32), the tokens are those that transformers' own loop samples, and the gradients
are those of plain autograd within {gradient:.0e} of their largest entry.

- **Rollouts** come from our own decode loop, which computes a prompt once for all its rollouts, or from the loop of
  transformers (`rollout.engine: auto`). On a GPU, in bfloat16, plain layers (of Llama, Qwen2, Qwen3, Mistral and others
  alike) have a decode step of our own; whether a model's are plain is found by trying.
- **In training and scoring** a prompt is computed once for all its completions, or once for each of them.
"""


def page(outcomes: dict[str, Outcome], unmade: dict[str, str]) -> str:
    """docs/models.md."""
    import transformers

    trained = {family: found for family, found in outcomes.items() if not found.refused}
    text = HEAD.format(
        count=len(outcomes) + len(unmade),
        made=len(outcomes),
        version=transformers.__version__,
        logprob=max(found.logprob_error for found in trained.values()),
        gradient=max(found.gradient_error for found in trained.values()),
    )
    for title, engine, shared in (
        ("Both by our own way", "native", True),
        ("Our own rollouts, prompts once a row in training", "native", False),
        ("Rollouts by transformers' loop, prompts once in training", "transformers", True),
        ("Rollouts by transformers' loop, prompts once a row in training", "transformers", False),
    ):
        chosen = {f: o for f, o in trained.items() if (o.engine, not o.plain_rows) == (engine, shared)}
        if engine == "native" and shared:
            text += f"\n## {title}\n\n{', '.join(f'`{family}`' for family in chosen)}\n"
        elif chosen:
            rows = (f"| `{family}` | {_reason(found)} |" for family, found in chosen.items())
            text += f"\n## {title}\n\n| family | why |\n|---|---|\n" + "\n".join(rows) + "\n"
    for title, reasons in (
        ("Refused with this message", {f: o.refused for f, o in outcomes.items() if o.refused}),
        ("Not tried: transformers could not make a small one here", unmade),
    ):
        rows = (f"| `{family}` | {_cell(reason)} |" for family, reason in reasons.items())
        text += f"\n## {title}\n\n| family | |\n|---|---|\n" + "\n".join(rows) + "\n"
    return text


def _reason(found: Outcome) -> str:
    return _cell("; ".join(dict.fromkeys(filter(None, (found.fallback, found.plain_rows)))))


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())[:240]


def main(families: list[str]) -> int:
    """Examines some families, or all and writes the page; 1 where one ends in a traceback or is not exact."""
    known = set(re.findall(r"`([^`]+)`", PAGE.read_text())) if PAGE.exists() else set()
    if new := [family for family in mapping() if family not in known]:
        print(f"{PAGE.name} does not have {len(new)} of transformers' families: {', '.join(new)}")
    outcomes, unmade, wrong = {}, {}, []
    for family in families or mapping():
        try:
            found = outcomes[family] = examine(family)
            exact = max(found.logprob_error, found.engines_differ, found.gradient_error) < TOLERANCE
            said = f"refused: {found.refused}" if found.refused else f"{found.engine}; {_reason(found)}"
            errors = f"{found.logprob_error:.0e} {found.engines_differ:.0e} {found.gradient_error:.0e}"
            print(f"{family}: {errors} {said}" + ("" if exact else "  NOT EXACT"), flush=True)
        except UnmadeError as error:
            unmade[family], exact = str(error), True
            print(f"{family}: not made: {error!s:.200}", flush=True)
        except Exception:
            exact = False
            print(f"{family}: {traceback.format_exc()}", flush=True)
        wrong += [] if exact else [family]
    if wrong:
        print(f"wrong: {', '.join(wrong)}")
    elif not families:
        PAGE.write_text(page(outcomes, unmade))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.path[:0] = [str(PAGE.parent.parent / "kernels"), str(PAGE.parent.parent)]
    sys.exit(main(sys.argv[1:]))
