"""What a GPU would be given to do, at real widths and without one: devices, shapes, dtypes, and where the host waits.

Tensors on "cuda" that hold nothing stand in for real ones. A PyTorch built for CPUs slices them once it has a guard for
CUDA devices, which is compiled here and loaded in a process of its own, as an error in C++ may end it.
Left out on purpose: gradients, which need more of CUDA than that, and the kernels, which compile elsewhere.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.cpp_extension import include_paths, library_paths
from torch.utils.weak import WeakTensorKeyDictionary

from distill.config import Config, TrainingConfig
from distill.loss import Group, GroupGradient, LossOptions, ModelParts, Rollouts, TeacherView
from distill.loss.advantage import advantages, task_credit
from distill.loss.gradients import token_weights
from distill.models import Head
from distill.prompts import PromptSet, left_pad
from distill.prompts.answers import Answer
from distill.run import layer_choice
from distill.runtime import MemoryLimits
from distill.teachers import NO_TEACHER
from distill.training import Answers, Mixture, compare, evaluate, mixture_metrics, token_view
from distill.training.diagnostics import step_metrics
from distill_kernels import TokenStats

GUARD = """#include <c10/core/impl/FakeGuardImpl.h>
namespace c10 { C10_REGISTER_GUARD_IMPL(CUDA, impl::FakeGuardImpl<kCUDA>); }"""
B, N, P, T, H, HEADS, LAYERS = 2, 16, 256, 512, 1024, 16, 3  # as Qwen3-0.6B, but for the layers
V = 151_936
integers = partial(torch.zeros, dtype=torch.long, device="cuda")


@pytest.mark.skipif(shutil.which("g++") is None or torch.backends.cuda.is_built(), reason="needs g++, and no CUDA")
def test_decode_scoring_and_figures_without_a_card(tmp_path: Path) -> None:
    (tmp_path / "guard.cpp").write_text(GUARD)
    paths = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    compiler = ["g++", "-std=c++20", "-shared", "-fPIC", "guard.cpp", "-o", "guard.so", *paths, "-lc10"]
    subprocess.run(compiler, cwd=tmp_path, check=True)
    command, environment = [sys.executable, __file__, tmp_path / "guard.so"], {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


class Card(TorchDispatchMode):
    """Counts operations, gives the host the `answers` it waits for, in order, and refuses what mixes devices."""

    def __init__(self, *answers: bool | int) -> None:
        super().__init__()
        self.answers, self.seen = list(answers), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.name()] += 1
        if func is torch.ops.aten.allclose.default:  # when the engine is made: is a norm what it seems to be
            return True
        if func is torch.ops.aten._local_scalar_dense.default:
            assert self.answers, "the host waits for the card once more than it should"
            return self.answers.pop(0)
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        assert len(devices) < 2, f"{func} mixes {devices}"
        return func(*args, **(kwargs or {}))


class Launches:
    """A kernel that counts its launches by their grid, and looks where its tensors are."""

    def __init__(self, seen: Counter) -> None:
        self.seen = seen

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*args, **kwargs) -> None:
            self.seen[grid] += 1
            assert {leaf.device.type for leaf in args if isinstance(leaf, torch.Tensor)} == {"cuda"}

        return launch


def decode_and_score() -> None:
    """An engine's prefill and four tokens a row in steps of fixed shape; a teacher's pass over ragged completions."""
    from distill.forward import completion_hidden, hidden
    from distill.rollout import SamplingOptions, decode, native
    from distill.runtime import clock
    from distill_kernels import triton_prefix_attention
    from distill_kernels.triton_prefix_blocks import LARGE

    attention = sys.modules["distill_kernels.prefix_attention"]  # whose function has the module's name in the package
    clock._pinned, decode.capture = lambda tensor, device: tensor, lambda step, *_: step() or step
    native.NativeEngine._generate = lambda self, *prompts, custom_generate: custom_generate(self, *prompts, None, None)
    kept = {"sampling": SamplingOptions(4), "eos_token_ids": [2], "pad_token_id": 0, "seed": 0}
    # No prompt is empty, some are padded; each has N rows; the longest completion has 4 tokens.
    with Card(True, True, False, 4) as card:
        engine = native.NativeEngine(model_in(torch.float32), dtype=torch.bfloat16, memory_budget_bytes=2**35, **kept)
        found = engine.generate(integers(B, P), integers(B, P).bool(), num_rollouts=N, prompt_keys=integers(B))
    assert (card.answers, card.seen["distill_kernels::decode_attention"]) == ([], 3 * LAYERS)
    assert card.seen["distill_kernels::record_draw"] == 4
    assert not any(card.seen[f"aten::{slow}"] for slow in ("index_copy_", "embedding", "index_put_"))
    for each, dtype in ((found.completion_ids, torch.long), (found.logprob, torch.float32)):
        assert (each.shape, each.dtype, each.device.type) == ((B * N, 4), dtype, "cuda")

    launched = Counter()
    attention._is_recent, triton_prefix_attention.blocks = lambda device: True, lambda d, device: LARGE[128]
    triton_prefix_attention._forward_kernel = Launches(launched)
    index, lengths = [row // N for row in range(B * N)], [T - row for row in range(B * N)]
    hidden.host_rows = lambda *_: hidden.Rows([P] * B, lengths, index)
    with Card() as card:
        ids = integers(B, P), None, integers(B * N, T)
        found = completion_hidden(model_in(torch.bfloat16).model, *ids, lengths, index)
    tiles = B * -(-P // 64) + sum(-(-(length - 1) // 64) for length in lengths)
    assert launched == {(tiles * HEADS,): LAYERS}
    assert (found.shape, found.dtype, found.device.type) == ((sum(lengths), H), torch.bfloat16, "cuda")


class Apart(TorchDispatchMode):
    """Tensors of the host are real, those of the card hold nothing, and no operation but a copy takes both.

    What was copied to the card comes back as it was, and what was made there as zeros.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, aten = kwargs or {}, torch.ops.aten
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        to = torch.device(kwargs.get("device") or "meta").type
        if func is aten._local_scalar_dense.default and devices == {"cuda"}:
            return 0
        if func is aten._to_copy.default and devices == {"cuda"} and to == "cpu":
            with unset_fake_temporarily():
                made_there = torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            return self.kept.get(args[0], made_there)
        assert len(devices) < 2, f"{func} mixes {devices}"
        with nullcontext() if "cuda" in (*devices, to) else unset_fake_temporarily():
            found = func(*args, **kwargs)
        if (devices, to) == ({"cpu"}, "cuda"):
            self.kept[found] = args[0]
        return found


class Parts(ModelParts):
    """A model whose hidden states hold nothing."""

    def hidden(self, prompt_ids, prompt_mask, completion_ids, lengths, index, **options) -> torch.Tensor:
        assert {each.device.type for each in (prompt_ids, completion_ids)} == {"cuda"}
        assert {each.device.type for each in (prompt_mask, lengths, index)} == {"cpu"}
        return torch.zeros(int(lengths.sum()), H, device="cuda")


class Engine:
    """Gives completions of 1 to 4 tokens."""

    def variant(self, **options) -> "Engine":
        return self

    def generate(self, prompt_ids, prompt_mask, *, num_rollouts, prompt_keys) -> Rollouts:
        assert prompt_ids.device.type == prompt_mask.device.type == "cuda"
        rows = torch.arange(len(prompt_ids) * num_rollouts)
        logprobs = torch.zeros(2, len(rows), 4, device="cuda")
        sampled = integers(len(rows), 4), (rows % 4 + 1).cuda(), *logprobs, (rows % 2 == 0).cuda()
        return Rollouts(prompt_ids, prompt_mask, *sampled, num_rollouts)


def figures() -> None:
    """What an evaluation, a comparison, a step and a choice of layers say of a group's tokens."""
    parts = Parts(None, Head(torch.zeros(V, H, device="cuda"), None, None, 1.0), torch.float32)
    models, limits, prompts = [parts, parts], MemoryLimits(64), [[1, 2, 3], [4, 5], [6]]
    weight = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])  # both score the second prompt, each as it sees it
    view = TeacherView([left_pad(prompts, 0), left_pad([[7], [8, 9], [1]], 0)], weight)
    options = {"num_rollouts": 2, "max_new_tokens": 4, "seed": 0, "vocab_size": V, "limits": limits}
    found = evaluate(Engine(), parts, models, left_pad(prompts, 0), teacher_view=view, **options)
    assert len(found.record("", ["one", "both", "other"])["by_teacher"]) == 3
    compare(parts, models, found.group, limits, V)
    tokenizer = SimpleNamespace(decode=lambda ids: "", pad_token_id=0)
    token_view(tokenizer, parts, models, found.group, ["", ""], V)

    lengths, index = found.group.completion_lengths, found.group.prompt_index
    K = int(lengths.sum())
    stats = TokenStats(*torch.zeros(6, K, device="cuda"))
    two = torch.ones(2, device="cuda")
    result = GroupGradient(two, stats, torch.zeros(6, H, device="cuda"), two)
    step_metrics(result, found.group, result.loss, LossOptions())
    for baseline, discount in product(("none", "group", "exact"), (0, 0.5, 1)):
        credit = advantages(stats, lengths, index, LossOptions(baseline=baseline, discount=discount))
        assert (credit.shape, credit.device.type) == ((K,), "cuda")
    rewarded = replace(found.rollouts, rewards=torch.zeros(6, 2).cuda(), task_advantage=torch.zeros(6).cuda())
    group = Group.of(rewarded.planned_on_host())  # of a checkpoint, whose rollouts were brought to the device
    assert task_credit(group, token_weights(lengths, "sequence")).device.type == "cpu"

    mixed_with_answers(prompts, found.rollouts)

    layer_choice.make_engine = lambda *_: Engine()
    config = Config(student={"model": "one"}, teacher={"model": "other"}, prompts={"train": "some"})
    teachers, student = [SimpleNamespace(parts=parts)] * 2, SimpleNamespace(device=torch.device("cuda"))
    pair = SimpleNamespace(student=student, teachers=teachers, tokenizer=tokenizer, vocab_size=V)
    seen = SimpleNamespace(student=SimpleNamespace(token_ids=prompts), teacher=SimpleNamespace(view=lambda _: view))
    layer_choice._FixedCompletions(config, pair, seen, torch.float32)


def mixed_with_answers(token_ids: list[list[int]], rollouts: Rollouts) -> None:
    """A step's group of rollouts and written answers, what nobody scores of it, and what is said of it."""
    nothing, said = [None] * 3, [Answer([7, 8], True), None, Answer([9, 9, 9], False)]
    prompts = PromptSet(token_ids, nothing, nothing, nothing, nothing, nothing, ("prompt",), answers=said)
    answers = Answers(prompts, None, 0, torch.device("cuda"), seed=0, shuffle=False)
    options = {"num_rollouts_per_prompt": 3, "prompts_per_step": 3, "off_policy_fraction": 0.4}
    for objective in (
        "reverse_kl",
        "cross_entropy",
    ):  # 4 of 9; of the two that are sampled of each prompt one is left out
        training = TrainingConfig(**options, off_policy_objective=objective)
        kept, group = Mixture(answers, training, None, 1, 0)(rollouts.planned_on_host(), range(3), 0)
        assert (len(kept.completion_lengths), int(group.written.sum())) == (5, 4)
        assert group.completion_ids.device.type == group.prompt_ids.device.type == kept.logprob.device.type == "cuda"
        assert group.written.device.type == group.prompt_mask.device.type == "cpu"
        if objective == "cross_entropy":
            ((_, _), (teacher, (rows,))) = group.by_teacher([torch.arange(9)])
            assert (teacher, rows.tolist()) == (1, [5, 6, 7, 8])
            assert NO_TEACHER.hidden(*group.seen_by(1).inputs(rows)).device.type == "cuda"
        K, two = int(group.completion_lengths.sum()), torch.ones(2, device="cuda")
        stats = TokenStats(*torch.zeros(6, K, device="cuda"))
        result = GroupGradient(two, stats, torch.zeros(9, H, device="cuda"), two)
        mixture_metrics(result, group, result.loss, LossOptions())


def model_in(dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, Qwen3Config

    sizes = {"hidden_size": H, "intermediate_size": 3072, "vocab_size": V, "num_hidden_layers": LAYERS}
    config = Qwen3Config(**sizes, num_attention_heads=HEADS, num_key_value_heads=8, tie_word_embeddings=True)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)


if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])
    with torch.no_grad(), FakeTensorMode():
        decode_and_score()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), Apart():
        figures()
