"""The frozen models that score: loading them, the prompts that they see, and where they wait between two phases."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.group import TeacherView
from distill.loss import ModelParts
from distill.models import ModelError, load_model, load_tokenizer, split_head
from distill.prompts import PromptError, left_pad, tokenise
from distill.server import Server
from distill.teacher_server import connect

if TYPE_CHECKING:
    from distill.config import StudentConfig, TeacherConfig
    from distill.prompts import PromptSet


class Teacher(NamedTuple):
    """One frozen model, as it is loaded and as it is computed with."""

    name: str | None
    """As prompts call it; None for the one of `teacher.model`."""
    model: PreTrainedModel | None
    """None for one on a server."""
    parts: ModelParts
    tokenizer: PreTrainedTokenizerBase
    context: int | None
    """Tokens of prompt and completion that it can take; None where it does not say."""


def load_teachers(
    config: "TeacherConfig",
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    *,
    student: "StudentConfig",
    base: PreTrainedModel | None,
) -> list[Teacher]:
    """`teacher.model` and `teacher.others`, without gradients. Raises `ModelError`.

    `base` is the student's own model where its weights stay as they are, and then serves as teacher too.
    """
    if config.server:
        reference, trusted = _origin(config.model, config, student)
        tokenizer = load_tokenizer(reference, trust_remote_code=trusted)
        server = Server(config.server, "teacher.server", timeout_seconds=config.timeout_seconds, retries=config.retries)
        parts, context = connect(server, reference, tokenizer, device)
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
        if config.precision == "int8":
            _to_int8(model)
        body, head = split_head(model)
        present = HostMemory(body, device).present if config.offload else contextlib.nullcontext
        loaded.append(Teacher(name, model, ModelParts(body, head, dtype, present), tokenizer, context_of(model)))
    return loaded


def _origin(reference: str, config: "TeacherConfig", student: "StudentConfig") -> tuple[str, bool]:
    """The model that a teacher's reference names, and whether its code is trusted."""
    return (student.model, student.trust_remote_code) if reference == "base" else (reference, config.trust_remote_code)


def context_of(model: PreTrainedModel) -> int | None:
    """Tokens of prompt and completion that a model can take; None where it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _to_int8(model: PreTrainedModel) -> None:
    """Rounds the weights of the body's linear layers to 8 bits, one scale a row; head and embeddings stay."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ModelError(
            f"teacher.precision int8 needs the package torchao ({error}): pip install 'distill-on-policy[int8]'"
        ) from None
    quantize_(model.base_model, Int8WeightOnlyConfig())


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


class TeacherPrompts:
    """What the teachers see of a prompt set, and which of them scores each prompt."""

    def __init__(self, token_ids: Sequence[Sequence[int]], teacher: Sequence[int], pad_token_id: int) -> None:
        self.token_ids, self.teacher, self._pad = token_ids, teacher, pad_token_id

    def view(self, indices: Sequence[int]) -> TeacherView:
        """Of some prompts."""
        ids, mask = left_pad([self.token_ids[i] for i in indices], self._pad)
        return TeacherView(ids, mask, torch.tensor([self.teacher[i] for i in indices]))


def teacher_prompts(
    prompts: "PromptSet",
    teachers: Sequence[Teacher],
    config: "TeacherConfig",
    *,
    longest: int | None,
    pad_token_id: int,
    special: bool,
) -> TeacherPrompts | None:
    """The prompts as the teachers see them; None where there is one teacher and it sees the student's.

    `longest` is how many tokens of prompt the teachers can take, `special` as for `tokenise`. Raises `PromptError`.
    """
    changed = config.system_prompt is not None or bool(config.chat_template_kwargs)
    if not changed and len(teachers) == 1 and not any(prompts.teachers):
        return None
    known = {teacher.name: index for index, teacher in enumerate(teachers)}
    token_ids, chosen = [], []
    for ids, messages, name in zip(prompts.token_ids, prompts.messages, prompts.teachers, strict=True):
        if name not in known:
            raise PromptError(
                f"the prompt {messages[-1]['content'][:60]!r} names the teacher {name!r}, and teacher.others has "
                f"{', '.join(filter(None, known)) or 'none'}"
            )
        chosen.append(known[name])
        token_ids.append(_seen(messages, teachers[known[name]], config, special) if changed else ids)
        if longest is not None and len(token_ids[-1]) > longest:
            raise PromptError(
                f"the prompt {messages[-1]['content'][:60]!r} has {len(token_ids[-1])} tokens as the teacher sees it, "
                f"and {longest} fit its context before the completion: shorten teacher.system_prompt or lower "
                f"prompts.max_tokens"
            )
    return TeacherPrompts(token_ids, chosen, pad_token_id)


def _seen(messages: list[dict[str, str]], teacher: Teacher, config: "TeacherConfig", special: bool) -> list[int]:
    """A prompt's ids with the teacher's own template, under its system prompt."""
    if teacher.tokenizer.chat_template is None:
        raise PromptError(
            "teacher.system_prompt and teacher.chat_template_kwargs need a chat template, and the teacher's tokenizer "
            "has none: leave them out or choose an instruction-tuned teacher"
        )
    if config.system_prompt is not None:
        others = messages[1:] if messages[0]["role"] == "system" else messages
        messages = [{"role": "system", "content": config.system_prompt}, *others]
    try:
        return tokenise(messages, teacher.tokenizer, True, special=special, **config.chat_template_kwargs)
    except (UnicodeError, TemplateError, TypeError, PromptError) as error:
        raise PromptError(
            f"the prompt {messages[-1]['content'][:60]!r} cannot be tokenised for the teacher: {error}"
        ) from None
