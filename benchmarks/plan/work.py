"""From a configuration to the work of a step, and the ways in which devices can share it."""

from collections.abc import Iterator

from benchmarks.plan.machines import GIB, NODE, Machine
from benchmarks.plan.model import Layout, Plan, Work, predict
from benchmarks.plan.shapes import Shape, shape_of
from distill.config import Config
from distill.loss.advantage import needs_scores
from distill.rollout.choice import WORTHWHILE_SPEEDUP

ITEMSIZE = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 5 / 8}
# A served teacher's weights in bfloat16, and a tenth of them for its keys and values.
SERVED_BYTES = 2.2


def work_of(config: Config, machine: Machine, prompt_tokens: int, completion_tokens: int | None = None) -> Work:
    """Raises ConfigError where a model's shape is not known."""
    student, teacher, rollout, training = config.student, config.teacher, config.rollout, config.training
    dropped = student.drop_layers
    dropped = int(dropped.split(":")[1]) if isinstance(dropped, str) else len(dropped)
    itemsize = ITEMSIZE.get(training.precision, 2 if machine.cuda else 4)
    # `auto` measures on a CPU, and takes what is worth its rounding.
    faster = machine.cuda or machine.flops[2] > WORTHWHILE_SPEEDUP * machine.flops[4]
    own = student.model if teacher.model == "base" else teacher.model
    shares = bool(student.lora) and own == student.model and teacher.precision == "auto" and not teacher.offload
    return Work(
        shape_of(student.model, dropped),
        shape_of(own),
        prompt_tokens,
        completion_tokens or rollout.max_new_tokens,
        training.num_rollouts_per_prompt,
        training.prompts_per_step,
        config.prompts_per_batch,
        training.tokens_per_micro_batch,
        itemsize,
        ITEMSIZE.get(rollout.precision, 2 if faster else 4),
        ITEMSIZE.get(teacher.precision, itemsize),
        lora_rank=student.lora.rank if student.lora else 0,
        checkpointing=training.activation_checkpointing,
        scores_first=needs_scores(config.loss),
        one_model=shares,
        offload=teacher.offload,
        follows=teacher.update != "frozen",
        memory_gib=rollout.memory_gib,
    )


def servers_for(teacher: Shape, machine: Machine) -> int:
    """The fewest devices, a power of two, that hold a served teacher."""
    count = 1
    while count * (machine.memory - 2 * GIB) < SERVED_BYTES * teacher.parameters:
        count *= 2
    return count


def layouts(work: Work, machine: Machine, devices: int, served: bool = True) -> Iterator[tuple[Layout, Plan]]:
    """Every way to share a step, the simplest first; a served teacher's devices come on top."""
    ways = ("replicate", "shard") if devices > 1 else ("replicate",)
    for way in ways:
        yield (layout := Layout(devices, way)), predict(work, machine, layout)
    few = servers_for(work.teacher, machine)
    for servers in (few * 2**power for power in range(6)) if served and machine.cuda else ():
        for way in ways if servers <= max(NODE, few, devices // 2) else ():
            yield (layout := Layout(devices, way, servers)), predict(work, machine, layout)


def best(found: list[tuple[Layout, Plan]]) -> tuple[Layout, Plan] | None:
    """Of those that fit, the one of the fewest device-seconds; a simpler one that needs at most 5 % more."""
    fitting = [(layout, plan) for layout, plan in found if plan.fits]
    if not fitting:
        return None
    costs = [plan.total * (layout.devices + layout.servers) for layout, plan in fitting]
    return next(pair for pair, cost in zip(fitting, costs, strict=True) if cost <= 1.05 * min(costs))
