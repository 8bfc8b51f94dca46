"""Rollouts against stock `generate`, against rescoring, and against themselves in other waves and batches."""

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from conftest import tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

import distill.rollout.decode
from distill.loss import Rollouts
from distill.rollout import RolloutEngine, SamplingOptions, choose_dtype, local_engine
from distill.rollout.generation_copy import GenerationCopy

FAMILIES = ("llama", "qwen3", "gpt_neox", "gemma3")
ENGINES = ("native", "transformers")
NEVER = (96,)
GREEDY = {"top_k": 1}


def mask_of(rollouts: Rollouts) -> torch.Tensor:
    """[R, T] bool, true where there is a completion token."""
    return torch.arange(rollouts.completion_ids.shape[1]) < rollouts.completion_lengths[:, None]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose much where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Prompts(NamedTuple):
    ids: Tensor
    mask: Tensor
    keys: Tensor


def ragged_prompts(pad: int = 0) -> Prompts:
    """Four prompts of 20, 1, 7 and 13 tokens, left-padded; longer than the window of the sliding family."""
    ids = torch.randint(3, 96, (4, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(20) >= 20 - torch.tensor([20, 1, 7, 13])[:, None]
    return Prompts(ids.masked_fill(~mask, pad), mask, torch.tensor([5, 0, 17, 90_000]))


def make_engine(model: PreTrainedModel, tokens: int = 24, eos=NEVER, **changes) -> RolloutEngine:
    options = {"pad_token_id": 0, "seed": 3, "precision": "float32", "engine": "native"}
    names = ("temperature", "top_k", "top_p", "min_p")
    sampling = SamplingOptions(tokens, **{name: changes.pop(name) for name in names if name in changes})
    return local_engine(model, sampling=sampling, eos_token_ids=eos, **(options | changes))


def run(engine: RolloutEngine, prompts: Prompts, num_rollouts: int) -> Rollouts:
    return engine.generate(prompts.ids, prompts.mask, num_rollouts=num_rollouts, prompt_keys=prompts.keys)


def stock_greedy(model: PreTrainedModel, prompts: Prompts, tokens: int, eos=NEVER, pad: int = 0) -> Tensor:
    output = model.generate(
        prompts.ids,
        attention_mask=prompts.mask.long(),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=list(eos),
        pad_token_id=pad,
    )
    return output[:, prompts.ids.shape[1] :]


def same(one: Rollouts, other: Rollouts) -> None:
    """Equal tokens, lengths and ends; log-probabilities up to what another order of the same sums may change."""
    assert torch.equal(one.completion_ids, other.completion_ids)
    assert torch.equal(one.completion_lengths, other.completion_lengths)
    assert torch.equal(one.finished, other.finished)
    torch.testing.assert_close(one.logprob, other.logprob, rtol=0, atol=1e-4)
    torch.testing.assert_close(one.sampling_logprob, other.sampling_logprob, rtol=0, atol=1e-4)


def rescored(model: PreTrainedModel, rollouts: Rollouts) -> Tensor:
    """[R, T] log-probabilities by running every row on its own, without padding and without a cache."""
    scores = torch.zeros_like(rollouts.logprob)
    for row, length in enumerate(rollouts.completion_lengths.tolist()):
        prompt = row // rollouts.num_rollouts
        start = rollouts.prompt_ids[prompt][rollouts.prompt_mask[prompt]]
        said = rollouts.completion_ids[row, :length]
        with torch.no_grad():
            logits = model(torch.cat([start, said])[None]).logits[0, len(start) - 1 : -1]
        scores[row, :length] = logits.log_softmax(-1).gather(1, said[:, None])[:, 0]
    return scores


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("num_rollouts", [1, 4, 16])
@pytest.mark.parametrize("early", [False, True], ids=["full", "early_eos"])
def test_greedy_tokens_equal_stock_generate(name: str, num_rollouts: int, early: bool) -> None:
    model, prompts, tokens = tiny_model(name), ragged_prompts(), 24
    eos = NEVER
    if early:  # ids that rows 0 and 2 say at different times, so that rows end early and unevenly
        free = stock_greedy(model, prompts, tokens)
        eos = (int(free[0, 3]), int(free[2, 11]), 96)
    expected = stock_greedy(model, prompts, tokens, eos)
    rollouts = run(make_engine(model, tokens, eos, **GREEDY), prompts, num_rollouts)
    assert torch.equal(rollouts.completion_ids, expected.repeat_interleave(num_rollouts, 0))
    if early:
        assert 1 <= rollouts.completion_lengths.min() < rollouts.completion_lengths.max()
        assert rollouts.finished.any()
    assert (rollouts.sampling_logprob == 0).all(), "a greedy draw is certain"


@pytest.mark.parametrize("name", FAMILIES)
def test_logprob_equals_rescoring(name: str) -> None:
    model, prompts = tiny_model(name), ragged_prompts()
    rollouts = run(make_engine(model, 20, eos=(3, 4, 5), temperature=1.3, top_p=0.9), prompts, 8)
    assert rollouts.finished.any()
    assert not rollouts.finished.all()
    torch.testing.assert_close(rollouts.logprob, rescored(model, rollouts), rtol=0, atol=1e-4)
    assert (rollouts.sampling_logprob[~mask_of(rollouts)] == 0).all()


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.01}])
def test_engines_give_the_same_rollouts(family: str, changes: dict) -> None:
    model, prompts = tiny_model(family), ragged_prompts()
    native, stock = (run(make_engine(model, engine=e, eos=(3, 4, 5), **changes), prompts, 4) for e in ENGINES)
    same(native, stock)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_waves_compaction_and_batch_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny_model(name), ragged_prompts()
    eos = tuple(range(3, 9))
    whole = run(make_engine(model, eos=eos), prompts, 6)
    assert whole.completion_lengths.unique().numel() > 1
    for budget in (1, 100_000, 400_000):
        engine = make_engine(model, eos=eos, memory_budget_bytes=budget)
        assert len(list(engine._waves(4, 20, 6))) > 1 or budget > 400_000
        same(whole, run(engine, prompts, 6))
    for ladder in ((24,), (6, 12), tuple(range(1, 25))):  # never, late, after every row that ends
        monkeypatch.setattr(distill.rollout.decode, "CPU_LADDER", ladder)
        same(whole, run(make_engine(model, eos=eos), prompts, 6))
    for first in (0, 2):  # in another batch, with less padding
        part = slice(first, first + 2)
        column = int(prompts.mask[part].any(0).int().argmax())
        batch = Prompts(prompts.ids[part, column:], prompts.mask[part, column:], prompts.keys[part])
        same(whole.select(part), run(make_engine(model, eos=eos), batch, 6))
    fewer = run(make_engine(model, eos=eos), prompts, 2)
    of_whole = whole.completion_ids.view(4, 6, -1)[:, :2].flatten(0, 1)
    assert torch.equal(fewer.completion_ids, of_whole[:, : fewer.completion_ids.shape[1]])


@pytest.mark.parametrize("num_rollouts", [1, 6])
def test_repeated_steps_change_nothing(family: str, num_rollouts: int) -> None:
    """Steps that are recorded once and repeated, over batches of other prompts, seeds, lengths and weights: whatever a
    recording has taken for fixed, another batch shows."""
    model, prompts, eos = tiny_model(family), ragged_prompts(), tuple(range(3, 9))
    engine = make_engine(model, 30, eos)
    assert engine.repeats
    first = prompts.ids[:2, -13:], prompts.mask[:2, -13:] | True, prompts.keys[:2]
    batches = [prompts, Prompts(*first), Prompts(prompts.ids.roll(3, 1), prompts.mask, prompts.keys + 1), prompts]
    recorded = 0
    for seed, (length, batch) in enumerate(zip((30, 12, 30, 26), batches, strict=True)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        engine.refresh()
        found = run(engine.variant(seed=seed, max_new_tokens=length), batch, num_rollouts)
        assert found.completion_lengths.min() < length
        plain = make_engine(model, length, eos, seed=seed)
        plain.repeats = False
        same(found, run(plain, batch, num_rollouts))
        recorded, before = len(engine._kept.decoder._steps), recorded
        assert recorded
    assert recorded - before < recorded, "nothing was recorded in a batch before"


def test_a_step_that_looks_at_values_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny_model("llama"), ragged_prompts()
    expected, forward = run(make_engine(model), prompts, 2), type(model.model.norm).forward
    monkeypatch.setattr(
        type(model.model.norm), "forward", lambda self, hidden: forward(self, hidden) * (1 if hidden.sum() else 0)
    )
    engine = make_engine(model)
    assert not engine.repeats
    same(expected, run(engine, prompts, 2))


def test_what_is_kept_grows_and_is_given_back() -> None:
    model, prompts = tiny_model(), ragged_prompts()
    engine = make_engine(model, 10)
    small = Prompts(prompts.ids[2:], prompts.mask[2:], prompts.keys[2:])
    expected = run(engine, small, 2)
    first = engine._kept.decoder
    run(engine.variant(seed=5, max_new_tokens=8), small, 2)
    assert engine._kept.decoder is first, "a shorter batch has its own buffers"
    run(engine, prompts, 3)
    assert engine._kept.decoder is not first
    same(expected, run(engine, small, 2))
    assert engine.release() == "what was kept for the next rollouts given back"
    assert engine.release() is None
    same(expected, run(engine, small, 2))
    assert engine._kept.decoder is not None
    attempts = iter([lambda: torch.empty(2**60), lambda: "done"])
    assert engine.limits.attempt("update", lambda: next(attempts)(), lambda: None, "") == "done"
    assert engine._kept.decoder is None
    same(expected, run(engine, small, 2))
    assert engine._kept.decoder is None, "an update that had no room would have none again"
    limits, gone = engine.limits, weakref.ref(engine)
    del engine, first
    gc.collect()
    assert gone() is None, "an engine stays for what it would give back"
    assert limits.attempt("update", iter([1]).__next__, lambda: None, "") == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_graphs_on_a_gpu_say_what_single_steps_say(family: str, precision: str) -> None:
    """In float32 the same tokens as steps run one by one; in bfloat16 near its rescoring. Over two batches."""
    model = tiny_model(family).cuda()
    prompts = Prompts(*(tensor.cuda() for tensor in ragged_prompts()))
    engine = make_engine(model, 40, eos=(3, 4, 5), precision=precision)
    assert engine.repeats
    for keys in (prompts.keys, prompts.keys + 1):
        batch = prompts._replace(keys=keys)
        replayed = run(engine, batch, 6)
        if precision == "float32":
            plain = make_engine(model, 40, eos=(3, 4, 5), precision=precision)
            plain.repeats = False
            same(replayed, run(plain, batch, 6))
        limit = 1e-4 if precision == "float32" else 0.1
        assert (replayed.logprob - rescored(model, replayed)).abs().mean() < limit


def test_waves_hold_every_row_once() -> None:
    engine = make_engine(tiny_model())
    for budget in (1, 10_000, 60_000, 200_000, 10**9):
        engine._memory_budget_bytes = budget
        rows = [range(*wave.indices(35)) for _, waves, _ in engine._waves(7, 20, 5) for wave in waves]
        assert [row for wave in rows for row in wave] == list(range(35))
    assert len(rows) == 1


def test_seed_and_key_choose_the_rollout() -> None:
    model, prompts = tiny_model(), ragged_prompts()
    base = run(make_engine(model), prompts, 3)
    assert not torch.equal(base.completion_ids, run(make_engine(model, seed=4), prompts, 3).completion_ids)
    other = run(make_engine(model), prompts._replace(keys=prompts.keys + 1), 3)
    assert not torch.equal(base.completion_ids, other.completion_ids)
    assert base.completion_ids.view(4, 3, -1).unique(dim=1).shape[1] == 3, "rollouts of a prompt differ"


@pytest.mark.parametrize("engine", ENGINES)
def test_padding_token_may_be_an_end_token(engine: str) -> None:
    """As in SmolLM2: what follows the sampled end is padding of the same id, and does not count."""
    model, prompts = tiny_model(), ragged_prompts(pad=7)
    rollouts = run(make_engine(model, eos=(7, 8), pad_token_id=7, engine=engine), prompts, 8)
    ids, lengths = rollouts.completion_ids, rollouts.completion_lengths
    ends = torch.isin(ids, torch.tensor([7, 8])) & mask_of(rollouts)
    assert rollouts.finished.any()
    assert torch.equal(ends.any(1), rollouts.finished)
    assert torch.equal(ends.int().argmax(1)[rollouts.finished] + 1, lengths[rollouts.finished])
    assert (ids[~mask_of(rollouts)] == 7).all()
    assert set(ids[ends].tolist()) == {7, 8}, "both end tokens end rollouts"


@pytest.mark.parametrize("engine", ENGINES)
def test_one_new_token_after_one_token(engine: str) -> None:
    model = tiny_model("qwen3")
    prompts = Prompts(torch.tensor([[11]]), torch.tensor([[True]]), torch.tensor([0]))
    rollouts = run(make_engine(model, tokens=1, engine=engine), prompts, 3)
    assert rollouts.completion_ids.shape == (3, 1)
    assert rollouts.completion_lengths.tolist() == [1, 1, 1]
    torch.testing.assert_close(rollouts.logprob, rescored(model, rollouts), rtol=0, atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_student_is_left_as_it_was(engine: str, precision: str) -> None:
    model, prompts = tiny_model("llama", attention_dropout=0.5), ragged_prompts()
    calm = run(make_engine(model, engine=engine, precision=precision), prompts, 2)
    model.train()
    model.model.layers[1].eval()
    model.generation_config.update(repetition_penalty=3.0, top_k=2, min_new_tokens=9, suppress_tokens=[5])
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    config, random_state = model.config.to_dict(), torch.get_rng_state()
    with torch.enable_grad():
        rollouts = run(make_engine(model, engine=engine, precision=precision), prompts, 2)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "sdpa"
    assert model.generation_config.repetition_penalty == 3.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not rollouts.logprob.requires_grad
    assert not rollouts.logprob.is_inference()
    same(calm, rollouts)  # neither dropout nor the checkpoint's generation settings had a say


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_refresh_follows_the_student(family: str, precision: str, engine: str) -> None:
    model, prompts = tiny_model(family), ragged_prompts()
    engine_of_old = make_engine(model, precision=precision, engine=engine)
    old = run(engine_of_old, prompts, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    engine_of_old.refresh()
    new = run(engine_of_old, prompts, 2)
    same(new, run(make_engine(model, precision=precision, engine=engine), prompts, 2))
    assert not torch.equal(old.completion_ids, new.completion_ids)
    if precision == "float32":
        torch.testing.assert_close(new.logprob, rescored(model, new), rtol=0, atol=1e-4)


def test_variant_shares_the_weights_and_their_refresh() -> None:
    model, prompts = tiny_model(), ragged_prompts()
    engine = make_engine(model)
    variant = engine.variant(seed=8, max_new_tokens=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    engine.refresh()
    rollouts = run(variant, prompts, 2)
    same(rollouts, run(make_engine(model, 5, seed=8), prompts, 2))
    assert rollouts.completion_ids.shape[1] == 5


@pytest.mark.parametrize("engine", ENGINES)
def test_variants_draw_with_samplers_of_their_own_between_the_engine_s_batches(engine: str) -> None:
    model, prompts = tiny_model(), ragged_prompts()
    own = make_engine(model, engine=engine, temperature=2.0)
    before = run(own, prompts, 2)
    for changes in (GREEDY, {"temperature": 0.5, "top_p": 0.8, "min_p": 0.1}):
        found = run(own.variant(seed=3, max_new_tokens=24, **changes), prompts, 2)
        same(found, run(make_engine(model, engine=engine, **{"temperature": 2.0} | changes), prompts, 2))
        assert not torch.equal(found.completion_ids, before.completion_ids)
        same(run(own, prompts, 2), before)


def test_bfloat16_stays_near_the_student(family: str) -> None:
    """As near as the stock model in bfloat16 comes, whose logits are rounded too."""
    model, prompts = tiny_model(family), ragged_prompts()
    rollouts = run(make_engine(model, precision="bfloat16"), prompts, 4)
    exact = rescored(model, rollouts)
    stock = rescored(copy.deepcopy(model).to(torch.bfloat16), rollouts).float()
    assert (rollouts.logprob - exact).abs().mean() <= (stock - exact).abs().mean() + 1e-3


def test_auto_precision_is_one_of_the_two() -> None:
    model = tiny_model()
    assert choose_dtype(model, "auto") in (torch.float32, torch.bfloat16)
    assert make_engine(model, precision="bfloat16").precision == "bfloat16"


@pytest.mark.parametrize("engine", ENGINES)
def test_padded_vocabulary_columns_are_never_drawn(engine: str) -> None:
    model, prompts = tiny_model(vocab_size=97), ragged_prompts()
    prompts = prompts._replace(ids=prompts.ids % 40)
    rollouts = run(make_engine(model, vocab_size=40, engine=engine), prompts, 8)
    assert rollouts.completion_ids.max() < 40
    first = rollouts.completion_ids[0, 0]
    with torch.no_grad():
        expected = model(prompts.ids[:1]).logits[0, -1, :40].log_softmax(-1)[first]
    torch.testing.assert_close(rollouts.logprob[0, 0], expected, rtol=0, atol=1e-4)


def test_select_is_the_rollouts_of_some_prompts() -> None:
    prompts = ragged_prompts()
    rollouts = run(make_engine(tiny_model(), eos=tuple(range(3, 12))), prompts, 3)
    part = rollouts.select(slice(1, 3))
    assert part.prompt_ids.shape == (2, 7), "columns that are padding in both prompts are left out"
    assert part.completion_ids.shape[1] == part.completion_lengths.max()
    assert torch.equal(part.completion_lengths, rollouts.completion_lengths[3:9])
    assert torch.equal(part.logprob[mask_of(part)], rollouts.logprob[3:9][mask_of(rollouts)[3:9]])
    with pytest.raises(ValueError, match="non-empty"):
        rollouts.select(slice(2, 2))


def test_wrong_input_is_refused() -> None:
    engine, prompts = make_engine(tiny_model()), ragged_prompts()
    with pytest.raises(ValueError, match="left-padded"):
        run(engine, Prompts(prompts.ids, prompts.mask.flip(1), prompts.keys), 2)
    with pytest.raises(ValueError, match="num_rollouts"):
        run(engine, prompts, 65_537)


REFUSED = {
    "t5": (AutoModelForSeq2SeqLM, {"d_model": 16, "num_layers": 1, "d_ff": 16, "d_kv": 8, "num_heads": 2}),
    "bloom": (AutoModelForCausalLM, {"hidden_size": 16, "n_layer": 1, "n_head": 2}),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_native_refuses_with_the_way_out(model_type: str) -> None:
    auto, changes = REFUSED[model_type]
    config = AutoConfig.for_model(model_type, vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=2, **changes)
    model = auto.from_config(config).eval()
    with pytest.raises(NotImplementedError, match=r"set rollout\.engine: auto"):
        make_engine(model)
    if model_type == "bloom":
        rollouts = run(make_engine(model, tokens=6, engine="transformers"), ragged_prompts(), 2)
        torch.testing.assert_close(rollouts.logprob, rescored(model, rollouts), rtol=0, atol=1e-4)


def test_copy_shares_what_needs_no_other_form() -> None:
    model = tiny_model()
    shared = GenerationCopy(model, torch.float32, eos_token_ids=[2], pad_token_id=0, pack=False).model
    assert shared.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert shared.model.layers[0].mlp.up_proj.weight is model.model.layers[0].mlp.up_proj.weight
    assert shared.config is not model.config
