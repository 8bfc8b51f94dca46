"""What a run does when memory runs out: the phase again, with half the micro-batch or half the rows sampled at once.

The new size is kept for the rest of the run, and with its checkpoints. Nothing here changes a gradient: its weights
are made over the whole group before it is split.
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar
from weakref import WeakMethod

import torch
from torch import Tensor

from distill.runtime.micro_batches import micro_batches

T = TypeVar("T")

USUAL_TOKENS = 8192
"""Of a micro-batch that nothing is said of."""
MOST_TOKENS = 2**16
"""What `auto` begins with on a GPU: past it, the launches of a pass are no part of its time."""

# What allocators raise as plain RuntimeErrors: PyTorch's on a CPU, oneDNN's, cuBLAS's, CUDA's own.
MESSAGES = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "could not create a memory",
    "could not create a primitive",
    "could not execute a primitive",
    "out of memory",
    "ALLOC_FAILED",
)


class MemoryLimitError(RuntimeError):
    """Memory ran out at the smallest size, with what to lower."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or one that led to it or was handled when it came, says that memory ran out.

    What runs out in the capture of a CUDA graph is followed by the failure of the capture's end, which hides it.
    """
    chain, seen = [error], set()
    while chain:
        found = chain.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(found, RuntimeError) and any(message in str(found) for message in MESSAGES):
            return True
        chain += (found.__cause__, None if found.__suppress_context__ else found.__context__)
    return False


class MemoryLimits:
    """The sizes in use, which only ever shrink; `report` hears of each change.

    Micro-batches stay as they are where they are `fixed`, as other ranks count on them. Of `auto`, they are as large as
    the memory of a GPU allows, beside what is kept for the next rollouts.
    """

    def __init__(
        self,
        tokens_per_micro_batch: int | Literal["auto"],
        rows_per_wave: int | None = None,
        report: Callable[[str], None] = lambda message: None,
        *,
        fixed: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.fixed = fixed
        # A CPU's memory does not say that it has run out, and its passes have no launches to share.
        self._finds = tokens_per_micro_batch == "auto" and not fixed and device is not None and device.type == "cuda"
        if tokens_per_micro_batch == "auto":
            tokens_per_micro_batch = MOST_TOKENS if self._finds else USUAL_TOKENS
        self.releases: list[WeakMethod[Callable[[str], str | None]]] = []
        """Called with the phase in which memory ran out: each gives back what is kept for later, and says what."""
        self.tokens_per_micro_batch, self.rows_per_wave, self.report = tokens_per_micro_batch, rows_per_wave, report

    def state(self) -> dict[str, int | None]:
        """What a checkpoint keeps."""
        return {"tokens_per_micro_batch": self.tokens_per_micro_batch, "rows_per_wave": self.rows_per_wave}

    def restore(self, state: dict[str, int | None]) -> None:
        """Takes over what `state` gave."""
        self.tokens_per_micro_batch, self.rows_per_wave = state["tokens_per_micro_batch"], state["rows_per_wave"]

    def attempt(self, phase: str, work: Callable[[], T], shrink: Callable[[], str | None], lower: str) -> T:
        """`work()`, again after each `shrink()` while memory runs out.

        `shrink` makes something smaller and says what, or returns None; then `MemoryLimitError` names `lower`.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, MemoryLimitError) or not is_out_of_memory(error):
                    raise
                reason = " ".join(str(error).split())[:200] or type(error).__name__
            # Outside the handler, whose traceback would keep the failed attempt's tensors alive.
            smaller = shrink() if self._finds and phase != "rollout" else None
            if smaller is None:
                releases = [release for reference in self.releases if (release := reference()) is not None]
                released = [what for release in releases if (what := release(phase))]
                smaller = shrink() or next(iter(released), None)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if smaller is None:
                raise MemoryLimitError(
                    f"memory ran out in the {phase} phase at its smallest size ({reason}). Lower {lower}"
                )
            self.report(f"memory ran out in the {phase} phase ({reason}): again with {smaller}")

    def in_micro_batches(
        self, phase: str, lengths: tuple[Tensor, Tensor, Tensor], work: Callable[[list[Tensor]], T]
    ) -> T:
        """`work(parts)` with a group cut into micro-batches; `lengths` are its prompts', its completions', and [R]
        which prompt each row has. `work` begins anew when called again.
        """
        prompts, completions, index = lengths

        def cut() -> list[Tensor]:
            return micro_batches(prompts, completions, index, self.tokens_per_micro_batch)

        def shrink() -> str | None:
            parts = cut()
            if self.fixed or all(len(rows) == 1 for rows in parts):
                return None
            largest = max(int(prompts[index[rows].unique()].sum() + completions[rows].sum()) for rows in parts)
            self.tokens_per_micro_batch = min(self.tokens_per_micro_batch, largest) // 2
            return f"training.tokens_per_micro_batch {self.tokens_per_micro_batch}"

        lower = (
            "rollout.max_new_tokens or prompts.max_tokens, set training.activation_checkpointing: true or "
            "training.precision: bfloat16, or take a smaller model"
        )
        return self.attempt(phase, lambda: work(cut()), shrink, lower)


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors on `device` may still take."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/meminfo has no line MemAvailable; set rollout.memory_gib")
