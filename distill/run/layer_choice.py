"""`student.drop_layers: auto:N`: which N layers the student misses least, by the exact reverse KL to its teachers.

Sets of layers are compared on a few fixed completions of the whole model, the best of them then as a run compares
students, on completions of their own: what follows a pruned model's mistakes decides, and costs a rollout to know.
Sets grow by one layer at a time from the best few, by layers that rank well alone: layers that only pay together, which
a search through all sets would find, are missed.
"""

import time
from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from distill.config import Config
from distill.loss import Group, ModelParts, score, statistics
from distill.models import ModelError, split_head, without_layers
from distill.prompts import left_pad
from distill.run.engines import make_engine
from distill.run.loading import Pair
from distill.run.prompt_sets import Prompts, evaluation_arguments
from distill.runtime import MemoryLimits
from distill.training import evaluate

NUM_PROMPTS, NUM_TOKENS = 12, 16  # of the fixed completions
NUM_SINGLES, NUM_SETS, NUM_FINALISTS = 8, 3, 3  # layers that sets grow by, sets that grow, sets that are compared last

Layers = tuple[int, ...]


@torch.no_grad()
def choose_layers(config: Config, pair: Pair, prompts: Prompts, dtype: torch.dtype, console: Console) -> dict[str, Any]:
    """Finds the layers on held-out `prompts`, and prints their ranking. Raises `ModelError`.

    Returns the content of `layers.json`: the `dropped` layers, and every figure that spoke for them in nats per token.
    """
    start, count = time.monotonic(), int(config.student.drop_layers.removeprefix("auto:"))
    total = pair.student.config.get_text_config().num_hidden_layers
    if count >= total:
        raise ModelError(f"student.drop_layers: auto:{count} leaves nothing of a model of {total} layers")
    fixed = _FixedCompletions(config, pair, prompts, dtype)

    def ranked(sets: Iterable[Layers], what: str) -> dict[Layers, float]:
        found = {layers: fixed.reverse_kl(layers) for layers in _tracked(sorted(sets), what, console)}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    singles = sets = ranked(((layer,) for layer in range(total)), f"each of {total} layers alone")
    for size in range(2, count + 1):
        # As many more layers as are already dropped, so that there is a choice however many are wanted.
        partners = list(singles)[: NUM_SINGLES + size - 1]
        grown = {tuple(sorted({*layers, *partner})) for layers in list(sets)[:NUM_SETS] for partner in partners}
        sets = ranked((layers for layers in grown if len(layers) == size), f"sets of {size}")
    finalists = list(sets)[:NUM_FINALISTS]
    own = {
        layers: _held_out(config, pair, prompts, dtype, layers)
        for layers in _tracked(finalists, "the best sets, each on completions of its own", console)
    }
    best = min(finalists, key=own.get)
    record = {
        "dropped": list(best),
        "sets": [{"layers": s, "reverse_kl": sets[s], "held_out_reverse_kl": own.get(s)} for s in sets],
        "single_layers": [{"layer": layer, "reverse_kl": value} for (layer,), value in singles.items()],
        "seconds": time.monotonic() - start,
    }
    _show(console, record)
    return record


class _FixedCompletions:
    """Short completions that the whole model wrote, with the teachers' hidden states."""

    def __init__(self, config: Config, pair: Pair, prompts: Prompts, dtype: torch.dtype) -> None:
        self._pair, self._dtype = pair, dtype
        self._teachers = [teacher.parts for teacher in pair.teachers]
        self._limits = MemoryLimits(config.training.tokens_per_micro_batch, device=pair.student.device)
        asked = left_pad(prompts.student.token_ids[:NUM_PROMPTS], pair.tokenizer.pad_token_id)
        ids, mask = (tensor.to(pair.student.device) for tensor in asked)
        # The whole model writes here, which no server has.
        here = {"engine": "auto", "server": None} if config.rollout.engine == "vllm" else {}
        config = config.model_copy(update={"rollout": config.rollout.model_copy(update=here)})
        engine = make_engine(pair.student, config, pair.tokenizer, pair.vocab_size, "float32", self._limits)
        rollouts = engine.variant(seed=config.evaluation.seed, max_new_tokens=NUM_TOKENS).generate(
            ids, mask, num_rollouts=1, prompt_keys=torch.arange(len(ids))
        )
        self._group = Group.of(rollouts, prompts.teacher and prompts.teacher.view(range(len(ids))))
        self._hidden = self._limits.in_micro_batches(
            "layer choice", self._group.seen_lengths, lambda parts: score(self._teachers, self._group, parts)
        )

    def reverse_kl(self, layers: Layers) -> float:
        """Mean over all tokens, of the model without `layers`."""
        student = ModelParts(*split_head(without_layers(self._pair.student, layers)), self._dtype)
        stats = self._limits.in_micro_batches(
            "layer choice",
            self._group.lengths,
            lambda parts: statistics(
                student,
                self._teachers,
                self._group,
                parts,
                vocab_size=self._pair.vocab_size,
                teacher_hidden=self._hidden,
            ),
        )
        return stats.reverse_kl.double().mean().item()


def _tracked(sets: list[Layers], what: str, console: Console) -> Iterable[Layers]:
    """A progress bar in a terminal, a line anywhere else."""
    what = f"choosing layers: {what}"
    if not console.is_terminal:
        console.print(f"{what} ({len(sets)} measurements)", highlight=False, soft_wrap=True)
    return track(sets, what, console=console, transient=True, disable=not console.is_terminal)


def _held_out(config: Config, pair: Pair, prompts: Prompts, dtype: torch.dtype, layers: Layers) -> float:
    """What the run's own evaluation will say of the student without `layers`."""
    student = without_layers(pair.student, layers)
    limits = MemoryLimits(config.training.tokens_per_micro_batch, device=student.device)
    return evaluate(
        make_engine(student, config, pair.tokenizer, pair.vocab_size, config.rollout.precision, limits),
        ModelParts(*split_head(student), dtype),
        [teacher.parts for teacher in pair.teachers],
        vocab_size=pair.vocab_size,
        limits=limits,
        **evaluation_arguments(config, prompts, pair.tokenizer.pad_token_id),
    ).reverse_kl


def _show(console: Console, record: dict[str, Any]) -> None:
    """The best sets, and the layers by what each costs alone."""
    table = Table(
        "without layers",
        "on fixed completions",
        "on its own",
        title=f"Reverse KL to the teacher, nats/token: dropping {record['dropped']}",
        title_justify="left",
    )
    for found in record["sets"][:NUM_SINGLES]:
        own = found["held_out_reverse_kl"]
        table.add_row(
            ", ".join(map(str, found["layers"])), f"{found['reverse_kl']:.3f}", "" if own is None else f"{own:.3f}"
        )
    console.print(table)
    alone = "  ".join(f"{each['layer']}: {each['reverse_kl']:.2f}" for each in record["single_layers"])
    console.print(f"each layer alone, on fixed completions: {alone}", highlight=False, soft_wrap=True)
