"""A pool of rollouts at a fixed policy, with the gradient that each of them alone would give, as a random sketch.

A group's gradient is a mean over its rollouts, so the gradients of all groups of all sizes come from one pool. What
depends on the group, the leave-one-out baseline b, is linear in two gradients: (A = r) − b (A = 1).
Gradients of 135 million numbers are kept as D = 65,536 sums of them with random signs: inner products are preserved in
the mean, with a standard deviation of at most sqrt(2 / D) = 0.6 % of the product of the norms.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.config import Config, ConfigError
from distill.loss import Group, HeadPair, LossOptions, ModelParts
from distill.loss.advantage import advantages, needs_scores
from distill.loss.gradients import token_weights
from distill.prompts import left_pad
from distill.run import choose_device
from distill.run.parts import RunParts
from distill.training import Ranks
from distill_kernels import TokenStats

SKETCH_SIZE = 65_536
SIGNS_SEED = 20_240_601
SCORE = "score"  # the gradient with A = 1


class Sketch:
    """Signed sums of gradients: element i of a block of D elements goes to sum (i + shift of the block) mod D.

    Signs and shifts are random: models concentrate their gradient in the same few places of every layer, which would
    meet in the same sums if blocks were not shifted.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], size: int = SKETCH_SIZE) -> None:
        self.size = size
        generator = torch.Generator().manual_seed(SIGNS_SEED)
        self.blocks: list[list[tuple[Tensor, int]]] = []  # a parameter's signs [n <= D] and shifts
        for parameter in parameters:
            signs = torch.randint(0, 2, (parameter.numel(),), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
            parts = signs.to(parameter.device).split(size)
            shifts = torch.randint(size, (len(parts),), generator=generator).tolist()
            self.blocks.append(list(zip(parts, shifts, strict=True)))

    def __call__(self, gradients: Sequence[Tensor]) -> Tensor:
        """[D] float32."""
        total = torch.zeros(2 * self.size, device=gradients[0].device)  # what runs past D is added at the end
        for gradient, blocks in zip(gradients, self.blocks, strict=True):
            for part, (signs, shift) in zip(gradient.reshape(-1).split(self.size), blocks, strict=True):
                total[shift : shift + len(part)] += part * signs
        return total[: self.size] + total[self.size :]


@dataclass(frozen=True)
class PromptPool:
    """M rollouts of one prompt."""

    sketches: dict[str, Tensor]  # [M, D] by vector
    shifts: dict[str, Tensor]  # [M, H] gradients of a shift of the last hidden states, which a run's diagnostics use
    norms: dict[str, Tensor]  # [M] exact, squared
    reward: Tensor  # [M] mean token reward, nats
    reverse_kl: Tensor  # [M] mean exact token KL, nats
    lengths: Tensor  # [M]

    def save(self, path: Path) -> None:
        tensors = {f"sketch/{name}": value for name, value in self.sketches.items()}
        tensors |= {f"shift/{name}": value for name, value in self.shifts.items()}
        tensors |= {f"norm/{name}": value for name, value in self.norms.items()}
        plain = {"reward": self.reward, "reverse_kl": self.reverse_kl, "lengths": self.lengths}
        partial = path.with_suffix(".partial")
        save_file({name: value.contiguous().cpu() for name, value in (tensors | plain).items()}, partial)
        partial.rename(path)

    @classmethod
    def load(cls, path: Path) -> "PromptPool":
        tensors = load_file(path)

        def named(kind: str) -> dict[str, Tensor]:
            return {n.removeprefix(f"{kind}/"): value for n, value in tensors.items() if n.startswith(f"{kind}/")}

        vectors = (named(kind) for kind in ("sketch", "shift", "norm"))
        return cls(*vectors, tensors["reward"], tensors["reverse_kl"], tensors["lengths"])


def vectors_of(estimators: dict[str, LossOptions]) -> dict[str, LossOptions | None]:
    """The gradients to be stored: one an estimator, but a group baseline's are the plain one and the score's (None)."""
    found: dict[str, LossOptions | None] = {}
    for name, options in estimators.items():
        if options.baseline == "group":
            found |= {plain_name(options): LossOptions(reduction=options.reduction), SCORE: None}
        else:
            found[vector_name(name, options)] = options
    return found


def plain_name(options: LossOptions) -> str:
    """The name of the sampled estimator without baseline; a group baseline is measured with each token's own reward."""
    if options.discount or options.reward_clip is not None:
        raise ValueError("a group baseline is measured at a fixed policy without discount and reward clip only")
    return "plain"


def vector_name(name: str, options: LossOptions) -> str:
    """The stored gradient that an estimator without group baseline is."""
    sampled = options.objective == "sampled_reverse_kl" and not needs_scores(options)
    return "plain" if sampled else name


class PoolMaker:
    """The policy, its teacher, and the prompts, with everything to make pools of them."""

    def __init__(self, config: Config, estimators: dict[str, LossOptions]) -> None:
        # Nothing is trained: the models and prompts are all that is needed of a run.
        self.parts = RunParts(config, choose_device(config.training.device), Console(quiet=True), Ranks(), None)
        self.vectors = vectors_of(estimators)
        self.parameters = [p for p in self.parts.student.parameters() if p.requires_grad]
        self.sketch = Sketch(self.parameters)

    def make(self, prompt: int, count: int, progress: Progress, task: Any) -> PromptPool:
        """`count` rollouts of the prompt with this index, and their gradients."""
        parts, prompts, seen = self.parts, self.parts.prompts.student, self.parts.prompts.teacher
        ids, mask = left_pad([prompts.token_ids[prompt]], parts.tokenizer.pad_token_id)
        rollouts = parts.engine.generate(
            ids.to(parts.device), mask.to(parts.device), num_rollouts=count, prompt_keys=torch.tensor([prompt])
        )
        group = Group.of(rollouts, seen and seen.view([prompt]))
        sketches, shifts, norms = ({name: [] for name in self.vectors} for _ in range(3))
        reward, reverse_kl = [], []
        for row in range(count):
            stats, gradients = rollout_gradients(
                parts.student_parts,
                parts.teachers,
                group,
                row,
                self.vectors,
                self.parameters,
                parts.vocab_size,
            )
            for name, of_vector, shift in gradients:
                shifts[name].append(shift.cpu())
                sketches[name].append(self.sketch(of_vector).cpu())
                norms[name].append(torch.stack([g.norm() for g in of_vector]).double().square().sum().cpu())
            reward.append(stats.reward.mean().cpu())
            reverse_kl.append(stats.reverse_kl.mean().cpu())
            progress.advance(task)
        return PromptPool(
            *({name: torch.stack(rows) for name, rows in kind.items()} for kind in (sketches, shifts, norms)),
            torch.stack(reward),
            torch.stack(reverse_kl),
            group.completion_lengths,
        )


def rollout_gradients(
    student: ModelParts,
    teachers: Sequence[ModelParts],
    group: Group,
    row: int,
    vectors: dict[str, LossOptions | None],
    parameters: Sequence[nn.Parameter],
    vocab_size: int | None,
) -> tuple[TokenStats, Iterator[tuple[str, Sequence[Tensor], Tensor]]]:
    """One rollout's statistics, and an iterator over the gradients of its loss as a group of its own: name, of the
    parameters, of a shift of its last hidden states.

    The importance ratio is left out: at a fixed policy it is 1.
    """
    rows = torch.tensor([row])
    inputs, ids, lengths = group.inputs(rows), group.valid(group.completion_ids, rows), group.completion_lengths[rows]
    index = int(group.weights[row].argmax())
    hidden, teacher = student.hidden(*inputs), teachers[index]
    with torch.no_grad(), teacher.present():
        teacher_hidden = teacher.hidden(*group.seen_by(index).inputs(rows))
    heads = HeadPair(student, teacher, 1.0, vocab_size)
    stats = heads.statistics(hidden.detach(), teacher_hidden, ids)

    def gradients() -> Iterator[tuple[str, Sequence[Tensor], Tensor]]:
        for name, options in vectors.items():
            if options is None:
                advantage, options = torch.ones_like(stats.reward), LossOptions()
            else:
                advantage = advantages(stats, lengths, rows * 0, options) if needs_scores(options) else None
            loss, _ = heads.loss(
                hidden,
                teacher_hidden,
                ids,
                token_weights(lengths, options.reduction).to(hidden.device),
                objective=options.objective,
                advantage=advantage,
                beta=options.beta,
            )
            *of_parameters, of_hidden = torch.autograd.grad(loss, (*parameters, hidden), retain_graph=True)
            yield name, of_parameters, of_hidden.sum(0)

    return stats, gradients()


def make_pools(
    name: str,
    config: Config,
    estimators: dict[str, LossOptions],
    prompts: int,
    count: int,
    output: Path,
    progress: Progress,
) -> None:
    """Makes the pools of the first `prompts` prompts that are not there yet.

    Raises `ConfigError` where pools of something else are in the way, and where there are fewer prompts.
    """
    folder = output / "pools"
    folder.mkdir(parents=True, exist_ok=True)
    ours = json.dumps(
        {
            "config": config.model_dump(
                mode="json", include={"student", "teacher", "prompts", "rollout"}, exclude_defaults=True
            ),
            "seed": config.training.seed,
            "count": count,
            "vectors": {n: _given(options) for n, options in vectors_of(estimators).items()},
        },
        indent=1,
    )
    made_of = folder / f"{name}.json"
    if made_of.exists() and made_of.read_text(encoding="utf-8") != ours:
        raise ConfigError(
            f"{folder}: holds pools of other rollouts or gradients, as {made_of.name} says; "
            "remove it or name another --output"
        )
    made_of.write_text(ours, encoding="utf-8")
    paths = _paths(name, prompts, output)
    missing = [prompt for prompt, path in enumerate(paths) if not path.exists()]
    if missing:
        task = progress.add_task(f"{name}: gradients", total=len(missing) * count)
        maker = PoolMaker(config, estimators)
        known = len(maker.parts.prompts.student)
        if known < prompts:
            raise ConfigError(f"{config.prompts.train}: has {known} prompts, and {name} needs {prompts}")
        for prompt in missing:
            maker.make(prompt, count, progress, task).save(paths[prompt])
        progress.remove_task(task)


def read_pools(name: str, prompts: int, output: Path) -> list[PromptPool]:
    """The pools that are there."""
    return [PromptPool.load(path) for path in _paths(name, prompts, output) if path.exists()]


def _paths(name: str, prompts: int, output: Path) -> list[Path]:
    return [output / "pools" / f"{name}-{prompt:03d}.safetensors" for prompt in range(prompts)]


def _given(options: LossOptions | None) -> dict[str, Any] | None:
    """What differs from the defaults, so that an option which did not exist yet changes nothing."""
    return options and {key: value for key, value in vars(options).items() if value != getattr(LossOptions(), key)}
