"""Training over ranks: the processes that `torchrun` starts divide the prompts of a step and add up what they find.

Every rank holds all rollouts of a group and computes the rows of its own prompts; what it does not know it leaves zero,
so that a sum over the ranks is what one process would have, in the same order. The weights of tokens are made over the
whole group, so gradients are summed too, never averaged.
Left out on purpose: dividing the tokens of a sequence or the layers of a model, which longer contexts and larger
students than these would need.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from signal import Signals
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from distill.group import Group
    from distill.memory import MemoryLimits
    from distill.rollout import RolloutEngine, Rollouts

T = TypeVar("T")


class RankError(RuntimeError):
    """Another rank died or hangs; the message names it where this rank can know."""


class Ranks:
    """This process among those of its run; alone, every method does nothing."""

    rank, local_rank, size = 0, 0, 1

    @classmethod
    def join(cls, device: str, timeout_s: float) -> "Ranks":
        """Finds the others where `torchrun` started this process; `device` and `timeout_s` as in `training`.

        Raises `RankError`.
        """
        ranks = cls()
        if "WORLD_SIZE" not in os.environ:
            return ranks
        ranks.rank, ranks.local_rank, ranks.size = (int(os.environ[n]) for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        # Half of the time to wait, half to find out whom for; what a GPU waits for is then looked into before NCCL,
        # which could only abort, gives up.
        ranks._timeout_s, patience = timeout_s, timedelta(seconds=timeout_s / 2)
        try:
            distributed.init_process_group("gloo", timeout=patience)
        except RuntimeError as error:
            raise RankError(
                f"rank {ranks.rank} did not find all {ranks.size} ranks within half of training.rank_timeout_s "
                f"({timeout_s:g} s): {error}"
            ) from error
        ranks._group = distributed.group.WORLD
        if device != "cpu" and torch.cuda.is_available():
            torch.cuda.set_device(ranks.local_rank)
            ranks._group = distributed.new_group(backend="nccl", timeout=2 * patience)
        return ranks

    def leave(self) -> None:
        if self.size > 1:
            distributed.destroy_process_group()

    def meet(self) -> None:
        """Waits until all ranks are here. Raises `RankError`."""
        if self.size == 1:
            return
        try:
            distributed.monitored_barrier(wait_all_ranks=True)
        except RuntimeError as error:
            missing = re.search(r"Ranks? ([\d, ]+?) failed to pass", str(error))
            who = f"rank {missing[1]}" if missing else "rank 0, or one that rank 0 names,"
            raise RankError(
                f"{who} died or hangs: rank {self.rank} of {self.size} has waited for it (training.rank_timeout_s: "
                f"{self._timeout_s:g}). The newest checkpoint is whole: the same command continues from there, by "
                f"itself under torchrun --max-restarts"
            ) from error

    def total(self, tensor: Tensor, mask: Tensor | None = None) -> Tensor:
        """The sum over ranks of what each holds, where its `mask` holds; the last dimensions are the mask's."""
        if self.size == 1:
            return tensor
        if mask is not None:
            tensor = torch.where(mask.to(tensor.device, non_blocking=True), tensor, 0)
        tensor = tensor.contiguous()
        distributed.all_reduce(tensor, group=self._group_of(tensor))
        return tensor

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sums the gradients of `parameters` over the ranks; one that a rank has none of counts as 0."""
        if self.size == 1:
            return
        pending = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            pending.append(distributed.all_reduce(parameter.grad, group=self._group_of(parameter), async_op=True))
        for work in pending:
            work.wait()

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def of_first(self, value: Any) -> Any:
        """What rank 0 gives, anything that JSON holds."""
        if self.size == 1:
            return value
        content = b"" if self.rank else json.dumps(value).encode()
        sent = torch.zeros(self.largest(len(content)), dtype=torch.uint8)
        if not self.rank:
            sent[:] = torch.tensor(list(content), dtype=torch.uint8)
        distributed.broadcast(sent, 0)
        return json.loads(bytes(sent.tolist()))

    def signal(self, received: Signals | None) -> Signals | None:
        """The signal that any rank has received, so that all stop at the same step."""
        self.meet()
        return Signals(number) if (number := self.largest(received or 0)) else None

    def own_rows(self, group: "Group") -> Tensor:
        """[R] bool on the host: the rows of this rank's prompts, which are about as many tokens as every other's."""
        prompts, completions, index = group.lengths
        tokens = prompts.index_add(0, index, completions)
        own = divide(tokens.tolist(), self.size)[self.rank]
        return torch.isin(index, torch.tensor(own, dtype=torch.int64))

    def in_micro_batches(
        self,
        limits: "MemoryLimits",
        phase: str,
        group: "Group",
        own: Tensor,
        work: Callable[[list[Tensor]], T],
    ) -> T:
        """`limits.in_micro_batches` of the rows of `group` that are this rank's `own` [R]."""
        prompts, completions, index = group.lengths
        rows = own.nonzero()[:, 0]
        return limits.in_micro_batches(
            phase, (prompts, completions[rows], index[rows]), lambda parts: work([rows[part] for part in parts])
        )

    def generate(
        self,
        engine: "RolloutEngine",
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        num_rollouts: int,
        prompt_keys: Tensor,
    ) -> "Rollouts":
        """`engine.generate`, each rank its share of the prompts: all rollouts, on every rank."""
        options = {"num_rollouts": num_rollouts}
        if self.size == 1:
            return engine.generate(prompt_ids, prompt_mask, prompt_keys=prompt_keys, **options)
        B = len(prompt_ids)
        # A rank without a prompt has to take part in what the engine does, so it samples one for nothing.
        share = divide([1] * B, self.size)[self.rank]
        own = torch.tensor(share or [0])
        first = int(prompt_mask[own].any(0).int().argmax())
        part = engine.generate(
            prompt_ids[own, first:], prompt_mask[own, first:], prompt_keys=prompt_keys[own], **options
        )
        self.meet()
        width = self.largest(part.completion_ids.shape[1])
        rows = (own[:, None] * num_rollouts + torch.arange(num_rollouts)).flatten().to(prompt_ids.device)

        def everyone(values: Tensor, padding: int = 0) -> Tensor:
            """[r] or [r, t] of this rank's rows to [R] or [R, width] of all."""
            found = values.new_zeros(B * num_rollouts, *[width] * (values.dim() - 1))
            if share:
                mine = values.new_full((len(rows), *found.shape[1:]), padding)
                mine[..., : values.shape[-1]] = values
                found[rows] = mine
            return self.total(found)

        return replace(
            part,
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion_ids=everyone(part.completion_ids, engine.pad_token_id),
            completion_lengths=everyone(part.completion_lengths),
            logprob=everyone(part.logprob),
            sampling_logprob=everyone(part.sampling_logprob),
            finished=everyone(part.finished.int()).bool(),
        )

    def _group_of(self, tensor: Tensor) -> distributed.ProcessGroup:
        return distributed.group.WORLD if tensor.device.type == "cpu" else self._group


def divide(costs: Sequence[int], parts: int) -> list[list[int]]:
    """The indices of `costs` in `parts` lists of about equal sums: the costliest first, to whoever has least."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    sums = [0] * parts
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        to = sums.index(min(sums))
        shares[to].append(index)
        sums[to] += costs[index]
    return [sorted(share) for share in shares]
