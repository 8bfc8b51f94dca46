"""The sections of the frozen models to learn from: the teacher, and what each of its `others` may say of itself."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from distill.config.sections import StudentConfig
from distill.config.values import Integer, Number, Reference, Section, TemplateArguments, Url, written_as

MAIN = "main"
"""What a record's mixture calls the teacher of `teacher.model`."""


class FrozenModel(Section):
    """A model that scores: which, in what precision, and what it sees."""

    model: Reference
    """The frozen model to learn from, named like the student's; both need one vocabulary. `base` is the student's own
    model before layers are dropped and adapters added, whose weights it shares where `student.lora` is set."""
    trust_remote_code: bool = False
    """Run Python code that the teacher's repository ships."""
    system_prompt: str | None = Field(None, min_length=1)
    """System message of the prompts that the teacher sees, and the student does not."""
    column: str | None = Field(None, min_length=1)
    """Column of a record with the prompt that the teacher sees in place of the student's: text that takes the place of
    the last turn, or a conversation; absent: `teacher_prompt`, where there is one."""
    prompt_template: str | None = Field(None, min_length=1)
    """Jinja template of the last turn that the teacher sees, with the record's columns, and the student's last turn as
    `prompt`: for a reference solution, a hint, or feedback."""
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)
    """Arguments of the teacher's own chat template for the prompts that it sees, as {enable_thinking: false}."""
    precision: Literal["auto", "float32", "bfloat16", "int8", "int4"] = "auto"
    """Its weights: `auto` is `training.precision`; `int8` takes half the memory of bfloat16 and needs torchao, `int4` a
    third of it, and costs more accuracy."""
    offload: bool = False
    """Keep it in host memory while it does not score; on a CPU that is where it is anyway."""
    server: Url | None = None
    """A vLLM or SGLang server that scores in its place; `model` then names its tokenizer only."""

    @model_validator(mode="after")
    def _one_prompt(self) -> "FrozenModel":
        if self.column is not None and self.prompt_template is not None:
            raise ValueError(
                "column and prompt_template both say what the teacher sees: leave one out; the template has every "
                "column by its name"
            )
        return self


# Told apart by their type, so that a mistake in one is not reported as a mistake in both.
KINDS = ("<name>", "<section>")
OtherTeacher = Annotated[
    Annotated[Reference, Tag(KINDS[0])] | Annotated[FrozenModel, Tag(KINDS[1])],
    Discriminator(lambda value: KINDS[not isinstance(value, str)]),
]
Update = Annotated[
    str,
    written_as(
        r"frozen|every:[1-9]\d{0,8}|ema:0\.\d*[1-9]\d*",
        "frozen, every:STEPS or ema:DECAY with a decay between 0 and 1, as ema:0.99",
    ),
]


class TeacherConfig(FrozenModel):
    others: dict[str, OtherTeacher] = Field(default_factory=dict)
    """Further teachers by name, each a model that is used here as `teacher.model` is, or a section of its own with the
    keys `model`, `system_prompt`, `column`, `prompt_template`, `chat_template_kwargs`, `precision`, `offload`, `server`
    and `trust_remote_code`. A prompt whose record has `"teacher": NAME` is scored by that one; with `{NAME: 0.7, main:
    0.3}` its loss is the weighted sum of the losses to each, `main` being `teacher.model`."""
    update: Update = "frozen"
    """Whether a teacher of the student's own weights follows it: `every:20` takes them over every 20 steps, `ema:0.99`
    keeps 0.99 of its own at each step. Evaluations are against the teacher of step 0 in any case."""
    server_gives: Literal["auto", "sampled", "top_k", "hidden"] = "auto"
    """What a teacher's `server` is asked for: `sampled`, the log-probabilities of the sampled tokens, all that
    `sampled_reverse_kl` needs; `top_k`, also its likeliest tokens at each place, for the other objectives, which are
    then those to the nearest teacher that fits; `hidden`, its last hidden states, with which everything is exact.
    `auto`: `sampled` where that is enough, else `hidden` where the server gives them, else `top_k`."""
    server_top_k: Integer = Field(20, ge=1)
    """How many of them. A vLLM server gives 20 at most unless it is started with `--max-logprobs`."""
    timeout_seconds: Number = Field(300, gt=0)
    """Longest wait for one answer of a teacher's `server`."""
    retries: Integer = Field(8, ge=0)
    """Further attempts at an answer of a teacher's `server`, after pauses of 1, 2, 4, ... and at most 60 seconds."""

    @field_validator("others")
    @classmethod
    def _names(cls, others: dict[str, Any]) -> dict[str, Any]:
        if MAIN in others:
            raise ValueError(f"another name than {MAIN!r}, which is what mixtures call teacher.model")
        return others

    def resolved(self, student: StudentConfig) -> dict[str | None, FrozenModel]:
        """The same with the student's own model for `base`, and whether its code is trusted."""
        own = {"model": student.model, "trust_remote_code": student.trust_remote_code}
        return {
            name: section.model_copy(update=own) if section.model == "base" else section
            for name, section in self.all().items()
        }

    def all(self) -> dict[str | None, FrozenModel]:
        """Every teacher's section by its name, that of `teacher.model` first, as None."""
        own = {name: getattr(self, name) for name in FrozenModel.model_fields}
        found: dict[str | None, FrozenModel] = {None: FrozenModel(**own)}
        for name, other in self.others.items():
            here = own | {"model": other, "server": None}  # the server has another model
            found[name] = FrozenModel(**here) if isinstance(other, str) else other
        return found

    def served(self) -> dict[str, FrozenModel]:
        """Those on a server, by the key of their section."""
        sections = {f"teacher.others.{name}" if name else "teacher": each for name, each in self.all().items()}
        return {key: section for key, section in sections.items() if section.server}
