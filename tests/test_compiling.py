"""Compiled layers: the same numbers, and as many compilations whatever the layers, lengths and rows."""

from collections import Counter

import pytest
import torch
from conftest import tiny_model
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from distill.config import Config, ConfigError, LoraConfig
from distill.forward import completion_hidden
from distill.forward import hidden as forward_hidden
from distill.loss import ModelParts
from distill.models import add_adapters, compile_layers, join_siblings, split_head
from distill.rollout import SamplingOptions, local_engine
from distill.run.compiling import WORTHWHILE_STEPS, compile_parts, wants_compiling
from distill.training import Ranks


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """Each test counts for itself. oneDNN's linears are a CPU's, where nothing is compiled outside tests."""
    monkeypatch.setattr(forward_hidden, "OneDnnLinears", forward_hidden._nothing)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    before = torch._dynamo.config.allow_unspec_int_on_nn_module
    yield
    torch._dynamo.config.allow_unspec_int_on_nn_module = before
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def counting(made: Counter):
    """A backend that compiles nothing, and counts the graphs of either direction."""

    def count(direction):
        return lambda graph, inputs: made.update([direction]) or make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=count("forward"), bw_compiler=count("backward"))


def hidden_and_gradient(model, lengths: list[int], **options) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    prompt_ids = torch.randint(3, 97, (2, 30), generator=generator)
    completion_ids = torch.randint(3, 97, (len(lengths), max(lengths)), generator=generator)
    index = torch.arange(len(lengths)) // (len(lengths) // 2)
    mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    model.zero_grad()
    hidden = completion_hidden(model.base_model, prompt_ids, mask, completion_ids, lengths, index, **options)
    trained = [weight for weight in model.base_model.parameters() if weight.requires_grad]
    upstream = torch.randn(hidden.shape, generator=generator)
    return [hidden.detach(), *torch.autograd.grad(hidden, trained, upstream)]


LAYERS = 10  # each of which would be a compilation of its own, or several
BATCHES = [[12, 9, 14, 3], [5, 2, 7, 3], [4, 4, 6, 9, 1, 8], [3, 3, 3, 3], [1, 2, 3, 4, 5, 6, 7, 8]]


def assert_trained_alike(model, expected, close=torch.equal, **options):
    for lengths, numbers in zip(BATCHES, expected, strict=True):
        assert all(map(close, hidden_and_gradient(model, lengths, **options), numbers))


@pytest.mark.parametrize(
    ("family", "kinds", "checkpointing"), [("qwen3", 1, False), ("qwen3", 1, True), ("gemma3", 2, False)]
)
def test_a_layer_of_a_training_pass_is_one_graph_a_direction(family, kinds, checkpointing):
    """For all lengths, layouts and layers of a kind: with a window, shorter than most rows, or without."""
    model, made = tiny_model(family, num_hidden_layers=4), Counter()
    expected = [hidden_and_gradient(model, lengths) for lengths in BATCHES]
    compile_layers(model, backend=counting(made))
    assert_trained_alike(model, expected, checkpointing=checkpointing)
    assert made == {"forward": kinds, "backward": kinds}
    assert not torch._dynamo.utils.counters["graph_break"]


def test_adapters_are_compiled_once_for_the_first_layer_and_once_for_the_rest():
    """No gradient reaches the first one's input, as the embeddings are not trained."""
    model, made = tiny_model("qwen3", num_hidden_layers=4), Counter()
    add_adapters(model, LoraConfig(rank=3, target_modules=["q_proj", "v_proj"]), seed=0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    expected = [hidden_and_gradient(model, lengths) for lengths in BATCHES]
    compile_layers(model, backend=counting(made))
    assert_trained_alike(model, expected, checkpointing=True)
    assert made == {"forward": 2, "backward": 2}
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_layer_of_a_scoring_pass_is_one_graph(mixed):
    def hidden(lengths):
        ids = torch.arange(3, 63).view(2, 30), torch.arange(3, 3 + len(lengths) * max(lengths)).view(len(lengths), -1)
        mask, index = torch.ones_like(ids[0], dtype=torch.bool), torch.arange(len(lengths)) // (len(lengths) // 2)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return completion_hidden(model.base_model, ids[0], mask, ids[1], lengths, index)

    model, made = tiny_model("qwen3", num_hidden_layers=4), Counter()
    expected = [hidden(lengths) for lengths in BATCHES]
    compile_layers(model, backend=counting(made))
    assert all(map(torch.equal, map(hidden, BATCHES), expected))
    assert made == {"forward": 1}
    assert not torch._dynamo.utils.counters["graph_break"]


def test_what_inductor_makes_of_a_training_pass_gives_the_same():
    model = tiny_model("qwen3", num_hidden_layers=2)
    expected = [hidden_and_gradient(model, lengths) for lengths in BATCHES]
    compile_layers(model)
    close = lambda found, wanted: (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()  # noqa: E731
    assert_trained_alike(model, expected, close, checkpointing=True)
    assert graphs() == 1


def test_attention_that_cannot_be_shared_is_noticed_in_a_compiled_layer():
    model = tiny_model("qwen3", num_hidden_layers=2, attention_dropout=0.5).train()
    compile_layers(model, backend="eager")
    forward_hidden._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="its attention has dropout"):
        hidden_and_gradient(model, BATCHES[0])


def test_decoding_gives_the_same_and_is_compiled_once():
    prompt_ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    model = tiny_model("qwen3", num_hidden_layers=LAYERS)
    options = {"sampling": SamplingOptions(6), "eos_token_ids": [], "pad_token_id": 0, "seed": 1}
    engine = local_engine(model, precision="float32", **options)
    engine.repeats = False  # a recording holds what a layer does, compiled or not

    def draw(N):
        mask = torch.ones_like(prompt_ids, dtype=torch.bool)
        return engine.generate(prompt_ids, mask, num_rollouts=N, prompt_keys=torch.arange(2))

    expected = [draw(N) for N in (2, 3, 4)]
    compile_layers(engine.body, backend="eager")
    for N, wanted in zip((2, 3, 4), expected, strict=True):
        found = draw(N)
        assert torch.equal(found.completion_ids, wanted.completion_ids)
        torch.testing.assert_close(found.logprob, wanted.logprob, rtol=1e-4, atol=1e-5)
    assert 0 < graphs() < LAYERS


def test_a_compiled_layer_makes_one_product_of_siblings():
    ids, model = torch.arange(3, 40)[None], tiny_model("qwen3", num_hidden_layers=LAYERS).requires_grad_(False)
    expected = model(ids, use_cache=False).logits
    join_siblings(model, list(model.parameters()))
    compile_layers(model, backend="eager")
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    assert 0 < graphs() < LAYERS


@pytest.mark.parametrize("trained", [True, False])
def test_what_the_compiler_takes_is_compiled_before_the_first_step(trained):
    model = tiny_model("qwen3", num_hidden_layers=LAYERS).requires_grad_(trained)
    parts = ModelParts(*split_head(model), torch.bfloat16)
    assert compile_parts(parts, backend="eager") is None
    made = graphs()
    assert 0 < made < LAYERS
    prompt_ids, said = torch.arange(3, 40)[None], torch.arange(3, 33).view(3, 10)
    mask, index = torch.ones_like(prompt_ids, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)
    with torch.set_grad_enabled(trained):
        parts.hidden(prompt_ids, mask, said, torch.tensor([10, 3, 8]), index)
    assert graphs() == made, "compiled anew for other lengths"
    assert all(weight.grad is None for weight in model.parameters())


def test_what_the_compiler_fails_at_stays_as_it_was():
    def failing(graph, inputs):
        raise RuntimeError("no such operation")

    model = tiny_model("qwen3", num_hidden_layers=2)
    parts = ModelParts(*split_head(model), torch.float32)
    ids = torch.arange(3, 40)[None]
    expected = model(ids, use_cache=False).logits
    assert "no such operation" in compile_parts(parts, backend=failing)
    torch._dynamo.reset()
    assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert graphs() == 0


@pytest.mark.parametrize(
    ("device", "asked", "prompts", "max_steps", "wanted"),
    [
        ("cuda", "auto", 2 * WORTHWHILE_STEPS, None, True),
        ("cuda", "auto", 2 * WORTHWHILE_STEPS - 2, None, False),
        ("cuda", "auto", 10**6, WORTHWHILE_STEPS - 1, False),
        ("cpu", "auto", 10**6, None, False),
        ("cuda", True, 1, None, True),
        ("cuda", False, 10**6, None, False),
    ],
)
def test_long_runs_on_a_gpu_are_compiled(device, asked, prompts, max_steps, wanted):
    model = {"model": "somewhere/model"}
    training = {"compile": asked, "prompts_per_step": 2, "max_steps": max_steps}
    config = Config(student=model, teacher=model, prompts={"train": "prompts.txt"}, training=training)
    assert wants_compiling(config, torch.device(device), Ranks(), config.training.total_steps([prompts])) is wanted
    if asked is True:
        with pytest.raises(ConfigError, match="it is for a GPU"):
            wants_compiling(config, torch.device("cpu"), Ranks())
