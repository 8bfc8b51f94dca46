"""`python -m distill.chat MODEL`: talk to a model that a run wrote, or to any other model reference."""

import argparse
import sys
from typing import Any

import torch

from distill.models import ModelError, load_model, load_tokenizer
from distill.prompts import tokenise


class _Printer:
    """Prints a completion while `generate` makes it; only whole words, so that no character is cut in two."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.token_ids, self.printed, self.prompt_seen = tokenizer, [], 0, False

    @property
    def text(self) -> str:
        return self.tokenizer.decode(self.token_ids, skip_special_tokens=True)

    def put(self, token_ids: torch.Tensor) -> None:
        if not self.prompt_seen:  # the first call brings the prompt
            self.prompt_seen = True
            return
        self.token_ids += token_ids.flatten().tolist()
        self._print(self.text.rfind(" ") + 1)

    def end(self) -> None:
        self._print(len(self.text))
        print()

    def _print(self, end: int) -> None:
        print(self.text[self.printed : end], end="", flush=True)
        self.printed = max(self.printed, end)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m distill.chat", description="Talk to a model; an empty line ends it."
    )
    parser.add_argument("model", help="for example outputs/default/final")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.7)
    options = parser.parse_args(argv)
    try:
        on_gpu = torch.cuda.is_available()
        placed = {"device": "cuda", "dtype": torch.bfloat16} if on_gpu else {}
        tokenizer, model = load_tokenizer(options.model), load_model(options.model, **placed)
    except ModelError as error:
        print(error, file=sys.stderr)
        return 2
    templated = tokenizer.chat_template is not None
    messages: list[dict[str, str]] = []
    while line := _read_line():
        messages.append({"role": "user", "content": line})
        prompt = torch.tensor([tokenise(messages, tokenizer, templated)], device=model.device)
        printer = _Printer(tokenizer)
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=options.max_new_tokens,
            do_sample=True,
            temperature=options.temperature,
            top_p=0.9,
            top_k=0,
            pad_token_id=tokenizer.pad_token_id,
            streamer=printer,
        )
        messages.append({"role": "assistant", "content": printer.text})
    return 0


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
