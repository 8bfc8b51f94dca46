"""`summary.json` and the closing table: what a finished run amounts to."""

import platform
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from distill.report import before_and_after, metric_rows
from distill.run.display import closing_table
from distill.run.outcome import NUM_SAMPLES, Outcome

FEW_HAVE = ("eval_metrics", "eval_sets", "answer_tokens", "warm_start")


@dataclass(frozen=True)
class Summary:
    """What `summary.json` holds; divergences in nats a token, None where there were no held-out prompts."""

    eval_reverse_kl_before: float | None
    eval_reverse_kl_after: float | None
    eval_reverse_kl_change: float | None
    """The second less the first."""
    eval_reverse_kl_change_standard_error: float | None
    """Over prompts, each compared with itself; None too where the first evaluation is an older version's."""
    eval_reverse_kl_reduction: float | None
    """1 is all of it."""
    eval_best_step: int | None
    """The step of the best evaluation: of the lowest held-out reverse KL, or of what early stopping looks at."""
    steps: int
    completion_tokens: int
    wall_seconds: float
    cpu_seconds: float
    """Of this process's cores together."""
    seconds_rollout: float
    seconds_score: float
    seconds_update: float
    peak_memory_bytes: int
    torch: str
    """Its version."""
    device: str
    precision: str
    threads: int
    ranks: int
    rollout_precision: str
    python: str
    """Its version."""
    samples: list[dict[str, str]]
    """Held-out prompts with what the student said: `prompt`, `before`, `after`."""
    eval_metrics: dict[str, Any] = field(default_factory=dict)
    """By set (`main`: `prompts.eval`), metric and figure: `before`, `after`, `change`, each `mean`, `low`, `high`."""
    eval_sets: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """By set of `evaluation.sets`, what the first four say of the main one."""
    answer_tokens: int = 0
    """Of written answers that were trained on."""
    warm_start: dict[str, Any] = field(default_factory=dict)
    """Its `steps`, and of the evaluation at its end `eval_reverse_kl`, `eval_metrics` and `eval_sets`."""

    def record(self) -> dict[str, Any]:
        """As it is written: without metrics, sets and answers where there are none."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in found.items() if value or name not in FEW_HAVE}


def summarise(outcome: Outcome) -> Summary:
    """The summary of a finished run."""
    evaluations = outcome.evaluations
    before, after = (evaluations[i]["reverse_kl"] if evaluations else None for i in (0, -1))
    seconds = {f"seconds_{p}": sum(m[f"seconds_{p}"] for m in outcome.metrics) for p in ("rollout", "score", "update")}
    return Summary(
        eval_reverse_kl_before=before,
        eval_reverse_kl_after=after,
        **{f"eval_{name}": x for name, x in outcome.change.items()},
        eval_reverse_kl_reduction=1 - after / before if before else None,
        eval_best_step=outcome.best_step,
        steps=outcome.steps,
        completion_tokens=outcome.completion_tokens,
        wall_seconds=outcome.wall_seconds,
        cpu_seconds=outcome.cpu_seconds,
        **seconds,
        peak_memory_bytes=outcome.peak_memory_bytes,
        **outcome.environment,
        rollout_precision=outcome.rollout_precision,
        python=platform.python_version(),
        samples=[
            {"prompt": prompt, "before": first, "after": last} for prompt, first, last in outcome.shown(NUM_SAMPLES)
        ],
        eval_metrics=before_and_after(evaluations),
        eval_sets=outcome.of_sets,
        answer_tokens=outcome.answer_tokens,
        warm_start=_of_warm_start(outcome),
    )


def _of_warm_start(outcome: Outcome) -> dict[str, Any]:
    if not outcome.warm_steps:
        return {}
    found: dict[str, Any] = {"steps": outcome.warm_steps}
    if evaluation := outcome.after_warm_start:
        found["eval_reverse_kl"] = evaluation["reverse_kl"]
        sets = evaluation.get("sets", {})
        further = {
            "eval_metrics": before_and_after([outcome.evaluations[0], evaluation]),
            "eval_sets": {name: {"reverse_kl": of_set["reverse_kl"]} for name, of_set in sets.items()},
        }
        found |= {name: value for name, value in further.items() if value}
    return found


def show_summary(console: Console, summary: Summary, folder: Path) -> None:
    """The closing table, and where everything is."""
    if summary.eval_reverse_kl_before is not None:
        _show_figures(console, summary)
    for line in (
        f"{_steps(summary)} in {summary.wall_seconds:.0f} s; report: {folder / 'report.html'}",
        f"model: {folder / 'final'}",
        f"talk to it, beside the teacher: python -m distill.chat {folder}",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def _steps(summary: Summary) -> str:
    warm = summary.warm_start.get("steps", 0)
    return f"{f'{warm} steps of warm start, ' if warm else ''}{summary.steps} steps"


def _show_figures(console: Console, summary: Summary) -> None:
    before, after = summary.eval_reverse_kl_before, summary.eval_reverse_kl_after
    warm = summary.warm_start if "eval_reverse_kl" in summary.warm_start else None
    # Of student and teacher alike, the first is rounding.
    change = f"  ({after / before - 1:+.0%})" if before and not warm else ""
    if warm and warm["eval_reverse_kl"]:
        change = f"  ({after / warm['eval_reverse_kl'] - 1:+.0%} since)"
    between = {name: f"{of['reverse_kl']:.3f}" for name, of in (warm or {}).get("eval_sets", {}).items()}
    between |= {row.name: row.after for row in metric_rows((warm or {}).get("eval_metrics", {}))}
    first = f"{warm['eval_reverse_kl']:.3f}" if warm else ""
    rows = [("held-out reverse KL, nats/token", f"{before:.3f}", first, f"{after:.3f}{change}")]
    if (error := summary.eval_reverse_kl_change_standard_error) is not None:
        change = f"{summary.eval_reverse_kl_change:+.3f} ± {1.96 * error:.3f}"
        rows.append(("its change with the 95 % interval", "", "", change))
    for name, one in summary.eval_sets.items():
        first, last = (f"{one[f'reverse_kl_{when}']:.3f}" for when in ("before", "after"))
        rows.append((f"{name}: held-out reverse KL", first, between.get(name, ""), last))
    for row in metric_rows(summary.eval_metrics, every=False):
        said = f"{row.after}{row.change and ', '}{row.change}"
        rows.append((row.name, row.before, between.get(row.name, ""), said))
    rows += [(s["prompt"], s["before"], "", s["after"]) for s in summary.samples[:3]]
    if warm:
        closing_table(console, rows, "before", "after the warm start", "after")
    else:
        closing_table(console, [(name, first, last) for name, first, _, last in rows])
