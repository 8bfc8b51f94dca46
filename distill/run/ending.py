"""What is written at the end of a run: the model, its adapter, and what the run amounts to."""

import json
from pathlib import Path

from rich.console import Console

from distill.models import auto_class, merged, save_adapter, save_model
from distill.run.card import write_card
from distill.run.live_report import LiveReport
from distill.run.outcome import Outcome
from distill.run.output import OutputFolder
from distill.run.parts import RunParts
from distill.run.progress import Progress
from distill.run.summary import Summary, show_summary, summarise
from distill.runtime import peak_memory_bytes, read_json_lines


def write_models(parts: RunParts, progress: Progress, output: OutputFolder) -> None:
    """Writes `adapter` and `final`; all ranks must ask for it."""
    student = parts.ranks.gathered_model(parts.student)
    reference, dropped = parts.config.student.model, parts.dropped_layers

    def write_model(folder: Path) -> None:
        save_model(merged(student), folder)
        parts.tokenizer.save_pretrained(folder)
        write_card(folder, outcome_of(parts, progress, output), auto_class(student.config).__name__)

    if parts.config.student.lora:
        output.replace("adapter", lambda folder: save_adapter(student, folder, reference, dropped))
    output.replace("final", write_model)


def write_summary(
    parts: RunParts, progress: Progress, output: OutputFolder, report: LiveReport, console: Console
) -> Summary:
    """Writes `summary.json` and the report, and prints the closing table."""
    summary = summarise(outcome_of(parts, progress, output))
    output.write_text("summary.json", json.dumps(summary.record(), indent=1, ensure_ascii=False))
    report.finish()
    show_summary(console, summary, output.path)
    return summary


def outcome_of(parts: RunParts, progress: Progress, output: OutputFolder) -> Outcome:
    """What the run has come to by now."""
    return Outcome(
        config=parts.config,
        steps=parts.trainer.position.step,
        warm_steps=parts.warm_steps,
        best_step=progress.best_step,
        metrics=read_json_lines(output.path / "metrics.jsonl"),
        evaluations=progress.evaluations,
        held_out_prompts=parts.held_out.student.texts if parts.held_out else [],
        samples=progress.samples,
        environment=parts.environment(),
        rollout_precision=parts.engine.precision,
        peak_memory_bytes=peak_memory_bytes(parts.device),
        **progress.seconds,
    )
