"""One frozen model that scores."""

from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.config import FrozenModel
from distill.loss import ModelParts


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
    section: FrozenModel
    """What the configuration says of it."""


def context_of(model: PreTrainedModel) -> int | None:
    """Tokens of prompt and completion that a model can take; None where it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
