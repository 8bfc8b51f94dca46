"""`summary.json` and the closing table: what a finished run amounts to."""

import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from distill.display import closing_table
from distill.metrics import peak_memory_bytes, read_json_lines

if TYPE_CHECKING:
    from distill.run import Run

NUM_SAMPLES = 6  # held-out completions kept from before and after, for the table and the report


def environment(run: "Run") -> dict[str, Any]:
    """What the last digits of a sum depend on beside the configuration."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu",
        "precision": str(run.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "ranks": run.ranks.size,
    }


def summarise(run: "Run") -> dict[str, Any]:
    """The content of `summary.json`."""
    metrics = read_json_lines(run.folder / "metrics.jsonl")
    before, after = (run.evaluations[i]["reverse_kl"] if run.evaluations else None for i in (0, -1))
    prompts = run.eval_prompts.texts[:NUM_SAMPLES] if run.eval_prompts else []
    samples = zip(prompts, run.samples.get("before", []), run.samples.get("after", []), strict=False)
    return {
        "eval_reverse_kl_before": before,
        "eval_reverse_kl_after": after,
        "eval_reverse_kl_reduction": 1 - after / before if before else None,
        "eval_best_step": run.best_step,
        "steps": run.trainer.position.step,
        "completion_tokens": sum(record["completion_tokens"] for record in metrics),
        "wall_seconds": time.monotonic() - run.started,
        "cpu_seconds": time.process_time() - run.cpu_started,
        **{f"seconds_{p}": sum(m[f"seconds_{p}"] for m in metrics) for p in ("rollout", "score", "update")},
        "peak_memory_bytes": peak_memory_bytes(run.device),
        **environment(run),
        "rollout_precision": run.engine.precision,
        "python": platform.python_version(),
        "samples": [{"prompt": prompt, "before": first, "after": last} for prompt, first, last in samples],
    }


def show_summary(console: Console, summary: dict[str, Any], folder: Path) -> None:
    """The closing table, and where everything is."""
    before, after = summary["eval_reverse_kl_before"], summary["eval_reverse_kl_after"]
    if before is not None:
        change = f"  ({after / before - 1:+.0%})" if before else ""
        rows = [("held-out reverse KL, nats/token", f"{before:.3f}", f"{after:.3f}{change}")]
        rows += [(s["prompt"], s["before"], s["after"]) for s in summary["samples"][:3]]
        closing_table(console, rows)
    for line in (
        f"{summary['steps']} steps in {summary['wall_seconds']:.0f} s; report: {folder / 'report.html'}",
        f"model: {folder / 'final'}",
        f"talk to it, beside the teacher: python -m distill.chat {folder}",
    ):
        console.print(line, highlight=False, soft_wrap=True)
