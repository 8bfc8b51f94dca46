"""The student's weights on a vLLM server: given through a folder that both see, shown by a probe."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.models import merged, save_model
from distill.servers import PROBE, TOLERANCE, PromptScores, Server, ServerError, UnavailableError, mean_gap


class ServedWeights:
    """The student's weights on a server; `stale` says that they have changed here.

    `snapshot` keeps those of now, in the folder and as the probe that shows them, and `ensure` gives the server the
    snapshot, also from another thread while the student is trained on.
    """

    def __init__(
        self, model: PreTrainedModel, server: Server, folder: Path, tokenizer: PreTrainedTokenizerBase, precision: str
    ) -> None:
        """Writes the folder, which a server can be started on, and checks the one that is there.

        Raises `ServerError` for another precision or vocabulary, or where weights cannot be exchanged.
        """
        self.server, self.folder, self.tokenizer = server, folder.absolute(), tokenizer
        self.stale, self.loaded = True, False
        self.dtype = model.dtype if precision == "auto" else getattr(torch, precision)
        server.hint = (
            f"serve it with VLLM_SERVER_DEV_MODE=1 vllm serve {self.folder} --generation-config vllm "
            f"--dtype {str(self.dtype).removeprefix('torch.')}"
        )
        self._write(model)
        self.name = server.model()["id"]
        config = self._server_info()
        self.precision, self.logprobs_mode = config["dtype"].removeprefix("torch."), config["logprobs_mode"]
        if precision not in ("auto", self.precision) or self.precision not in TOLERANCE:
            raise ServerError(f"{server}: computes in {self.precision}, and rollout.precision is {precision}")
        self.dtype = getattr(torch, self.precision)
        self._probe_ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        server.check_tokenizer(self.name, PROBE, self._probe_ids)
        self._scores = PromptScores(server, self.name)

    def snapshot(self, model: PreTrainedModel) -> None:
        """Keeps the weights of now of the student, which is in one piece."""
        if self.stale:
            self._write(model)
            self._own, self.stale, self.loaded = self._probe(model), False, False

    def ensure(self) -> None:
        """Returns when the server has the snapshot. Raises `ServerError`; an `UnavailableError` may pass."""
        if self.loaded and self._gap() <= TOLERANCE[self.precision]:
            return
        self.loaded = False
        try:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}}
            self.server.request("/collective_rpc", body)
            self.server.request("/reset_prefix_cache", {})  # its keys and values are the old weights'
        except UnavailableError:
            raise
        except ServerError as error:
            raise ServerError(f"{error}: it did not take the student's weights; {self.server.hint}") from None
        gap = self._gap()
        if not gap <= TOLERANCE[self.precision]:
            self.stale = True
            raise ServerError(
                f"{self.server}: after it was given the student's weights, its log-probabilities of a fixed text are "
                f"off by {gap:.3g} nats a token, where {TOLERANCE[self.precision]} is allowed: it serves another "
                f"model, or kept some weights; {self.server.hint}"
            )
        self.loaded = True

    def _gap(self) -> float:
        """Mean absolute difference between the server's log-probabilities of the probe and the snapshot's."""
        return mean_gap(self._own.tolist(), self._scores.score(self._probe_ids, attempts=False))

    @torch.no_grad()
    def _probe(self, model: PreTrainedModel) -> Tensor:
        """The student's own log-probabilities of the probe."""
        device = model.device
        ids = torch.tensor([self._probe_ids], device=device)
        # FlashAttention takes no float32, which the student's weights are.
        flash = "flash" in model.config._attn_implementation
        with torch.autocast(device.type, torch.bfloat16, enabled=flash):
            logits = model(ids[:, :-1]).logits
        return logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[0, :, 0].cpu()

    @torch.no_grad()
    def _write(self, model: PreTrainedModel) -> None:
        """The student as an ordinary model folder, whose files appear whole.

        Its head is never tied: a server that loads tied weights into a running model leaves its head as it was.
        """
        plain, partial = merged(model), self.folder.with_name(f".{self.folder.name}.partial")
        embedding, head = plain.get_input_embeddings(), plain.get_output_embeddings()
        if head.weight is embedding.weight:
            own = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
            own.weight, own.bias = nn.Parameter(head.weight.clone(), requires_grad=False), head.bias
            plain.set_output_embeddings(own)
            for config in (plain.config, plain.config.get_text_config()):
                config.tie_word_embeddings = False
        plain.config.dtype = self.dtype
        state = {name: tensor.to(self.dtype) for name, tensor in plain.state_dict().items()}
        try:
            shutil.rmtree(partial, ignore_errors=True)
            save_model(plain, partial, state_dict=state)
            self.tokenizer.save_pretrained(partial)
            self.folder.mkdir(parents=True, exist_ok=True)
            for file in partial.iterdir():
                os.replace(file, self.folder / file.name)
            partial.rmdir()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise ServerError(
                f"{self.server}: the student could not be written to {self.folder}, which it reads: {error}. "
                f"Make room or make it writable, and give the same command again"
            ) from None

    def _server_info(self) -> dict[str, Any]:
        try:
            return self.server.call("/server_info?config_format=json")["vllm_config"]["model_config"]
        except UnavailableError:
            raise
        except (ServerError, KeyError, TypeError):
            raise ServerError(
                f"{self.server}: takes no weights: a vLLM server does when it is started with VLLM_SERVER_DEV_MODE=1 "
                f"(on a network that only you reach); {self.server.hint}"
            ) from None
