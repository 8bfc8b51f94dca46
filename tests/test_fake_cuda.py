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
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.cpp_extension import include_paths, library_paths

GUARD = """#include <c10/core/impl/FakeGuardImpl.h>
namespace c10 { C10_REGISTER_GUARD_IMPL(CUDA, impl::FakeGuardImpl<kCUDA>); }"""
B, N, P, T, H, HEADS, LAYERS = 2, 16, 256, 512, 1024, 16, 3  # as Qwen3-0.6B, but for the layers
integers = partial(torch.zeros, dtype=torch.long, device="cuda")


@pytest.mark.skipif(shutil.which("g++") is None or torch.backends.cuda.is_built(), reason="needs g++, and no CUDA")
def test_decode_and_scoring_without_a_card(tmp_path: Path) -> None:
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


def model_in(dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, Qwen3Config

    sizes = {"hidden_size": H, "intermediate_size": 3072, "vocab_size": 151_936, "num_hidden_layers": LAYERS}
    config = Qwen3Config(**sizes, num_attention_heads=HEADS, num_key_value_heads=8, tie_word_embeddings=True)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)


if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])
    with torch.no_grad(), FakeTensorMode():
        decode_and_score()
