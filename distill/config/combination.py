"""What the sections of a configuration must be beside each other, which none of them can check alone."""

from typing import NamedTuple

from distill.config.grading import EvaluationConfig, Rewards
from distill.config.sections import LossConfig, PromptsConfig, RolloutConfig, StudentConfig, TrainingConfig
from distill.config.teacher import TeacherConfig

OF_SAMPLED_TOKENS = ("sampled_reverse_kl", "rewards")  # objectives that ask a teacher about sampled tokens only


class Combination(NamedTuple):
    """A configuration's sections."""

    student: StudentConfig
    teacher: TeacherConfig
    prompts: PromptsConfig
    rollout: RolloutConfig
    training: TrainingConfig
    loss: LossConfig
    evaluation: EvaluationConfig
    rewards: Rewards

    @property
    def rewarded(self) -> bool:
        """Whether a reward is trained on, not only watched."""
        return any(reward.weight for reward in self.rewards)

    @property
    def prompts_per_batch(self) -> int:
        return self.rollout.prompts_per_batch or self.training.prompts_per_step

    def check(self) -> None:
        """Raises `ValueError` for what cannot be meant together."""
        step, batch = self.training.prompts_per_step, self.prompts_per_batch
        if batch % step:
            raise ValueError(
                f"rollout.prompts_per_batch is {batch} and training.prompts_per_step {step}: a batch must hold a whole "
                "number of steps"
            )
        self._check_loss()
        self._check_answers()
        self._check_served_teacher()
        self._check_following_teacher()
        if self.training.parallel == "shard" and (
            any(each.offload or each.precision in ("int8", "int4") for each in self.teacher.all().values())
            or self.teacher.served()
        ):
            raise ValueError(
                "training.parallel shard gives each rank a part of the teacher as it is loaded: leave teacher.offload, "
                "teacher.precision int8 or int4 and servers of teachers out, or set training.parallel to replicate"
            )
        self._check_evaluations()
        if isinstance(self.student.drop_layers, str) and self.prompts.eval is None:
            raise ValueError(
                f"student.drop_layers {self.student.drop_layers} measures on held-out prompts, but prompts.eval names "
                "no file: set it, or list the layers"
            )

    def _check_evaluations(self) -> None:
        wants = {
            "training.eval_every": self.training.eval_every,
            "training.early_stopping": self.training.early_stopping,
            "evaluation.metrics": self.evaluation.metrics,
            "evaluation.sets": self.evaluation.sets,
        }
        found = [key for key, value in wants.items() if value]
        if found and self.prompts.eval is None:
            raise ValueError(f"{found[0]} is set, but prompts.eval names no file")

    def _check_answers(self) -> None:
        training, M = self.training, self.training.off_policy_sequences
        trained_on = training.warm_start or training.off_policy_fraction
        if found := [key for key in ("answers", "answer_column") if getattr(self.prompts, key) and not trained_on]:
            raise ValueError(
                f"prompts.{found[0]} is for training.warm_start and training.off_policy_fraction, and neither is set"
            )
        if training.max_steps == 0 and not training.warm_start:
            raise ValueError("training.max_steps is 0, which is for a warm start alone: set training.warm_start")
        if not training.off_policy_fraction:
            if training.off_policy_objective:
                raise ValueError("training.off_policy_objective is set, and training.off_policy_fraction is 0")
            return
        sequences = training.prompts_per_step * training.num_rollouts_per_prompt
        if M in (0, sequences):
            raise ValueError(
                f"training.off_policy_fraction {training.off_policy_fraction} of a step's {sequences} sequences "
                f"(training.prompts_per_step times num_rollouts_per_prompt) is rounded to {M}, which leaves "
                f"{'no answer' if M == 0 else 'no rollout'}: set another fraction, or take more sequences"
            )
        if self.loss.objective == "rewards" and not training.off_policy_objective:
            raise ValueError(
                "training.off_policy_fraction is set, and loss.objective rewards says nothing of written answers: set "
                "training.off_policy_objective"
            )

    def _check_rewards(self) -> None:
        loss = self.loss
        if self.rewarded and self.training.sampled_rollouts == 1:
            raise ValueError(
                f"a reward counts by how much it is above that of the prompt's other rollouts, and "
                f"{self._only_rollout()}: sample more of them, or set the weights of rewards to 0, which only watches"
            )
        for key, value in (("objective", loss.objective == "rewards"), ("scale_rewards", loss.scale_rewards)):
            if value and not self.rewarded:
                raise ValueError(f"loss.{key} is {getattr(loss, key)!r}, and rewards lists none with a weight")

    def _only_rollout(self) -> str:
        """Why a prompt has one rollout."""
        if self.training.num_rollouts_per_prompt == 1:
            return "training.num_rollouts_per_prompt is 1"
        return f"training.off_policy_fraction {self.training.off_policy_fraction} leaves each prompt one"

    def _check_loss(self) -> None:
        loss = self.loss
        self._check_rewards()
        if loss.objective != "sampled_reverse_kl":
            meant = {"baseline": ("none",), "discount": (0,), "reward_clip": (None,)}
            if not self.rewarded:
                meant["importance_sampling"] = ("stale", "none")
            for key, harmless in meant.items():
                if getattr(loss, key) not in harmless:
                    raise ValueError(
                        f"loss.{key} is {getattr(loss, key)!r}, which changes sampled_reverse_kl only, and "
                        f"loss.objective is {loss.objective}: leave loss.{key} out or set the objective"
                    )
            if not self.rewarded:
                return
        if loss.baseline == "group" and self.training.sampled_rollouts == 1:
            raise ValueError(
                f"loss.baseline group is the mean of a prompt's other rollouts, and {self._only_rollout()}: sample "
                f"more of them, or set loss.baseline to exact"
            )
        if loss.importance_sampling == "sampler" and loss.importance_clip is None:
            raise ValueError("loss.importance_sampling sampler needs an upper limit: set loss.importance_clip")
        if loss.temperature != 1 and loss.importance_clip is not None and loss.importance_sampling == "stale":
            raise ValueError(
                "loss.importance_clip needs loss.temperature 1, because log-probabilities at sampling are recorded at "
                "temperature 1: set loss.importance_clip to null or loss.temperature to 1"
            )

    def _check_following_teacher(self) -> None:
        teacher, student, key = self.teacher, self.student, f"teacher.update is {self.teacher.update!r}"
        if teacher.update == "frozen":
            return
        if teacher.model not in ("base", student.model):
            raise ValueError(
                f"{key}, and teacher.model {teacher.model!r} is another model than the student's {student.model!r}, "
                f"whose weights it cannot take over: set teacher.model to base, or teacher.update to frozen"
            )
        if student.drop_layers:
            raise ValueError(
                f"{key}, and the student has other layers than its teacher (student.drop_layers): leave one of them out"
            )
        for name, needed in (("server", None), ("offload", False)):
            if getattr(teacher, name) != needed:
                raise ValueError(f"{key}, which needs its weights here, beside the student's: leave teacher.{name} out")
        if teacher.precision in ("int8", "int4"):
            raise ValueError(f"{key}, and weights of {teacher.precision} cannot follow: leave teacher.precision out")

    def _check_served_teacher(self) -> None:
        served = self.teacher.served()
        if not served:
            return
        gives, objective = self.teacher.server_gives, self.compares_distributions()
        for key, section in served.items():
            if section.offload or section.precision in ("int8", "int4"):
                what = "offload" if section.offload else f"precision {section.precision}"
                raise ValueError(f"{key}.{what} is of weights here, and {key}.server has them elsewhere: leave one out")
        if gives == "sampled" and objective:
            raise ValueError(
                f"{objective} compares distributions, and teacher.server_gives is sampled: set that to hidden or "
                f"top_k, or the objective to sampled_reverse_kl (on written answers, to cross_entropy)"
            )
        if gives == "top_k" and not objective:
            raise ValueError(
                f"teacher.server_gives is top_k, and {self.loss.objective} asks of the sampled tokens only: leave "
                f"teacher.server_gives out, or set another loss.objective"
            )
        if gives in ("sampled", "top_k") and (needs := self.needs_whole_distribution()):
            raise ValueError(
                f"{needs} needs the teacher's whole distribution, of which its server says too little with "
                f"teacher.server_gives {gives}: set that to hidden"
            )

    def compares_distributions(self) -> str:
        """Which objective asks a teacher about more than the tokens that were sampled; empty where none does."""
        training, of_answers = self.training, self.training.off_policy_objective
        warm = training.warm_start and training.warm_start.objective
        found = {
            f"loss.objective {self.loss.objective}": self.loss.objective not in OF_SAMPLED_TOKENS,
            f"training.warm_start.objective {warm}": warm == "forward_kl",
            f"training.off_policy_objective {of_answers or 'reverse_kl'}": training.off_policy_fraction
            and of_answers != "cross_entropy",
        }
        return next((what for what, does in found.items() if does), "")

    def needs_whole_distribution(self) -> str:
        """What needs more of a teacher than its likeliest tokens, whatever the objective; empty where nothing does."""
        found = {
            f"loss.temperature {self.loss.temperature}": self.loss.temperature != 1,
            "loss.baseline exact": self.loss.baseline == "exact",
            f"student.drop_layers {self.student.drop_layers}": isinstance(self.student.drop_layers, str),
        }
        return next((what for what, needs in found.items() if needs), "")
