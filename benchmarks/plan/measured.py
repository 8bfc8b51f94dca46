"""What the model is held to: the committed measurements of a machine beside what is predicted for its limits.

The limits are those that the kernels' times were compared with; in bfloat16 twice the products are taken to be done in
the same time. Steps and heads come from the benchmarks' files, phases and memory of whole runs from `runs.json`, which
`record` makes of the folders of finished runs.
"""

import json
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness import Row, describe_machine, write_json
from benchmarks.plan.machines import CPU, GIB, GPUS, Machine
from benchmarks.plan.model import PHASES, Work, predict
from benchmarks.plan.shapes import Shape, known
from benchmarks.plan.work import work_of
from distill.config import load_config
from distill.models import load_tokenizer
from distill.prompts import load_prompts
from distill.runtime import read_json_lines

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores"
H200 = ROOT / "benchmarks" / "results" / "nvidia-h200-141gb"
TINY = Shape(256, 1024, 8, 4, 2, 64, 8192, False)  # test_rollout's
SMOLLM2 = known("SmolLM2-135M")
PRUNED = replace(SMOLLM2, num_hidden_layers=28)
ROLLOUTS = re.compile(
    r"rollouts, (SmolLM2-135M|tiny model), (float32|bfloat16): (\d+) prompts of (\d+) tokens, (\d+) rollouts of (\d+)"
)


class Point(NamedTuple):
    """A figure beside its prediction: seconds or, of memory, bytes."""

    what: str
    figure: str
    measured: float
    predicted: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def machine(folder: Path = RESULTS) -> Machine:
    """By the limits that the kernels' fractions there were taken of."""
    rows = [row for row in _rows(folder) if row.name == "ours" and row.fraction]
    by_products = next(row for row in rows if row.group.startswith("CPU target"))
    by_bytes = next(row for row in rows if row.group.startswith("reverse_kl"))
    flops = by_products.flops / (by_products.seconds * by_products.fraction)
    bandwidth = by_bytes.bytes / (by_bytes.seconds * by_bytes.fraction)
    return Machine(folder.name, 24 * GIB, {4: flops, 2: 2 * flops}, bandwidth, efficiency=CPU, cuda=False)


def points(folder: Path = RESULTS) -> list[Point]:
    """Every figure of this project's steps, heads and rollouts that is kept for the machine."""
    cpu, found = machine(folder), []
    for row in _rows(folder):
        n, what = _numbers(row), re.sub(r": asked.*| on average| in torch.float32| N = 1, 4, 16,", "", row.group)
        what += f", {row.name}" if "=" in row.name else ""
        if row.group.startswith("growth of the fused head"):
            shape = replace(TINY, vocab_size=n["V"])
            plan = predict(Work(shape, shape, 1, n["K"], 1, micro_batch=n["K"] + 1), cpu)
            found.append(Point(what, "fused head", row.seconds, plan.seconds["fused head"]))
        elif row.group.startswith("growth of a step"):
            plan = predict(Work(TINY, TINY, n["P"], n["T"], n["N"]), cpu)
            found.append(Point(what, "step", row.seconds, plan.total))
            beyond = max(plan.peak.values()) - sum(plan.held.values())
            found.append(Point(what, "memory beyond what is held", row.peak_bytes, beyond))
        elif row.group.startswith("whole step") and "N" in n and "bfloat16" not in row.group and row.name != "TRL":
            sampled = 2 if "=" in row.name else 4  # the cost of more rollouts is measured in the faster precision
            plan = predict(Work(PRUNED, SMOLLM2, n["P"], n["T"], n["N"], rollout_itemsize=sampled), cpu)
            found.append(Point(what, "step", row.seconds, plan.total))
        elif (sizes := ROLLOUTS.match(row.group)) and row.name == "ours":
            name, precision, *counts = sizes.groups()
            (prompts, P, N, T), shape = map(int, counts), SMOLLM2 if name == "SmolLM2-135M" else TINY
            itemsize = 4 if precision == "float32" else 2
            plan = predict(Work(shape, shape, P, T, N, prompts, prompts, rollout_itemsize=itemsize), cpu)
            what = f"rollouts of {name}, {precision}, prompts: {prompts}, P = {P}, T = {T}, N = {N}"
            found.append(Point(what, "rollout", row.seconds, plan.seconds["prefill"] + plan.seconds["decode"]))
        elif file := re.search(r"^step of (configs/\w+\.yaml)", row.group):
            changes = {"rollout": {"prompts_per_batch": n["B"]}} if "B" in n else {}
            plan = predict(work_of(load_config(ROOT / file[1], changes), cpu, n["P"], n["T"]), cpu)
            if row.name in PHASES:
                found.append(Point(what, row.name, row.seconds, plan.phase(row.name)))
            else:
                found.append(Point(what, "memory of the process", row.peak_bytes, max(plan.peak.values())))
    return found


def gpu_points(folder: Path = H200) -> list[Point]:
    """The rollouts on an H200 and the phases of a step with layers that are not compiled, but for those rollouts that
    the model's own layers made."""
    student, teacher, found = known("Qwen3-0.6B"), known("Qwen3-4B"), []
    for row in _rows(folder):
        half = {"itemsize": 2, "rollout_itemsize": 2, "teacher_itemsize": 2}
        if row.name == "ours" and (sizes := re.match(r"rollouts, Qwen3-0.6B, bfloat16: (.*) each", row.group)):
            B, P, N, T = map(int, re.findall(r"\d+", sizes[1]))
            plan = predict(Work(student, teacher, P, T, N, B, B, **half, micro_batch="auto"), GPUS["h200"])
            what = f"rollouts of Qwen3-0.6B, bfloat16, prompts: {B}, P = {P}, T = {T}, N = {N}"
            found.append(Point(what, "rollout", row.seconds, plan.phase("rollout")))
        elif (
            row.group.startswith("Qwen3-0.6B from 4B")
            and not row.group.endswith(("compiled", "autocast"))
            and row.name in PHASES
            and not (row.name == "rollout" and "model's layers" in row.group)
        ):
            n = _numbers(row)
            plan = predict(Work(student, teacher, n["P"], n["T"], n["N"], **half, micro_batch="auto"), GPUS["h200"])
            found.append(Point(row.group, row.name, row.seconds, plan.phase(row.name)))
    return found


def record(folders: list[Path], path: Path) -> None:
    """Writes a row for each phase of some runs of recipes, named like them: medians over the steps, peak memory."""
    rows, about = [], describe_machine()
    for folder in folders:
        config, steps = load_config(folder / "config.yaml"), read_json_lines(folder / "metrics.jsonl")
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        about |= {key: summary[key] for key in ("torch", "threads", "device")}
        ids = load_prompts(config.prompts.train, load_tokenizer(config.student.model)).token_ids
        P, T = (round(statistics.mean(x)) for x in (map(len, ids), (step["completion_length"] for step in steps)))
        group = f"step of configs/{folder.name}.yaml, B = {config.prompts_per_batch}, P = {P}, T = {T} on average"
        for phase in PHASES:
            samples = [step[f"seconds_{phase}"] for step in steps]
            rows.append(Row(group, phase, statistics.median(samples)))
        whole = statistics.median(sum(step[f"seconds_{phase}"] for phase in PHASES) for step in steps)
        peak = max(step["peak_memory_bytes"] for step in steps)
        tokens = round(statistics.mean(step["completion_tokens"] for step in steps))
        rows.append(Row(group, "ours", whole, peak_bytes=peak, tokens=tokens))
    command = f"python -m benchmarks.plan --record {' '.join(f'outputs/{folder.name}' for folder in folders)}"
    write_json(path, rows, command=command, machine=about)


def _rows(folder: Path) -> list[Row]:
    """Of all files of a machine."""
    files = [path for path in sorted(folder.glob("*.json")) if ".pytest-benchmark" not in path.name]
    return [Row(**row) for file in files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]


def _numbers(row: Row) -> dict[str, int]:
    """The sizes that a row's group and name give, as {"P": 512, ...}."""
    found = {letter: int(value) for letter, value in re.findall(r"\b([A-Z]) = (\d+)", f"{row.group} {row.name}")}
    if triple := re.search(r"\(P, T, N\) = \((\d+), (\d+), (\d+)\)", row.group):
        found |= zip("PTN", map(int, triple.groups()), strict=True)
    return found
