"""For the process of a vLLM server, on a CPU as on a GPU: writes the last hidden states of a request to a file.

vLLM imports this file by its name from the folder that PYTHONPATH names; docs/serving.md has the command. A request
asks by `kv_transfer_params: {"hidden_states_from": i}`, and those of its answer have the `hidden_states_path`. The file
holds `token_ids` [n] of the n tokens of its prompt, and `hidden_states` [n - i, 1, H] from the i-th on. It is there
whole or not at all, soon after the answer, for its owner alone: a prompt can be told from its states.
"""

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
)
from vllm.v1.request import RequestStatus


@dataclass
class Asked(PendingSave):
    """What is to be written."""

    first: int = 0


class HiddenStatesConnector(ExampleHiddenStatesConnector):
    """vLLM's own connector, which finds the states in the cache, for who asks, and without CUDA's events and locks."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.use_lock = False
        os.makedirs(self._storage_path, mode=0o700, exist_ok=True)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """In the scheduler: whether the blocks must stay until they are read, and what the answer says."""
        first = (request.kv_transfer_params or {}).get("hidden_states_from")
        if first is None or request.status == RequestStatus.FINISHED_ABORTED:
            self._request_filenames.pop(request.request_id, None)
            return False, None
        found = super().request_finished(request, block_ids)
        if pending := self._pending_saves.get(request.request_id):
            self._pending_saves[request.request_id] = Asked(**vars(pending), first=int(first))
        return found

    def _submit_async_write(self, pending: Asked) -> None:
        """In the worker, when the request has been computed."""
        if not self._is_tp_rank_zero:
            return
        places = torch.tensor(pending.block_ids)[:, None] * self._block_size + torch.arange(self._block_size)
        places = places.flatten()[pending.first : len(pending.token_ids)].to(self._kv_cache.device)
        states = extract_from_kv_cache(self._kv_cache, places, len(places)).cpu().contiguous()
        self._req_copy_events[pending.req_id] = Copied()
        tensors = {"hidden_states": states, "token_ids": pending.token_ids}
        self._req_futures[pending.req_id] = future = self._executor.submit(write, tensors, pending.filename)
        future.add_done_callback(partial(self._on_write_done, pending.req_id))


class Copied:
    """In place of a CUDA event: the copy was awaited."""

    def query(self) -> bool:
        return True


def write(tensors: dict[str, Tensor], path: str) -> None:
    beside = f"{path}.partial"
    os.close(os.open(beside, os.O_CREAT | os.O_WRONLY, 0o600))
    save_file(tensors, beside)
    os.replace(beside, path)
