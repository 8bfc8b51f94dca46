"""The decode cache and its two-piece attention, and the distribution that tokens are drawn from."""

import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from conftest import tiny_model
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from distill.rollout import SamplingOptions, local_engine
from distill.rollout.decode import Completions, Decoder, decode_step
from distill.rollout.kv_cache import DecodeCache, PromptCache, Room
from distill.rollout.prefill import prefill
from distill_kernels import Sample

KV_HEADS, GROUP, WIDTH = 2, 3, 8


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose much where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def exact_attention(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """float64 [R, heads, D] for keys [R, kv heads, L, D], of which row r sees `seen` [R, L]."""
    query = query.double().view(query.shape[0], KV_HEADS, GROUP, WIDTH)
    scores = query @ keys.double().transpose(-1, -2) / math.sqrt(WIDTH)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None, None], -math.inf)
    if sinks is not None:
        sinks = sinks.double().view(KV_HEADS, GROUP, 1).expand(len(query), -1, -1, 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : keys.shape[2]]
    return (weights @ values.double()).flatten(1, 2)


def goes_on(cache: DecodeCache) -> None:
    """What a step of a decode does once every layer has written."""
    cache.position.add_(1)
    cache.length += 1


@pytest.mark.parametrize("counts", [(1, 1, 1), (4, 4, 4), (3, 1, 2), (5, 1, 1)])
@pytest.mark.parametrize(
    ("window", "softcap", "sink", "value_width"),
    [
        *((window, None, None, WIDTH) for window in (None, 1, 4, 9)),
        (None, None, None, 5),
        (None, None, None, 12),
        (None, 0.7, None, WIDTH),
        (None, None, 1.0, WIDTH),
        (4, 0.7, 1.0, 5),
    ],
)
def test_attention_in_pieces_is_attention_on_the_whole_row(
    counts: tuple[int, ...], window: int | None, softcap: float | None, sink: float | None, value_width: int
) -> None:
    """Ragged prompts, ragged numbers of rows, rows dropped on the way, windows that cut either piece; room to spare."""
    generator = torch.Generator().manual_seed(1)
    prompts, length, steps, widths = len(counts), 7, 6, (WIDTH, value_width)
    mask = torch.arange(length) >= torch.tensor([0, 6, 3])[:, None]
    made = [torch.randn(prompts, KV_HEADS, length, width, generator=generator) for width in widths]
    sinks = None if sink is None else sink * torch.randn(KV_HEADS * GROUP, generator=generator)
    index = torch.repeat_interleave(torch.arange(prompts), torch.tensor(counts))
    prompt = PromptCache([made[0]], [made[1]], mask)
    cache = DecodeCache(prompt, Room(prompts + 1, length + 2, len(index) + 3, steps + 1))
    for buffer in (*cache._keys, *cache._values, *cache._prompt_keys, *cache._prompt_values):
        buffer.fill_(math.nan)  # of an earlier batch, or of none
    cache.load(prompt, index)
    keys, values, seen = made[0][index], made[1][index], mask[index]
    for step in range(steps):
        if step == 3:
            # Prompt 1 loses every row; the others keep the last one.
            kept = (index != 1).nonzero().squeeze(1)[-max(1, len(index) // 2) :]
            cache.keep(kept)
            index, keys, values, seen = index[kept], keys[kept], values[kept], seen[kept]
        query = torch.randn(len(index), KV_HEADS * GROUP, 1, WIDTH, generator=generator)
        new = [torch.randn(len(index), KV_HEADS, 1, width, generator=generator) for width in widths]
        keys, values = torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2)
        seen = torch.cat([seen, torch.ones(len(index), 1, dtype=torch.bool)], 1)
        in_window = torch.arange(keys.shape[2]) >= (0 if window is None else keys.shape[2] - window)
        expected = exact_attention(query, keys, values, seen & in_window, softcap, sinks)
        options = {"window": window, "softcap": softcap, "sinks": sinks}
        output = cache.attend(query, *cache.update(*new, 0), 0, WIDTH**-0.5, **options)
        torch.testing.assert_close(output, expected.float(), rtol=1e-5, atol=1e-5)
        goes_on(cache)
    assert cache.windows == (set() if window is None else {0})


@pytest.mark.parametrize("counts", [(1, 1), (2, 1)])
def test_of_latents_attention_writes_what_the_model_made_of_them(counts: tuple) -> None:
    """`update` hands the new token's latent back alone."""
    generator = torch.Generator().manual_seed(4)
    pieces = [torch.randn(2, KV_HEADS, 4, width, generator=generator) for width in (WIDTH, 5)]
    index = torch.repeat_interleave(torch.arange(2), torch.tensor(counts))
    prompt = PromptCache([pieces[0]], [pieces[1]], torch.ones(2, 4, dtype=torch.bool))
    cache, keys, values = DecodeCache(prompt, Room(2, 4, len(index), 4)), pieces[0][index], pieces[1][index]
    cache.load(prompt, index)
    for _ in range(3):
        latents = [torch.randn(len(index), 1, 1, 3, generator=generator) for _ in range(2)]
        assert all(back is latent for back, latent in zip(cache.update(*latents, 0), latents, strict=True))
        query = torch.randn(len(index), KV_HEADS * GROUP, 1, WIDTH, generator=generator)
        new = [torch.randn(len(index), KV_HEADS, 1, width, generator=generator) for width in (WIDTH, 5)]
        keys, values = torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2)
        expected = exact_attention(query, keys, values, torch.ones(len(index), keys.shape[2]).bool(), None, None)
        output = cache.attend(query, *new, 0, WIDTH**-0.5)
        torch.testing.assert_close(output, expected.float(), rtol=1e-5, atol=1e-5)
        goes_on(cache)


def test_a_row_is_written_up_to_its_end_and_no_further() -> None:
    out = Completions.empty(3, 2, pad_token_id=7, device=torch.device("cpu"))
    rows, ended, ends = torch.arange(3), torch.tensor([False, True, False]), torch.tensor([5, 6])
    drawn = Sample(torch.tensor([5, 6, 4]), torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-0.5, -1.5, -2.5]))
    go_on = out.write(0, rows, drawn, ended, ends, pad_token_id=7)
    assert go_on.tolist() == [5, 7, 4]
    assert ended.tolist() == [True, True, False]
    assert out.lengths.tolist() == [1, 0, 1]
    assert out.token_ids[:, 0].tolist() == [5, 7, 4]
    assert out.logprob[:, 0].tolist() == [-1.0, 0.0, -3.0]
    assert out.sampling_logprob[:, 0].tolist() == [-0.5, 0.0, -2.5]


def test_draws_follow_the_warped_distribution() -> None:
    """Chi-square of 20,000 first tokens against the exact distribution; the warpers of transformers are the oracle."""
    model = tiny_model("llama")
    sampling = SamplingOptions(max_new_tokens=1, temperature=1.7, top_k=40, top_p=0.95, min_p=0.004)
    engine = local_engine(model, sampling=sampling, eos_token_ids=[2], pad_token_id=0, seed=5, precision="float32")
    prompt = torch.tensor([[11, 7, 42, 3]])
    draws = 20_000
    rollouts = engine.generate(
        prompt, torch.ones_like(prompt, dtype=torch.bool), num_rollouts=draws, prompt_keys=torch.tensor([9])
    )
    with torch.no_grad():
        scores = model(prompt).logits[:, -1].double()
    plain = scores.log_softmax(-1)[0]
    for warper in (
        TemperatureLogitsWarper(1.7),
        TopKLogitsWarper(40),
        TopPLogitsWarper(0.95),
        MinPLogitsWarper(0.004),
    ):
        scores = warper(prompt, scores)
    exact = scores.log_softmax(-1)[0]
    drawn = rollouts.completion_ids[:, 0]
    torch.testing.assert_close(rollouts.logprob[:, 0], plain[drawn].float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(rollouts.sampling_logprob[:, 0], exact[drawn].float(), rtol=0, atol=1e-5)
    possible = exact.isfinite()
    assert 5 < possible.sum() < 40, "the filters must leave out something, and leave something"
    expected = draws * exact.exp()[possible]
    observed = torch.bincount(drawn, minlength=exact.numel())[possible].double()
    assert expected.min() > 5, "chi-square needs expected counts above 5"
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    degrees = int(possible.sum()) - 1
    # Wilson-Hilferty: the 0.9999 quantile of chi-square.
    limit = degrees * (1 - 2 / (9 * degrees) + 3.719 * math.sqrt(2 / (9 * degrees))) ** 3
    assert chi_square < limit, f"{chi_square:.1f} on {degrees} degrees of freedom"


@pytest.mark.parametrize("repeat", [False, True])
def test_decode_equals_the_forward_of_the_whole_row(repeat: bool) -> None:
    """The log-probabilities of a forced greedy path through `prefill` and a `Decoder` alone, without an engine."""
    model = tiny_model("gpt_neox")
    prompt = torch.tensor([[0, 0, 5, 9], [4, 8, 15, 16]])
    mask = torch.tensor([[False, False, True, True], [True, True, True, True]])
    with torch.no_grad():
        cache, hidden = prefill(model.base_model, prompt, mask)
        decoder = Decoder(
            partial(decode_step, model.base_model),
            model.lm_head,
            like=cache,
            room=Room(2, 4, 6, 5),
            sampling=SamplingOptions(5),
            eos_token_ids=[96],
            pad_token_id=0,
            repeat=repeat,
        )
        model.set_attn_implementation("distill_shared_prefix")
        out = decoder.run(cache, hidden, torch.tensor([0, 0, 0, 1, 1, 1]), torch.arange(6), seed=1, length=5)
        model.set_attn_implementation("sdpa")
        for row in range(6):
            length = int(out.lengths[row])
            real = prompt[row // 3][mask[row // 3]]
            logits = model(torch.cat([real, out.token_ids[row, :length]])[None]).logits[0]
            logprob = logits.log_softmax(-1)[len(real) - 1 : -1].gather(1, out.token_ids[row, :length, None])[:, 0]
            torch.testing.assert_close(out.logprob[row, :length], logprob, rtol=0, atol=1e-4)


def test_prompts_in_chunks_give_what_they_give_as_a_whole(family: str) -> None:
    model, prompt = tiny_model(family), torch.randint(3, 96, (3, 20), generator=torch.Generator().manual_seed(6))
    for mask in (torch.ones(3, 20, dtype=torch.bool), torch.arange(20) >= torch.tensor([0, 3, 17])[:, None]):
        with torch.no_grad():
            whole, hidden = prefill(model.base_model, prompt, mask)
            for columns in (1, 7, 19, 20):
                chunks, last = prefill(model.base_model, prompt, mask, columns)
                torch.testing.assert_close(last, hidden, rtol=0, atol=1e-5)
                for found, expected in zip((*chunks.keys, *chunks.values), (*whole.keys, *whole.values), strict=True):
                    of_tokens = mask[:, None, :, None]
                    torch.testing.assert_close(found * of_tokens, expected * of_tokens, rtol=0, atol=1e-5)
