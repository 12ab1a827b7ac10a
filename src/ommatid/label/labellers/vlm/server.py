"""One request to a server that speaks OpenAI's protocol, and what its failure means; the only file that knows `openai`."""

import base64
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import openai

from ommatid.label.labellers.vlm.messages import Said

ANSWER_TOKENS = 2048
"""An answer is cut off after so many: a name takes thirty, a model that thinks first some hundreds."""
CONNECT_SECONDS = 10.0
"""To be let in; `timeout` is for the answer."""
DETAIL = 300
"""Characters kept of what a server says of an error."""
_ABOUT_SCHEMA = ("response_format", "json_schema", "structured", "guided", "grammar")
"""Words by which servers refer to `response_format` when they refuse it."""


class Hiccup(Exception):
    """No answer this time; the next try may get one."""

    def __init__(self, detail: str, was_heard: bool, is_busy: bool = False, wait: float | None = None) -> None:
        super().__init__(detail)
        self.was_heard = was_heard
        """Whether anything came back."""
        self.is_busy = is_busy
        """Whether the server asks everybody to slow down."""
        self.wait = wait
        """Seconds that the server wants to be left alone."""


class Rejected(Exception):
    """The server does not take this request, however often it is sent; it may take others."""


class Changed(Exception):
    """The server does not take a setting that its kind often takes, or may not; without it, ask again at once."""

    def __init__(self, with_schema: bool) -> None:
        super().__init__(with_schema)
        self.with_schema = with_schema
        """Of the next try."""


class Unusable(Exception):
    """The server takes no request of ours."""


class Server:
    """A server and a model on it. The key comes from OPENAI_API_KEY, and goes into the requests' headers only."""

    def __init__(self, url: str, model: str, timeout: float) -> None:
        self._key = os.environ.get("OPENAI_API_KEY") or ""
        self._url, self._model = url, model
        # a client without any key refuses to start, and servers that need none don't look at it
        self._client = openai.OpenAI(
            base_url=url, api_key=self._key or "none", max_retries=0, timeout=openai.Timeout(timeout, connect=CONNECT_SECONDS)
        )
        self._settings: dict[str, Any] = {"temperature": 0, "max_tokens": ANSWER_TOKENS}
        self._takes_schema: bool | None = None
        """None: not known yet."""

    def send(self, parts: Sequence[str | bytes], schema: dict[str, Any], with_schema: bool) -> Said:
        """Send one request.

        Args:
            parts: Texts and JPEGs.
            schema: Of the answer.
            with_schema: Whether to demand it by `response_format`; not done where the server is known to refuse that.

        Raises:
            Hiccup: no answer; try again.
            Changed: ask again at once, with or without schema as it says.
            Rejected: it refuses this request.
            Unusable: it refuses all.
        """
        settings, with_schema = dict(self._settings), with_schema and self._takes_schema is not False
        if with_schema:
            settings["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
        messages: Any = [{"role": "user", "content": [_part(part) for part in parts]}]
        try:
            completion: Any = self._client.chat.completions.create(model=self._model, messages=messages, **settings)
        except openai.APITimeoutError:
            raise Hiccup("no answer in time", was_heard=False) from None
        except openai.APIConnectionError as error:
            raise Hiccup(self._clean(f"no connection: {error.__cause__ or error}"), was_heard=False) from None
        except openai.APIStatusError as error:
            raise self._meaning(error, settings) from None
        except (openai.APIError, ValueError) as error:
            raise Hiccup(self._clean(f"not the protocol: {error}"), was_heard=True) from None
        said = self._read(completion, parts)
        if self._takes_schema is None:
            self._takes_schema = with_schema
        return said

    def _read(self, completion: Any, parts: Sequence[str | bytes]) -> Said:
        choices = getattr(completion, "choices", None)
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = getattr(choice, "message", None)
        if choice is None or message is None:
            raise Hiccup(self._clean(f"not the protocol: no choices in {completion}"), was_heard=True)
        text = message.content if isinstance(message.content, str) else ""
        usage = getattr(completion, "usage", None)
        n_tokens = getattr(usage, "total_tokens", None) or _estimate(parts, text)
        return Said(text, getattr(message, "refusal", None) or None, str(choice.finish_reason), n_tokens)

    def _meaning(self, error: openai.APIStatusError, settings: dict[str, Any]) -> Exception:
        status, detail = error.status_code, self._clean(f"{error.status_code}: {_message(error)}")
        match status:
            case 401 | 403:
                return Unusable(f"{detail}; {'OPENAI_API_KEY is not taken' if self._key else 'set OPENAI_API_KEY'}")
            case 402:
                return Unusable(detail)
            case 404:
                return Unusable(f"{detail}; {self._offer()}")
            case 429 if error.code == "insufficient_quota":
                return Unusable(detail)
            case 408 | 409 | 425:
                return Hiccup(detail, was_heard=True)
            case 429 | 503:
                return Hiccup(detail, was_heard=True, is_busy=True, wait=_retry_after(error))
            case _ if status >= 500:
                return Hiccup(detail, was_heard=True, wait=_retry_after(error))
            case _:
                return self._without(settings, f"{error.param} {detail}".lower()) or Rejected(detail)

    def _without(self, settings: dict[str, Any], why: str) -> Changed | None:
        """What to leave out, where the refusal was or may have been about a setting."""
        had_schema = "response_format" in settings
        if "temperature" in settings and "temperature" in why:
            self._settings.pop("temperature", None)
            return Changed(had_schema)
        if "max_tokens" in settings and "max_tokens" in why:  # newer models of OpenAI's want the other name
            self._settings.pop("max_tokens", None)
            self._settings["max_completion_tokens"] = ANSWER_TOKENS
            return Changed(had_schema)
        if had_schema and any(word in why for word in _ABOUT_SCHEMA):
            self._takes_schema = False
            return Changed(with_schema=False)
        if had_schema and self._takes_schema is None and "image" not in why:
            return Changed(with_schema=False)  # without a word about it: if the next try succeeds, it was that
        return None

    def _offer(self) -> str:
        """What models there are, for someone who named one that is not."""
        try:
            names = sorted(model.id for model in self._client.models.list())
        except Exception:  # the error that is being told is the one that matters
            return f"is {self._url} the base URL (most end in /v1), and {self._model} a model there?"
        return self._clean(f"the server has the models {', '.join(names) or '(none)'}; model is {self._model}")

    def _clean(self, text: str) -> str:
        """On one line, not longer than anybody reads, and never with the key."""
        hidden = text.replace(self._key, "***") if self._key else text
        return " ".join(hidden.split())[:DETAIL]


def _part(part: str | bytes) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(part).decode()}}


def _message(error: openai.APIStatusError) -> str:
    """The words of the server: in its JSON, or whatever it sent."""
    body: Any = error.body
    match body:
        case {"message": str(message)} | {"error": str(message)} | {"detail": str(message)}:
            return message
        case _:
            return str(body or error.message)


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds of the header Retry-After, which has a number or a date."""
    given = error.response.headers.get("retry-after", "")
    with suppress(ValueError):
        return max(0.0, float(given))
    with suppress(ValueError):
        return max(0.0, (parsedate_to_datetime(given) - datetime.now(UTC)).total_seconds())
    return None


def _estimate(parts: Sequence[str | bytes], text: str) -> int:
    """Tokens where a server does not count them: four characters each, a thousand an image."""
    n_images = sum(isinstance(part, bytes) for part in parts)
    return (sum(len(part) for part in parts if isinstance(part, str)) + len(text)) // 4 + 1000 * n_images
