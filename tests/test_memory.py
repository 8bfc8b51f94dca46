"""Memory that runs out: really (RLIMIT_AS), and at chosen calls; what is retried, kept, and said at the end."""

import contextlib
import subprocess
import sys
from functools import partial
from weakref import WeakMethod

import pytest
import torch
from conftest import tiny_model
from rich.console import Console
from test_train import ROOT, environment, events_of, execute, metrics_of

from distill.config import load_config
from distill.loss import Group, Rollouts, model_parts, score
from distill.loss import head_pair as fused
from distill.rollout import RolloutEngine, SamplingOptions, local_engine
from distill.run import Run, checkpoint
from distill.runtime import MemoryLimitError, MemoryLimits, is_out_of_memory
from distill.runtime.memory import USUAL_TOKENS
from distill.runtime.micro_batches import micro_batches
from distill.train import main

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: 12 bytes"),
    MemoryError(),
]
FOUR_ROWS = {"training.num_rollouts_per_prompt": 4, "prompts.eval": None}


class Shortage:
    """Stands for a function and runs out of memory at chosen calls."""

    def __init__(self, real, error: Exception, short) -> None:
        self.real, self.error, self.short, self.calls = real, error, short, 0

    def __call__(self, *args, **options):
        self.calls += 1
        if self.short(self.calls, *args):
            raise self.error
        return self.real(*args, **options)


def test_what_says_that_memory_ran_out_is_known():
    assert all(map(is_out_of_memory, ERRORS))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_memory_that_runs_out_is_known_behind_the_error_that_follows(error):
    """As in the capture of a CUDA graph, whose end fails too."""

    @contextlib.contextmanager
    def capture():
        try:
            yield
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def caught(work) -> Exception:
        with pytest.raises(RuntimeError) as found:
            work()
        return found.value

    def captured():
        with capture():
            raise type(error)(*error.args)

    def explained(cause):
        try:
            captured()
        except RuntimeError as failure:
            raise RuntimeError("the wave failed") from (failure if cause else None)

    assert is_out_of_memory(caught(captured))
    assert is_out_of_memory(caught(lambda: explained(True)))
    assert not is_out_of_memory(caught(lambda: explained(False)))  # what `from None` says
    limits, attempts = MemoryLimits(1, rows_per_wave=2), iter([captured, lambda: "done"])
    assert limits.attempt("rollout", lambda: next(attempts)(), lambda: "1 rollout at once", "") == "done"


def test_errors_that_lead_to_one_another_in_a_circle_end():
    one, other = RuntimeError("one"), RuntimeError("other")
    one.__context__, other.__cause__ = other, one
    assert not is_out_of_memory(one)
    other.__context__ = MemoryError()
    other.__suppress_context__ = False
    assert is_out_of_memory(one)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_update_that_runs_out_is_retried_with_the_same_gradient(write_config, monkeypatch, error):
    """The second micro-batch fails, after the first has left its gradient: bit for bit as if always cut smaller."""
    changes = {**FOUR_ROWS, "training.tokens_per_micro_batch": 45}
    run = Run(load_config(write_config(changes)), Console(quiet=True), lambda: None)
    trainer, real = run.parts.trainer, fused.linear_distill_loss
    prompts, mask = trainer.encode([0, 1])
    rollouts = run.parts.engine.generate(prompts, mask, num_rollouts=4, prompt_keys=torch.arange(2))
    group = Group.of(rollouts)
    lengths = group.prompt_mask.sum(1), group.completion_lengths, group.prompt_index
    parts = micro_batches(*lengths, 45)
    assert len(parts) > 1
    hidden = score(trainer.lesson.teachers, group, parts)

    def gradients(work) -> dict[str, torch.Tensor]:
        work()
        return {name: parameter.grad.clone() for name, parameter in trainer.parameters.items()}

    monkeypatch.setattr(fused, "linear_distill_loss", Shortage(real, error, lambda call, *_: call == 2))
    learn = partial(trainer._gradients, trainer.lesson, hidden, group, torch.ones(8, dtype=torch.bool))
    retried = gradients(lambda: run.parts.limits.in_micro_batches("update", lengths, learn))
    monkeypatch.setattr(fused, "linear_distill_loss", real)
    smaller = micro_batches(*lengths, run.parts.limits.tokens_per_micro_batch)
    assert len(smaller) > len(parts)
    always_small = gradients(lambda: learn(smaller))
    whole = gradients(lambda: learn(micro_batches(*lengths, 10**6)))
    for name, gradient in retried.items():
        assert torch.equal(gradient, always_small[name])
        torch.testing.assert_close(gradient, whole[name])
    run.output.release()


def test_the_smaller_size_is_reported_and_stays_with_the_run(write_config, tmp_path, monkeypatch):
    real = fused.linear_distill_loss
    changes = {**FOUR_ROWS, "training.tokens_per_micro_batch": 45}
    execute(write_config(changes | {"training.output_dir": str(tmp_path / "whole")}))
    monkeypatch.setattr(fused, "linear_distill_loss", Shortage(real, ERRORS[1], lambda call, *_: call == 2))
    size = execute(write_config(changes)).parts.limits.tokens_per_micro_batch
    monkeypatch.setattr(fused, "linear_distill_loss", real)
    for one, other in zip(metrics_of(tmp_path / "run"), metrics_of(tmp_path / "whole"), strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    (event,) = events_of(tmp_path / "run")
    assert (event["event"], event["step"]) == ("memory", 1)
    assert f"again with training.tokens_per_micro_batch {size}" in event["message"]
    state = checkpoint.load_newest(tmp_path / "run" / "checkpoints").state
    assert state["trainer"]["limits"] == {"tokens_per_micro_batch": size, "rows_per_wave": None}
    again = Run(load_config(write_config(changes)), Console(quiet=True), lambda: None)
    assert again.parts.limits.tokens_per_micro_batch == size < 45
    again.output.release()


def test_scoring_and_evaluation_that_run_out_are_retried(write_config, tmp_path, monkeypatch):
    real = model_parts.completion_hidden
    # An evaluation asks for the student's and the teacher's states, then for those of each of two completions that are
    # looked at, then step 1 scores: calls 1 and 2, 3 to 6, and 7.
    for call, phase in ((2, "evaluation"), (7, "score")):
        monkeypatch.setattr(model_parts, "completion_hidden", real)
        folder = tmp_path / phase
        run = Run(
            load_config(write_config({"training.output_dir": str(folder), "training.max_steps": 1})),
            Console(quiet=True),
            lambda: None,
        )
        # Only now: loading checks the teacher.
        monkeypatch.setattr(model_parts, "completion_hidden", Shortage(real, ERRORS[1], lambda n, *_, c=call: n == c))
        assert run.execute() == 0
        (event,) = events_of(folder)
        assert f"memory ran out in the {phase} phase" in event["message"]
        assert len(metrics_of(folder)) == 1


def test_at_the_smallest_size_the_message_says_what_to_lower(write_config, tmp_path, monkeypatch, capsys):
    path = write_config({**FOUR_ROWS, "training.save_every": 100})
    execute(write_config({**FOUR_ROWS, "training.output_dir": str(tmp_path / "whole")}, "whole.yaml"))
    real = fused.linear_distill_loss
    monkeypatch.setattr(fused, "linear_distill_loss", Shortage(real, ERRORS[1], lambda call, *_: call > 2))
    assert main(["--config", str(path)]) == 2
    message = capsys.readouterr().err
    assert "memory ran out in the update phase at its smallest size" in message
    for key in ("rollout.max_new_tokens", "prompts.max_tokens", "training.activation_checkpointing"):
        assert key in message
    assert "Saved after step 2" in message
    assert "Traceback" not in message
    monkeypatch.setattr(fused, "linear_distill_loss", real)
    assert main(["--config", str(path)]) == 0
    assert metrics_of(tmp_path / "run")[:2] == metrics_of(tmp_path / "whole")[:2]
    assert len(metrics_of(tmp_path / "run")) == 5


def engine(name: str, **options) -> RolloutEngine:
    return local_engine(
        tiny_model("llama", vocab_size=272),
        sampling=SamplingOptions(max_new_tokens=8),
        eos_token_ids=[2],
        pad_token_id=0,
        precision="float32",
        engine=name,
        seed=0,
        **options,
    )


def sampled(of: RolloutEngine) -> Rollouts:
    prompts = torch.arange(3, 15).view(3, 4)
    keys = torch.arange(3)
    return of.generate(prompts, torch.ones_like(prompts, dtype=torch.bool), num_rollouts=4, prompt_keys=keys)


@pytest.mark.parametrize("name", ["native", "transformers"])
@pytest.mark.parametrize("fits", [8, 4, 2, 1])
def test_rollouts_that_run_out_are_sampled_fewer_at_once(name, fits):
    messages = []
    short = engine(name, limits=MemoryLimits(1, report=messages.append))
    target = "_decoder" if name == "native" else "_generate"
    rows = (lambda prompt, rows: rows) if name == "native" else (lambda prompts, *_: len(prompts))
    setattr(short, target, Shortage(getattr(short, target), ERRORS[1], lambda _, *given: rows(*given) > fits))
    found, whole = sampled(short), sampled(engine(name))
    assert short.limits.rows_per_wave < 12
    assert messages[-1].endswith(f"again with {short.limits.rows_per_wave} rollouts at once")
    assert torch.equal(found.completion_ids, whole.completion_ids)
    torch.testing.assert_close(found.logprob, whole.logprob)
    calls = getattr(short, target).calls
    sampled(short)  # the size is kept: nothing fails again
    assert len(messages) == messages.index(messages[-1]) + 1
    assert getattr(short, target).calls - calls <= -(-12 // short.limits.rows_per_wave) + 3


def test_rollouts_at_the_smallest_size_say_what_to_lower():
    short = engine("native")
    short._decoder = Shortage(None, MemoryError(), lambda *_: True)
    with pytest.raises(MemoryLimitError, match=r"rollout phase at its smallest size.*rollout\.max_new_tokens"):
        sampled(short)


def test_an_evaluations_engine_shares_the_size():
    first = engine("native")
    other = first.variant(seed=1, max_new_tokens=4)
    other._decoder = Shortage(other._decoder, ERRORS[1], lambda _, prompt, rows: rows > 4)
    sampled(other)
    assert first.limits.rows_per_wave == 6  # that is one prompt's four at once


LEAVE_FREE = """
import resource, sys

def leave_free(mebibytes):
    used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
    limit = used * 1024 + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
"""

REAL_UPDATE = (
    LEAVE_FREE
    + """
from rich.console import Console
from distill.config import load_config
from distill.run import Run

run = Run(load_config(sys.argv[1]), Console(), lambda: None)
gradients = run.parts.trainer._gradients
def limited(*args):
    leave_free(int(sys.argv[2]))
    return gradients(*args)
run.parts.trainer._gradients = limited
train = run._train
def until_trained():
    try:
        return train()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
run._train = until_trained
sys.exit(run.execute())
"""
)

REAL_ROLLOUTS = (
    LEAVE_FREE
    + """
sys.path.insert(0, "tests")
import torch
from test_memory import engine
from distill.runtime import MemoryLimits
rows = 16_000
def sampled(of, rows):
    prompts = torch.arange(3, 7)[None]
    everything = torch.ones_like(prompts, dtype=torch.bool)
    return of.generate(prompts, everything, num_rollouts=rows, prompt_keys=torch.zeros(1, dtype=torch.long))
# oneDNN has to have its kernels by then: where it meets the limit as it makes one, it makes none any more, and 16,000
# rows are sampled one by one.
sampled(engine("native"), rows // 4)
short = engine("native", limits=MemoryLimits(1, report=print))
leave_free(int(sys.argv[1]))
found = sampled(short, rows)
assert short.limits.rows_per_wave < rows == len(found.completion_lengths)
assert found.completion_lengths.min() > 0
"""
)


def in_a_process(script: str, *arguments) -> str:
    one_thread = environment() | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_memory_that_really_runs_out_in_an_update(write_config, tmp_path):
    """The operating system refuses the process more address space; the run halves its micro-batch and goes on."""
    changes = {
        "training.num_rollouts_per_prompt": 200,
        "rollout.max_new_tokens": 120,
        "rollout.prompts_per_batch": 1,
        "training.tokens_per_micro_batch": 10**6,
        "training.max_steps": 1,
        "prompts.eval": None,
    }
    # Between what the whole group needs and what its half does: where oneDNN itself, and no tensor, meets the limit, it
    # can make no kernel any more in that process, however much there is later.
    in_a_process(REAL_UPDATE, write_config(changes), 160)
    events = events_of(tmp_path / "run")
    assert any("memory ran out in the update phase" in event["message"] for event in events)
    execute(write_config(changes | {"training.output_dir": str(tmp_path / "whole")}))
    (one,), (other,) = metrics_of(tmp_path / "run"), metrics_of(tmp_path / "whole")
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_memory_that_really_runs_out_in_rollouts():
    assert "memory ran out in the rollout phase" in in_a_process(REAL_ROLLOUTS, 80)


def test_on_a_gpu_a_micro_batch_is_as_large_as_fits(monkeypatch):
    """Begun with more than any memory holds, halved until a step fits; what is kept for rollouts stays."""
    lengths = torch.full((4,), 1000), torch.full((32,), 1000), torch.arange(4).repeat_interleave(8)
    fits, released, tried = 15_000, [], []
    limits = MemoryLimits("auto", device=torch.device("cuda"))

    class Kept:
        def release(self, phase):
            released.append(phase)

    kept = Kept()
    limits.releases.append(WeakMethod(kept.release))

    def work(parts):
        tokens = max(len(rows) * 1000 + 1000 * len(set(lengths[2][rows].tolist())) for rows in parts)
        tried.append(tokens)
        if tokens > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [len(rows) for rows in parts]

    assert limits.in_micro_batches("update", lengths, work) == [8, 8, 8, 8]
    assert tried == [36_000, 18_000, 9_000]
    assert not released
    assert limits.state()["tokens_per_micro_batch"] == 9_000
    fits = 1_500  # not even a row: then what is kept goes, too
    with pytest.raises(MemoryLimitError):
        limits.in_micro_batches("update", lengths, work)
    assert released == ["update"]


@pytest.mark.parametrize(("device", "fixed"), [("cpu", False), ("cuda", True)])
def test_elsewhere_a_micro_batch_has_a_usual_size(device, fixed):
    limits = MemoryLimits("auto", device=torch.device(device), fixed=fixed)
    assert limits.tokens_per_micro_batch == USUAL_TOKENS
