"""The optimizer step: nothing in it waits for an accelerator but the metrics."""

import sys

import pytest
import torch
from conftest import tiny_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import peak_memory
from distill.config import TrainingConfig
from distill.loss import Group, LossOptions, ModelParts
from distill.models import split_head
from distill.rollout import SamplingOptions, local_engine
from distill.training import Trainer
from distill_kernels.chunks import WORKSPACE_BYTES

aten = torch.ops.aten
# Operations whose result, or the size of it, the host has to know before it can go on.
WAITING = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.equal.default: "equal",
    aten._unique2.default: "unique",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}
COPYING = {torch.Tensor.tolist: "tolist", torch.Tensor.cpu: "cpu", torch.Tensor.numpy: "numpy"}


class Watch:
    """Notes each wait for a tensor that would live on an accelerator: the given ones and all that is made of them."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.waits: list[str] = []
        self._storages: dict[int, object] = {}  # kept, so that no address is used twice
        self._mark(tensors)

    def _mark(self, values) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor):
                self._storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()

    def _marked(self, values) -> bool:
        tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
        return any(tensor.untyped_storage()._cdata in self._storages for tensor in tensors)

    def modes(self) -> tuple[TorchFunctionMode, TorchDispatchMode]:
        watch = self

        class Copies(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                if function in COPYING and watch._marked(args):
                    watch.waits.append(COPYING[function])
                return function(*args, **(kwargs or {}))

        class Waits(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                if watch._marked((args, kwargs)):
                    by_mask = function is aten.index.Tensor and any(
                        index is not None and index.dtype == torch.bool for index in args[1]
                    )
                    if function in WAITING or by_mask:
                        watch.waits.append(WAITING.get(function, "index by mask"))
                    watch._mark(result)
                return result

        return Copies(), Waits()


@pytest.fixture
def trainer():
    def make(device="cpu", *, V=97, N=3, T=6, budget=16, **loss):
        student, teacher = (tiny_model(f, vocab_size=V, seed=i).to(device) for i, f in enumerate(("llama", "qwen3")))
        teacher.requires_grad_(False)
        engine = local_engine(
            student,
            sampling=SamplingOptions(max_new_tokens=T),
            eos_token_ids=(),
            pad_token_id=0,
            seed=0,
            precision="float32",
        )
        prompts = torch.tensor([[0, 5, 6], [7, 8, 9]])
        return Trainer(
            student,
            ModelParts(*split_head(student), torch.float32),
            [ModelParts(*split_head(teacher), torch.float32)],
            engine,
            lambda epoch: [[0, 1]],
            lambda indices: (prompts, prompts != 0),
            TrainingConfig(num_rollouts_per_prompt=N, prompts_per_step=2, tokens_per_micro_batch=budget),
            LossOptions(**loss),
            vocab_size=V,
        )

    return make


def test_the_watch_sees_what_waits():
    there, host = torch.ones(3), torch.ones(3)
    watch = Watch(there)
    copies, waits = watch.modes()
    with copies, waits:
        bool(host.sum() > 0), host.tolist(), host[host > 0]
        assert not watch.waits
        made = there * host
        made.sum().item(), made.view(1, 3).tolist(), made[made > 0], made.cpu()
    assert watch.waits == ["item", "tolist", "index by mask", "cpu"]


@pytest.mark.parametrize(
    "loss",
    [
        {"objective": "reverse_kl"},
        {"importance_clip": 2.0},
        {"baseline": "group", "discount": 0.5, "reward_clip": 3.0},
        {"baseline": "exact"},
        {"objective": "reverse_kl", "mask_truncated": True},
    ],
    ids=lambda loss: "-".join(loss),
)
def test_a_step_waits_for_its_metrics_only(trainer, loss, monkeypatch):
    """The metrics' one read: the figures of the line, and each rollout's divergence."""
    # What only tensors on a CPU are asked, as these are.
    monkeypatch.setattr(sys.modules["distill_kernels.linear_distill_loss"], "_known_to_be_one", lambda upstream: False)
    made = trainer(**loss)
    made._sample(0, [[0, 1]], 0)
    rollouts = made.rollouts
    on_device = (rollouts.prompt_ids, rollouts.completion_ids, rollouts.logprob, rollouts.sampling_logprob)
    watch = Watch(*on_device, *made.student.parameters(), *made.teachers[0].body.parameters())
    copies, waits = watch.modes()
    with copies, waits:
        metrics, _ = made._step(Group.of(rollouts), groups_in_batch=1)
    assert metrics["reverse_kl_exact"] > 0
    assert watch.waits == ["tolist"]


@pytest.mark.parametrize("objective", ["reverse_kl", "sampled_reverse_kl"])
def test_no_logits_of_all_tokens_exist_in_a_step(trainer, objective, monkeypatch):
    """Rollout, scoring and update of K tokens stay far below the [K, V] float32 logits of one model, 480 MiB here."""
    monkeypatch.setitem(WORKSPACE_BYTES, "cpu", 8 * 2**20)
    few, many = (trainer(V=20_480, N=N, T=48, budget=2**20, objective=objective) for N in (2, 64))
    next(few.steps())  # libraries make their own buffers
    steps = many.steps()
    results = []
    peak = peak_memory(lambda: results.append(next(steps)))
    assert results[0].metrics["completion_tokens"] * 20_480 * 4 == 480 * 2**20
    assert peak < 160 * 2**20


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_step_does_not_synchronise(trainer):
    made = trainer("cuda")
    steps = made.steps()
    made._sample(0, [[0, 1]], 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("distill.training.diagnostics.to_host", lambda values: dict.fromkeys(values, 0.0))
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
