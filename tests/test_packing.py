"""Micro-batches and length buckets: every row exactly once, within the budget, with little padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.forward.packing import MAX_PADDING, Rows, host_rows, length_buckets, pack
from distill.runtime.micro_batches import micro_batches

GROUPS = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.integers(0, 20), min_size=1, max_size=9)), min_size=1, max_size=5
)


def rows_of(groups: list[tuple[int, list[int]]]) -> Rows:
    return Rows(
        [prompt for prompt, _ in groups],
        [length for _, lengths in groups for length in lengths],
        [i for i, (_, lengths) in enumerate(groups) for _ in lengths],
    )


@settings(max_examples=60, deadline=None)
@given(GROUPS, st.integers(1, 120))
def test_micro_batches_hold_every_row_once_within_the_budget(groups, budget):
    prompt_lengths, completion_lengths, prompt_index = rows = rows_of(groups)
    batches = [batch.tolist() for batch in micro_batches(*rows, budget)]
    assert sorted(row for batch in batches for row in batch) == list(range(len(prompt_index)))
    for batch in batches:
        prompts = {prompt_index[row] for row in batch}
        cost = sum(prompt_lengths[p] for p in prompts) + sum(completion_lengths[row] for row in batch)
        longest = max(completion_lengths[row] for row in batch)
        assert cost <= budget or (len(prompts) == 1 and cost == sum(prompt_lengths[p] for p in prompts) + longest)
    for prompt, length in enumerate(prompt_lengths):
        members = [row for row, p in enumerate(prompt_index) if p == prompt]
        if length + sum(completion_lengths[row] for row in members) <= budget:
            assert any(set(members) <= set(batch) for batch in batches), "a group that fits was cut"


def test_a_large_group_is_cut_evenly():
    batches = micro_batches([64], [32] * 256, [0] * 256, 64 + 32 * 100)
    assert [len(batch) for batch in batches] == [86, 85, 85]


def test_the_budget_must_be_positive():
    with pytest.raises(ValueError, match="token_budget must be at least 1 token, found 0"):
        micro_batches([3], [2], [0], 0)


@settings(max_examples=60, deadline=None)
@given(GROUPS)
def test_length_buckets_waste_little(groups):
    rows = rows_of(groups)
    buckets = length_buckets(rows)
    assert sorted(row for bucket in buckets for row in bucket) == list(range(len(rows.prompt_index)))
    for bucket in buckets:
        padded = len(bucket) * max(rows.length(row) for row in bucket)
        assert padded - sum(rows.length(row) for row in bucket) <= MAX_PADDING * padded


@settings(max_examples=60, deadline=None)
@given(GROUPS)
def test_packed_rows_hold_each_prompt_once_and_no_padding(groups):
    rows = rows_of(groups)
    packed = pack(rows, 30, 20)
    assert len(packed.source) == len(set(packed.source.tolist())) == sum(packed.segments) == rows.packed_tokens()
    assert len(packed.states) == sum(rows.completion_lengths)
    for shared in packed.shared:
        assert shared.key_start + shared.key_length <= shared.query_start


def test_rows_that_do_not_fit_together_are_refused():
    ids, mask = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[0, 1, 1], [0, 0, 0]], dtype=torch.bool)
    completions = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="a prompt has no token"):
        host_rows(ids, mask, completions, [1, 2], [0, 1])
    with pytest.raises(ValueError, match=r"prompt_index must lie in 0\.\.1, found 0 to 2"):
        host_rows(ids, mask, completions, [1, 2], [0, 2])
    with pytest.raises(ValueError, match=r"completion_lengths must lie in 0\.\.4, .* found 1 to 5"):
        host_rows(ids, mask, completions, [1, 5], [0, 0])
    with pytest.raises(ValueError, match="completion_ids has 2 rows, completion_lengths 1 and prompt_index 2"):
        host_rows(ids, mask, completions, [1], [0, 0])
