"""A run's models in words, for whoever reads of them later: the report, the model card."""

from collections.abc import Iterator

from distill.config.config import Config
from distill.config.teacher import FrozenModel

SHOWN = 120  # characters of a text that somebody wrote


def in_words(config: Config) -> dict[str, str]:
    """What is trained on what, from whom: a few words by what they are about."""
    student, prompts, rollout = config.student, config.prompts, config.rollout
    about = [student.model]
    if student.drop_layers:
        dropped = (
            student.drop_layers if isinstance(student.drop_layers, str) else ", ".join(map(str, student.drop_layers))
        )
        about.append(f"without layers {dropped}")
    if student.lora:
        about.append(f"adapters of rank {student.lora.rank}")
    if student.chat_template_kwargs:
        about.append(f"template arguments {student.chat_template_kwargs}")
    if prompts.system_prompt:
        about.append(f"system prompt “{_short(prompts.system_prompt)}”")
    if prompts.chat_template not in ("auto", "never"):
        about.append(f"chat template {prompts.chat_template}")
    if rollout.stop_ids:
        about.append(f"completions end on {', '.join(map(str, rollout.stop_ids))}")
    if config.rewards:
        about.append(f"rewarded by {', '.join(f'{_short(r.function)} (weight {r.weight:g})' for r in config.rewards)}")
    found = {"student": "; ".join(about)}
    for name, section in config.teacher.all().items():
        words = [*_of_model(section)]
        if section.server:
            words.append("on a server")
        if name is None and config.teacher.update != "frozen":
            words.append(f"follows the student ({config.teacher.update}); evaluations are against that of step 0")
        found["teacher" if name is None else f"teacher {name}"] = "; ".join(words)
    return found


def _of_model(section: FrozenModel) -> Iterator[str]:
    yield section.model
    if section.precision != "auto":
        yield f"weights in {section.precision}"
    if section.system_prompt:
        yield f"system prompt “{_short(section.system_prompt)}”"
    if section.column:
        yield f"sees each record's {section.column}"
    if section.prompt_template:
        yield f"sees each record as “{_short(section.prompt_template)}”"
    if section.chat_template_kwargs:
        yield f"template arguments {section.chat_template_kwargs}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."
