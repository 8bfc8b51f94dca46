"""`python -m benchmarks.plan`: what a configuration would take on a machine, and the plan in docs/scaling.md.

    python -m benchmarks.plan --config configs/qwen3.yaml --gpu h100 --gpus 8
    python -m benchmarks.plan --page docs/scaling.md
    python -m benchmarks.plan --record outputs/default outputs/lora --results benchmarks/results/NAME/runs.json

The first prints seconds and bytes by phase for each way to share the work; `--gpu this` (or `cpu`) measures this
processor's limits for a few seconds first.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.plan import measured, page
from benchmarks.plan.machines import GIB, GPUS, NODE, Machine, this_cpu
from benchmarks.plan.model import MOST_ROLLOUTS, PHASES, Layout, Plan, Work, largest_rollouts
from benchmarks.plan.work import best, layouts, work_of
from distill.config import ConfigError, load_config
from distill.models import ModelError


def named(layout: Layout) -> str:
    way = layout.parallel if layout.devices > 1 else "one"
    return way + (f", teacher served by {layout.servers}" if layout.servers else "")


def table(work: Work, machine: Machine, found: list[tuple[Layout, Plan]]) -> str:
    """A line for each part of a step and for memory, a column for each layout."""
    lines = [("seconds a step", [named(layout) for layout, _ in found])]
    for phase, parts in PHASES.items():
        lines.append((phase, [f"{plan.phase(phase):.3g}" for _, plan in found]))
        lines += [(f"  {part}", [f"{plan.seconds[part]:.3g}" for _, plan in found]) for part in parts]
    tokens = work.prompts * work.N * work.T
    lines.append(("whole step", [f"{plan.total:.3g}" for _, plan in found]))
    lines.append(("tokens a second", [f"{tokens / plan.total:,.0f}" for _, plan in found]))
    lines.append(("GiB a device", [""] * len(found)))
    lines += [(f"  {k}", [f"{plan.held[k] / GIB:.1f}" for _, plan in found]) for k in found[0][1].held]
    lines += [(f"  most in {k}", [f"{plan.peak[k] / GIB:.1f}" for _, plan in found]) for k in PHASES]
    lines.append(("fits", ["yes" if plan.fits else "no" for _, plan in found]))
    lines.append(("waves of rollouts", [str(plan.waves or "none") for _, plan in found]))
    lines.append(("tokens_per_micro_batch", [str(plan.micro_batch) for _, plan in found]))
    for name, waves in (("largest N that fits", None), ("  in one wave", 1)):
        largest = [largest_rollouts(work, machine, layout, waves) for layout, _ in found]
        lines.append((name, [f"{n:,}" + (" or more" if n == MOST_ROLLOUTS else "") for n in largest]))
    widths = [max(len(row[i]) for _, row in lines) + 2 for i in range(len(found))]
    texts = (f"{name:24}" + "".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for name, row in lines)
    return "\n".join(text.rstrip() for text in texts)


def plan(config_file: str, gpu: str, gpus: int, prompt_tokens: int) -> str:
    """The answer to one question. Raises ConfigError."""
    config = load_config(config_file)
    if gpu not in GPUS and gpus > 1:
        raise ConfigError(f"--gpus: found {gpus} with --gpu {gpu}, and the plan knows one processor of this kind")
    machine = GPUS[gpu] if gpu in GPUS else this_cpu()
    work = work_of(config, machine, prompt_tokens)
    found = list(layouts(work, machine, gpus))
    chosen = best(found)
    # Of a served teacher's sizes the smallest is shown, and the chosen one.
    local, served = ([pair for pair in found if (pair[0].servers > 0) == there] for there in (False, True))
    shown = local + [pair for pair in served if pair[0].servers == served[0][0].servers or pair == chosen]
    step = f"{work.prompts} prompts of {work.P} tokens (--prompt-tokens) x {work.N} rollouts of {work.T}"
    lines = [f"{config.student.model} from {config.teacher.model} on {gpus} x {machine.name}; a step: {step}"]
    if machine.cuda:
        lines.append(page.UNVERIFIED)
    else:
        rates = "{:.0f} GFLOP/s float32, {:.0f} bfloat16".format(*(machine.flops[size] / 1e9 for size in (4, 2)))
        lines.append(f"limits measured just now: {rates}, {machine.bandwidth / 1e9:.0f} GB/s")
    lines += ["", table(work, machine, shown), ""]
    if chosen is None:
        lines.append("Nothing fits: take more or larger GPUs, student.lora, or a smaller student.")
    else:
        lines.append(f"Choose: {page.choice(*chosen)}")
        if chosen[0].servers and config.asked_of_servers != "sampled":
            what = f"its {config.teacher.server_top_k} likeliest tokens for loss.objective: {config.loss.objective}"
            lines.append(f"A vLLM server can give its hidden states (docs/serving.md); else it names {what}.")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description="Predicts a step's time and memory.")
    parser.add_argument("--config", metavar="FILE", help="a run's configuration")
    parser.add_argument("--gpu", choices=[*GPUS, "cpu", "this"], default="h100")
    parser.add_argument("--gpus", type=int, choices=range(1, NODE + 1), default=1, metavar="1..8")
    parser.add_argument("--prompt-tokens", type=int, default=256, metavar="P", help="of a prompt; 256 if absent")
    parser.add_argument("--page", type=Path, metavar="FILE", help="fill the plan's section of this page")
    parser.add_argument("--record", type=Path, nargs="+", metavar="RUN", help="keep the phases of finished runs")
    parser.add_argument("--results", type=Path, metavar="FILE", help="where --record keeps them")
    options = parser.parse_args(argv)
    if not (options.config or options.page or options.record) or bool(options.record) != bool(options.results):
        parser.error("give --config FILE, --page FILE, or --record RUN... --results FILE")
    if options.prompt_tokens < 1:
        parser.error(f"--prompt-tokens: found {options.prompt_tokens}, expected at least 1")
    try:
        if options.record:
            measured.record(options.record, options.results)
        if options.page:
            page.write(options.page)
        if options.config:
            print(plan(options.config, options.gpu, options.gpus, options.prompt_tokens))
    except (ConfigError, ModelError, OSError) as error:
        print(f"benchmarks.plan: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
