"""What a run works with, made from its configuration: device and precision, the two models, the prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.config import Config, ConfigError
from distill.loss import ModelParts
from distill.models import check_pair, load_model, load_tokenizer, split_head
from distill.prompts import PromptSet, load_prompts


class Pair(NamedTuple):
    """Student and teacher, found to agree."""

    student: PreTrainedModel
    student_parts: ModelParts
    teacher_parts: ModelParts
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    context: int | None
    """Tokens of prompt and completion that both models can take; None where neither says."""


def load_pair(config: Config, device: torch.device, dtype: torch.dtype) -> Pair:
    """Loads both models and checks them against each other. Raises `ModelError`."""
    student_options, teacher_options = config.student, config.teacher
    placed = {"device": device, "attention": config.training.attention}
    tokenizer = load_tokenizer(student_options.model, trust_remote_code=student_options.trust_remote_code)
    teacher_tokenizer = load_tokenizer(teacher_options.model, trust_remote_code=teacher_options.trust_remote_code)
    # The student's weights stay float32 whatever it is computed in: small updates would round away.
    student = load_model(
        student_options.model,
        drop_layers=student_options.drop_layers,
        trust_remote_code=student_options.trust_remote_code,
        **placed,
    )
    teacher = load_model(
        teacher_options.model, dtype=dtype, trust_remote_code=teacher_options.trust_remote_code, **placed
    ).requires_grad_(False)
    vocab_size = check_pair(student, teacher, tokenizer, teacher_tokenizer)
    contexts = [getattr(m.config.get_text_config(), "max_position_embeddings", None) for m in (student, teacher)]
    return Pair(
        student,
        ModelParts(*split_head(student), dtype),
        ModelParts(*split_head(teacher), dtype),
        tokenizer,
        vocab_size,
        min(filter(None, contexts), default=None),
    )


def load_prompt_sets(config: Config, pair: Pair, tell: Callable[[str], None]) -> tuple[PromptSet, PromptSet | None]:
    """Training and held-out prompts; `tell` hears of what was left out. Raises `ConfigError` or `PromptError`."""
    settings = config.prompts

    def load(path: Path, key: str, completion: int) -> PromptSet:
        longest = settings.max_tokens
        if pair.context is not None:
            if completion >= pair.context:
                raise ConfigError(
                    f"{key}: found {completion}, expected less than the models' context of {pair.context} tokens"
                )
            longest = min(longest, pair.context - completion)
        prompts = load_prompts(
            path,
            pair.tokenizer,
            chat_template=settings.chat_template,
            control_tokens=settings.control_tokens,
            max_tokens=longest,
        )
        if prompts.empty or prompts.too_long:
            tell(
                f"{path}: {len(prompts)} prompts used; left out: {prompts.empty} empty, "
                f"{prompts.too_long} of more than {longest} tokens"
            )
        return prompts

    train = load(settings.train, "rollout.max_new_tokens", config.rollout.max_new_tokens)
    if settings.eval is None:
        return train, None
    if config.evaluation.max_new_tokens is not None:
        return train, load(settings.eval, "evaluation.max_new_tokens", config.evaluation.max_new_tokens)
    return train, load(settings.eval, "rollout.max_new_tokens", config.rollout.max_new_tokens)


def choose_device(requested: str) -> torch.device:
    """The device of `training.device`. Raises `ConfigError` when it is not there."""
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(requested)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"training.device: found {requested!r}, but torch sees {torch.cuda.device_count()} GPUs")
    return device


def choose_dtype(requested: str, device: torch.device) -> torch.dtype:
    """The dtype of `training.precision` on a device."""
    if requested == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, requested)
