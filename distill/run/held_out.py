"""What an evaluation makes of one set of held-out prompts: the reverse KL, and what metrics say of the completions."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from distill.report import MAIN_SET
from distill.run.judges import Judges, failures
from distill.run.parts import RunParts
from distill.run.prompt_sets import evaluation_arguments
from distill.training import Evaluation, change_since, evaluate, record_metrics


class Look(NamedTuple):
    """One set as the student does on it now."""

    record: dict[str, Any]
    """Its figures, with their changes since the first evaluation."""
    evaluation: Evaluation
    failures: list[str]
    """Of each metric that failed on some completions: on how many, and why on the first."""


def look_at(parts: RunParts, judges: Judges, name: str, first: Mapping[str, Any] | None) -> Look:
    """Samples from the student, scores and judges; `first` is the record of the set's first evaluation, if it was."""
    main = name == MAIN_SET
    prompts = parts.held_out if main else parts.sets[name]
    asked = evaluation_arguments(parts.config, prompts, parts.tokenizer.pad_token_id, None if main else name)
    result = evaluate(
        parts.engine,
        parts.student_parts,
        parts.first_teachers,
        vocab_size=parts.vocab_size,
        limits=parts.limits,
        ranks=parts.ranks,
        **asked,
    )
    record = result.record(prompts.identity.label, prompts.teachers)
    record |= change_since(first or record, record)
    judged = judges(name, parts.tokenizer, prompts.student.records, result.rollouts)
    record_metrics(record, judged, asked["num_rollouts"], first)
    return Look(record, result, [line if main else f"{name}: {line}" for line in failures(judged)])
