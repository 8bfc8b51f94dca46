"""The last hidden states of a prompt's tokens, which a vLLM server writes to a file of a folder that both see.

The server has `vllm_plugin/hidden_states_connector.py` for that. A file is deleted when it is read, and only one that
holds the tokens which were asked about: its name is what the server says.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from distill.servers.client import Server, ServerError, UnavailableError, about_prompt

PLUGIN = Path(__file__).parent / "vllm_plugin"
LONGEST_LOOK, LONGEST_WAIT = 0.05, 60.0  # seconds between two looks for a file, and for it to come after the answer


class PromptStates:
    """The hidden states that a server gives, as they are after its last layer and before the norm that follows."""

    def __init__(self, server: Server, model: str) -> None:
        self.server, self.model = server, model
        self.remedy = "start one that does"
        """What to do where the server gives something else."""

    def gives(self, token_ids: Sequence[int]) -> bool:
        """Whether the server has any to give. Raises `ServerError`."""
        return self.server.again(lambda: self._attempt(token_ids, 0)) is not None

    def of(self, token_ids: Sequence[int], first: int = 0) -> Tensor:
        """[n - first, H] in the server's precision, of each of n tokens from the `first` on. Raises `ServerError`."""
        found = self.server.again(lambda: self._attempt(token_ids, first))
        if found is None:
            raise ServerError(f"{self.server}: gives no hidden states; {self.remedy}")
        return found

    def _attempt(self, token_ids: Sequence[int], first: int) -> Tensor | None:
        asked = {"kv_transfer_params": {"hidden_states_from": first}}
        answer = self.server.request("/v1/completions", about_prompt(self.model, token_ids) | asked)
        try:
            path = Path(answer["kv_transfer_params"]["hidden_states_path"])
        except (KeyError, TypeError):
            return None
        said, shape = f"{self.server}: the hidden states are in {path}", (len(token_ids) - first, 1)
        found = self._awaited(path, said)
        hidden, ids = found.get("hidden_states"), found.get("token_ids")
        if ids is None or ids.tolist() != list(token_ids):
            raise ServerError(f"{said}, which holds those of other tokens than it was asked about")
        if hidden is None or hidden.dim() != 3 or hidden.shape[:2] != shape:
            held = "none" if hidden is None else f"a shape of {list(hidden.shape)}"
            raise ServerError(f"{said}, which holds {held}, where {[*shape, 'H']} is meant; {self.remedy}")
        path.unlink(missing_ok=True)
        return hidden[:, 0]

    def _awaited(self, path: Path, said: str) -> dict[str, Tensor]:
        """What the file holds, as soon as it is there whole."""
        wait = min(LONGEST_WAIT, self.server.timeout_seconds)
        until, pause, error = time.monotonic() + wait, 0.001, "it is not there"
        while time.monotonic() < until:
            try:
                return load(path.read_bytes())
            except FileNotFoundError:
                if not path.parent.is_dir():
                    raise ServerError(
                        f"{said}, a folder that is not here: both must see it under one path; {self.remedy}"
                    ) from None
            except PermissionError:
                raise ServerError(f"{said}, which only the server's user may read: be the same here") from None
            except (OSError, SafetensorError) as failure:
                error = f"it is not whole ({failure})"
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_LOOK)
        raise UnavailableError(f"{said}, and after {wait:g} seconds {error}")
