"""What samples from a model, as the `rollout` section says."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.config import Config
from distill.models import WorkingCopy, eos_ids, named_ids
from distill.rollout import RolloutEngine, SamplingOptions, ServedWeights, VllmEngine, local_engine
from distill.runtime import MemoryLimits
from distill.servers import Server
from distill.training import RankedVllmEngine, Ranks

SERVED = "rollout-model"  # folder of a run through which a server gets the student's weights


def make_engine(
    model: PreTrainedModel,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    precision: str,
    limits: MemoryLimits,
    ranks: Ranks | None = None,
    working: WorkingCopy | None = None,
    compiled: bool = False,
) -> RolloutEngine | VllmEngine | RankedVllmEngine:
    """What samples from `model` as `rollout` says, in a precision that may be decided already; `working` is a copy that
    there is of it, whose weights it shares, and `compiled` has it compile its layers."""
    rollout = config.rollout
    common = {
        "sampling": SamplingOptions(
            rollout.max_new_tokens, rollout.temperature, rollout.top_k, rollout.top_p, rollout.min_p
        ),
        "eos_token_ids": named_ids(rollout.stop_ids, tokenizer) or eos_ids(model, tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "seed": config.training.seed,
        "vocab_size": vocab_size,
    }
    if rollout.engine == "vllm":
        limit = {"timeout_seconds": rollout.timeout_seconds, "retries": rollout.retries}
        server, folder = Server(rollout.server, "rollout.server", **limit), config.training.output_dir / SERVED
        common["corrects_sampler"] = config.loss.importance_sampling == "sampler"

        def make(whole: PreTrainedModel) -> VllmEngine:
            return VllmEngine(model, ServedWeights(whole, server, folder, tokenizer, precision), **common)

        return make(model) if ranks is None or ranks.size == 1 else RankedVllmEngine(ranks, model, make)
    return local_engine(
        model,
        **common,
        precision=precision,
        engine=rollout.engine,
        memory_budget_bytes=None if rollout.memory_gib is None else int(rollout.memory_gib * 2**30),
        compiled=compiled,
        limits=limits,
        working=working,
    )
