"""A small real server of the endpoints that training uses: a tiny transformers model behind HTTP, which can fail."""

import json
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import save
from transformers import AutoModelForCausalLM, AutoTokenizer


class ModelServer:
    """Serves a folder at `url`.

    `faults` are taken from the left, one a request to /v1/completions: a status, `cut` (half an answer), `silent`
    (without log-probabilities), a number of seconds after which it comes unless whoever asked has given up, something
    to call first, or None for a true answer.
    """

    def __init__(self, folder: Path, *, echo_only: bool = False, port: int = 0) -> None:
        self.folder, self.echo_only = Path(folder), echo_only
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.faults: deque = deque()
        self.drift, self._scored = 0.0, 0  # nats by which each answer is below the one before
        self.states_folder: Path | None = None  # where hidden states are written for who asks
        self.said_folder: Path | None = None  # which the answers name instead
        self.file_faults: deque[str] = deque()  # one a file: see `_write_states`
        self.layer, self._files = -1, 0  # whose states, and how many files so far
        self.calls: list[tuple[str, dict]] = []
        self._lock = threading.Lock()
        self.max_model_len: int | None = 256
        self.max_logprobs = 20
        self.dtype, self.logprobs_mode, self.deaf = "torch.float32", "raw_logprobs", False
        self._start(port)

    def _start(self, port: int) -> None:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_) -> None: ...

            def do_GET(self) -> None:
                owner._answer(self, None)

            def do_POST(self) -> None:
                owner._answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}"))

        ThreadingHTTPServer.allow_reuse_address = True
        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def start_again(self) -> None:
        """On the same port, with the weights of its folder, as a new process would."""
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        self._start(self.port)

    def go_away(self, until: Callable[[], bool]) -> None:
        """Stops, and starts again as soon as `until()` holds."""

        def come_back() -> None:
            while not until():
                time.sleep(0.001)
            self.start_again()

        self.stop()
        threading.Thread(target=come_back, daemon=True).start()

    def _answer(self, handler: BaseHTTPRequestHandler, body: dict | None) -> None:
        path = handler.path.split("?")[0]
        with self._lock:
            self.calls.append((path, body))
            fault = self.faults.popleft() if path == "/v1/completions" and self.faults else None
        if isinstance(fault, float):
            select.select([handler.connection], [], [], fault)  # readable once the other side has closed it
        if callable(fault):
            fault()
        route = getattr(self, "_" + path.strip("/").replace("/", "_"), None)
        status = fault if isinstance(fault, int) else 200 if route else 404
        try:
            content = route(body) if status == 200 else {"error": {"message": f"a fault of status {status}"}}
        except Exception as error:
            status, content = 400, {"error": {"message": str(error)}}
        if fault == "silent":
            content["choices"] = [{**c, "prompt_logprobs": None, "logprobs": None} for c in content["choices"]]
        data = json.dumps(content).encode()
        with suppress(OSError):  # whoever asked may have given up
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data[: len(data) // 2] if fault == "cut" else data)

    def _v1_models(self, _: None) -> dict:
        return {"data": [{"id": "served", "max_model_len": self.max_model_len}]}

    def _tokenize(self, body: dict) -> dict:
        return {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}

    @torch.no_grad()
    def likeliest(self, token_ids: list[int], count: int) -> list[dict[str, dict]]:
        """Of every place but the first: so many tokens, and the one that stands there."""
        if count > self.max_logprobs:
            raise ValueError(f"requested prompt logprobs of {count}, more than the maximum of {self.max_logprobs}")
        with self._lock:
            known = self.model(torch.tensor([token_ids])[:, :-1]).logits[0].log_softmax(-1)
        found = []
        for logprobs, token in zip(known, token_ids[1:], strict=True):
            ids = {token, *logprobs.topk(min(count, len(logprobs))).indices.tolist()}
            found.append({str(one): {"logprob": logprobs[one].item()} for one in ids})
        return found

    @torch.no_grad()
    def logprobs(self, token_ids: list[int]) -> list[float]:
        """Of every token but the first."""
        ids = torch.tensor([token_ids])
        with self._lock:
            known = self.model(ids[:, :-1]).logits[0].log_softmax(-1)
            self._scored += 1
            drift = self.drift * self._scored if self.drift else 0
        return (known.gather(1, ids[0, 1:, None])[:, 0] - drift).tolist()

    @torch.no_grad()
    def _write_states(self, token_ids: list[int], first: int) -> Path:
        """Of each token from the `first` on, after a layer; a file fault is `half`, `late`, `lost` or what is wrong."""
        with self._lock:
            fault = self.file_faults.popleft() if self.file_faults else None
            given: list[torch.Tensor] = []
            hook = self.model.model.layers[self.layer].register_forward_hook(lambda *_: given.append(_[2]))
            self.model(torch.tensor([token_ids]))
            hook.remove()
            self._files += 1
            path = self.states_folder / f"{self._files}.safetensors"
        states, ids = given[0].view(len(token_ids), 1, -1)[first:], torch.tensor(token_ids)
        if fault == "nan":
            states = states * torch.nan
        if fault == "short":
            states = states[1:]
        if fault == "others":
            ids = ids.flip(0)
        data = save({"hidden_states": states.contiguous(), "token_ids": ids})

        def write() -> None:
            beside = path.with_suffix(".partial")
            beside.write_bytes(data)
            beside.rename(path)

        if fault == "late":
            threading.Timer(0.3, write).start()
        elif fault == "half":
            path.write_bytes(data[: len(data) // 2])
        elif fault != "lost":
            write()
        return path

    def _v1_completions(self, body: dict) -> dict:
        prompt = body["prompt"]
        if max(prompt) >= self.model.config.vocab_size:
            raise ValueError(f"token id {max(prompt)} is out of vocabulary")
        if "n" in body:
            return {"choices": [self._sampled(body, number) for number in reversed(range(body["n"]))]}
        if count := body.get("prompt_logprobs"):
            if self.echo_only:
                return {"choices": [{"text": ""}]}
            return {"choices": [{"text": "", "prompt_logprobs": [None, *self.likeliest(prompt, count)]}]}
        if self.states_folder and (asked := body.get("kv_transfer_params")):
            path = self._write_states(prompt, asked["hidden_states_from"])
            said = str((self.said_folder or self.states_folder) / path.name)
            return {"choices": [{"text": ""}], "kv_transfer_params": {"hidden_states_path": said}}
        found = self.logprobs(prompt)
        if body.get("echo"):
            return {"choices": [{"logprobs": {"token_logprobs": [None, *found, -1.0]}}]}
        if self.echo_only:  # SGLang passes over what it does not know
            return {"choices": [{"text": "", "logprobs": None}]}
        said = [None, *({str(token): {"logprob": p}} for token, p in zip(prompt[1:], found, strict=True))]
        return {"choices": [{"text": "", "prompt_logprobs": said}]}

    @torch.no_grad()
    def _sampled(self, body: dict, number: int) -> dict:
        """A completion, drawn with temperature alone, and the plain or the tempered log-probabilities of its tokens."""
        generator = torch.Generator().manual_seed(body["seed"] + number)
        ids, logprobs, count = list(body["prompt"]), [], len(body["prompt"])
        while len(ids) < count + body["max_tokens"] and (not logprobs or ids[-1] not in body["stop_token_ids"]):
            with self._lock:
                logits = self.model(torch.tensor([ids])).logits[0, -1]
            tempered = logits / body["temperature"]
            for token, bias in (body["logit_bias"] or {}).items():
                tempered[int(token)] += bias
            ids.append(int(torch.multinomial(tempered.softmax(-1), 1, generator=generator)))
            shown = logits if self.logprobs_mode == "raw_logprobs" else tempered
            logprobs.append(float(shown.log_softmax(-1)[ids[-1]]))
        return {"index": number, "token_ids": ids[count:], "logprobs": {"token_logprobs": logprobs}}

    def _server_info(self, _: None) -> dict:
        return {"vllm_config": {"model_config": {"dtype": self.dtype, "logprobs_mode": self.logprobs_mode}}}

    def _collective_rpc(self, body: dict) -> dict:
        assert body["method"] == "reload_weights"
        model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"], dtype=torch.float32).eval()
        assert model.config.num_hidden_layers == self.model.config.num_hidden_layers, "another architecture"
        assert not model.config.tie_word_embeddings, "the head would stay as it was"
        if not self.deaf:
            self.model = model
        return {"results": [None]}

    def _reset_prefix_cache(self, _: dict) -> dict:
        return {}
