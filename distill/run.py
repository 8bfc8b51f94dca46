"""One run, from models and prompts to a trained model: loading, the loop's surroundings, and every output file.

The trainer takes the steps; here stands what happens between two of them: logging, evaluation, checkpoints.
"""

import itertools
import json
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from rich.console import Console

from distill import checkpoint
from distill.checkpoint import CheckpointError
from distill.config import Config, ConfigError, to_yaml
from distill.decode import SamplingOptions
from distill.display import Display, closing_table
from distill.evaluate import check_against_itself, decode_samples, evaluate
from distill.loss import LossOptions, ModelParts
from distill.metrics import JsonLines, peak_memory_bytes, read_json_lines
from distill.models import check_pair, eos_ids, load_model, load_tokenizer, split_head
from distill.prompts import PromptSet, epoch_order, left_pad, load_prompts
from distill.report import write_report
from distill.rollout import RolloutEngine
from distill.trainer import StepResult, Trainer

NUM_SAMPLES = 6  # held-out completions kept from before and after, for the table and the report


class Run:
    """A run's models, files and progress; `execute` does it all."""

    def __init__(self, config: Config, console: Console, received_signal: Callable[[], Signals | None]) -> None:
        self.config, self.console, self.received_signal = config, console, received_signal
        self.folder = config.training.output_dir
        self.started, self.cpu_started = time.monotonic(), time.process_time()
        self.device = choose_device(config.training.device)
        self.dtype = choose_dtype(config.training.precision, self.device)
        self.evaluations: list[dict[str, Any]] = []
        self.samples: dict[str, list[str]] = {}
        self._load_models()
        self._load_prompts()
        check_against_itself(self.teacher_parts, self.prompts.token_ids[0], self.vocab_size)
        found = self._find_checkpoint()
        self.trainer = self._make_trainer(found[1]["rollout_precision"] if found else config.rollout.precision)
        if found:
            self._restore(*found)

    def execute(self) -> int:
        """Trains, evaluates and writes everything; returns the exit status."""
        self._open_folder()
        trainer, training = self.trainer, self.config.training
        display = Display(trainer.total_steps, trainer.position.step, self.console)
        trainer.on_phase = display.phase
        with display:
            if not self.evaluations:
                self._evaluate(display)
            for result in trainer.steps():
                self._record(result, display)
                step, last = trainer.position.step, trainer.position.step == trainer.total_steps
                if last or (training.eval_every and step % training.eval_every == 0):
                    self._evaluate(display)
                stop = self.received_signal()
                if last or stop or step % training.save_every == 0:
                    self._save(display)
                if stop and not last:
                    display.message(f"{stop.name}: saved after step {step}; the same command continues from there")
                    return 128 + stop
            display.phase("writing the model")
            self._write_model()
        self._write_summary()
        return 0

    def _load_models(self) -> None:
        student, teacher, training = self.config.student, self.config.teacher, self.config.training
        placed = {"device": self.device, "attention": training.attention}
        self.tokenizer = load_tokenizer(student.model, trust_remote_code=student.trust_remote_code)
        teacher_tokenizer = load_tokenizer(teacher.model, trust_remote_code=teacher.trust_remote_code)
        # The student's weights stay float32 whatever it is computed in: small updates would round away.
        self.student = load_model(
            student.model, drop_layers=student.drop_layers, trust_remote_code=student.trust_remote_code, **placed
        )
        self.teacher = load_model(
            teacher.model, dtype=self.dtype, trust_remote_code=teacher.trust_remote_code, **placed
        ).requires_grad_(False)
        self.vocab_size = check_pair(self.student, self.teacher, self.tokenizer, teacher_tokenizer)
        self.student_parts = ModelParts(*split_head(self.student), self.dtype)
        self.teacher_parts = ModelParts(*split_head(self.teacher), self.dtype)

    def _load_prompts(self) -> None:
        settings, rollout = self.config.prompts, self.config.rollout
        context = min(model.config.get_text_config().max_position_embeddings for model in (self.student, self.teacher))
        room = context - rollout.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"rollout.max_new_tokens: found {rollout.max_new_tokens}, expected less than the models' context of "
                f"{context} tokens"
            )
        options = {"chat_template": settings.chat_template, "max_tokens": min(settings.max_tokens, room)}
        self.prompts = load_prompts(settings.train, self.tokenizer, **options)
        self._report_left_out(settings.train, self.prompts, options["max_tokens"])
        self.eval_prompts = None
        if settings.eval is not None:
            self.eval_prompts = load_prompts(settings.eval, self.tokenizer, **options)
            self._report_left_out(settings.eval, self.eval_prompts, options["max_tokens"])

    def _report_left_out(self, path: Path, prompts: PromptSet, limit: int) -> None:
        if prompts.empty or prompts.too_long:
            self.console.print(
                f"{path}: {len(prompts)} prompts used; left out: {prompts.empty} empty, "
                f"{prompts.too_long} of more than {limit} tokens",
                highlight=False,
                soft_wrap=True,
            )

    def _make_trainer(self, rollout_precision: str) -> Trainer:
        config = self.config
        rollout, training = config.rollout, config.training
        self.engine = RolloutEngine(
            self.student,
            sampling=SamplingOptions(
                rollout.max_new_tokens, rollout.temperature, rollout.top_k, rollout.top_p, rollout.min_p
            ),
            eos_token_ids=eos_ids(self.student, self.tokenizer),
            pad_token_id=self.tokenizer.pad_token_id,
            precision=rollout_precision,
            engine=rollout.engine,
            memory_budget_bytes=None if rollout.memory_gib is None else int(rollout.memory_gib * 2**30),
            seed=training.seed,
            vocab_size=self.vocab_size,
        )

        def prompt_batches(epoch: int) -> list[list[int]]:
            order = epoch_order(len(self.prompts), seed=training.seed, epoch=epoch, shuffle=config.prompts.shuffle)
            size = config.prompts_per_batch
            return [order[start : start + size] for start in range(0, len(order), size)]

        return Trainer(
            self.student,
            self.student_parts,
            self.teacher_parts,
            self.engine,
            prompt_batches,
            lambda indices: left_pad([self.prompts.token_ids[i] for i in indices], self.tokenizer.pad_token_id),
            training,
            LossOptions(**config.loss.model_dump(), mask_truncated=rollout.mask_truncated),
            vocab_size=self.vocab_size,
        )

    def _find_checkpoint(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]] | None:
        """Tensors and state of the checkpoint to continue from, if there is one."""
        resume = self.config.training.resume
        if resume == "never":
            return None
        if resume == "auto":
            found = checkpoint.load_newest(self.folder / "checkpoints")
        else:
            found = checkpoint.load(Path(resume))
        if found:
            self._accept(found[1])
        return found

    def _restore(self, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]) -> None:
        self.trainer.restore(tensors, state["trainer"])
        self.evaluations, self.samples = state["evaluations"], state["samples"]
        self.started -= state["wall_seconds"]
        self.cpu_started -= state.get("cpu_seconds", 0.0)
        done, total = self.trainer.position.step, self.trainer.total_steps
        self.console.print(f"continuing after step {done} of {total}", highlight=False)

    def _open_folder(self) -> None:
        """Sets an earlier run's folder aside where this one starts over, and opens the files that grow."""
        folder = self.folder
        if self.config.training.resume == "never" and (folder / "metrics.jsonl").exists():
            names = (folder.with_name(f"{folder.name}.{i}") for i in itertools.count(1))
            kept = next(path for path in names if not path.exists())
            folder.rename(kept)
            self.console.print(f"the earlier run's folder is now {kept}", highlight=False, soft_wrap=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
        done = self.trainer.position.step

        def open_log(name: str) -> JsonLines:
            return JsonLines(folder / name, keep=lambda record: record["step"] <= done)

        self.metrics_log, self.rollout_log = open_log("metrics.jsonl"), open_log("rollouts.jsonl")
        self.evaluation_log = open_log("evaluations.jsonl")

    def _accept(self, state: dict[str, Any]) -> None:
        """Refuses a checkpoint of a run that this one would not continue truly, naming each key."""
        changed = checkpoint.changed_keys(state["config"], self.config.model_dump(mode="json"))
        if state["prompts"] != self.prompts.digest:
            changed.append(f"prompts.train: the prompts in {self.config.prompts.train} are others than before")
        if changed:
            raise CheckpointError(
                f"{self.folder} holds a run that this configuration would not continue truly:\n  "
                + "\n  ".join(changed)
                + "\nSet training.resume to never to start over, or name another training.output_dir"
            )

    def _evaluate(self, display: Display) -> None:
        if self.eval_prompts is None:
            return
        display.phase("evaluation")
        step, settings = self.trainer.position.step, self.config.evaluation
        result = evaluate(
            self.engine,
            self.student_parts,
            self.teacher_parts,
            left_pad(self.eval_prompts.token_ids, self.tokenizer.pad_token_id),
            num_rollouts=settings.num_rollouts_per_prompt,
            max_new_tokens=settings.max_new_tokens or self.config.rollout.max_new_tokens,
            seed=settings.seed,
            vocab_size=self.vocab_size,
            token_budget=self.config.training.tokens_per_micro_batch,
        )
        record = {"step": step, **result.record()}
        self.evaluations.append(record)
        self.evaluation_log.write([record])
        rows = range(0, len(self.eval_prompts) * settings.num_rollouts_per_prompt, settings.num_rollouts_per_prompt)
        self.samples["after" if step else "before"] = decode_samples(
            self.tokenizer, result.rollouts, rows[:NUM_SAMPLES]
        )
        display.message(
            f"held-out reverse KL after step {step}: {result.reverse_kl:.3f} ± {result.standard_error:.3f} nats/token"
        )

    def _record(self, result: StepResult, display: Display) -> None:
        rollouts, step = result.rollouts, result.metrics["step"]
        texts = decode_samples(self.tokenizer, rollouts, range(len(rollouts.finished)))
        self.metrics_log.write([result.metrics])
        self.rollout_log.write(
            {
                "step": step,
                "prompt": self.prompts.texts[result.prompts[row // rollouts.num_rollouts]],
                "completion": texts[row],
                "completion_length": int(rollouts.completion_lengths[row]),
                "finished": bool(rollouts.finished[row]),
                "reverse_kl_exact": result.row_reverse_kl[row],
            }
            for row in range(len(texts))
        )
        display.update(result.metrics, texts[0])

    def _save(self, display: Display) -> None:
        display.phase("checkpoint")
        tensors, state = self.trainer.state()
        state = {
            "trainer": state,
            "config": self.config.model_dump(mode="json"),
            "prompts": self.prompts.digest,
            # `auto` was decided by a measurement, which another day could decide otherwise.
            "rollout_precision": self.engine.precision,
            "evaluations": self.evaluations,
            "samples": self.samples,
            "wall_seconds": time.monotonic() - self.started,
            "cpu_seconds": time.process_time() - self.cpu_started,
        }
        step, keep_last = self.trainer.position.step, self.config.training.keep_last
        checkpoint.save(self.folder / "checkpoints", step, tensors, state, keep_last)

    def _write_model(self) -> None:
        """`final/` appears whole, and an earlier one stays until then."""
        partial, final = self.folder / "final.partial", self.folder / "final"
        shutil.rmtree(partial, ignore_errors=True)
        self.student.save_pretrained(partial)
        self.tokenizer.save_pretrained(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)

    def _write_summary(self) -> None:
        metrics = read_json_lines(self.folder / "metrics.jsonl")
        before, after = (self.evaluations[i]["reverse_kl"] if self.evaluations else None for i in (0, -1))
        samples = zip(self.samples.get("before", []), self.samples.get("after", []), strict=False)
        summary = {
            "eval_reverse_kl_before": before,
            "eval_reverse_kl_after": after,
            "eval_reverse_kl_reduction": 1 - after / before if before else None,
            "steps": self.trainer.position.step,
            "completion_tokens": sum(record["completion_tokens"] for record in metrics),
            "wall_seconds": time.monotonic() - self.started,
            "cpu_seconds": time.process_time() - self.cpu_started,
            **{f"seconds_{p}": sum(m[f"seconds_{p}"] for m in metrics) for p in ("rollout", "score", "update")},
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "precision": str(self.dtype).removeprefix("torch."),
            "rollout_precision": self.engine.precision,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "samples": [
                {"prompt": prompt, "before": first, "after": last}
                for prompt, (first, last) in zip(self._eval_texts(), samples, strict=False)
            ],
        }
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
        report = write_report(self.folder)
        if before is not None:
            change = f"  ({after / before - 1:+.0%})" if before else ""
            rows = [("held-out reverse KL, nats/token", f"{before:.3f}", f"{after:.3f}{change}")]
            rows += [(s["prompt"], s["before"], s["after"]) for s in summary["samples"][:3]]
            closing_table(self.console, rows)
        for line in (
            f"{summary['steps']} steps in {summary['wall_seconds']:.0f} s; report: {report}",
            f"model: {self.folder / 'final'}",
            f"talk to it: python -m distill.chat {self.folder / 'final'}",
        ):
            self.console.print(line, highlight=False, soft_wrap=True)

    def _eval_texts(self) -> Sequence[str]:
        return self.eval_prompts.texts[:NUM_SAMPLES] if self.eval_prompts else []


def choose_device(requested: str) -> torch.device:
    """The device of `training.device`. Raises `ConfigError` when it is not there."""
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(requested)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"training.device: found {requested!r}, but torch sees {torch.cuda.device_count()} GPUs")
    return device


def choose_dtype(requested: str, device: torch.device) -> torch.dtype:
    """The dtype of `training.precision` on a device."""
    if requested == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, requested)
