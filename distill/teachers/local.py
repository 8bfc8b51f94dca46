"""The frozen models that score: loading them, and where they wait between two phases."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from distill.config import StudentConfig, TeacherConfig
from distill.loss import ModelParts
from distill.models import ModelError, load_model, load_tokenizer, split_head
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
) -> list[Teacher]:
    """`teacher.model` and `teacher.others`, without gradients. Raises `ModelError`.

    `base` is the student's own model where its weights stay as they are, and then serves as teacher too.
    """
    if config.server:
        reference, trusted = _origin(config.model, config, student)
        tokenizer = load_tokenizer(reference, trust_remote_code=trusted)
        server = Server(config.server, "teacher.server", timeout_seconds=config.timeout_seconds, retries=config.retries)
        parts, context = connect(server, reference, tokenizer)
        return [Teacher(None, None, parts, tokenizer, context)]
    if config.offload and device.type == "cpu":
        raise ModelError("teacher.offload: on a CPU the teacher is in host memory anyway; leave the key out")
    loaded = []
    if config.precision in ("float32", "bfloat16"):
        dtype = getattr(torch, config.precision)
    shares = base is not None and config.precision == "auto" and not config.offload
    for name, reference in ((None, config.model), *config.others.items()):
        reference, trusted = _origin(reference, config, student)
        tokenizer = load_tokenizer(reference, trust_remote_code=trusted)
        if shares and reference == student.model:
            model = base.requires_grad_(False)
        else:
            model = load_model(reference, dtype=dtype, device=device, attention=attention, trust_remote_code=trusted)
            model.requires_grad_(False)
        if config.precision in ("int8", "int4"):
            round_weights(model, config.precision)
        body, head = split_head(model)
        present = HostMemory(body, device).present if config.offload else contextlib.nullcontext
        loaded.append(Teacher(name, model, ModelParts(body, head, dtype, present), tokenizer, context_of(model)))
    return loaded


def _origin(reference: str, config: TeacherConfig, student: StudentConfig) -> tuple[str, bool]:
    """The model that a teacher's reference names, and whether its code is trusted."""
    return (student.model, student.trust_remote_code) if reference == "base" else (reference, config.trust_remote_code)


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
