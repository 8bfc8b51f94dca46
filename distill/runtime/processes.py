"""The processes that `torchrun` starts for one run: how they find each other, wait, and exchange what each of them has.

Every wait ends: at its time-out, or where another process is gone, with a message that names it.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from signal import Signals
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, distributed

from distill.runtime.clock import to_device

T = TypeVar("T")
Errors = tuple[type[Exception], ...]


class RankError(RuntimeError):
    """Another rank died or hangs; the message names it where this rank can know."""


class Processes:
    """This process among those of its run; alone, every method does nothing."""

    rank, local_rank, size = 0, 0, 1
    sharded = False
    """Whether models' weights are shared out."""

    @classmethod
    def join(cls, device: str, timeout_s: float, parallel: str = "replicate") -> Self:
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
        """Ends the exchange, and the threads of its groups, which end with the last reference to them.

        One that still lets go of a tensor while the interpreter ends would abort the process.
        """
        if self.size > 1:
            self._meeting = self._group = None
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
            tensor = torch.where(to_device(mask, tensor.device), tensor, 0).contiguous()
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

    def by_first(self, work: Callable[[], T]) -> T:
        """What rank 0's `work()` gives, anything that JSON holds, on every rank, however long it takes."""
        if self.size == 1:
            return work()
        background = ThreadPoolExecutor(1)
        try:
            future = background.submit(work) if self.rank == 0 else None
            self.wait_for_first(future)
            return self.of_first(future and future.result())
        finally:
            background.shutdown(wait=False)  # where another rank is gone, nobody waits for it

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

    def _group_of(self, tensor: Tensor) -> distributed.ProcessGroup:
        return distributed.group.WORLD if tensor.device.type == "cpu" else self._group
