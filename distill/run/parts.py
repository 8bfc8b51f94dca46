"""What a run is made of: its models, prompts and engine, put together into a trainer."""

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from distill.config import Config
from distill.loss import Group, LossOptions, ModelParts, check_sharing
from distill.models import describe, split_head
from distill.prompts import epoch_batches, epoch_order, left_pad
from distill.rollout import choose_dtype as choose_rollout_dtype
from distill.run.checkpoint import Checkpoint, accept
from distill.run.compiling import compile_parts, wants_compiling
from distill.run.engines import make_engine
from distill.run.layer_choice import choose_layers
from distill.run.loading import Pair, choose_dtype, load_pair, make_student, make_working_copy, on_copy
from distill.run.prompt_sets import Prompts, load_answers, load_prompt_sets
from distill.runtime import MemoryLimits
from distill.teachers import NO_TEACHER, FollowingTeacher
from distill.training import (
    WARM_START,
    Answers,
    Mixture,
    Ranks,
    StepResult,
    Task,
    TaskRewards,
    Trainer,
    WarmStart,
    check_against_itself,
    mixture_metrics,
)

NAMED_ONLY = (
    "a teacher's server gives no hidden states, so it names its {} likeliest tokens at each place, and the loss is at "
    "most the exact one (docs/serving.md)"
)


class RunParts:
    """Everything that is loaded or made before the first step, and stays to the end of the run."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        console: Console,
        ranks: Ranks,
        start: Checkpoint | None,
        tasks: Sequence[Task] = (),
    ) -> None:
        """`start` is the checkpoint that the run continues from; its weights are not read here. `tasks` reward it.

        Raises `ConfigError`, `ModelError`, `PromptError`, `ServerError` and `CheckpointError`.
        """
        self.config, self.ranks, self._console = config, ranks, console
        self.device, self.dtype = device, choose_dtype(config.training.precision, device)
        wants_compiling(config, device, ranks)  # which raises where it cannot be had, before all is loaded
        pair = load_pair(config, self.device, self.dtype)
        self.tokenizer, self.vocab_size = pair.tokenizer, pair.vocab_size
        self.servers = [teacher.parts.body.server for teacher in pair.teachers if teacher.parts.elsewhere]
        self.prompts, self.held_out, self.sets = load_prompt_sets(config, pair, console)
        answered = load_answers(config, pair, console, self.prompts)
        self.answers = self._make_answers(answered)
        self.rewards = self._make_rewards(tasks)
        models = {id(teacher.parts.body): teacher.parts for teacher in pair.teachers}  # each once
        for model in models.values():
            check_against_itself(model, self.prompts.student.token_ids[0], self.vocab_size)
        self.layer_choice: dict[str, Any] | None = None
        self.dropped_layers = self._choose_layers(pair, start)
        self.student = make_student(pair.student, config, self.dropped_layers)
        whole = ModelParts(*split_head(self.student), self.dtype)
        self.notices = self._said_of_prompts(answered, pair)
        """Events of the loading, with what is said of each."""
        self.following = self._follower()
        if self.following:
            models[0] = ModelParts(*split_head(self.following.model), pair.teachers[0].parts.dtype)
        for who, model in (("student", whole), *(("teacher", model) for model in models.values())):
            if reason := check_sharing(model):
                self.notices.append(("sharing", f"the {who} computes a prompt once for each of its rows, as {reason}"))
        working = make_working_copy(self.student, whole, config, ranks)
        self.student_parts = ranks.shard(self.student, whole) if working is None else on_copy(whole, working)
        self.first_teachers = self._shared_out(pair)
        """Those of step 0, which evaluations are against."""
        self.teachers = self._teachers_now(models)
        if config.student.lora:
            self.tell(describe(self.student))
        if start:
            accept(start, config, self.prompts.identity, self.student, self.reward_files, self.answers_digest)
        self.limits = MemoryLimits(config.training.tokens_per_micro_batch, fixed=ranks.sharded, device=device)
        steps = config.training.total_steps(map(len, self._batches(0)))
        compiled = wants_compiling(config, device, ranks, steps) and self._compile()
        asked = (self.vocab_size, self._precision(start), self.limits, ranks, working, compiled)
        self.engine = make_engine(self.student, config, self.tokenizer, *asked)
        if config.rollout.engine == "auto" and (reason := self.engine.fallback):
            self.notices.append(("engine", f"rollouts come from transformers' own loop, as {reason}"))
        if config.rollout.server and ranks.rank == 0:
            self.servers.append(self.engine.server)
        self.trainer = self._make_trainer()
        self.warm_start = self._make_warm_start()

    def _said_of_prompts(self, answered: Prompts | None, pair: Pair) -> list[tuple[str, str]]:
        """What is to be said of what the teachers see of the prompts, and tell of it."""
        further = [answered] if answered and answered is not self.prompts else []
        of_sets = (self.prompts, *further, *([self.held_out] if self.held_out else []), *self.sets.values())
        found = [("prompts", line) for prompts in of_sets for line in prompts.remarks]
        if self.config.asked_of_servers == "auto" and any(each.parts.head is None for each in pair.teachers):
            found.append(("teacher", NAMED_ONLY.format(self.config.teacher.server_top_k)))
        return found

    @property
    def total_steps(self) -> int:
        """All optimizer steps of the run, the warm start's included."""
        return self.warm_steps + self.trainer.total_steps

    @property
    def warm_steps(self) -> int:
        """Those before the first rollout."""
        return self.warm_start.total_steps if self.warm_start else 0

    def tell(self, line: str) -> None:
        """Prints a line as it is."""
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def texts(self, result: StepResult) -> list[str]:
        """The texts of the prompts of a step."""
        warm = result.metrics.get("phase") == WARM_START
        texts = (self.answers.prompts if warm else self.prompts.student).texts
        return [texts[index] for index in result.prompts]

    def environment(self) -> dict[str, Any]:
        """What the last digits of a sum depend on beside the configuration."""
        return {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "precision": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "ranks": self.ranks.size,
        }

    def _compile(self) -> bool:
        """Compiles the layers of all models here; whether the compiler took the student's."""
        reasons = {}
        teachers = {id(parts.body): ("teacher", parts) for parts in (*self.teachers, *self.first_teachers)}
        for who, parts in (*teachers.values(), ("student", self.student_parts)):
            if not parts.elsewhere and (reason := compile_parts(parts)):
                reasons[who] = reason
        for who, reason in reasons.items():
            self.notices.append(("compile", f"the {who}'s layers are not compiled, as the compiler fails: {reason}"))
        return "student" not in reasons

    @property
    def reward_files(self) -> dict[str, str]:
        """SHA-256 of the files of reward functions, by the functions' references."""
        return self.rewards.files if self.rewards else {}

    @property
    def answers_digest(self) -> str:
        """Tells the written answers from others; empty where there are none."""
        return self.answers.prompts.answers_digest if self.answers else ""

    def _make_answers(self, answered: Prompts | None) -> Answers | None:
        if answered is None:
            return None
        order = {"seed": self.config.training.seed, "shuffle": self.config.prompts.shuffle}
        return Answers(answered.student, answered.teacher, self.tokenizer.pad_token_id, self.device, **order)

    def _make_warm_start(self) -> WarmStart | None:
        settings = self.config.training.warm_start
        if settings is None:
            return None
        teachers = self.teachers if settings.objective == "forward_kl" else [NO_TEACHER]
        return WarmStart(self.trainer, self.answers, settings, teachers)

    def _make_rewards(self, tasks: Sequence[Task]) -> TaskRewards | None:
        if not tasks:
            return None
        scale = self.config.loss.scale_rewards
        return TaskRewards(tasks, self.prompts.student.records, self.tokenizer, scale=scale, ranks=self.ranks)

    @property
    def teacher_weights(self) -> dict[str, torch.Tensor]:
        """Those of the teacher that follows the student; none where there is no such one."""
        return self.following.weights if self.following else {}

    def _follower(self) -> FollowingTeacher | None:
        update = self.config.teacher.update
        return None if update == "frozen" else FollowingTeacher(self.student, update)

    def _follow(self, step: int) -> None:
        self.following.after_step(step)
        self.teachers[0].refresh()

    def _teachers_now(self, models: dict[int, ModelParts]) -> list[ModelParts]:
        """Those that score in training; without evaluations, one that is followed by another is not kept."""
        if self.following is None:
            return self.first_teachers
        teachers = [self.ranks.shard(self.following.model, models[0]), *self.first_teachers[1:]]
        self.first_teachers = self.first_teachers if self.held_out else teachers
        return teachers

    def _shared_out(self, pair: Pair) -> list[ModelParts]:
        """The teachers' parts, each model's shared out over the ranks once."""
        found: dict[int, ModelParts] = {}
        for teacher in pair.teachers:
            if id(teacher.parts.body) not in found:
                found[id(teacher.parts.body)] = self.ranks.shard(teacher.model, teacher.parts)
        return [found[id(teacher.parts.body)] for teacher in pair.teachers]

    def _choose_layers(self, pair: Pair, start: Checkpoint | None) -> Sequence[int]:
        """The layers to drop: as configured, as the checkpoint's run found them, or found now."""
        if not isinstance(wanted := self.config.student.drop_layers, str):
            return wanted
        if start:  # of a run with another configuration, which is refused when all is loaded
            self.layer_choice = start.state.get("layer_choice") or {"dropped": ()}
        else:
            self.layer_choice = choose_layers(self.config, pair, self.held_out, self.dtype, self._console)
            self.layer_choice = self.ranks.of_first(self.layer_choice)
        return self.layer_choice["dropped"]

    def _precision(self, start: Checkpoint | None) -> str:
        """The rollouts' precision, decided once for all ranks and for the rest of the run."""
        rollout = self.config.rollout
        precision = start.state["rollout_precision"] if start else rollout.precision
        # Each rank would measure for itself; a server's is its own.
        if self.ranks.size > 1 and precision == "auto" and not rollout.server:
            precision = self.ranks.of_first(str(choose_rollout_dtype(self.student, precision))[len("torch.") :])
        return precision

    def _batches(self, epoch: int) -> Sequence[Sequence[int]]:
        """An epoch's batches of prompt indices."""
        config, count = self.config, len(self.prompts.student)
        order = epoch_order(count=count, seed=config.training.seed, shuffle=config.prompts.shuffle, epoch=epoch)
        return epoch_batches(order, config.prompts_per_batch)

    def _loss_options(self) -> LossOptions:
        of_written = self.config.training.off_policy_objective
        return LossOptions(
            **self.config.loss.of_tokens(),
            mask_truncated=self.config.rollout.mask_truncated,
            of_written=None if of_written == "cross_entropy" else of_written,
        )

    def _make_trainer(self) -> Trainer:
        config, training = self.config, self.config.training
        prompts, seen, teachers = self.prompts.student, self.prompts.teacher, self.teachers
        groups: dict[str, Any] = {"make_group": lambda r, indices, step: (r, Group.of(r, seen and seen.view(indices)))}
        if training.off_policy_fraction:
            mixture = Mixture(self.answers, training, seen, len(teachers), self.tokenizer.pad_token_id)
            groups = {"make_group": mixture, "measure": mixture_metrics}
            teachers = teachers if mixture.scored else [*teachers, NO_TEACHER]
        return Trainer(
            self.student,
            self.student_parts,
            teachers,
            self.engine,
            self._batches,
            lambda indices: left_pad([prompts.token_ids[i] for i in indices], self.tokenizer.pad_token_id),
            training,
            self._loss_options(),
            vocab_size=self.vocab_size,
            **groups,
            limits=self.limits,
            async_batches=config.rollout.async_batches,
            ranks=self.ranks,
            judge=self.rewards,
            after_step=self._follow if self.following else lambda step: None,
        )
