"""The optimizer step: nothing in it waits for an accelerator but the metrics."""

import sys
from typing import ClassVar

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
from distill.runtime import PhaseClock
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
# Operations that make a tensor of what the host has, and send it where they are told in a copy that is waited for.
SENDING = {torch.tensor, torch.as_tensor}


def names_a_device(args: tuple, kwargs: dict) -> bool:
    return any(isinstance(given, torch.device | str) for given in (*args, kwargs.get("device")))


class Watch:
    """Notes each wait for a tensor that would live on an accelerator: the given ones, all that is made of them, and
    what is made or sent where a caller names a device. Sending waits too, but from memory that `pin` gave.
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.waits: list[str] = []
        self._storages: dict[int, object] = {}  # kept, so that no address is used twice
        self._pinned: dict[int, object] = {}
        self._mark(tensors)

    def pin(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """In the place of `distill.runtime.clock._pinned`."""
        if self._marked(tensor):
            return tensor
        copy = tensor.clone()
        self._pinned[copy.untyped_storage()._cdata] = copy.untyped_storage()
        return copy

    def _mark(self, values) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor):
                self._storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()

    def _marked(self, values) -> bool:
        tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
        return any(tensor.untyped_storage()._cdata in self._storages for tensor in tensors)

    def _sent(self, tensor: torch.Tensor, result: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        """The result of a `.to(device)` of a tensor of the host's, as a tensor that is there."""
        if not (non_blocking and tensor.untyped_storage()._cdata in self._pinned):
            self.waits.append("to")
        result = result.clone()
        self._mark(result)
        return result

    def _waits_for(self, function, args: tuple) -> str | None:
        """What an operation with a marked tensor waits for, if anything."""
        if function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool for index in indices):
                return "index by mask"
            if not all(self._marked(index) for index in indices):
                return "index from the host"
        return WAITING.get(function)

    def modes(self) -> tuple[TorchFunctionMode, TorchDispatchMode]:
        watch = self

        class Copies(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                kwargs = kwargs or {}
                if function in COPYING and watch._marked(args):
                    watch.waits.append(COPYING[function])
                result = function(*args, **kwargs)
                if not names_a_device(args[1:] if function is torch.Tensor.to else (), kwargs):
                    return result
                if function is torch.Tensor.to and not watch._marked(args[0]):
                    return watch._sent(args[0], result, kwargs.get("non_blocking", False))
                if function in SENDING:
                    watch.waits.append(function.__name__)
                watch._mark(result)
                return result

        class Waits(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                if watch._marked((args, kwargs)):
                    if wait := watch._waits_for(function, args):
                        watch.waits.append(wait)
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


def test_the_watch_sees_what_is_sent():
    device, there, host = torch.device("cpu"), torch.ones(3), torch.arange(3)
    watch = Watch(there)
    copies, waits = watch.modes()
    with copies, waits:
        index = watch.pin(host, device).to(device, non_blocking=True)
        there[index], there.to(device), host.to(torch.float32), torch.zeros(3, device=device)[index]
        assert not watch.waits
        host.to(device), host.to(device, non_blocking=True), watch.pin(host, device).to(device)
        there[host], torch.tensor([1.0], device=device), index.max().item(), torch.arange(3, device=device).tolist()
    assert watch.waits == ["to"] * 3 + ["index from the host", "tensor", "item", "tolist"]


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
    """The metrics' one read: the figures of the line, and each rollout's divergence; nor is anything sent unpinned."""
    # What only tensors on a CPU are asked, as these are.
    monkeypatch.setattr(sys.modules["distill_kernels.head_gradients"], "_known_to_be_one", lambda upstream: False)
    made = trainer(**loss)
    made._sample(0, [[0, 1]], 0)
    rollouts = made.rollouts
    on_device = (rollouts.prompt_ids, rollouts.completion_ids, rollouts.logprob, rollouts.sampling_logprob)
    models = (made.student, made.lesson.teachers[0].body)
    watch = Watch(*on_device, *(tensor for model in models for tensor in (*model.parameters(), *model.buffers())))
    monkeypatch.setattr("distill.runtime.clock._pinned", watch.pin)
    copies, waits = watch.modes()
    with copies, waits:
        metrics, *_ = made.step(Group.of(rollouts), made.lesson, 1e-5, {"rollout": 0.0})
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


def test_the_clock_waits_for_its_last_event_by_itself(monkeypatch):
    class Event:
        reached: ClassVar[list] = []

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.number = len(Event.reached)
            Event.reached.append(False)

        def synchronize(self):
            Event.reached[: self.number + 1] = [True] * (self.number + 1)

        def elapsed_time(self, other):
            assert Event.reached[self.number]
            assert Event.reached[other.number]
            return 1000.0 * (other.number - self.number)

    monkeypatch.setattr("torch.cuda.Event", Event)
    clock = PhaseClock(torch.device("cuda"))
    assert clock.read() == {}
    for name in ("score", "update", "score"):
        with clock.phase(name):
            pass
    assert clock.read() == {"score": 2.0, "update": 1.0}


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
