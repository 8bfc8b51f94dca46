"""A step recorded once and repeated as a flat list of calls on fixed tensors: for a CPU what a graph is for a GPU.

Between two small products the Python of a model takes longer than the arithmetic. `capture` runs a step, sees every
operation that reaches PyTorch's kernels, and keeps those that compute: a view of memory that stays where it is need not
be taken again, and what depends on nothing is not made again. Results go to memory planned once, which those share that
are not needed at the same time.
What holds for a graph holds here: what a step reads and leaves behind lies in tensors that were there before it, shapes
never change, and nothing looks at a value. A step that does look is repeated as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill_kernels.backend import REPEATED

Step = Callable[[], None]

# Whose results are memory with nothing in it yet.
UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
COPIES = {"clone", "_to_copy"}

# Pointing a tensor to another memory takes a microsecond, which is less than a copy for so many that look at a result.
MOST_MOVED = 4
# All results of a step are held while it is recorded; where they are more than this, Python matters little.
MOST_BYTES = 2**30


@dataclass(frozen=True)
class _Call:
    op: Any
    args: tuple
    kwargs: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]

    @property
    def name(self) -> str:
        return self.op.overloadpacket.__name__

    @property
    def writes(self) -> bool:
        """Whether it changes what it is given."""
        return self.op._schema.is_mutable


class Watch(TorchDispatchMode):
    """Collects the calls of a step as it runs, and the `reason` why it cannot be repeated, if there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.reason: str | None = None
        self._bytes = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = op(*args, **(kwargs or {}))
        inputs, outputs = _strided((args, kwargs)), _strided(result)
        if _looks_at_values(op, args) or len({tensor.device.type for tensor in inputs if tensor.dim()}) > 1:
            self.reason = self.reason or f"it depends on values, by {op}"
        if any(isinstance(leaf, Tensor) and leaf.layout != torch.strided for leaf in tree_leaves(result)):
            self.reason = self.reason or f"{op} makes a tensor of another layout"
        read = {_memory(tensor) for tensor in inputs}
        self._bytes += sum(tensor.nbytes for tensor in outputs if _memory(tensor) not in read)
        if self._bytes > MOST_BYTES:
            self.reason = self.reason or f"its results are more than {MOST_BYTES} bytes"
        if self.reason is not None:
            self.calls.clear()
        elif outputs or op._schema.is_mutable:
            self.calls.append(_Call(op, args, kwargs or {}, inputs, outputs))
        return result


@torch.no_grad()
def capture(step: Step, device: torch.device, pool: Any = None) -> Step:
    """Runs `step`, and returns what repeats it: a graph on CUDA, a list of calls elsewhere, or `step` itself.

    Graphs of one `pool` (`torch.cuda.graph_pool_handle()`) share the memory of what a step needs in between.
    """
    if device.type == "cuda":
        step()  # which warms it up
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            step()
        return graph.replay
    with Watch() as seen:
        step()
    return step if seen.reason is not None else _repeated(seen.calls)


def _repeated(calls: list[_Call]) -> Step:
    calls, unwritten = _needed(calls)
    objects: dict[int, dict[int, Tensor]] = {}
    for call in calls:
        for tensor in (*call.inputs, *call.outputs):
            objects.setdefault(_memory(tensor), {})[id(tensor)] = tensor
    moved: set[int] = set()
    repeats = [_repeat(call, objects, moved) for call in calls]
    _share_memory(calls, unwritten, objects, moved)

    def run() -> None:
        for repeat in repeats:
            repeat()

    return run


def _strided(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]


def _looks_at_values(op: Any, args: tuple) -> bool:
    tags = set(op.tags)
    if op.overloadpacket.__name__ in ("index", "index_put", "index_put_", "_unsafe_index"):
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _strided(args[1]))
    looks = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}
    return bool(tags & looks)


def _memory(tensor: Tensor) -> int:
    """What tells apart the memory of two tensors that live at the same time."""
    return tensor.untyped_storage().data_ptr()


def _needed(calls: Sequence[_Call]) -> tuple[list[_Call], list[Tensor]]:
    """The calls that have to be repeated, and the tensors that they write into before anything else does."""
    written = {_memory(tensor) for call in calls if call.writes for tensor in call.inputs}
    fixed, computing, unwritten = set(), [], []
    made = set()
    for call in calls:
        results = {_memory(tensor) for tensor in call.outputs}
        read = {_memory(tensor) for tensor in call.inputs}
        if call.writes:
            computing.append(call)
            made |= results - read
        elif call.name in UNWRITTEN:
            unwritten += call.outputs
            made |= results
        elif results <= read:
            continue  # a view
        elif read <= fixed and not results & written:
            fixed |= results
        else:
            computing.append(call)
            made |= results
    kept, used = [], set()
    for call in reversed(computing):
        touched = {_memory(tensor) for tensor in (*call.inputs, *call.outputs)}
        outside = call.writes and any(_memory(tensor) not in made for tensor in call.inputs)
        if outside or used & (touched if call.writes else {_memory(tensor) for tensor in call.outputs}):
            kept.append(call)
            used |= touched
    return kept[::-1], unwritten


def _repeat(call: _Call, objects: dict[int, dict[int, Tensor]], moved: set[int]) -> Step:
    """What does a call again, with its results where they were, or `moved`: that is added to."""
    if repeated := REPEATED.get(call.op._name):
        return repeated(call.outputs, *call.args, **call.kwargs)
    if call.writes:
        return _written(call)
    if len(call.outputs) > 1:
        return lambda: [
            out.copy_(new) for out, new in zip(call.outputs, _strided(call.op(*call.args, **call.kwargs)), strict=True)
        ]
    (out,) = call.outputs
    if call.name in COPIES:
        return partial(out.copy_, call.inputs[0])
    if way := _way_to_write(call):
        return partial(way, *call.args, **call.kwargs, out=out)
    tensors = list(objects[_memory(out)].values())
    if len(tensors) <= MOST_MOVED:
        moved.add(_memory(out))
        return _moved(call, tensors)
    op, args, kwargs = call.op, call.args, call.kwargs
    return lambda: out.copy_(op(*args, **kwargs))


def _moved(call: _Call, tensors: list[Tensor]) -> Step:
    (out,), op, args = call.outputs, partial(call.op, **call.kwargs), call.args
    if [id(tensor) for tensor in tensors] == [id(out)]:
        return lambda: out.set_(op(*args))
    places = [(tensor, (tensor.storage_offset(), tensor.shape, tensor.stride())) for tensor in tensors]

    def run() -> None:
        memory = op(*args).untyped_storage()
        for tensor, place in places:
            tensor.set_(memory, *place)

    return run


def _written(call: _Call) -> Step:
    if call.name == "index_copy_" and call.args[2].numel() == 1:  # which takes three times as long
        target, dim, index, source = call.args
        return lambda: target.narrow(dim, int(index), 1).copy_(source)
    return partial(call.op, *call.args, **call.kwargs)


def _way_to_write(call: _Call) -> Callable | None:
    """The form of an operation that takes an `out` and is the quickest to call, tried here on the values it had."""
    (out,) = call.outputs
    packet = call.op.overloadpacket
    forms = [getattr(torch, call.name, None)]
    for overload in packet.overloads():
        form = getattr(packet, overload)
        outs = [argument for argument in form._schema.arguments if argument.is_out]
        given = [argument for argument in form._schema.arguments if not argument.is_out]
        same = [(a.name, str(a.type)) for a in given] == [(a.name, str(a.type)) for a in call.op._schema.arguments]
        if same and [argument.name for argument in outs] == ["out"]:
            forms.append(form)
    for form in filter(None, forms):
        trial = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype)
        try:
            form(*call.args, **call.kwargs, out=trial)
        except (TypeError, RuntimeError):
            continue
        return form
    return None


def _share_memory(
    calls: Sequence[_Call], unwritten: Sequence[Tensor], objects: dict[int, dict[int, Tensor]], moved: set[int]
) -> None:
    """Puts every result of `calls` but those that are moved into memory that no other needs at that time."""
    last: dict[int, int] = {}
    own = {_memory(tensor) for tensor in unwritten}
    for number, call in enumerate(calls):
        given = {_memory(tensor) for tensor in call.inputs} if call.writes else set()
        own |= {_memory(tensor) for tensor in call.outputs} - given - moved
        for tensor in (*call.inputs, *call.outputs):
            last[_memory(tensor)] = number
    ends: dict[int, list[int]] = {}
    for memory, number in last.items():
        ends.setdefault(number, []).append(memory)
    free: list[torch.UntypedStorage] = []
    placed: dict[int, torch.UntypedStorage] = {}
    for number, call in enumerate(calls):
        for tensor in (*call.outputs, *call.inputs):
            memory = _memory(tensor)
            if memory in own and memory not in placed:
                size = tensor.untyped_storage().nbytes()
                fitting = [block for block in free if block.nbytes() >= size]
                placed[memory] = min(fitting, key=lambda block: block.nbytes(), default=None)
                if placed[memory] is None:
                    placed[memory] = torch.empty(size, dtype=torch.uint8).untyped_storage()
                else:
                    free.remove(placed[memory])
        free += [placed[memory] for memory in ends.get(number, ()) if memory in placed]
    for memory, block in placed.items():
        for tensor in objects[memory].values():
            tensor.set_(block, tensor.storage_offset(), tensor.shape, tensor.stride())
