"""Training over ranks: the processes that `torchrun` starts divide the prompts of a step and add up what they find.

Every rank holds all rollouts of a group and computes the rows of its own prompts; what it does not know it leaves zero,
so that a sum over the ranks is what one process would have, in the same order. The weights of tokens are made over the
whole group, so gradients are summed too, never averaged. Where the weights of a model are shared out as well, a layer
is gathered for each of its passes (FSDP2), so all ranks must make equally many of them.
Left out on purpose: dividing the tokens of a sequence or the layers of a model, which longer contexts and larger
students than these would need.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from datetime import timedelta
from signal import Signals
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from distill.memory import MemoryLimitError
from distill.models import alias, whole
from distill.server import ServerError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.group import Group
    from distill.loss import ModelParts
    from distill.memory import MemoryLimits
    from distill.rollout import RolloutEngine, Rollouts

T = TypeVar("T")
Errors = tuple[type[Exception], ...]


class RankError(RuntimeError):
    """Another rank died or hangs; the message names it where this rank can know."""


class Ranks:
    """This process among those of its run; alone, every method does nothing."""

    rank, local_rank, size = 0, 0, 1
    sharded = False
    """Whether models' weights are shared out."""

    @classmethod
    def join(cls, device: str, timeout_s: float, parallel: str = "replicate") -> "Ranks":
        """Finds the others where `torchrun` started this process; the arguments are those of `training`.

        Raises `RankError`.
        """
        ranks = cls()
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return ranks
        ranks.rank, ranks.local_rank, ranks.size = (int(os.environ[n]) for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        ranks.sharded = parallel == "shard"
        # A third of the time to wait, the rest to find out whom for: all who wait have to give up before that. NCCL,
        # which could only abort, comes last.
        ranks._timeout_s, patience = timeout_s, timedelta(seconds=timeout_s / 3)
        try:
            store, rank, size = next(distributed.rendezvous("env://", timeout=patience))
            # torchrun keeps the store when it starts the ranks again: addresses in it may be those of the dead.
            store = distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
        except RuntimeError as error:
            raise RankError(
                f"rank {ranks.rank} did not find all {ranks.size} ranks within a third of training.rank_timeout_s "
                f"({timeout_s:g} s): {error}"
            ) from error
        # A group of its own to meet in: a wait that has timed out closes a connection for good.
        ranks._meeting = distributed.new_group(backend="gloo", timeout=patience)
        ranks._group = distributed.group.WORLD
        if device != "cpu" and torch.cuda.is_available():
            torch.cuda.set_device(ranks.local_rank)
            ranks._group = distributed.new_group(backend="nccl", timeout=3 * patience)
        return ranks

    def leave(self) -> None:
        if self.size > 1:
            distributed.destroy_process_group()

    def meet(self, patience: float = 1 / 3) -> None:
        """Waits until all ranks are here, for `patience` of the time-out. Raises `RankError`."""
        if self.size == 1:
            return
        try:
            seconds = timedelta(seconds=patience * self._timeout_s)
            distributed.monitored_barrier(self._meeting, seconds, wait_all_ranks=True)
        except RuntimeError as error:
            named = re.search(r"Ranks? ([\d, ]+?) failed to pass", str(error))
            raise self._without(named[1] if named else self._dead()) from error

    def roll_call(self) -> None:
        """Raises `RankError` where another rank is gone, which may be why an exchange has failed."""
        if self.size > 1:
            if dead := self._dead():
                raise self._without(dead)
            self.meet(1 / 2)

    def _dead(self) -> str:
        """The ranks whose connection has closed. Only rank 0 knows: the others leave after it."""
        dead = []
        for rank in range(1, self.size) if self.rank == 0 else ():
            try:
                distributed.isend(torch.zeros(1), rank, self._meeting)
            except RuntimeError:
                dead.append(str(rank))
        return ", ".join(dead)

    def _without(self, ranks: str) -> RankError:
        who = f"rank {ranks}" if ranks else "rank 0, or one that rank 0 names,"
        return RankError(
            f"{who} died or hangs: rank {self.rank} of {self.size} has waited for it (training.rank_timeout_s: "
            f"{self._timeout_s:g}). The newest checkpoint is whole: the same command continues from there, by "
            f"itself under torchrun --max-restarts"
        )

    def total(self, tensor: Tensor, mask: Tensor | None = None) -> Tensor:
        """The sum over ranks of what each holds, where its `mask` holds; the last dimensions are the mask's."""
        if self.size == 1:
            return tensor
        # A tensor of its own, since the sum takes its place: what was given may be part of another.
        if mask is None:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        else:
            tensor = torch.where(mask.to(tensor.device, non_blocking=True), tensor, 0).contiguous()
        distributed.all_reduce(tensor, group=self._group_of(tensor))
        return tensor

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sums the gradients of `parameters` over the ranks; one that a rank has none of counts as 0."""
        if self.size == 1 or self.sharded:  # then the backward pass has summed them
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

    def of_all(self, value: Any) -> list[Any]:
        """What each rank gives, anything that JSON holds."""
        if self.size == 1:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sent = torch.full((self.largest(len(content)),), ord(" "), dtype=torch.uint8)
        sent[: len(content)] = content
        received = [torch.empty_like(sent) for _ in range(self.size)]
        distributed.all_gather(received, sent)
        return [json.loads(bytes(part.tolist())) for part in received]

    def of_first(self, value: Any) -> Any:
        """What rank 0 gives, anything that JSON holds."""
        return self.of_all(None if self.rank else value)[0]

    def together(self, work: Callable[[], T], errors: Errors) -> T:
        """`work()` of this rank, where it came to an end on all: if one raised one of `errors`, all raise that.

        Raises `RankError` where a rank does not come to an end.
        """
        if self.size == 1:
            return work()
        failure, result = None, None
        try:
            result = work()
        except errors as error:
            failure = error
        self.meet()
        kinds = [kind for kind in errors if isinstance(failure, kind)]
        said = self.of_all(kinds and [errors.index(kinds[0]), getattr(failure, "strerror", None) or str(failure)])
        if failure is not None:
            raise failure
        for rank, (kind, message) in ((rank, words) for rank, words in enumerate(said) if words):
            raise errors[kind](f"{message} (on rank {rank})")
        return result

    def wait_for_first(self, future: "Future | None") -> None:
        """Returns on every rank when rank 0's `future` is done, however long that takes."""
        while self.of_first(self.rank == 0 and bool(wait([future], self._timeout_s / 10).not_done)):
            pass

    def tensors_of_first(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Rank 0's `tensors` on every rank's `device`."""
        about = self.of_first({name: [str(t.dtype)[len("torch.") :], *t.shape] for name, t in tensors.items()})
        found = {}
        for name, (dtype, *shape) in about.items():
            tensor = torch.empty(shape, dtype=getattr(torch, dtype)) if self.rank else tensors[name].cpu().contiguous()
            # Bytes, as there are no collectives for all types.
            distributed.broadcast(tensor.view(torch.uint8), 0)
            found[name] = tensor.to(device)
        return found

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

        def of_group(parts: list[Tensor]) -> T:
            parts = [rows[part] for part in parts]
            return work(self._evened(group, own, parts) if self.sharded else parts)

        lengths = (prompts, completions[rows], index[rows])
        return self._agreed(lambda: limits.in_micro_batches(phase, lengths, of_group))

    def _agreed(self, work: Callable[[], T]) -> T:
        """`together`, for what a run can be continued after; not where the others wait in the midst of `work`."""
        return work() if self.sharded else self.together(work, (MemoryLimitError, ServerError))

    def _evened(self, group: "Group", own: Tensor, parts: list[Tensor]) -> list[Tensor]:
        """As many micro-batches for each teacher on every rank, filled up with a row that is another rank's."""
        parts, view = group.by_teacher(parts), group.teacher_view
        of_row = own.new_zeros(len(own), dtype=torch.int64) if view is None else view.teacher[group.prompt_index]
        for teacher in of_row.unique().tolist():
            count = sum(group.teacher_of(rows) == teacher for rows in parts)
            others = (~own & (of_row == teacher)).nonzero()[:, 0]
            parts += [others[:1]] * (self.largest(count) - count)
        return group.by_teacher(parts)

    def shard(self, model: "PreTrainedModel", parts: "ModelParts") -> "ModelParts":
        """Shares the weights of `model` out over the ranks; returns what takes the place of its `parts`.

        The model keeps its structure, with the shards as its parameters, for optimizers and copies; it cannot be
        called any more. Without effect unless `sharded`. Raises `ModelError`.
        """
        if not self.sharded:
            return parts
        # What one process never needs takes a second to import.
        from torch.distributed.device_mesh import DeviceMesh

        from distill.sharding import share_out

        device = parts.head.weight.device.type
        mesh = DeviceMesh.from_group(self._group if device == "cuda" else distributed.group.WORLD, device)
        return share_out(model, parts, mesh)

    def describe(self, model: "PreTrainedModel") -> str:
        """How many ranks there are and what each keeps of `model`, as a line to print."""
        tensors = [*model.parameters()]
        held = sum((tensor.to_local() if self.sharded else tensor).numel() for tensor in tensors)
        return (
            f"{self.size} ranks; rank 0 keeps {held:,} of the student's {sum(t.numel() for t in tensors):,} parameters"
        )

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` in one piece, for rank 0 to write; on the other ranks nothing of those that are shared out."""
        if not self.sharded:
            return dict(tensors)
        pieces = ((name, whole(tensor.detach())) for name, tensor in tensors.items())
        return {name: tensor.cpu() if self.rank == 0 else tensor.new_empty(0) for name, tensor in pieces}

    def gathered_model(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """`model` with its weights in one piece on rank 0."""
        if not self.sharded:
            return model
        found, plain = self.gathered(dict(model.named_parameters())), alias(model)
        kept = {id(shard): nn.Parameter(found[name], shard.requires_grad) for name, shard in model.named_parameters()}
        for module in plain.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = kept[id(parameter)]
        return plain

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
        if self.size == 1 or engine.engine == "vllm":  # which asks one server for all
            return engine.generate(prompt_ids, prompt_mask, num_rollouts=num_rollouts, prompt_keys=prompt_keys)
        B = len(prompt_ids)
        # A rank without a prompt has to take part in what the engine does, so it samples one for nothing.
        share = divide([1] * B, self.size)[self.rank]
        own = torch.tensor(share or [0])
        first = int(prompt_mask[own].any(0).int().cpu().argmax())
        mine = {"prompt_ids": prompt_ids[own, first:], "prompt_mask": prompt_mask[own, first:]}
        part = self._agreed(lambda: engine.generate(**mine, num_rollouts=num_rollouts, prompt_keys=prompt_keys[own]))
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
