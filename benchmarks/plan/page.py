"""The plan's section of docs/scaling.md: what 1 to 512 GPUs give, what fits which, and predicted beside measured."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.plan import measured
from benchmarks.plan.machines import GIB, GPU, GPUS, NODE
from benchmarks.plan.model import PHASES, Layout, Plan, Work, largest_rollouts
from benchmarks.plan.shapes import known
from benchmarks.plan.work import best, layouts, work_of
from benchmarks.variance.tables import markdown
from distill.config import ConfigError, load_config

ROOT = Path(__file__).parents[2]
MARKERS = "<!-- plan -->", "<!-- end of plan -->"
UNVERIFIED = (
    "Predicted. Peaks are the vendor's, the part of them that is reached was measured on one H200 with Qwen3-0.6B from "
    "4B; other GPUs, other models and more than one GPU are not verified (benchmarks/plan/machines.py)."
)
PAIRS = {"0.6B": ("4B", "235B-A22B"), "1.7B": ("8B",), "4B": ("32B", "235B-A22B"), "8B": ("32B", "235B-A22B")}
STEP = {"P": 256, "T": 512, "N": 8, "prompts": 512, "batch": 512}
COUNTS = (1, 8, 64, 512)
RECIPE = "configs/qwen3.yaml"
WAVES_COST_LITTLE = 1.25  # times the decoding of a single wave


def choice(layout: Layout, plan: Plan) -> str:
    """In the configuration's words."""
    words = [layout.parallel] if layout.devices > 1 else []
    words.append(f"teacher served by {layout.servers} more GPUs" if layout.servers else "teacher local")
    return ", ".join([*words, "rollouts native" if plan.wave_cost < WAVES_COST_LITTLE else "rollouts vllm"])


def scaling() -> Iterator[list[str]]:
    """A row for each pair of Qwen3 models and number of H100s."""
    for student, teacher in ((student, teacher) for student, teachers in PAIRS.items() for teacher in teachers):
        work = Work(known(f"Qwen3-{student}"), known(f"Qwen3-{teacher}"), **STEP, itemsize=2, rollout_itemsize=2)
        work = replace(work, teacher_itemsize=2)
        for count in COUNTS:
            row = [f"{student} from {teacher}", str(count)]
            if found := best(list(layouts(work, GPUS["h100"], count))):
                plan = found[1]
                longest = max(plan.seconds, key=plan.seconds.get)
                row += [choice(*found), f"{max(plan.peak.values()) / GIB:.0f}", f"{plan.total:.3g}"]
                row += [f"{plan.phase(phase):.3g}" for phase in PHASES]
                row.append(f"{work.prompts * work.N * work.T / plan.total:,.0f}")
                row.append(f"{longest}, {plan.seconds[longest] / plan.total:.0%}")
            yield row if found else [*row, "does not fit", *[""] * 7]


def fitting() -> Iterator[list[str]]:
    """A row for each GPU and number of them, for the recipe."""
    config = load_config(ROOT / RECIPE)
    for machine in GPUS.values():
        work = replace(work_of(config, machine, STEP["P"]), memory_gib=None)
        for count in (1, NODE):
            row = [machine.name, str(count)]
            if found := best(list(layouts(work, machine, count, served=False))):
                layout, plan = found
                row += [layout.parallel if count > 1 else "", f"{sum(plan.held.values()) / GIB:.1f}"]
                row += [f"{plan.peak[phase] / GIB:.1f}" for phase in PHASES]
                row.append(str(plan.micro_batch))
                row += [f"{largest_rollouts(work, machine, layout, waves):,}" for waves in (1, None)]
                row.append(f"{plan.total:.3g}")
            yield row if found else [*row, "does not fit", *[""] * 8]


def beside() -> Iterator[list[str]]:
    """A row for each measured step, run and rollout; of the growth benchmark the range of ratios."""
    growth: dict[str, list[measured.Point]] = {}
    for point in measured.points() + measured.gpu_points():
        if point.what.startswith("growth"):
            growth.setdefault(point.figure, []).append(point)
            continue
        unit, size = ("GiB", GIB) if "memory" in point.figure else ("s", 1)
        values = (f"{value / size:.2f} {unit}" for value in (point.predicted, point.measured))
        yield [point.what, point.figure, *values, f"{point.ratio:.2f}"]
    for figure, found in growth.items():
        low, high = min(point.ratio for point in found), max(point.ratio for point in found)
        yield [f"{len(found)} points of `benchmarks/test_growth.py`", figure, "", "", f"{low:.2f} to {high:.2f}"]


def section() -> str:
    """Everything between the markers."""
    step = f"{STEP['prompts']} prompts of {STEP['P']} tokens x {STEP['N']} rollouts of {STEP['T']}"
    head = ["student from teacher", "GPUs", "choose", "peak GiB", "s a step", *PHASES, "tokens/s", "longest part"]
    fit = ["GPU", "GPUs", "layout", "held GiB", *(f"most in {phase}" for phase in PHASES)]
    fit += ["tokens_per_micro_batch", "largest N, one wave", "largest N", "s a step"]
    cpu = measured.machine()
    return f"""
Made by `python -m benchmarks.plan --page docs/scaling.md`. For a configuration of your own:
`python -m benchmarks.plan --config FILE --gpu h100 --gpus 8` (`--gpu this` measures this processor's limits first).

**{UNVERIFIED}**

A step is taken apart into what the code does: bytes moved against bandwidth, products against their peak, and the
launching of layers. Taken of a GPU: {GPU.body:.0%} of the dense peak in the layers' products, {GPU.head:.0%} in the
fused head, {GPU.attention:.0%} in attention, {GPU.copying:.0%} of the bandwidth, {GPU.layer_seconds * 1e6:.0f} µs to
launch a layer ({GPU.decode_layer_seconds * 1e6:.0f} µs in a replayed decode step); between machines 400 Gbit/s a GPU.
Every completion is taken to be as long as the longest. Chosen is what takes the fewest GPU-seconds, a teacher's servers
included.

### What 1 to 512 GPUs give

H100 80 GB, bfloat16, Qwen3 models, one step of {step}, `sampled_reverse_kl`. The step stays the same, so that 512 GPUs
have one prompt each.

{markdown(head, scaling())}
How to choose:

- `training.parallel: replicate` while weights, gradients and Adam's moments (16 bytes a weight), the sampling copy (2)
  and the teacher fit beside a micro-batch; else `shard`.
- `teacher.server` where a local teacher does not fit even in shards, or where gathering them for each micro-batch
  takes longer than scoring. A server computes the prompt once for every rollout, as log-probabilities of a prompt are
  not kept, unless it gives hidden states; without these, other objectives than `sampled_reverse_kl` have its
  likeliest tokens.
- `rollout.engine: native` unless memory cuts a batch into waves that take {WAVES_COST_LITTLE:g} times as long as a
  single one; then `vllm`, on GPUs of its own. What vLLM itself would take is not predicted.
- More GPUs than prompts in a step stay idle. With few rows on each, a decode step reads all weights for little, and no
  step is shorter than T such reads: raise `training.prompts_per_step` with the GPUs.

### What fits

`{RECIPE}` without its `rollout.memory_gib`, prompts of {STEP["P"]} tokens. A micro-batch that does not fit is halved by
the run itself, and N beyond one wave is sampled in several.

{markdown(fit, fitting())}
### Predicted beside measured

On the machine of [`performance.md`](performance.md), by the limits measured there ({cpu.flops[4] / 1e9:.0f} GFLOP/s in
float32, {cpu.bandwidth / 1e9:.0f} GB/s), from the files in `benchmarks/results/{cpu.name}`. The efficiencies of this
processor were set by hand to fit these figures. The last lines are those of an H200
(`benchmarks/results/{measured.H200.name}`), whose limits are the vendor's and whose efficiencies were set to fit, too.
`tests/test_plan.py` holds every time to a factor of 1.5 and all memory to 25 %.

{markdown(["what", "figure", "predicted", "measured", "ratio"], beside())}
"""


def write(path: Path) -> None:
    """Replaces what stands between the page's markers. Raises ConfigError where they are missing."""
    text = path.read_text(encoding="utf-8")
    before, found, rest = text.partition(MARKERS[0])
    _, ended, after = rest.partition(MARKERS[1])
    if not found or not ended:
        raise ConfigError(f"{path}: has no section between {MARKERS[0]!r} and {MARKERS[1]!r}")
    path.write_text(before + MARKERS[0] + "\n" + section() + MARKERS[1] + after, encoding="utf-8")
