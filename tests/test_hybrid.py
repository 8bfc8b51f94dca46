"""Layers that keep a state: rollouts against stock generation, gradients against plain rows, and what is refused."""

import functools
import warnings
from collections.abc import Iterator

import pytest
import torch
from test_forward import gradients, our_logprobs, random_rows
from test_rollout import Prompts, make_engine, ragged_prompts, rescored, run, same
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

import distill.rollout.decode
from distill.forward import completion_hidden
from distill.forward import hidden as ways
from distill.models import keeps_states, states
from distill.rollout.prefill import prefill

BASE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # at the usual 0.02 a tiny model's states hardly matter
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,  # prompts and completions are cut within a chunk and at its end
    "mamba_expand": 2,
}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8, "num_key_value_heads": 4}
CONVOLUTIONS = {"layer_types": ["conv", "conv", "full_attention", "conv"]}
# What each family needs beyond BASE.
HYBRID = {
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA | EXPERTS,
    "qwen3_next": DELTA | EXPERTS,
    "olmo_hybrid": DELTA,
    "granitemoehybrid": MAMBA2
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16}
    | {"layer_types": ["mamba", "attention", "mamba", "mamba"]},
    "falcon_h1": MAMBA2 | {"mamba_d_ssm": 64},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8}
    | {"hybrid_override_pattern": "M*M-", "n_routed_experts": 4, "moe_shared_expert_intermediate_size": 16},
    "bamba": MAMBA2 | {"attn_layer_indices": [1]},
    "zamba2": {"mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 2, "chunk_size": 8}
    | {"layers_block_type": ["mamba", "mamba", "hybrid", "mamba"], "hybrid_layer_ids": [2]}
    | {"num_mem_blocks": 1, "adapter_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8, "expand": 2},
    "jamba": {"mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "zamba": {"mamba_d_state": 8, "n_mamba_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": CONVOLUTIONS,
    "lfm2_moe": CONVOLUTIONS | EXPERTS | {"num_dense_layers": 1},
    "zaya": {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "router_hidden_size": 16}
    | {"sliding_window": 6, "layer_types": ["hybrid", "hybrid_sliding"] * 2},
    "kimi_linear": LATENT
    | EXPERTS
    | {"linear_head_dim": 8, "linear_num_heads": 4, "layer_types": DELTA["layer_types"]},
    "bailing_hybrid": LATENT
    | EXPERTS
    | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_mtp_layers": 0}
    | {"layer_types": DELTA["layer_types"]},
    "minimax": {"block_size": 8, "layer_types": ["linear_attention", "full_attention"] * 2},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 64}
    | {"block_types": ("recurrent", "recurrent", "attention")},
    "rwkv": {"attention_hidden_size": 32},
}
HYBRID = {name: sizes for name, sizes in HYBRID.items() if name in CONFIG_MAPPING}  # transformers 5.17 has not all
OWN_STATES = ("minimax", "recurrent_gemma", "rwkv")  # in a cache or in modules of their own
LATENT_KEYS = ("kimi_linear", "bailing_hybrid")  # keys and values that are made of one smaller vector
IGNORE_STATES = ("jamba", "mamba", "falcon_mamba", "zamba")  # for more than one token at a time
DECODE = [name for name in HYBRID if name not in OWN_STATES + LATENT_KEYS]
SHARE = [name for name in HYBRID if name not in OWN_STATES + IGNORE_STATES]
EOS = tuple(range(3, 13))


def tiny_hybrid(name: str, *, seed: int = 0, **changes) -> PreTrainedModel:
    """A random causal LM of 4 layers and hidden size 32, in eval mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**BASE, **HYBRID[name], **changes})).eval()


@pytest.fixture(autouse=True)
def one_thread_and_no_history() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ways._warn_once.cache_clear()
    yield
    torch.set_num_threads(threads)


# --- rollouts ---


@pytest.mark.parametrize("name", DECODE)
def test_engines_give_the_same_rollouts(name: str) -> None:
    """Prompts of 20, 1, 7 and 13 tokens, and rows that end, and so are dropped, at different times."""
    model, prompts = tiny_hybrid(name), ragged_prompts()
    for num_rollouts in (1, 4):
        native, stock = (
            run(make_engine(model, engine=engine, eos=EOS), prompts, num_rollouts)
            for engine in ("native", "transformers")
        )
        same(native, stock)
    assert native.completion_lengths.unique().numel() > 3
    # A few models' own decode step is off from their forward pass, in stock generation as much as here.
    torch.testing.assert_close(native.logprob, rescored(model, native), rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["qwen3_5_text", "falcon_h1", "lfm2", "mamba2"])
def test_waves_dropping_and_batch_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, tokens = tiny_hybrid(name), ragged_prompts(), 12
    whole = run(make_engine(model, tokens, EOS), prompts, 5)
    assert whole.completion_lengths.unique().numel() > 1
    monkeypatch.setattr(distill.rollout.decode, "CPU_LADDER", tuple(range(1, 99)))  # after every row that ends
    engine = make_engine(model, tokens, EOS)
    for rows, waves in ((1, 20), (3, 8), (10, 2)):
        engine.limits.rows_per_wave = rows
        assert sum(len(parts) for _, parts, _ in engine._waves(4, 20, 5)) == waves
        same(whole, run(engine, prompts, 5))
    other = Prompts(*(tensor[2:] for tensor in prompts))
    same(whole.select(slice(2, 4)), run(make_engine(model, tokens, EOS), other, 5))


def test_a_wave_counts_the_states() -> None:
    """Qwen3.5: of each of 3 layers a convolution's last 4 inputs of 64 channels, and 4 heads of 8 x 8, in float32."""
    engine = make_engine(tiny_hybrid("qwen3_5_text"))
    assert engine._state_bytes == 3 * (64 * 4 + 4 * 8 * 8) * 4
    assert engine._token_bytes == 2 * 2 * 8 * 4, "of the one layer with attention"
    with_states = next(iter(engine._waves(1, 20, 6)))
    engine._memory_budget_bytes = 7 * engine._state_bytes
    assert len(next(iter(engine._waves(1, 20, 6)))[1]) > len(with_states[1])


@pytest.mark.parametrize("name", OWN_STATES)
def test_what_keeps_states_elsewhere_is_refused_in_words(name: str) -> None:
    with pytest.raises(NotImplementedError, match=r"rollout.engine native: .*; set rollout.engine: auto"):
        make_engine(tiny_hybrid(name))


@pytest.mark.parametrize("name", ["qwen3_5_text", "granitemoehybrid", "lfm2"])
def test_the_probe_of_decode_steps_finds_a_forgotten_state(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "lfm2":
        monkeypatch.setattr(distill.rollout.kv_cache, "of_rows", lambda layers, index: fresh(layers, index))
    else:
        monkeypatch.setattr(
            LinearAttentionLayer, "update_recurrent_state", lambda self, state, state_idx=0: forget(self, state)
        )
    with pytest.raises(NotImplementedError, match="a decode step is off by"):
        make_engine(tiny_hybrid(name))


def forget(layer: LinearAttentionLayer, state: torch.Tensor) -> torch.Tensor:
    layer.recurrent_states[0] = torch.zeros_like(state)
    layer.is_recurrent_states_initialized[0] = True
    return layer.recurrent_states[0]


def fresh(layers: list, index: torch.Tensor) -> list:
    copies = states.of_rows(layers, index)
    for layer in copies:
        for state in getattr(layer, "conv_states", {}).values():
            state.zero_()
    return copies


def test_any_error_of_a_probe_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearAttentionLayer, "update_conv_state", lambda *_, **__: 1 // 0)
    with pytest.raises(NotImplementedError, match="its probe ends in ZeroDivisionError"):
        make_engine(tiny_hybrid("qwen3_5_text"))


def test_rows_have_copies_of_their_own() -> None:
    model = tiny_hybrid("falcon_h1")
    prompt, _ = prefill(model.model, torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool))
    before = [tensor.clone() for tensor in states.tensors_of(prompt.states)]
    rows = states.of_rows(prompt.states, torch.tensor([0, 0]))
    for tensor in states.tensors_of(rows):
        assert len(tensor) == 2
        tensor.fill_(7.0)
    assert before
    assert all(torch.equal(old, new) for old, new in zip(before, states.tensors_of(prompt.states), strict=True))


# --- training ---

ROWS = ([21, 9, 9], [7, 3, 2, 1, 0, 5, 6, 6, 2, 4], [0, 0, 0, 1, 1, 1, 2, 2, 2, 0])


def hybrid_rows(*shape):
    return random_rows(*(shape or ROWS), vocab_size=300)


def assert_like_plain(model: PreTrainedModel, rows, tolerance: float = 1e-4, **options) -> None:
    """Log-probabilities, and each parameter's gradient relative to its size."""
    found, expected = our_logprobs(model, rows, **options), our_logprobs(model, rows, way="padded")
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    found, expected = gradients(model, found), gradients(model, expected)
    assert found.keys() == expected.keys()
    floor = 1e-3 * max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        size = max(gradient.abs().max(), floor)
        torch.testing.assert_close(found[name] / size, gradient / size, atol=tolerance, rtol=0, msg=name)


def token_counts(model: PreTrainedModel) -> list[int]:
    """Filled with the tokens of each later call of the model's body."""
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    return seen


@pytest.mark.parametrize("name", SHARE)
@pytest.mark.filterwarnings("error:model type")
def test_gradients_equal_those_of_plain_rows(name: str) -> None:
    model = tiny_hybrid(name).train()
    # The router of qwen3_next divides by small sums: each way is as far from float64.
    assert_like_plain(model, hybrid_rows(), 3e-4 if name == "qwen3_next" else 1e-4)
    assert model.training
    seen = token_counts(model)
    our_logprobs(model, random_rows([12, 8], [4] * 6, [0, 0, 0, 1, 1, 1]))
    assert sum(seen) == 12 + 8 + 6 * 3, "each prompt is computed once"


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2", "zaya"])
@pytest.mark.parametrize(
    "shape",
    [
        ([5, 6], [1, 1, 1, 1], [0, 0, 1, 1]),  # T = 1: only the prompts are computed
        ([15, 15], [2, 2, 2, 2], [0, 0, 1, 1]),  # a completion of one token to compute
        ([1, 1], [4, 3, 6, 6], [0, 0, 1, 1]),  # prompts shorter than a convolution
        ([40, 6, 30], [5, 4, 4], [2, 2, 0]),  # a prompt that no row uses
        ([70], [70, 3, 65], [0, 0, 0]),  # beyond the delta rule's chunk of 64
    ],
)
def test_uneven_shapes(name: str, shape: tuple) -> None:
    # In float64 the long rows of the delta rule agree to 2e-12; in float32 that is the rounding of its decay.
    assert_like_plain(tiny_hybrid(name), hybrid_rows(*shape), 2e-3 if shape[0] == [70] else 1e-4)


@pytest.mark.parametrize("name", IGNORE_STATES)
@pytest.mark.parametrize("initializer_range", [0.02, 0.2])
def test_layers_that_ignore_a_state_are_found(name: str, initializer_range: float) -> None:
    """In untrained weights too, where what they leave out is smaller than rounding."""
    model = tiny_hybrid(name, initializer_range=initializer_range)
    with pytest.warns(UserWarning, match=f"'{name}' .* as the gradient through a prompt's states is .*% off"):
        assert_like_plain(model, hybrid_rows(), 1e-5)


def test_layers_that_cut_the_graph_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = lambda layer, state, state_idx=0: layer.recurrent_states.update({state_idx: state.detach()})  # noqa: E731
    monkeypatch.setattr(states.GraphState, "update_recurrent_state", cut)
    with pytest.warns(UserWarning, match="'granitemoehybrid' .* as the gradient through a prompt's states is .*% off"):
        assert_like_plain(tiny_hybrid("granitemoehybrid"), hybrid_rows(), 1e-5)


def test_a_cache_of_its_own_is_named_and_left_alone() -> None:
    with pytest.warns(UserWarning, match="'minimax' .* as going on from a prompt's states raises ValueError: MiniMax"):
        assert_like_plain(tiny_hybrid("minimax"), hybrid_rows(), 1e-5)


def test_ranks_that_share_weights_out_compute_plain_rows() -> None:
    model = tiny_hybrid("qwen3_5_text")
    seen = token_counts(model)
    with pytest.warns(UserWarning, match="ranks that share its weights out call it once"):
        our_logprobs(model, hybrid_rows(), one_call=True)
    assert len(seen) == 1


@pytest.mark.parametrize("name", SHARE)
@pytest.mark.filterwarnings("error:model type")
def test_checkpointing_changes_nothing_but_memory(name: str) -> None:
    model, rows, saved = tiny_hybrid(name), hybrid_rows(), {}
    for checkpointing in (False, True):
        found = our_logprobs(model, rows, checkpointing=checkpointing)  # the probe is done with
        sizes = saved[checkpointing] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            again = our_logprobs(model, rows, checkpointing=checkpointing)
        assert torch.equal(found, again)
    assert sum(saved[True]) < 0.5 * sum(saved[False])
    assert_like_plain(model, rows, 3e-4 if name == "qwen3_next" else 1e-4, checkpointing=True)


@pytest.mark.parametrize("name", ["zamba", "zamba2"])
def test_checkpointed_layers_within_others_have_the_same_gradients(name: str) -> None:
    model, rows = tiny_hybrid(name), hybrid_rows()
    found, expected = (
        gradients(model, our_logprobs(model, rows, way="padded", checkpointing=checkpointing))
        for checkpointing in (True, False)
    )
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


def test_the_probe_leaves_a_model_as_it_was_and_runs_once() -> None:
    model = tiny_hybrid("qwen3_5_text").train()
    model.model.layers[1].eval()
    modes, before = (
        [module.training for module in model.modules()],
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    random_state, body = torch.get_rng_state(), model.model
    completion_hidden(body, *hybrid_rows())
    seen = token_counts(model)
    completion_hidden(body, *hybrid_rows())
    assert sum(seen) < 21 + 9 + 9 + 50
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("name", ["granitemoehybrid", "falcon_h1", "lfm2", "nemotron_h"])
@pytest.mark.filterwarnings("error:model type")
def test_under_autocast_rounding_is_no_more_than_that_of_plain_rows(name: str) -> None:
    model, rows = tiny_hybrid(name), hybrid_rows()
    exact = gradients(model, our_logprobs(model, rows, way="padded"))

    def error(way: str) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(model, our_logprobs(model, rows, way=way))
        wrong = sum((found[name] - gradient).square().sum() for name, gradient in exact.items())
        return float((wrong / sum(gradient.square().sum() for gradient in exact.values())).sqrt())

    assert error("chosen") <= 1.5 * error("padded")


def test_a_frozen_teacher_shares_prompts_too() -> None:
    model, rows = tiny_hybrid("qwen3_next").requires_grad_(False), hybrid_rows()
    with torch.no_grad():
        completion_hidden(model.model, *rows)
        seen = token_counts(model)
        found = our_logprobs(model, rows)
    assert sum(seen) < 100
    torch.testing.assert_close(found, our_logprobs(model, rows, way="padded"), atol=1e-4, rtol=0)


def test_absent_kernels_are_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hybrid, dense = (AutoConfig.for_model(name) for name in ("qwen3_5_text", "qwen3"))
    assert keeps_states(hybrid)
    assert not keeps_states(dense)
    states._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"without flash-linear-attention and causal-conv1d .*\[hybrid\]"):
        states.warn_of_absent_kernels(hybrid)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        states.warn_of_absent_kernels(hybrid)
        states.warn_of_absent_kernels(dense)
        states._warn_once.cache_clear()
        monkeypatch.setattr(states, "KERNELS", dict.fromkeys(states.KERNELS, functools.partial(bool, 1)))
        states.warn_of_absent_kernels(hybrid)
