"""Device, precision and models of a run, from its configuration; student and teachers are found to agree."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.config import Config, ConfigError
from distill.forward import refuse_like
from distill.loss import ModelParts
from distill.models import (
    WorkingCopy,
    add_adapters,
    body_of,
    check_pair,
    check_tokenizers,
    load_model,
    load_tokenizer,
    named_ids,
    split_head,
    without_layers,
)
from distill.prompts import read_template
from distill.teachers import Teacher, context_of, load_teachers
from distill.training import Ranks


class Pair(NamedTuple):
    """The student's model as it is stored, and its teachers, found to agree."""

    student: PreTrainedModel
    student_parts: ModelParts
    teachers: list[Teacher]
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    context: int | None
    """Tokens of prompt and completion that all models can take; None where neither says."""


def load_pair(config: Config, device: torch.device, dtype: torch.dtype) -> Pair:
    """Loads the models and checks them against each other. Raises `ModelError` and `PromptError`."""
    options, attention = config.student, config.training.attention
    template = _template_of(config)
    tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    stops = named_ids(config.rollout.stop_ids, tokenizer)
    known = _vocab_sizes(config, tokenizer)
    # The student's weights stay float32 whatever it is computed in: small updates would round away.
    trusted = options.trust_remote_code
    base = load_model(options.model, trust_remote_code=trusted, device=device, attention=attention, trained=True)
    # Weights that are trained cannot be a teacher's.
    frozen = base if options.lora else None
    teachers = load_teachers(
        config.teacher, device, dtype, attention, student=options, base=frozen, gives=config.asked_of_servers
    )
    if template is not None:
        for templated in (tokenizer, *(teacher.tokenizer for teacher in teachers)):
            templated.chat_template = template
    vocab_sizes = []
    for teacher in teachers:
        with teacher.parts.present():
            options_of = {"stops": stops, "vocab_size": known[teacher.name]}
            vocab_sizes.append(check_pair(base, teacher.model, tokenizer, teacher.tokenizer, **options_of))
    if stops:  # for whoever samples from what is saved
        base.generation_config.eos_token_id = stops
    contexts = [context_of(base), *(teacher.context for teacher in teachers)]
    return Pair(
        base,
        ModelParts(*split_head(base), dtype),
        teachers,
        tokenizer,
        min(vocab_sizes),
        min(filter(None, contexts), default=None),
    )


def load_alone(config: Config, device: torch.device, dtype: torch.dtype) -> Pair:
    """The student without a teacher. Raises `ModelError` and `PromptError`."""
    options, template = config.student, _template_of(config)
    tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    stops = named_ids(config.rollout.stop_ids, tokenizer)
    model = load_model(
        options.model,
        trust_remote_code=options.trust_remote_code,
        device=device,
        attention=config.training.attention,
        trained=True,
    )
    known = check_tokenizers(tokenizer, tokenizer, "student")
    vocab_size = check_pair(model, None, tokenizer, tokenizer, stops=stops, vocab_size=known)
    if template is not None:
        tokenizer.chat_template = template
    return Pair(model, ModelParts(*split_head(model), dtype), [], tokenizer, vocab_size, context_of(model))


def _template_of(config: Config) -> str | None:
    """The chat template of the file that `prompts.chat_template` names. Raises `PromptError`."""
    named = config.prompts.chat_template
    return None if named in ("auto", "never") else read_template(Path(named))


def _vocab_sizes(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str | None, int]:
    """The tokens that each teacher shares with the student, found before any weights are read. Raises `ModelError`."""
    found: dict[str | None, int] = {}
    for name, teacher in config.teacher.resolved(config.student).items():
        other = tokenizer
        if teacher.model != config.student.model:
            other = load_tokenizer(teacher.model, trust_remote_code=teacher.trust_remote_code)
        found[name] = check_tokenizers(tokenizer, other, f"teacher.others.{name}" if name else "teacher")
    return found


def make_student(base: PreTrainedModel, config: Config, dropped: Sequence[int]) -> PreTrainedModel:
    """What is trained: `base` without its `dropped` layers, with adapters where they are asked for; its own tensors.

    Raises `ModelError`.
    """
    student = without_layers(base, dropped)
    if config.student.lora:
        add_adapters(student, config.student.lora, config.training.seed)
    return student


def make_working_copy(student: PreTrainedModel, parts: ModelParts, config: Config, ranks: Ranks) -> WorkingCopy | None:
    """Where a GPU computes in half precision with float32 weights that it holds whole, and trains all of them; None
    for a model that computes with one of them in float32, as a probe finds."""
    rounds = student.device.type == "cuda" and parts.dtype != torch.float32
    if not rounds or config.student.lora or ranks.sharded:
        return None
    working = WorkingCopy(student, parts.dtype)
    return working if computes_alike(parts, on_copy(parts, working)) else None


def on_copy(parts: ModelParts, working: WorkingCopy) -> ModelParts:
    """A model whose body is its working copy's, which shares prompts where its own did."""
    body = body_of(working.model)
    refuse_like(parts.body, body)
    return parts._replace(body=body, refresh=working.refresh)


@torch.no_grad()
def computes_alike(one: ModelParts, other: ModelParts) -> bool:
    """Whether both give the same hidden states of some tokens, to the last bit."""
    return torch.equal(one.hidden(*some_rows(one)), other.hidden(*some_rows(one)))


def some_rows(parts: ModelParts) -> tuple[torch.Tensor, ...]:
    """A prompt and two completions of it, as `ModelParts.hidden` takes them, to try a model with."""
    V, device = parts.head.weight.shape[0], parts.head.weight.device
    prompt, said = (torch.arange(count, device=device) % V for count in (9, 14))
    mask, lengths = torch.ones(1, 9, dtype=torch.bool), torch.tensor([5, 7])
    return prompt[None], mask, said.view(2, 7), lengths, torch.zeros(2, dtype=torch.int64)


def choose_device(requested: str, ranks: Ranks | None = None) -> torch.device:
    """The device of `training.device`, over ranks a GPU each. Raises `ConfigError` when it is not there."""
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(requested)
    if ranks and ranks.size > 1 and device.type == "cuda":
        if device.index is not None:
            raise ConfigError(f"training.device: found {requested!r}, but every rank has its own GPU: set it to cuda")
        requested, device = f"cuda:{ranks.local_rank}", torch.device("cuda", ranks.local_rank)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"training.device: found {requested!r}, but torch sees {torch.cuda.device_count()} GPUs")
    return device


def choose_dtype(requested: str, device: torch.device) -> torch.dtype:
    """The dtype of `training.precision` on a device."""
    if requested == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, requested)
