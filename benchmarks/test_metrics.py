"""What metrics add to an evaluation: 1,000 completions judged by `contains` and `json_schema`.

The model is the tiny random Llama of test_rollout.py, its own teacher, with 250 prompts of 16 tokens and 4 completions
of 32 tokens each: a small model and few tokens, so that what is compared with is short. Every completion is made valid
JSON, which a schema takes longest over. `pytest -s benchmarks/test_metrics.py` prints the ratio.
"""

import json
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.harness import DRY, Row, interleave
from benchmarks.make_models import word_tokenizer
from benchmarks.test_rollout import engine_of, model_of, prompts_of
from distill.loss import ModelParts
from distill.models import split_head
from distill.report import MAIN_SET
from distill.run import Judges
from distill.runtime import MemoryLimits
from distill.training import evaluate

PROMPTS, LENGTH, ROLLOUTS, TOKENS = (5 if DRY else 250), 16, 4, 32
MOST = 0.05
SCHEMA = {
    "type": "object",
    "properties": {"words": {"type": "array", "items": {"type": "string", "pattern": "^[a-z<]"}}},
    "required": ["words"],
}


class _AsJson:
    """A tokenizer whose every text is JSON that the schema holds for, or nearly."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer

    def decode(self, token_ids: torch.Tensor, **options: Any) -> str:
        return json.dumps({"words": self._tokenizer.decode(token_ids, **options).split()})


def test_metrics_cost_little_of_an_evaluation(record) -> None:
    model, engine = model_of("tiny"), engine_of("tiny", "float32")
    parts = ModelParts(*split_head(model), torch.float32)
    prompts, tokenizer = prompts_of("tiny", PROMPTS, LENGTH), _AsJson(word_tokenizer(model.config.vocab_size))
    records = [{"answer": f"w{index}", "schema": SCHEMA} for index in range(PROMPTS)]
    limits, found = MemoryLimits(8192), {}

    def look() -> None:
        found["evaluation"] = evaluate(
            engine,
            parts,
            [parts],
            (prompts, torch.ones_like(prompts, dtype=torch.bool)),
            num_rollouts=ROLLOUTS,
            max_new_tokens=TOKENS,
            seed=1,
            vocab_size=model.config.vocab_size,
            limits=limits,
        )

    with Judges({MAIN_SET: ("evaluation.metrics", ["contains", "json_schema"])}) as judges:

        def judge() -> None:
            found["judged"] = judges(MAIN_SET, tokenizer, records, found["evaluation"].rollouts)

        timings = interleave({"evaluation": look, "metrics": judge}, rounds=2, warmup=0)
    assert all(len(each.values) == PROMPTS * ROLLOUTS and not each.failed for each in found["judged"].values())
    assert sum(found["judged"]["json_schema"].values) > PROMPTS  # most are valid
    group = f"{PROMPTS * ROLLOUTS} completions"
    for name, timing in timings.items():
        record(Row(group, name, timing.median, spread=timing.spread, tokens=PROMPTS * ROLLOUTS * TOKENS))
    ratio = timings["metrics"].median / timings["evaluation"].median
    print(f"\nmetrics: {timings['metrics'].median:.3f} s, {100 * ratio:.2f} % of an evaluation")
    assert DRY or ratio < MOST
