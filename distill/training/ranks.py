"""Training over ranks: the processes that `torchrun` starts divide the prompts of a step and add up what they find.

Every rank holds all rollouts of a group and computes the rows of its own prompts; what it does not know it leaves zero,
so that a sum over the ranks is what one process would have, in the same order. The weights of tokens are made over the
whole group, so gradients are summed too, never averaged. Where the weights of a model are shared out as well, a layer
is gathered for each of its passes (FSDP2), so all ranks must make equally many of them.
Left out on purpose: dividing the tokens of a sequence or the layers of a model, which longer contexts and larger
students than these would need.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, distributed, nn

from distill.loss import Group, GroupGradient, ModelParts, Rollouts
from distill.models import alias, whole
from distill.rollout import RolloutEngine
from distill.runtime import MemoryLimitError, MemoryLimits, Processes, to_device
from distill.servers import ServerError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


T = TypeVar("T")


class Ranks(Processes):
    """What each of a run's processes does of its work; alone, all of it."""

    def own_rows(self, group: Group) -> Tensor:
        """[R] bool on the host: the rows of this rank's prompts, which are about as many tokens as every other's."""
        prompts, completions, index = group.lengths
        tokens = prompts.index_add(0, index, completions)
        own = divide(tokens.tolist(), self.size)[self.rank]
        return torch.isin(index, torch.tensor(own, dtype=torch.int64))

    def in_micro_batches(
        self,
        limits: MemoryLimits,
        phase: str,
        group: Group,
        own: Tensor,
        work: Callable[[list[Tensor]], T],
        *,
        by_teacher: bool = False,
    ) -> T:
        """`limits.in_micro_batches` of the rows of `group` that are this rank's `own` [R].

        `by_teacher`: models are called for each teacher's rows of a micro-batch, after what the teacher sees.
        """
        prompts, completions, index = group.seen_lengths if by_teacher else group.lengths
        rows = own.nonzero()[:, 0]

        def of_group(parts: list[Tensor]) -> T:
            parts = [rows[part] for part in parts]
            return work(self._evened(group, own, parts, by_teacher) if self.sharded else parts)

        lengths = (prompts, completions[rows], index[rows])
        return self._agreed(lambda: limits.in_micro_batches(phase, lengths, of_group))

    def _agreed(self, work: Callable[[], T]) -> T:
        """`together`, for what a run can be continued after; not where the others wait in the midst of `work`."""
        return self.together(work, () if self.sharded else (MemoryLimitError, ServerError))

    def _evened(self, group: Group, own: Tensor, parts: list[Tensor], by_teacher: bool) -> list[Tensor]:
        """As many micro-batches on every rank, filled up with a row that is another rank's; `by_teacher` with a row of
        every teacher in each, for what finds the same of a row however often it looks.
        """
        missing = self.largest(len(parts)) - len(parts)
        if not by_teacher:
            return parts + [(~own).nonzero()[:1, 0]] * missing
        parts = parts + [own.nonzero()[:0, 0]] * missing
        scored = group.weights > 0  # [R, M]
        for teacher in scored.any(0).nonzero()[:, 0].tolist():
            of_teacher = scored[:, teacher]
            any_row = of_teacher.nonzero()[:1, 0]
            parts = [rows if of_teacher[rows].any() else torch.cat([rows, any_row]) for rows in parts]
        return parts

    def sum_of(
        self, result: GroupGradient, group: Group, own: Tensor, width: int, parameters: Iterable[nn.Parameter]
    ) -> GroupGradient:
        """What all ranks found, on every rank; the sum of their gradients is then in the `parameters`.

        `own` [R] are this rank's rows of the group, `width` is H of its `row_gradients`.
        """
        if self.size == 1:
            return result
        self.add_gradients(parameters)
        shifts = result.row_gradients
        if shifts is None:
            shifts = result.losses.new_zeros(len(own), width)
        tokens = own.repeat_interleave(group.completion_lengths)
        return GroupGradient(
            self.total(result.losses),
            result.stats._make(self.total(torch.stack(list(result.stats)), tokens)),
            self.total(shifts, own[:, None]),
            self.total(result.agreement),
        )

    def shard(self, model: "PreTrainedModel", parts: ModelParts) -> ModelParts:
        """Shares the weights of `model` out over the ranks; returns what takes the place of its `parts`.

        The model keeps its structure, with the shards as its parameters, for optimizers and copies; it cannot be
        called any more. Without effect unless `sharded`. Raises `ModelError`.
        """
        if not self.sharded:
            return parts
        # What one process never needs takes a second to import.
        from torch.distributed.device_mesh import DeviceMesh

        from distill.training.sharding import share_out

        device = parts.head.weight.device.type
        mesh = DeviceMesh.from_group(self._group if device == "cuda" else distributed.group.WORLD, device)
        return share_out(model, parts, mesh)

    def describe(self, model: "PreTrainedModel") -> str:
        """How many ranks there are and what each keeps of `model`, as a line to print."""
        tensors = [*model.parameters()]
        held = sum((tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel() for tensor in tensors)
        return (
            f"{self.size} ranks; rank 0 keeps {held:,} of the student's {sum(t.numel() for t in tensors):,} parameters"
        )

    def gathered_model(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """`model` with its weights in one piece on rank 0."""
        if not self.sharded:
            return model
        plain, kept = alias(model), {}
        for shard in model.parameters():
            # For which all ranks must ask; on the others nothing of it stays.
            found = whole(shard.detach())
            found = found.cpu() if self.rank == 0 else found.new_empty(0)
            kept[id(shard)] = nn.Parameter(found, shard.requires_grad)
        for module in plain.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = kept[id(parameter)]
        return plain

    def generate(
        self,
        engine: RolloutEngine,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        num_rollouts: int,
        prompt_keys: Tensor,
    ) -> Rollouts:
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
        width = self.largest(part.completion_ids.shape[1])
        rows = to_device((own[:, None] * num_rollouts + torch.arange(num_rollouts)).flatten(), prompt_ids.device)

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


def divide(costs: Sequence[int], parts: int) -> list[list[int]]:
    """The indices of `costs` in `parts` lists of about equal sums: the costliest first, to whoever has least."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    sums = [0] * parts
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        to = sums.index(min(sums))
        shares[to].append(index)
        sums[to] += costs[index]
    return [sorted(share) for share in shares]
