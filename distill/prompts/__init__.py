"""Prompts: records read from files, folders and hub datasets, tokenised with the chat template, and their order.

In: paths and a tokenizer. Out: a `PromptSet`, and batches of left-padded token ids.
"""

from distill.prompts.answers import AnswerOptions
from distill.prompts.conversations import conversation_of
from distill.prompts.prompt_set import PromptSet, epoch_batches, epoch_order, left_pad, load_prompts
from distill.prompts.records import PromptError
from distill.prompts.tokens import PromptTokeniser, read_template, tokenise

__all__ = [
    "AnswerOptions",
    "PromptError",
    "PromptSet",
    "PromptTokeniser",
    "conversation_of",
    "epoch_batches",
    "epoch_order",
    "left_pad",
    "load_prompts",
    "read_template",
    "tokenise",
]
