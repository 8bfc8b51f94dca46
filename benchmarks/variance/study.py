"""What is measured: the grid of a study, read from YAML: `full.yaml` or `quick.yaml` here, or a file of the user's.

The recipe itself is an ordinary run's configuration; a study only names what is varied around it.
"""

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill.config import ConfigError

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


class Study(Part):
    """A study's whole grid."""

    estimators: dict[str, dict[str, Any]]
    """Names, each with the keys of the recipe's `loss` section that it changes."""
    training: TrainingStudy


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
    for block in study.training.blocks:
        for name in block.estimators:
            if name not in study.estimators:
                raise ConfigError(f"{path}: training names the estimator {name!r}, which is not among the estimators")
    return study
