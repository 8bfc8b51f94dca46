"""On-policy distillation of causal language models: several rollouts a prompt, one optimizer step a group.

    from distill import Config, fit

    summary = fit(Config.load("configs/default.yaml", {"training.max_steps": 3}))

What is imported from here is loaded when it is first asked for, so that `import distill` costs next to nothing.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.config import Config, ConfigError
    from distill.run import Summary
    from distill.train import Interrupted, fit

__all__ = ["Config", "ConfigError", "Interrupted", "Summary", "fit"]

_WHERE = {
    "Config": "distill.config",
    "ConfigError": "distill.config",
    "Interrupted": "distill.train",
    "Summary": "distill.run",
    "fit": "distill.train",
}

# transformers imports torchao wherever it is installed; that warns of its files for other GPUs, and torch warns of it.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
