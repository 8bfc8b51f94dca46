"""`python -m benchmarks.profile`: what a step of the real trainer launches, how long that runs and how long it waits.

    python -m benchmarks.profile --shape qwen3 --P 256 --T 512 --N 16 --prompts 4 --out profile.json

For each phase: device kernels (on a CPU: operations with time of their own), the 15 that take longest, the gaps in
which none of them runs, and the bytes and FLOPs that the plan counts for the same work. Models are random. A rollout is
sampled for `--profiled-tokens` only, so that the trace stays small; score and update get T random tokens in its place.
Left out on purpose: times to quote, as tracing and the waits at the borders of a phase cost some.
"""

import argparse
import datetime
import importlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.harness import describe_machine, synchronize
from benchmarks.plan.machines import CPU, GPU, Machine
from benchmarks.plan.model import PHASES, Work, predict
from benchmarks.plan.shapes import Shape, known
from benchmarks.trace import intervals, marked, summary
from distill.config import TrainingConfig
from distill.loss import LossOptions, ModelParts, Rollouts
from distill.models import WorkingCopy, compile_layers, fuse_norms, split_head
from distill.rollout import RolloutEngine, SamplingOptions, local_engine
from distill.run.loading import on_copy
from distill.runtime import PhaseClock, free_bytes
from distill.training import Trainer

DECODE_STEP = "one decode step"
FEWEST = 4  # of a profiled rollout: one of its steps is then neither its first, its last, nor a capture


class ProfileError(RuntimeError):
    """A trace that says nothing."""


@dataclass(frozen=True)
class Sizes:
    """What `--shape` names; P, T, N, prompts and profiled tokens can be set one by one."""

    student: Shape
    teacher: Shape
    P: int
    T: int
    N: int
    prompts: int
    profiled_tokens: int
    compile: bool = False


TINY = Shape(64, 192, 3, 4, 2, 16, 512, True, qk_norm=True)
SHAPES = {
    "tiny": Sizes(replace(TINY, num_hidden_layers=2), TINY, P=16, T=12, N=4, prompts=2, profiled_tokens=6),
    "qwen3": Sizes(known("Qwen3-0.6B"), known("Qwen3-4B"), P=256, T=512, N=16, prompts=4, profiled_tokens=24),
}


class ProfiledClock(PhaseClock):
    """Names each phase in the trace, and waits for the device at its borders: what runs within is the phase's."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.device = device

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with marked(name, self.device), super().phase(name):
            yield


class ShortRollouts:
    """An engine whose short rollouts are sampled, and others of T tokens handed on in their place."""

    def __init__(self, engine: RolloutEngine, instead: Rollouts) -> None:
        self.engine, self.instead, self.refresh = engine, instead, engine.refresh

    def generate(self, *arguments: Any, **options: Any) -> Rollouts:
        self.engine.generate(*arguments, **options)
        return self.instead


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    fields = {name: value for name, value in asdict(shape).items() if "expert" not in name and name != "qk_norm"}
    with torch.device(device):
        config = AutoConfig.for_model("qwen3", **fields)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_rollouts(sizes: Sizes, prompt_ids: torch.Tensor) -> Rollouts:
    """T tokens a row, all as likely as one another."""
    rows, V = sizes.prompts * sizes.N, sizes.student.vocab_size
    device = prompt_ids.device
    logprob = torch.full((rows, sizes.T), -math.log(V), device=device)
    return Rollouts(
        prompt_ids,
        torch.ones_like(prompt_ids, dtype=torch.bool),
        torch.randint(V, (rows, sizes.T), device=device),
        torch.full((rows,), sizes.T, device=device),
        logprob,
        logprob,
        torch.zeros(rows, dtype=torch.bool, device=device),
        sizes.N,
    )


def trainer_of(sizes: Sizes, steps: int, device: torch.device) -> Trainer:
    """One whose steps are `sizes`; passes and rollouts are in bfloat16 on CUDA, in float32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    student = random_model(sizes.student, device, torch.float32)
    teacher = random_model(sizes.teacher, device, dtype).requires_grad_(False)
    if device.type == "cuda":  # as `load_model` does
        fuse_norms(student), fuse_norms(teacher)
    prompt_ids = torch.randint(sizes.student.vocab_size, (sizes.prompts, sizes.P), device=device)
    parts, working = ModelParts(*split_head(student), dtype), None
    if device.type == "cuda":  # as a run does
        working = WorkingCopy(student, dtype)
        parts = on_copy(parts, working)
    engine = local_engine(
        student,
        engine="native",
        working=working,
        sampling=SamplingOptions(max_new_tokens=sizes.profiled_tokens),
        eos_token_ids=(),
        pad_token_id=0,
        seed=0,
        precision=str(dtype).removeprefix("torch."),
        compiled=sizes.compile,
    )
    if sizes.compile:
        compile_layers(parts.body), compile_layers(teacher)
    if sizes.profiled_tokens < sizes.T:
        engine = ShortRollouts(engine, random_rollouts(sizes, prompt_ids))
    trainer = Trainer(
        student,
        parts,
        [ModelParts(*split_head(teacher), dtype)],
        engine,
        lambda epoch: [range(sizes.prompts)],
        lambda indices: (prompt_ids, torch.ones_like(prompt_ids, dtype=torch.bool)),
        TrainingConfig(num_rollouts_per_prompt=sizes.N, prompts_per_step=sizes.prompts, num_epochs=steps),
        LossOptions(objective="reverse_kl"),
        vocab_size=sizes.student.vocab_size,
    )
    trainer.clock = ProfiledClock(device)
    return trainer


@contextmanager
def decode_step_marked(device: torch.device, number: int) -> Iterator[None]:
    """Names decode step `number` in the trace: on CUDA of the replayed ones, on a CPU from one draw to the next."""
    decoder = importlib.import_module("distill.rollout.decode").Decoder
    advance, seen = decoder._advance, [0]

    def advance_marked(self: Any) -> None:
        seen[0] += 1
        if seen[0] != number:
            advance(self)
            return
        with marked(DECODE_STEP, device):
            advance(self)

    with patch.object(decoder, "_advance", advance_marked):
        yield


def trace(sizes: Sizes, steps: int, device: torch.device) -> tuple[list[Any], Trainer]:
    """The last of so many optimizer steps as the profiler saw it.

    One trace a process: after a first one, CUPTI may give no kernels at all, so the steps before are not traced.
    """
    torch.manual_seed(0)
    trainer = trainer_of(sizes, steps, device)
    results = trainer.steps()
    for _ in range(steps - 1):
        next(results)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with (
        decode_step_marked(device, sizes.profiled_tokens // 2),
        profile(activities=activities, acc_events=True) as seen,
    ):
        next(results)
        synchronize(device)
    # Not `seen.events()`, which takes a minute for a million of them.
    return seen.profiler.kineto_results.events(), trainer


def counted(work: Work, device: torch.device) -> tuple[dict[str, float], dict[str, float], int]:
    """Bytes and FLOPs by part of a step, and the waves of its rollouts, as the plan has them.

    The plan gives seconds; on a machine that moves a byte a second and multiplies in no time they are bytes, and FLOPs
    on one that does one a second and moves bytes in no time.
    """
    cuda = device.type == "cuda"
    memory = torch.cuda.mem_get_info(device)[1] if cuda else free_bytes(device)
    runtime = (GPU if cuda else CPU).runtime_bytes
    all_reached = GPU._replace(
        body=1, head=1, attention=1, copying=1, rows=1, layer_seconds=0, decode_layer_seconds=0, runtime_bytes=runtime
    )
    plans = [
        predict(work, Machine("counts", memory, {2: flops, 4: flops}, moved, efficiency=all_reached, cuda=cuda))
        for flops, moved in ((math.inf, 1.0), (1.0, math.inf))
    ]
    return plans[0].seconds, plans[1].seconds, max(1, plans[0].waves)


def work_of(sizes: Sizes, device: torch.device, micro_batch: int) -> Work:
    """What a step does, for the plan."""
    size = 2 if device.type == "cuda" else 4
    return Work(
        sizes.student,
        sizes.teacher,
        sizes.P,
        sizes.T,
        sizes.N,
        prompts=sizes.prompts,
        batch=sizes.prompts,
        micro_batch=micro_batch,
        itemsize=size,
        rollout_itemsize=size,
        teacher_itemsize=size,
    )


def planned(sizes: Sizes, device: torch.device, micro_batch: int) -> dict[str, dict[str, Any]]:
    """The plan's bytes and FLOPs for what each range holds."""
    work = work_of(sizes, device, micro_batch)
    moved, flops, _ = counted(work, device)
    short_moved, short_flops, waves = counted(replace(work, T=sizes.profiled_tokens), device)
    moved |= {part: short_moved[part] for part in PHASES["rollout"]}
    flops |= {part: short_flops[part] for part in PHASES["rollout"]}
    counts = {}
    for phase, parts in PHASES.items():
        each = {part: {"bytes": moved[part], "flops": flops[part]} for part in parts}
        counts[phase] = {key: sum(one[key] for one in each.values()) for key in ("bytes", "flops")} | {"parts": each}
    decode, steps = counts["rollout"]["parts"]["decode"], waves * sizes.profiled_tokens
    counts[DECODE_STEP] = {key: decode[key] / steps for key in ("bytes", "flops")}
    return counts


def profiled(sizes: Sizes, steps: int, device: torch.device) -> dict[str, Any]:
    """Everything about one step, as `--out` writes it."""
    events, trainer = trace(sizes, steps, device)
    ranges, ran = intervals(events, device)
    plan = planned(sizes, device, trainer.limits.tokens_per_micro_batch)
    phases = {name: summary(ranges[name], ran) | {"plan": plan[name]} for name in plan if name in ranges}
    for name, phase in phases.items():
        if not phase["kernels"]:
            raise ProfileError(f"the profiler saw nothing run in {name}: is it allowed to trace this device?")
    if DECODE_STEP in phases:
        phases[DECODE_STEP]["share_of_rollout"] = phases[DECODE_STEP]["seconds"] / phases["rollout"]["seconds"]
    return {"machine": describe_machine(device), "date": datetime.date.today().isoformat(), "sizes": asdict(sizes)} | {
        "profiled_step": steps,
        "phases": phases,
    }


def tables(found: dict[str, Any]) -> str:
    """For people: a block a range."""
    sizes, cuda = found["sizes"], "cuda" in found["machine"]
    what = "kernels and copies" if cuda else "operations with time of their own"
    lines = [
        ", ".join(f"{name} {value}" for name, value in found["machine"].items()),
        f"step {found['profiled_step']}: {sizes['prompts']} prompts of {sizes['P']} tokens x {sizes['N']} rollouts of "
        f"{sizes['T']}; the profiled rollout has {sizes['profiled_tokens']} tokens a row. "
        "Under the profiler: not times to quote.",
    ]
    for name, phase in found["phases"].items():
        gaps, plan, busy = phase["gaps"], phase["plan"], phase["busy_seconds"]
        share = f", {phase['share_of_rollout']:.1%} of the rollout" if "share_of_rollout" in phase else ""
        lines += [
            "",
            f"{name}: {phase['seconds'] * 1e3:.3f} ms{share}; {phase['kernels']:,} {what}, busy {busy * 1e3:.3f} ms",
            f"  idle {gaps['idle_seconds'] / phase['seconds']:.1%} in {gaps['count']:,} gaps: "
            f"median {gaps['median_microseconds']:.1f} us, largest {gaps['largest_microseconds']:.1f} us",
            f"  the plan counts {plan['bytes'] / 1e9:.4g} GB and {plan['flops'] / 1e9:.4g} GFLOP: while busy "
            f"{plan['bytes'] / busy / 1e9:.4g} GB/s, {plan['flops'] / busy / 1e12:.4g} TFLOP/s",
            f"  {'count':>9} {'ms':>10} {'share':>6}  name",
        ]
        lines += [
            f"  {one['count']:>9,} {one['milliseconds']:>10.3f} {one['share']:>6.1%}  {one['name'][:80]}"
            for one in phase["longest"]
        ]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> tuple[Sizes, int, torch.device, Path | None]:
    """Sizes, steps, device and the file to write."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description="Profiles one optimizer step.")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3" if cuda else "tiny", help="of the random models")
    for name, meaning in (("P", "tokens of a prompt"), ("T", "tokens of a rollout"), ("N", "rollouts of a prompt")):
        parser.add_argument(f"--{name}", type=int, help=f"{meaning}; the shape's own if absent")
    parser.add_argument("--compile", action="store_true", help="as `training.compile` has it")
    parser.add_argument("--prompts", type=int, help="prompts of the step")
    parser.add_argument("--profiled-tokens", type=int, metavar="T", help="tokens of a rollout that are sampled")
    parser.add_argument("--steps", type=int, default=2, help="the last of these steps is profiled; 2 if absent")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything to this JSON file")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    for name, least in {"P": 1, "T": FEWEST, "N": 1, "prompts": 1, "profiled_tokens": FEWEST, "steps": 2}.items():
        if given.get(name, least) < least:
            parser.error(f"--{name.replace('_', '-')}: found {given[name]}, expected at least {least}")
    shape, steps, device = (given.pop(name) for name in ("shape", "steps", "device"))
    out = given.pop("out", None)
    if device == "cuda" and not cuda:
        parser.error("--device cuda: found no NVIDIA GPU that this PyTorch can use")
    if given.get("compile") and device == "cpu":
        parser.error("--compile: found --device cpu; layers are compiled on a GPU only")
    if (shape, device) == ("qwen3", "cpu"):
        parser.error("--shape qwen3: a CPU would take hours; found no --device cuda, so take --shape tiny")
    sizes = replace(SHAPES[shape], **given)
    return replace(sizes, profiled_tokens=min(sizes.profiled_tokens, sizes.T)), steps, torch.device(device), out


def main(argv: Sequence[str] | None = None) -> int:
    sizes, steps, device, out = parse(argv)
    try:
        found = profiled(sizes, steps, device)
    except ProfileError as error:
        print(f"benchmarks.profile: {error}", file=sys.stderr)
        return 2
    print(tables(found))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
