"""A client of an OpenAI-compatible server (vLLM, SGLang): requests with time-outs, and again with growing pauses.

What may pass is tried again: no connection, a time-out, a broken answer, the statuses of an overloaded or starting
server. What will not pass is a `ServerError` at once. The key of a server that asks for one is in DISTILL_SERVER_KEY.
"""

import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T, U = TypeVar("T"), TypeVar("U")

CONCURRENT = 64  # requests under way at once; the server makes its own batches of them
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds
PASSING = {408, 425, 429, 500, 502, 503, 504}


class ServerError(ValueError):
    """A server that cannot be used, with what it said and what to do."""


class UnavailableError(ServerError):
    """What may pass by itself."""


class Server:
    """The server at a URL, named by its configuration `key`; `report` hears of every pause."""

    def __init__(self, url: str, key: str, *, timeout_seconds: float, retries: int) -> None:
        self.url, self.key = url.rstrip("/").removesuffix("/v1"), key
        self.timeout_seconds, self.retries = timeout_seconds, retries
        self.pause, self.hint, self._reported = FIRST_PAUSE, "start the server", ""
        self.report: Callable[[str], None] = lambda message: print(message, file=sys.stderr, flush=True)

    def __str__(self) -> str:
        return f"{self.key} {self.url}"

    def request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """One attempt: GET, or POST where there is a body; the decoded JSON, None for an empty answer."""
        headers = {"Content-Type": "application/json"}
        if token := os.environ.get("DISTILL_SERVER_KEY"):
            headers["Authorization"] = f"Bearer {token}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with urllib.request.urlopen(request, timeout=self.timeout_seconds) as answer:
                content = answer.read()
            return json.loads(content) if content else None
        except urllib.error.HTTPError as error:
            with error:
                said = " ".join(error.read(2000).decode(errors="replace").split())[:500]
            kind = UnavailableError if error.code in PASSING else ServerError
            raise kind(f"{self}: {path} answered with status {error.code}: {said or error.reason}") from None
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            reason = getattr(error, "reason", None) or error
            raise UnavailableError(f"{self}: {path}: {reason or type(error).__name__}") from None

    def again(self, work: Callable[[], T]) -> T:
        """`work()`, again after each `UnavailableError` with pauses that double; the last one is raised."""
        for attempt in range(self.retries + 1):
            try:
                return work()
            except UnavailableError as error:
                if attempt == self.retries:
                    raise UnavailableError(
                        f"{error}. Given up after {attempt + 1} attempts; {self.hint}, and give the same command "
                        f"again, or raise {self.key.split('.')[0]}.retries"
                    ) from None
                seconds = min(self.pause * 2**attempt, LONGEST_PAUSE)
                again = f"again in {seconds:.0f} s ({attempt + 1} of {self.retries})"
                if self._reported != (message := f"{error}; {self.hint}; {again}"):  # of many requests at once
                    self._reported = message
                    self.report(message)
                time.sleep(seconds)
        raise AssertionError

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """`request`, again where it may pass."""
        return self.again(lambda: self.request(path, body))

    def model(self, wanted: str | None = None) -> dict[str, Any]:
        """What the server says of the model that it serves: `wanted` where that is among several."""
        models = self.call("/v1/models")["data"]
        named = [model for model in models if model["id"] == wanted] or models
        if len(named) != 1:
            names = ", ".join(repr(model["id"]) for model in models)
            raise ServerError(f"{self}: serves {len(models)} models ({names}): serve one there")
        return named[0]

    def check_tokenizer(self, model: str, text: str, token_ids: Sequence[int]) -> None:
        """Compares how the server tokenises `text`; a server that does not say is believed."""
        try:
            body = {"model": model, "prompt": text, "add_special_tokens": False}
            found = self.call("/tokenize", body)["tokens"]
        except UnavailableError:
            raise
        except (ServerError, KeyError, TypeError):
            return
        if list(found) != list(token_ids):
            raise ServerError(
                f"{self}: has another vocabulary: {text[:40]!r} is {found[:8]}... there and {list(token_ids)[:8]}... "
                f"here. Serve a model with the tokenizer of the student"
            )


def about_prompt(model: str, token_ids: Sequence[int]) -> dict[str, Any]:
    """A request to /v1/completions that is about its prompt: one token is sampled, as some servers refuse none."""
    return {"model": model, "prompt": list(token_ids), "max_tokens": 1, "temperature": 1.0}


def in_parallel(work: Callable[[T], U], items: Iterable[T]) -> list[U]:
    """`work` of every item, many at a time; the first failure ends it."""
    with ThreadPoolExecutor(CONCURRENT) as pool:
        try:
            return list(pool.map(work, items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
