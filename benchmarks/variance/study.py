"""What is measured: the grid of a study, read from YAML: `full.yaml` or `quick.yaml` here, or a file of the user's.

The recipe itself is an ordinary run's configuration; a study only names what is varied around it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distill.config import Config, ConfigError
from distill.config.sections import LossConfig
from distill.loss import LossOptions

Count = Annotated[int, Field(ge=1)]
HERE = Path(__file__).parent


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Block(Part):
    """Runs of every estimator with every number of rollouts, in this order."""

    estimators: tuple[str, ...]
    num_rollouts: tuple[Count, ...]


class TrainingStudy(Part):
    """Whole training runs."""

    blocks: tuple[Block, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    overrides: dict[str, dict[str, Any]] = {}
    """Sections and keys of the recipe that these runs change."""
    targets: tuple[float, ...] = ()
    """Held-out reverse KL, nats per token, to which steps, tokens and seconds are counted."""
    keep_models: bool = False
    """Keep each run's `final/` instead of its figures only."""


class FixedStudy(Part):
    """Groups of rollouts of single prompts at a fixed policy."""

    estimators: tuple[str, ...]
    num_rollouts: tuple[Count, ...]
    prompts: Count
    """The first so many of the recipe's prompts."""
    pool: Annotated[int, Field(ge=2)]
    """Rollouts of each prompt, at least twice the largest group."""
    overrides: dict[str, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _large_enough(self) -> "FixedStudy":
        if self.pool < 2 * max(self.num_rollouts):
            raise ValueError(f"a pool of {self.pool} rollouts has no two groups of {max(self.num_rollouts)}")
        return self


class SplitStudy(Part):
    """Prompts against rollouts at equal samples."""

    estimators: tuple[str, ...]
    layouts: tuple[tuple[Count, Count], ...]
    """Prompts in a step, and rollouts of each."""
    prompts: Annotated[int, Field(ge=3)]
    pool: Annotated[int, Field(ge=2)]
    """Rollouts of each prompt, from which larger groups are extrapolated."""
    overrides: dict[str, dict[str, Any]] = {}


class SingleStudy(Part):
    """One prompt with many rollouts, against few rollouts at as many steps and at as many samples."""

    recipe: Path
    runs: tuple[tuple[Count, Count], ...]
    """Rollouts and optimizer steps of each run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    overrides: dict[str, dict[str, Any]] = {}


class Study(Part):
    """A study's whole grid."""

    estimators: dict[str, dict[str, Any]]
    """Names, each with the keys of the recipe's `loss` section that it changes."""
    fixed: FixedStudy | None = None
    split: SplitStudy | None = None
    training: TrainingStudy | None = None
    single: SingleStudy | None = None

    def has(self, part: str) -> bool:
        return getattr(self, part) is not None

    def loss_options(self, recipe: Config, names: Sequence[str]) -> dict[str, LossOptions]:
        """What the named estimators are."""
        return {
            name: LossOptions(**LossConfig(**recipe.loss.model_dump() | self.estimators[name]).of_tokens())
            for name in names
        }


def load_study(path: Path) -> Study:
    """Reads a study. Raises `ConfigError`."""
    try:
        study = Study(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (yaml.YAMLError, TypeError) as error:
        raise ConfigError(f"{path}: not a study: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {error}") from None
    blocks = study.training.blocks if study.training else ()
    for part in filter(None, (*blocks, study.fixed, study.split)):
        for name in part.estimators:
            if name not in study.estimators:
                raise ConfigError(f"{path}: {name!r} is not among the estimators, {', '.join(study.estimators)}")
    return study
