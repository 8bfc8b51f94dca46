"""The frozen models that score: loading them, and where they wait between two phases."""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.config import FrozenModel, StudentConfig, TeacherConfig
from distill.loss import ModelParts
from distill.models import ModelError, load_end, load_model, load_tokenizer, split_head
from distill.servers import Server
from distill.teachers.rounding import round_weights
from distill.teachers.served import connect
from distill.teachers.teacher import Teacher, context_of


def load_teachers(
    config: TeacherConfig,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    *,
    student: StudentConfig,
    base: PreTrainedModel | None,
    gives: str = "sampled",
) -> list[Teacher]:
    """`teacher.model` and `teacher.others`, without gradients; what is one model is loaded once. Raises `ModelError`.

    `base` is the student's own model where its weights stay as they are, and then serves as teacher too. Servers are
    asked for what they shall give, as `teacher.server_gives` names it.
    """
    loaded: list[Teacher] = []
    models: dict[tuple, Teacher] = {}  # several teachers may be one model that sees different prompts
    for name, section in config.resolved(student).items():
        key = section.model, section.trust_remote_code, section.precision, section.offload, section.server
        if key not in models:
            tokenizer = load_tokenizer(section.model, trust_remote_code=section.trust_remote_code)
            if section.server:
                models[key] = _served(config, name, section, tokenizer, device, dtype, gives)
            else:
                shared = base if section.model == student.model else None
                models[key] = _local(section, tokenizer, device, dtype, attention, shared)
        loaded.append(models[key]._replace(name=name, section=section))
    return loaded


def _served(
    config: TeacherConfig,
    name: str | None,
    section: FrozenModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: torch.dtype,
    gives: str,
) -> Teacher:
    key = f"teacher.others.{name}.server" if name else "teacher.server"
    server = Server(section.server, key, timeout_seconds=config.timeout_seconds, retries=config.retries)
    load = partial(
        load_end,
        section.model,
        dtype=_dtype(section, dtype),
        device=device,
        trust_remote_code=section.trust_remote_code,
    )
    parts, context = connect(server, section.model, tokenizer, gives=gives, top_k=config.server_top_k, load=load)
    return Teacher(None, None, parts, tokenizer, context, section)


def _local(
    section: FrozenModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    base: PreTrainedModel | None,
) -> Teacher:
    """A teacher here; `base` is the model of that reference that is loaded already, if there is one."""
    if section.offload and device.type == "cpu":
        raise ModelError("teacher.offload: on a CPU the teacher is in host memory anyway; leave the key out")
    dtype = _dtype(section, dtype)
    if base is not None and section.precision == "auto" and not section.offload:
        model = base.requires_grad_(False)
    else:
        trusted = section.trust_remote_code
        model = load_model(section.model, dtype=dtype, device=device, attention=attention, trust_remote_code=trusted)
        model.requires_grad_(False)
    if section.precision in ("int8", "int4"):
        round_weights(model, section.precision)
    body, head = split_head(model)
    present = HostMemory(body, device).present if section.offload else contextlib.nullcontext
    return Teacher(None, model, ModelParts(body, head, dtype, present), tokenizer, context_of(model), section)


def _dtype(section: FrozenModel, own: torch.dtype) -> torch.dtype:
    """What a teacher is computed in, `own` unless its section says so."""
    return getattr(torch, section.precision) if section.precision in ("float32", "bfloat16") else own


class HostMemory:
    """Keeps a frozen body in host memory (pinned), but for the phases in which it computes.

    The head stays where it is: the update's fused operation needs it too.
    """

    def __init__(self, body: nn.Module, device: torch.device) -> None:
        self._tensors, self._device = [*body.parameters(), *body.buffers()], device
        copies = (tensor.detach().cpu() for tensor in self._tensors)
        self._at_host = [copy.pin_memory() if device.type == "cuda" else copy for copy in copies]
        self._leave()

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        for tensor, at_host in zip(self._tensors, self._at_host, strict=True):
            tensor.data = at_host.to(self._device, non_blocking=True)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        # Frozen: nothing has to be copied back.
        for tensor, at_host in zip(self._tensors, self._at_host, strict=True):
            tensor.data = at_host
