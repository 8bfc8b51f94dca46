"""Reading a configuration's YAML strictly: plain sections and keys, nothing that YAML would guess or blow up."""

from pathlib import Path
from typing import Any

import yaml

# Far above any configuration; what is larger or deeper is something else, or was made to exhaust memory.
MAX_BYTES, MAX_DEPTH = 2**20, 20


class ConfigError(ValueError):
    """A configuration that cannot be used: one readable message with every problem found."""


class _StrictLoader(yaml.SafeLoader):
    """safe_load that refuses a key written twice, of which YAML would silently keep the last, and YAML's ways to
    write a small file that becomes a huge value: aliases, and nesting without end."""

    depth = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not used in configurations", self.peek_event().start_mark
            )
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"nested more than {MAX_DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a name", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} stands twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a file holds. Raises `ConfigError` for anything else."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path}: more than {MAX_BYTES // 2**20} MiB, so it is no configuration")
        content = yaml.load(content.decode(), Loader=_StrictLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    # A number of thousands of digits is a ValueError, a !!timestamp that is none an AttributeError.
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())[:400]}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected sections with keys, found {type(content).__name__}")
    if strange := [key for key in content if not isinstance(key, str)]:
        raise ConfigError(f"{path}: expected names of sections, found {strange[0]!r}")
    return content
