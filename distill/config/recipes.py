"""Recipes by their names: those that came with this package, with the prompt files that they read.

`--config default` then works in any folder, without a copy of the repository.
"""

from pathlib import Path
from typing import Any

from distill.config.yaml_file import ConfigError, read_yaml

PACKAGE = Path(__file__).parent.parent
# In a wheel they lie in the package, in a checkout beside it.
FILES = ("train", "eval", "answers")  # keys of `prompts` that name them
ROOT = PACKAGE / "shipped" if (PACKAGE / "shipped").is_dir() else PACKAGE.parent


def read_recipe(reference: str | Path) -> dict[str, Any]:
    """What the YAML file at a path holds, or the recipe of that name; a file of the name comes first.

    The prompt files of a recipe are those beside it, wherever it is read from. Raises `ConfigError`.
    """
    path = Path(reference)
    if path.is_file() or path.suffix or path.name != str(reference):
        return read_yaml(path)
    found = {file.stem: file for file in sorted((ROOT / "configs").glob("*.yaml"))}
    if path.name not in found:
        raise ConfigError(
            f"{reference}: there is no such file, and no recipe of that name; recipes: {', '.join(found)}"
        )
    content = read_yaml(found[path.name])
    sets = content.get("evaluation", {}).get("sets", {})
    for section, keys in ((content.get("prompts", {}), FILES), *((own, ("prompts",)) for own in sets.values())):
        section |= {key: str(ROOT / section[key]) for key in keys if (ROOT / str(section.get(key))).is_file()}
    return content
