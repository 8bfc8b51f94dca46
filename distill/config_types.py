"""What the configuration's sections are made of: checked kinds of values, and the section within a section."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag


def _no_boolean(value: Any) -> Any:
    # YAML's bare `yes` is a boolean, and Python takes a boolean for a number.
    if isinstance(value, bool):
        raise ValueError("expected a number, not a truth value")
    return value


Integer = Annotated[int, BeforeValidator(_no_boolean)]
Number = Annotated[float, BeforeValidator(_no_boolean), Field(allow_inf_nan=False)]
Positive = Annotated[Integer, Field(ge=1)]


def _no_nul(value: Any) -> Any:
    if "\0" in str(value):
        raise ValueError("expected text without NUL characters")
    return value


FilePath = Annotated[Path, AfterValidator(_no_nul)]
Reference = Annotated[str, Field(min_length=1), AfterValidator(_no_nul)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class LoraConfig(Section):
    rank: Positive = 16
    """Rank of the adapters; only they are trained."""
    alpha: Number | None = Field(None, gt=0)
    """The adapters' product is scaled by alpha / rank; 2 · rank if absent."""
    target_modules: Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)] = ("all-linear",)
    """Names of the linear layers that get an adapter; `all-linear`: every one but the output layer."""


def _word_alone(value: Any) -> Any:
    # The command line makes a list of a single word.
    return value[0] if isinstance(value, list) and len(value) == 1 and str(value[0]).startswith("auto") else value


# Told apart by their type, so that a mistake in one is not reported as a mistake in both.
TAGS = ("<auto>", "<list>")
DropLayers = Annotated[
    Annotated[str, Field(pattern=r"^auto:[1-9]\d{0,3}$"), Tag("<auto>")]
    | Annotated[tuple[Annotated[Integer, Field(ge=0)], ...], Tag("<list>")],
    Discriminator(lambda value: TAGS[not isinstance(value, str)]),
    BeforeValidator(_word_alone),
]
