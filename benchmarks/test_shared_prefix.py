"""Forward and backward of N completions of one prompt: the prompt computed once, against the plain padded rows.

A tiny random Llama (8 layers, hidden 256, V 8,192) in float32 on two CPU threads, from token ids to the gradients of
the sampled tokens' log-probabilities, head included in both, and the same products (oneDNN's) in both, so that what
is compared is the sharing. What is asked for is against one padded batch; a large one suffers from its own size, so
16 rows at a time are measured beside it.
`bound` is what the tokens of the body allow, N(P + T) / (P + NT).
"""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.harness import Row, interleave
from distill.forward import completion_hidden
from distill.forward.cpu_linear import OneDnnLinears
from distill.forward.hidden import padded_hidden
from distill.forward.packing import host_rows
from distill.models import split_head

VOCAB_SIZE = 8192
# (P, T, N) and how many times faster than plain rows it has to be.
SHAPES = [
    ((256, 64, 16), 3.2),
    pytest.param((256, 64, 64), 3.8, marks=pytest.mark.whole_grid),
    ((256, 256, 8), 1.5),
    ((32, 32, 4), 0.97),
]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": VOCAB_SIZE}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **heads))


def inputs_of(P: int, T: int, N: int) -> tuple:
    """Random ids of one prompt and its N completions."""
    torch.manual_seed(1)
    return (
        torch.randint(VOCAB_SIZE, (1, P)),
        torch.ones(1, P, dtype=torch.bool),
        torch.randint(VOCAB_SIZE, (N, T)),
        [T] * N,
        [0] * N,
    )


def step(model, hidden_of, inputs, rows_at_once):
    """Gradients of the mean log-probability of the completions, accumulated over parts of the rows."""
    body, head = split_head(model)
    prompt_ids, prompt_mask, completion_ids, lengths, index = inputs
    model.zero_grad()
    for start in range(0, len(index), rows_at_once):
        rows = slice(start, start + rows_at_once)
        part = (prompt_ids, prompt_mask, completion_ids[rows], lengths[rows], index[rows])
        hidden = hidden_of(body, *part)
        with OneDnnLinears():
            logits = head.logits(hidden)
        nn.functional.cross_entropy(logits, completion_ids[rows].flatten(), reduction="sum").div(len(index)).backward()


def gradient_after(model, call) -> torch.Tensor:
    """All of the model's gradients after the call, as one vector."""
    call()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def plain(body, prompt_ids, prompt_mask, completion_ids, lengths, index):
    rows = host_rows(prompt_ids, prompt_mask, completion_ids, lengths, index)
    with OneDnnLinears():
        return padded_hidden(body, prompt_ids, completion_ids, rows)


@pytest.mark.parametrize(("shape", "wanted"), SHAPES, ids=str)
def test_forward_and_backward(model, two_threads, shape, wanted, record):
    P, T, N = shape
    inputs = inputs_of(P, T, N)
    candidates = {
        "ours": lambda: step(model, completion_hidden, inputs, N),
        "plain rows": lambda: step(model, plain, inputs, N),
    }
    if N > 16:
        candidates["plain rows, 16 at a time"] = lambda: step(model, plain, inputs, 16)
    gradients = {name: gradient_after(model, call) for name, call in candidates.items()}
    for name, found in gradients.items():
        apart = (found - gradients["plain rows"]).norm() / gradients["plain rows"].norm()
        assert apart < 1e-4, f"{name} computes something else: its gradient is {apart:.1e} apart"
    timings = interleave(candidates, rounds=3, memory=True)
    ours = timings["ours"].median
    bound = N * (P + T) / (P + N * T)
    group = f"shared prompt, forward and backward, (P, T, N) = {shape}: at most {bound:.2f} x, asked {wanted} x"
    for name, timing in timings.items():
        record(Row(group, name, timing.median, timing.spread, peak_bytes=timing.peak_bytes))
    assert timings["plain rows"].median / ours >= wanted
