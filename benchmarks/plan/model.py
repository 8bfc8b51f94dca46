"""Seconds and bytes of one optimizer step, from shapes and a machine's limits.

Every part is what the code does: a prompt is computed once for all its completions (packing.py), a decode step reads
the weights and the keys (decode.py), waves and the head's buffers are those of `cut_waves` and `rows_per_chunk`,
gradients and Adam's moments are float32 and stay (trainer.py). All completions are taken to be T tokens long. Past
one device, prompts are divided over the devices; `shard` divides weights, gradients, moments and the local teacher and
gathers them layer by layer, and the sampling copy is whole on every device.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from benchmarks.plan.machines import COLLECTIVE, GIB, NETWORK, NODE, Machine
from benchmarks.plan.shapes import Shape
from distill.rollout.waves import WaveBytes, cut_waves, wave_bytes
from distill.runtime.memory import MOST_TOKENS, USUAL_TOKENS
from distill_kernels.chunks import rows_per_chunk, workspace

PHASES = {
    "rollout": ("weight refresh", "prefill", "decode"),
    "score": ("teacher's forward", "waiting for its weights"),
    "update": ("forward and backward", "fused head", "optimizer", "communication"),
}
FRAGMENTS = 1.1  # memory in use, of what a phase allocates
WORKING_BYTES = 48 * 2**20  # that products work in, in every phase
MOST_ROLLOUTS = 65_536  # of a prompt, in one step
LOGIT_BYTES = {"sample": 32, "head": 36}  # moved for each logit: written, read by each pass, gradients
ADAM_BYTES = 40  # moved for each weight: norm, clipping, and the fused step


@dataclass(frozen=True)
class Work:
    """What a step does; `prompts` of a step, of which `batch` are sampled together, N rollouts each."""

    student: Shape
    teacher: Shape
    P: int
    T: int
    N: int
    prompts: int = 1
    batch: int = 1
    micro_batch: int | Literal["auto"] = USUAL_TOKENS
    itemsize: int = 4
    rollout_itemsize: int = 4
    teacher_itemsize: float = 4
    lora_rank: int = 0
    checkpointing: bool = False
    scores_first: bool = False
    one_model: bool = False
    """The teacher is the student's own model, loaded once."""
    offload: bool = False
    follows: bool = False
    """A copy of what is trained follows it as the teacher, beside the teacher of step 0."""
    memory_gib: float | None = None

    @property
    def trained(self) -> int:
        """Weights with gradients."""
        if not self.lora_rank:
            return self.student.parameters
        s = self.student
        sides = 4 * s.hidden_size + 2 * s.head_dim * (s.num_attention_heads + s.num_key_value_heads)
        return self.lora_rank * s.num_hidden_layers * (sides + 3 * (s.hidden_size + s.intermediate_size))

    @property
    def scoring_itemsize(self) -> int:
        """Of the arithmetic that scores: 8 and fewer bits are for weights alone."""
        return self.itemsize if self.teacher_itemsize <= 1 else int(self.teacher_itemsize)

    def chunk(self, K: int, machine: Machine) -> tuple[int, int]:
        """Rows of a chunk of the fused head, and bytes of a column of one row."""
        column = 8 + (self.itemsize if machine.cuda and self.itemsize < 4 else 0)
        device = torch.device("cuda" if machine.cuda else "cpu")
        size = workspace(device, machine.memory)
        return rows_per_chunk(K, self.student.vocab_size, column, size, device), column

    def split(self) -> tuple[int, int, int, int]:
        """Micro-batches; tokens computed in all of them; of the largest, tokens and completion tokens."""
        row, whole = self.T - 1, self.P + self.N * self.T
        if whole <= self.micro_batch:
            together = min(self.prompts, self.micro_batch // whole)
            tokens = self.P + self.N * row
            return -(-self.prompts // together), self.prompts * tokens, together * tokens, together * self.N * self.T
        parts = -(-self.N // min(self.N, max(1, (self.micro_batch - self.P) // self.T)))
        rows = -(-self.N // parts)
        tokens = self.prompts * (parts * self.P + self.N * row)
        return self.prompts * parts, tokens, self.P + rows * row, rows * self.T

    def pairs(self, prompts_computed: float) -> float:
        """Of query and key, in one layer's attention."""
        rows = self.prompts * self.N
        return prompts_computed * self.P**2 / 2 + rows * (self.P * self.T + self.T**2 / 2)


@dataclass(frozen=True)
class Layout:
    """How the work lies on devices; `servers` are the devices of a teacher that is served, 0: it is local."""

    devices: int = 1
    parallel: str = "replicate"
    servers: int = 0

    @property
    def shards(self) -> int:
        return self.devices if self.parallel == "shard" else 1


@dataclass(frozen=True)
class Plan:
    """Of one device and step."""

    seconds: dict[str, float]
    held: dict[str, float]
    peak: dict[str, float]
    """Bytes at the most, by phase."""
    waves: int
    wave_cost: float
    """Seconds of decoding, against all rows in one wave."""
    micro_batch: int
    fits: bool

    def phase(self, name: str) -> float:
        return sum(self.seconds[part] for part in PHASES[name])

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def predict(work: Work, machine: Machine, layout: Layout = Layout()) -> Plan:
    """What one device does, with micro-batches halved until they fit, as `MemoryLimits` does."""
    prompts, batch = (-(-count // layout.devices) for count in (work.prompts, work.batch))
    if work.micro_batch == "auto":
        work = replace(work, micro_batch=MOST_TOKENS if machine.cuda and layout.shards == 1 else USUAL_TOKENS)
    whole, work = work, replace(work, prompts=prompts, batch=batch)
    held = held_bytes(work, machine, layout)
    cut = list(_waves(work, machine, sum(held.values())))
    while True:
        peak = peak_bytes(work, machine, layout, held, cut)
        fits = max(peak.values()) <= machine.memory and cut != []
        if fits or work.micro_batch <= work.P + work.T:
            break
        work = replace(work, micro_batch=min(work.micro_batch, work.prompts * (work.P + work.N * work.T)) // 2)
    seconds = _rollout_seconds(work, machine, layout, cut)
    seconds |= _score_seconds(whole, work, machine, layout)
    seconds |= _update_seconds(work, machine, layout)
    together = _decode_seconds(work, machine, [(work.batch, work.batch * work.N)])
    wave_cost = seconds["decode"] * work.batch / work.prompts / together
    return Plan(seconds, held, peak, len(cut), wave_cost, work.micro_batch, fits)


def held_bytes(work: Work, machine: Machine, layout: Layout) -> dict[str, float]:
    """From the first optimizer step to the end."""
    s, t = work.student, work.teacher
    copy = 0 if work.rollout_itemsize == 4 else 2 * s.parameters
    if not machine.cuda:  # packed for oneDNN, the head in float32; embeddings only where they change their type
        copy = work.rollout_itemsize * s.body() + 4 * s.head + (2 * s.head if work.rollout_itemsize == 2 else 0)
    working = work.itemsize * s.body() if _rounded_once(work, machine, layout) and work.rollout_itemsize == 4 else 0
    teacher = t.head if work.offload else t.parameters
    local = not work.one_model and not layout.servers
    return {
        "student": 4 * s.parameters / layout.shards,
        "gradients and Adam": 12 * work.trained / layout.shards,
        "sampling copy": copy,  # which the passes compute with, too, where they round alike
        "working copy": working,
        "teacher": work.teacher_itemsize * teacher / layout.shards if local else 0,
        "teacher that follows": 4 * work.trained / layout.shards if work.follows else 0,
        "runtime": machine.efficiency.runtime_bytes,
    }


def _rounded_once(work: Work, machine: Machine, layout: Layout) -> bool:
    """Whether passes find their weights in half precision, instead of rounding them each time."""
    return machine.cuda and work.itemsize < 4 and not work.lora_rank and layout.shards == 1


def _wave_bytes(work: Work, machine: Machine) -> WaveBytes:
    # On a CPU keys and values are float32, whatever the weights are.
    token_bytes = work.student.token_bytes(work.rollout_itemsize if machine.cuda else 4)
    sizes = {"prompt_length": work.P, "max_new_tokens": work.T}
    return wave_bytes(work.student, work.rollout_itemsize, token_bytes, **sizes)


def _waves(work: Work, machine: Machine, held: float) -> Iterator[tuple[int, int]]:
    """Prompts and rows of each wave of a batch; none where nothing is left for them."""
    budget = (machine.memory - held) / 2 if work.memory_gib is None else work.memory_gib * GIB
    needed = _wave_bytes(work, machine)
    if budget < needed.least + needed.row:
        return
    for prompts, parts in cut_waves(work.batch, work.N, int(budget), needed):
        for rows in parts:
            yield prompts.stop - prompts.start, rows.stop - rows.start


def peak_bytes(work: Work, machine: Machine, layout: Layout, held: dict[str, float], cut: list) -> dict[str, float]:
    """At the most, by phase."""
    s, t, base = work.student, work.teacher, sum(held.values())
    needed = _wave_bytes(work, machine)
    _, _, tokens, K = work.split()
    hidden = work.prompts * work.N * work.T * t.hidden_size * work.scoring_itemsize if not layout.servers else 0
    passing = tokens * (8 * t.hidden_size + 3 * work.scoring_itemsize * t.intermediate_size * t.num_experts_per_tok)
    if layout.servers:
        passing = 0
    elif layout.shards > 1:  # two layers at a time
        passing += 2 * work.teacher_itemsize * t.body() / t.num_hidden_layers
    elif work.offload:
        passing += work.teacher_itemsize * t.body()
    of_layer = s.activation_bytes(work.itemsize, cuda=machine.cuda)
    kept = tokens * s.num_hidden_layers * of_layer
    if work.checkpointing:
        kept = tokens * (4 * s.num_hidden_layers * s.hidden_size + of_layer)
    half = work.itemsize < 4
    rows, column = work.chunk(K, machine)
    gradient = 0 if work.lora_rank else s.head
    # The weight's gradient beside the buffers first, beside its scaled copies then.
    head = 4 * gradient + max(rows * s.vocab_size * column, (6 if half else 4) * gradient)
    head += K * s.hidden_size * (4 + 2 * work.itemsize) + (2 * s.head if half else 0)
    if half and not _rounded_once(work, machine, layout):  # the weights as products take them, kept for the backward
        head += work.itemsize * s.body() / (s.num_hidden_layers / 2 if layout.shards > 1 else 1)
    extra = {
        "rollout": max(
            (prompts * needed.whole + rows * needed.row for prompts, rows in cut), default=needed.least + needed.row
        ),
        "score": passing + hidden,
        "update": kept + head + hidden,
    }
    return {name: base + WORKING_BYTES + FRAGMENTS * more for name, more in extra.items()}


def _forward(machine: Machine, shape: Shape, tokens: float, pairs: float, itemsize: int, parts: int = 1) -> float:
    """Seconds of one forward without the head, in so many parts."""
    reached = machine.efficiency
    attention = 4 * pairs * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
    computing = (
        machine.busy(2 * shape.active * tokens, itemsize, reached.body, parts * itemsize * shape.body())
        + machine.busy(attention, itemsize, reached.attention)
        + machine.moving(2 * tokens * shape.num_hidden_layers * shape.activation_bytes(itemsize, cuda=machine.cuda))
    )
    launching = parts * shape.num_hidden_layers * reached.layer_seconds
    return max(computing, launching) if machine.cuda else computing + launching


def _collective(layout: Layout, machine: Machine, moved: float) -> float:
    """Seconds of a gather, or of one half of a reduction, of so many bytes."""
    link = machine.link if layout.devices <= NODE else min(NETWORK, machine.link)
    return moved * (1 - 1 / layout.devices) / (COLLECTIVE * link) if layout.devices > 1 else 0.0


def _rollout_seconds(work: Work, machine: Machine, layout: Layout, cut: list) -> dict[str, float]:
    """A batch's, shared evenly by the steps that it serves."""
    s, itemsize = work.student, work.rollout_itemsize
    steps = work.batch / work.prompts
    refresh = machine.moving((4 + itemsize) * s.parameters)
    if layout.shards > 1:
        refresh += _collective(layout, machine, itemsize * s.parameters)
    elif machine.cuda and itemsize == 4:
        refresh = 0
    blocks = -(-work.batch // max((prompts for prompts, _ in cut), default=1))
    prefill = _forward(machine, s, work.batch * work.P, work.batch * work.P**2 / 2, itemsize, blocks)
    decode = _decode_seconds(work, machine, cut)
    return {"weight refresh": refresh / steps, "prefill": prefill / steps, "decode": decode / steps}


def _decode_seconds(work: Work, machine: Machine, cut: list[tuple[int, int]]) -> float:
    """Of a batch that is cut into waves of so many prompts and rows."""
    s, reached, itemsize, seconds = work.student, machine.efficiency, work.rollout_itemsize, 0.0
    head, kept = (itemsize, itemsize) if machine.cuda else (4, 4)
    for prompts, rows in cut:
        keys = (prompts * work.P + rows * work.T / 2) * s.token_bytes(kept)
        attention = 4 * rows * s.num_hidden_layers * s.num_attention_heads * s.head_dim * (work.P + work.T / 2)
        one = machine.busy(2 * rows * s.active, itemsize, reached.body, itemsize * s.body())
        one += machine.busy(2 * rows * s.head, head, reached.head, head * s.head)
        one += machine.busy(attention, kept, reached.attention, keys)
        one += LOGIT_BYTES["sample"] * rows * s.vocab_size / (machine.bandwidth * reached.rows)
        seconds += work.T * (one + s.num_hidden_layers * reached.decode_layer_seconds)
    return seconds


def _score_seconds(whole: Work, work: Work, machine: Machine, layout: Layout) -> dict[str, float]:
    t, itemsize = work.teacher, work.teacher_itemsize
    if layout.servers:  # every row with its own prompt, and the head at every token: what log-probabilities cost there
        rows, length = whole.prompts * whole.N, whole.P + whole.T
        parts = max(1, rows * length // 8192)
        seconds = _forward(machine, t, rows * length, rows * length**2 / 2, 2, parts)
        seconds += machine.busy(2 * rows * length * t.head, 2, machine.efficiency.head)
        return dict.fromkeys(PHASES["score"], 0.0) | {"teacher's forward": seconds / layout.servers}
    parts, tokens, *_ = work.split()
    pairs = work.pairs(max(work.prompts, parts))
    seconds, waiting = _forward(machine, t, tokens, pairs, work.scoring_itemsize, parts), 0.0
    if work.offload:
        waiting = itemsize * t.body() / (COLLECTIVE * 32e9)
    if layout.shards > 1:  # layers are gathered while others compute
        waiting = max(0.0, parts * _collective(layout, machine, itemsize * t.parameters) - seconds)
    return {"teacher's forward": seconds, "waiting for its weights": waiting}


def _update_seconds(work: Work, machine: Machine, layout: Layout) -> dict[str, float]:
    s, t, reached, itemsize = work.student, work.teacher, machine.efficiency, work.itemsize
    parts, tokens, _, K_of_part = work.split()
    K = work.prompts * work.N * work.T
    forward = _forward(machine, s, tokens, work.pairs(max(work.prompts, parts)), itemsize, parts)
    body = forward * ((2.5 if work.lora_rank else 3) + work.checkpointing + (work.scores_first and parts > 1))
    if itemsize < 4:  # the weights' cast
        body += (1 if _rounded_once(work, machine, layout) else parts) * machine.moving(6 * s.body())
    columns = s.hidden_size * (2 if work.lora_rank else 3) + (0 if layout.servers else t.hidden_size)
    columns += (s.hidden_size + t.hidden_size) if work.scores_first else 0
    head = machine.busy(2 * K * s.vocab_size * columns, itemsize, reached.head)
    head += LOGIT_BYTES["head"] * K * s.vocab_size / (machine.bandwidth * reached.rows)
    if not work.lora_rank:  # the weight's gradient: made, added to by each chunk, scaled, handed on
        head += machine.moving(s.head * (24 * parts + 8 * K / work.chunk(K_of_part, machine)[0]))
    optimizer = machine.moving(ADAM_BYTES * work.trained / layout.shards)
    if layout.shards > 1:
        moved = parts * (2 * itemsize * s.parameters + 4 * work.trained)
        communication = max(0.0, _collective(layout, machine, moved) - body)
    else:
        communication = 2 * _collective(layout, machine, 4 * work.trained)
    return dict(zip(PHASES["update"], (body, head, optimizer, communication), strict=True))


def largest_rollouts(work: Work, machine: Machine, layout: Layout = Layout(), waves: int | None = None) -> int:
    """The largest N that fits, sampled in at most so many waves; 0 where none does."""

    def good(n: int) -> bool:
        plan = predict(replace(work, N=n), machine, layout)
        return plan.fits and (waves is None or plan.waves <= waves)

    low, high = 0, 1
    while high <= MOST_ROLLOUTS and good(high):
        low, high = high, 2 * high
    high = min(high, MOST_ROLLOUTS + 1)
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low
