"""What must hold between student and teacher before the first step: one vocabulary, the same ends, heads that we know.

Left out on purpose: patches per model family; what the generic split into body and head cannot express is refused.
"""

import contextlib
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.models.ends import stops_line
from distill.models.head_inputs import differs_from_own_logits, eval_mode, precision_of
from distill.models.sources import ModelError
from distill.models.structure import split_head
from distill.models.tokenizers import check_tokenizers
from distill.runtime import is_out_of_memory


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: those of the generation configuration and the tokenizer's, sorted."""
    found = {tokenizer.eos_token_id}
    for config in (model.generation_config, model.config, model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        found.update(ids if isinstance(ids, list) else [ids])
    return sorted(found - {None})


def check_pair(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    *,
    stops: Sequence[int] = (),
    vocab_size: int | None = None,
) -> int:
    """Checks before the first step that student and teacher agree; returns the number V of shared real tokens.

    Raises `ModelError` when their tokenizers differ, when they end a completion differently, when a head is narrower
    than the tokenizer, or when body and head do not reproduce a model's own logits. Of a `teacher` that is None, which
    another process has, only the tokenizer is compared. `stops`, where a run names them, are the ends of both;
    `vocab_size` is V where the tokenizers have been compared.
    """
    if vocab_size is None:
        vocab_size = check_tokenizers(student_tokenizer, teacher_tokenizer)
    _check_split("student", student, vocab_size)
    _check_gradient(student)
    if teacher is None:
        return vocab_size
    ends, teacher_ends = eos_ids(student, student_tokenizer), eos_ids(teacher, teacher_tokenizer)
    if ends != teacher_ends and not stops:
        raise ModelError(
            f"student and teacher end a completion differently: the student's end-of-sequence ids are {ends}, the "
            f"teacher's {teacher_ends}. Name those that end one here, for example all of them:\n"
            f"{stops_line([i for i in {*ends, *teacher_ends} if i < vocab_size], student_tokenizer)}"
        )
    _check_split("teacher", teacher, vocab_size)
    return vocab_size


def find_split(model: PreTrainedModel) -> None:
    """Has `split_head` take all of `model` up to its output layer, where its base alone does not give its logits.

    What goes wrong here is said by `check_pair`, which knows whose model it is.
    """
    if model.get_output_embeddings() is None or model.device.type == "meta":
        return
    with contextlib.suppress(Exception):
        error, allowed = differs_from_own_logits(*split_head(model), model)
        if error > allowed:
            model.split_at_head = True
            error, allowed = differs_from_own_logits(*split_head(model), model)
            model.split_at_head = bool(error <= allowed)


def _check_split(name: str, model: PreTrainedModel, vocab_size: int) -> None:
    body, head = split_head(model)
    if head.weight.shape[0] < vocab_size:
        raise ModelError(f"{name}: the tokenizer has {vocab_size} tokens, the model's head only {head.weight.shape[0]}")
    try:
        error, allowed = differs_from_own_logits(body, head, model)
    except Exception as failure:
        what = f"{name}: model type {model.config.model_type!r} does not take token ids alone to logits"
        raise _unfit(f"{what} by way of hidden states", failure) from failure
    if not allowed.isfinite():
        raise ModelError(f"{name}: its logits are not finite: its weights are damaged")
    if not error <= allowed:
        raise ModelError(
            f"{name}: body and head of model type {model.config.model_type!r} do not give the model's own logits "
            f"(they differ by {error.item():.3g}), so its head does something this trainer does not know"
        )


def _check_gradient(student: PreTrainedModel) -> None:
    """Raises `ModelError` for a class whose forward has no backward the way it is trained, without dropout."""
    body, head = split_head(student)
    trained = student.get_input_embeddings().weight
    if not trained.requires_grad:
        return
    mixed, dtype = precision_of(student, head.weight)
    try:
        with eval_mode(student), torch.autocast(trained.device.type, dtype, enabled=mixed):
            hidden = body(input_ids=torch.arange(1, 5, device=trained.device)[None], use_cache=False).last_hidden_state
        torch.autograd.grad(hidden.sum(), trained)
    except Exception as error:
        raise _unfit(f"student: model type {student.config.model_type!r} has no gradient", error) from error


def _unfit(what: str, error: Exception) -> ModelError:
    """What a model that is no decoder of text makes of token ids alone is open-ended, but it is no traceback."""
    if is_out_of_memory(error):
        raise error
    return ModelError(f"{what}, so it cannot be distilled: {' '.join(f'{type(error).__name__}: {error}'.split()):.300}")
