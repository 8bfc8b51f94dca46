"""Hidden states of completion tokens: the same log-probabilities and gradients whichever way they are computed."""

import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.forward import completion_hidden, micro_batches
from distill.models import split_head


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.lists(st.integers(0, 20), min_size=1, max_size=9)), min_size=1, max_size=5
    ),
    st.integers(1, 120),
)
def test_micro_batches_hold_every_row_once_within_the_budget(groups, budget):
    prompt_lengths = [prompt for prompt, _ in groups]
    completion_lengths = [length for _, lengths in groups for length in lengths]
    prompt_index = [i for i, (_, lengths) in enumerate(groups) for _ in lengths]
    batches = [batch.tolist() for batch in micro_batches(prompt_lengths, completion_lengths, prompt_index, budget)]
    assert sorted(row for batch in batches for row in batch) == list(range(len(prompt_index)))
    for batch in batches:
        prompts = {prompt_index[row] for row in batch}
        cost = sum(prompt_lengths[p] for p in prompts) + sum(completion_lengths[row] for row in batch)
        longest = max(completion_lengths[row] for row in batch)
        assert cost <= budget or (len(prompts) == 1 and cost == sum(prompt_lengths[p] for p in prompts) + longest)
    for prompt, length in enumerate(prompt_lengths):
        rows = [row for row, p in enumerate(prompt_index) if p == prompt]
        if length + sum(completion_lengths[row] for row in rows) <= budget:
            assert any(set(rows) <= set(batch) for batch in batches), "a group that fits was cut"


def test_a_large_group_is_cut_evenly():
    batches = micro_batches([64], [32] * 256, [0] * 256, 64 + 32 * 100)
    assert [len(batch) for batch in batches] == [86, 85, 85]


def test_the_budget_must_be_positive():
    with pytest.raises(ValueError, match="token_budget must be at least 1 token, found 0"):
        micro_batches([3], [2], [0], 0)


def random_rows(prompt_lengths, completion_lengths, prompt_index, *, vocab_size=97, seed=0):
    """Left-padded prompts, right-padded completions; padding holds ordinary ids, which must not matter."""
    generator = torch.Generator().manual_seed(seed)
    prompt_ids = torch.randint(vocab_size, (len(prompt_lengths), max(prompt_lengths) + 2), generator=generator)
    completion_ids = torch.randint(
        vocab_size, (len(completion_lengths), max(completion_lengths) + 1), generator=generator
    )
    columns = torch.arange(prompt_ids.shape[1] - 1, -1, -1)
    prompt_mask = columns < torch.tensor(prompt_lengths)[:, None]
    return prompt_ids, prompt_mask, completion_ids, torch.tensor(completion_lengths), torch.tensor(prompt_index)


def padded_logprobs(model, prompt_ids, prompt_mask, completion_ids, completion_lengths, prompt_index):
    """The oracle: the whole model on left-padded prompts and right-padded completions, log-probabilities [K]."""
    ids = torch.cat([prompt_ids[prompt_index], completion_ids], dim=1)
    completion_mask = torch.arange(completion_ids.shape[1]) < completion_lengths[:, None]
    mask = torch.cat([prompt_mask[prompt_index], completion_mask], dim=1)
    position_ids = (mask.long().cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=position_ids).logits
    logprobs = logits[:, prompt_ids.shape[1] - 1 : -1].float().log_softmax(-1)
    return logprobs.gather(-1, completion_ids[..., None])[..., 0][completion_mask]


def our_logprobs(model, rows, **options):
    body, head = split_head(model)
    hidden = completion_hidden(body, *rows, **options)
    _, _, completion_ids, completion_lengths, _ = rows
    tokens = completion_ids[torch.arange(completion_ids.shape[1]) < completion_lengths[:, None]]
    return head.logits(hidden).float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def gradients(model, logprobs):
    """Gradients of a random weighting of the log-probabilities, by parameter name."""
    model.zero_grad()
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(5))
    (logprobs * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, rows, **options):
    """Log-probabilities within 1e-5, gradients within 1e-5 of the largest of each parameter."""
    expected = padded_logprobs(model, *rows)
    found = our_logprobs(model, rows, **options)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    expected, found = gradients(model, expected), gradients(model, found)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1.0)
        assert error < 1e-5, f"{name}: {error}"


RAGGED = ([5, 1, 9], [3, 7, 1, 6, 2, 7, 0, 4], [0, 0, 2, 1, 2, 0, 1, 1])


def test_ragged_rows_equal_the_padded_model(family):
    assert_same(tiny_model(family), random_rows(*RAGGED))
