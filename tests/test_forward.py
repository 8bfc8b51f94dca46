"""Hidden states of completion tokens: the same log-probabilities and gradients whichever way they are computed."""

import warnings
from functools import partial

import pytest
import torch
from conftest import tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from distill.forward import completion_hidden
from distill.forward import hidden as ways
from distill.forward.packing import host_rows
from distill.models import split_head
from distill.runtime.micro_batches import micro_batches

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def random_rows(prompt_lengths, completion_lengths, prompt_index, *, vocab_size=97, seed=0):
    """Left-padded prompts, right-padded completions; padding holds ordinary ids, which must not matter."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randint, vocab_size, generator=generator)
    prompt_ids = draw(size=(len(prompt_lengths), max(prompt_lengths) + 2))
    completion_ids = draw(size=(len(completion_lengths), max(completion_lengths) + 1))
    columns = torch.arange(prompt_ids.shape[1] - 1, -1, -1)
    prompt_mask = columns < torch.tensor(prompt_lengths)[:, None]
    return prompt_ids, prompt_mask, completion_ids, torch.tensor(completion_lengths), torch.tensor(prompt_index)


def ragged_rows(B, N, *, longest=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prompt_lengths = torch.randint(1, 13, (B,), generator=generator).tolist()
    completion_lengths = torch.randint(0, longest + 1, (B * N,), generator=generator).tolist()
    completion_lengths[0] = longest
    return random_rows(prompt_lengths, completion_lengths, [row // N for row in range(B * N)], seed=seed)


def valid_tokens(rows):
    _, _, completion_ids, completion_lengths, _ = rows
    return completion_ids[torch.arange(completion_ids.shape[1]) < completion_lengths[:, None]]


def padded_logprobs(model, prompt_ids, prompt_mask, completion_ids, completion_lengths, prompt_index):
    """The oracle: the whole model on left-padded prompts and right-padded completions, log-probabilities [K]."""
    ids = torch.cat([prompt_ids[prompt_index], completion_ids], dim=1)
    completion_mask = torch.arange(completion_ids.shape[1]) < completion_lengths[:, None]
    mask = torch.cat([prompt_mask[prompt_index], completion_mask], dim=1)
    position_ids = (mask.long().cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=position_ids).logits
    logprobs = (
        logits[:, prompt_ids.shape[1] - 1 : -1].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    )
    return logprobs.gather(-1, completion_ids[..., None])[..., 0][completion_mask]


def our_logprobs(model, rows, way="chosen", **options):
    """Log-probabilities [K] by `completion_hidden`, or by one of the two ways it chooses from."""
    body, head = split_head(model)
    if way == "chosen":
        hidden = completion_hidden(body, *rows, **options)
    else:
        function = {"shared": ways.shared_hidden, "padded": ways.padded_hidden}[way]
        hidden = function(body, rows[0], rows[2], host_rows(*rows), **options)
    logits = nn.functional.linear(hidden, head.weight)
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return logprobs.gather(-1, valid_tokens(rows)[:, None])[:, 0]


def gradients(model, logprobs):
    """Gradients of a random weighting of the log-probabilities, by parameter name."""
    model.zero_grad()
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(5))
    (logprobs * weights).sum().backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, rows, **options):
    """Log-probabilities within 1e-5, and each parameter's gradient within 1e-5 of its size."""
    expected, found = padded_logprobs(model, *rows), our_logprobs(model, rows, **options)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    expected, found = gradients(model, expected), gradients(model, found)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * max(1.0, gradient.abs().max().item()), rtol=0)


@pytest.mark.parametrize("way", ["shared", "padded"])
@pytest.mark.parametrize("N", [1, 4, 64])
@pytest.mark.parametrize("B", [1, 3])
def test_ragged_rows_equal_the_padded_model(family, B, N, way):
    assert_same(tiny_model(family), ragged_rows(B, N), way=way)


@pytest.mark.parametrize("way", ["shared", "padded"])
@pytest.mark.parametrize("training", [False, True])
def test_checkpointing_changes_nothing_but_memory(family, way, training):
    model = tiny_model(family).train(training)
    rows = ragged_rows(3, 4)
    before = [dict(vars(module)) for module in model.modules()]
    assert_same(model, rows, way=way, checkpointing=True)
    after = [dict(vars(module)) for module in model.modules()]
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys()
        assert all(new[name] is old[name] for name in ("training", "_forward_hooks"))

    saved = {}
    for checkpointing in (False, True):
        sizes = saved[checkpointing] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            our_logprobs(model, rows, way=way, checkpointing=checkpointing)
    assert sum(saved[True]) < 0.6 * sum(saved[False])


class LowRank(nn.Module):
    """A frozen linear layer with a trained low-rank addition."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_weights_with_low_rank_additions(checkpointing):
    model = tiny_model("qwen3").requires_grad_(False)
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
        layer.mlp.down_proj = LowRank(layer.mlp.down_proj)
    rows = ragged_rows(3, 4)
    assert_same(model, rows, way="shared", checkpointing=checkpointing)
    trained = set(gradients(model, our_logprobs(model, rows, way="shared", checkpointing=checkpointing)))
    assert trained == {name for name, _ in model.named_parameters() if ".up." in name or ".down." in name}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_bfloat16_is_as_close_to_float64_as_the_padded_model_is(family, weights, checkpointing):
    """Either the weights are bfloat16, or autocast computes with float32 weights in bfloat16."""
    rows = ragged_rows(3, 16)
    model, exact = (tiny_model(family, dtype=weights) for _ in range(2))
    exact = exact.double()
    wanted = padded_logprobs(exact, *rows)
    wanted_gradients = gradients(exact, wanted)

    def errors(logprobs):
        """Root mean square of the log-probabilities' errors, relative error of all gradients together."""
        found = gradients(model, logprobs)
        wrong = sum((found[name] - gradient).square().sum() for name, gradient in wanted_gradients.items())
        whole = sum(gradient.square().sum() for gradient in wanted_gradients.values())
        return (logprobs - wanted).square().mean().sqrt().item(), (wrong / whole).sqrt().item()

    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        ours, padded = (
            our_logprobs(model, rows, way="shared", checkpointing=checkpointing),
            padded_logprobs(model, *rows),
        )
    ours, padded = errors(ours), errors(padded)
    eps = torch.finfo(torch.bfloat16).eps
    assert ours[0] <= padded[0] + eps
    assert ours[1] <= padded[1] + eps


@pytest.mark.parametrize("way", ["chosen", "shared", "padded"])
@pytest.mark.parametrize(
    "lengths",
    [
        ([5, 2], [1, 1, 1, 1], [0, 0, 1, 1]),  # T = 1: only the prompts are computed
        ([1, 1], [4, 3, 6], [0, 0, 1]),  # prompts of one token
        ([5, 1, 9], [3, 7, 1, 6, 2, 7, 0, 4], [0, 0, 2, 1, 2, 0, 1, 1]),  # rows in any order, uneven groups
        ([4, 6, 3], [5, 4], [2, 2]),  # prompts that no row uses
    ],
)
def test_uneven_shapes(lengths, way):
    assert_same(tiny_model("llama"), random_rows(*lengths), way=way)


@pytest.mark.parametrize("way", ["chosen", "shared", "padded"])
def test_no_valid_token_gives_no_state_and_zero_gradients(way):
    model = tiny_model("llama")
    logprobs = our_logprobs(model, random_rows([3, 2], [0, 0], [0, 1]), way=way)
    assert logprobs.shape == (0,)
    assert all(gradient.eq(0).all() for gradient in gradients(model, logprobs).values())


def test_a_teacher_scores_without_gradients(family):
    model = tiny_model(family)
    rows = ragged_rows(3, 4)
    with torch.no_grad():
        found = our_logprobs(model, rows, way="shared")
    assert not found.requires_grad
    torch.testing.assert_close(found, padded_logprobs(model, *rows).detach(), atol=1e-5, rtol=1e-5)


def test_each_prompt_is_computed_once_a_micro_batch(monkeypatch):
    model = tiny_model("llama")
    rows = random_rows([12, 8], [4] * 6, [0, 0, 0, 1, 1, 1])
    seen = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    our_logprobs(model, rows)
    assert seen == [12 + 8 + 6 * 3]


def test_rows_that_share_nothing_are_computed_plainly():
    model = tiny_model("llama")
    seen = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    our_logprobs(model, random_rows([12, 12], [4, 4], [0, 1]))
    assert seen == [(2, 15)]


def test_a_group_split_by_budget_has_the_same_gradient():
    model = tiny_model("qwen3")
    rows = ragged_rows(1, 256)
    prompt_ids, prompt_mask, completion_ids, lengths, index = rows
    tokens_of = lengths.cumsum(0)
    weights = torch.randn(int(lengths.sum()), generator=torch.Generator().manual_seed(5)) / lengths.sum()

    def accumulated(budget):
        model.zero_grad()
        batches = micro_batches(prompt_mask.sum(1), lengths, index, budget)
        for batch in batches:
            part = (prompt_ids, prompt_mask, completion_ids[batch], lengths[batch], index[batch])
            mine = torch.cat([weights[tokens_of[row] - lengths[row] : tokens_of[row]] for row in batch])
            (our_logprobs(model, part) * mine).sum().backward()
        return len(batches), {name: p.grad.clone() for name, p in model.named_parameters()}

    count, whole = accumulated(10**6)
    assert count == 1
    count, split = accumulated(200)
    assert count > 5
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, atol=1e-6, rtol=1e-6)


def test_other_attention_falls_back_to_plain_rows_with_one_warning():
    """A window that stands in the mask alone, which no function of ours reads."""
    ways._warn_once.cache_clear()
    config = AutoConfig.for_model("phimoe", **SMALL, num_local_experts=4, sliding_window=16)
    model, rows = AutoModelForCausalLM.from_config(config).eval(), ragged_rows(1, 6, longest=24)
    with pytest.warns(UserWarning, match="model type 'phimoe' .* 2 of its layers have a window, and 0 tell"):
        assert_same(model, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        our_logprobs(model, rows)


def test_windows_are_shared_and_need_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for longest in (24, 3):  # beyond the window and within
            assert_same(tiny_model("gemma3"), ragged_rows(1, 6, longest=longest))


def test_attention_that_is_more_than_causal_is_noticed_and_left_as_it_was():
    ways._warn_once.cache_clear()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **SMALL))
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    before = model.config._attn_implementation
    with pytest.warns(UserWarning, match="model type 'gemma3_text' .* a mask of its own, or looks ahead"):
        hidden = completion_hidden(model.model, *ragged_rows(1, 6))
    assert torch.isfinite(hidden).all()
    assert model.config._attn_implementation == before
