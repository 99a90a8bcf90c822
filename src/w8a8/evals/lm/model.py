"""The model that lm-evaluation-harness asks: a server's completions, whatever engine runs it.

Texts become tokens here, as the harness's own model of transformers does it (with the tokenizer's special tokens, cut
from the left to the context, with its chat template), and go to `/v1/completions` as tokens: so scores equal what is
published with that model. A text's log-probability comes from an echo of the prompt with log-probabilities. Without a
tokenizer, texts and chats go as they are, and nothing can be scored.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from w8a8.errors import ServerError, UsageError, first_line
from w8a8.evals.asking import Reply, Server, ask_all
from w8a8.evals.lm.journal import Answer, Answers, hashed

MAX_ANSWER = 256
"""Tokens of an answer where a task does not say, as in the harness."""

CHAT_STOPS = 4
"""Stop strings that OpenAI's chat API takes; the harness sends no more, either."""

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Shows progress over a number of requests of a kind: a context whose value is called with the number just answered."""


class ApiModel(TemplateLM):  # type: ignore[misc]
    """The model `name` of a server, for the harness."""

    def __init__(
        self,
        server: Server,
        name: str,
        tokenizer: Any,
        answers: Answers,
        *,
        context: int,
        concurrency: int,
        chat: bool,
        progress: Progress,
    ) -> None:
        """Ask `server`, `concurrency` requests at a time, of at most `context` tokens; record `answers`.

        `tokenizer` is transformers', or None; with `chat` prompts are chats.
        """
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = context
        self._server, self._name, self._answers = server, name, answers
        self._concurrency, self._chat, self._progress = concurrency, chat, progress

    # --- what the harness asks a model about ----------------------------------------------------------------------

    @property
    def eot_token_id(self) -> Any:
        """The end-of-text token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> Any:
        """What stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """What a cache of prompts would be known by; none is kept."""
        return ""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Cut a text into tokens, with the special ones that the tokenizer adds unless the text has them."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **special))

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Make a text of a chat: the template's, or JSON where the server has the tokenizer.

        A template that refuses a system message is given none. Raises UsageError where it refuses the rest, too.
        """
        if self.tokenizer is None:
            return json.dumps(chat_history)
        how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **how))
        except TemplateError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise UsageError(f"{self._name}: the chat template refuses a task: {first_line(error)}") from error
            return self.apply_chat_template(others, add_generation_prompt)

    # --- the harness's requests -----------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score each request's continuation behind its context: nats, and whether it is the likeliest."""
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:  # noqa: ARG002
        """Score each request's whole text, window by window: nats."""
        windows, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            for window in map(make_disjoint_window, rolling):
                windows.append((None, *window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += nats
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002
        """Answer each request's prompt."""
        return [answer.text for answer in self._ask("answers", [self._generation(*each.args) for each in requests])]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        asked = []
        for _, context, continuation in requests:
            ids = (context + continuation)[1 - self.max_length :]  # the server adds a token
            body = {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
            asked.append(Request(body, max(1, len(ids) - len(continuation))))
        return [(answer.logprob, answer.greedy) for answer in self._ask("log-likelihoods", asked)]

    def _generation(self, context: str, settings: Mapping[str, Any]) -> "Request":
        """Make the request that a task's `settings` ask for. Raises UsageError for longer answers than the context."""
        more = normalize_gen_kwargs(settings, MAX_ANSWER)
        more.pop("do_sample", None)
        most, stop = more.pop("max_gen_toks"), [string for string in more.pop("until") if string]
        if most >= self.max_length:
            raise UsageError(f"a task asks for answers of {most} tokens, and {self._name} has {self.max_length} in all")
        body = {"max_tokens": most, "temperature": more.pop("temperature", 0), "extra_body": more}
        if self.tokenizer is not None:
            body["prompt"] = self.tok_encode(context)[most - self.max_length :]
        elif self._chat:
            body["messages"], stop = json.loads(context), stop[:CHAT_STOPS]
        else:
            body["prompt"] = context
        return Request({**body, **({"stop": stop} if stop else {})})

    # --- asking ---------------------------------------------------------------------------------------------------

    def _ask(self, what: str, requests: Sequence["Request"]) -> list[Answer]:
        """Ask what the journal has no answer to; return all answers. Raises ServerError for the first that fails."""
        seen, keys, found = Counter[str](), list[str](), self._answers.found
        for request in requests:
            key = request.key
            drawn = request.body["temperature"] and seen[key]  # further samples of one request
            keys.append(f"{key}-{drawn}" if drawn else key)
            seen[key] += 1
        waiting = {name: request for name, request in zip(keys, requests, strict=True) if name not in found}
        names, before = list(waiting), self._answers.seconds
        every = len(set(keys))
        with self._progress(what, every) as advance:
            advance(every - len(waiting))

            def answered(number: int, reply: Reply, seconds: float) -> None:
                answer = waiting[names[number]].read(self._server.base_url, reply)
                self._answers.record(replace(answer, request=names[number], seconds=round(before + seconds, 3)))
                advance(1)

            bodies = {i: {"model": self._name, **waiting[name].body} for i, name in enumerate(names)}
            if bodies:
                ask_all(self._server, bodies, concurrency=self._concurrency, answered=answered)
        return [found[name] for name in keys]


@dataclass(frozen=True, slots=True)
class Request:
    """What the client is given; for a text to be scored, `scored` is the first token that counts, else 0."""

    body: Mapping[str, Any]
    scored: int = 0

    @property
    def key(self) -> str:
        """The request's hash."""
        return hashed([self.body, self.scored])

    def read(self, url: str, reply: Reply) -> Answer:
        """Read the answer. Raises ServerError for a request that failed, or an answer that does not score."""
        if not self.scored:
            if reply.error:
                raise ServerError(reply.error)
            return Answer("", 0, text=reply.text)
        tokens = reply.scores[self.scored : len(self.body["prompt"])]
        if reply.error or len(reply.scores) < len(self.body["prompt"]):
            said = reply.error or f"{url}: the answer has no log-probabilities of the prompt"
            raise ServerError(f"{said}; scoring needs them, by `echo` and `logprobs`: `w8a8 serve` and vLLM give them")
        nats = math.fsum(own or 0.0 for own, _ in tokens)
        return Answer("", 0, logprob=nats, greedy=all(likeliest for _, likeliest in tokens))
