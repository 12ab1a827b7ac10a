"""One request to a server that speaks OpenAI's protocol, and the meaning of each failure. Only this file imports `openai`."""

import base64
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import openai

from ommatid.label.labellers.vlm.messages import Completion

ANSWER_TOKENS = 2048
"""Largest number of tokens in an answer: a label takes about thirty, and a model that reasons first takes a few hundred."""
CONNECT_SECONDS = 10.0
"""Seconds to wait for a connection; `timeout` is the time to wait for the answer."""
DETAIL = 300
"""Largest number of characters kept of a server's error message."""
_ABOUT_SCHEMA = ("response_format", "json_schema", "structured", "guided", "grammar")
"""Words in error messages of servers that refuse `response_format`."""


class TransientFailure(Exception):
    """There was no answer, but another try may get one."""

    def __init__(self, detail: str, has_response: bool, is_busy: bool = False, wait: float | None = None) -> None:
        super().__init__(detail)
        self.has_response = has_response
        """Whether the server sent anything."""
        self.is_busy = is_busy
        """Whether the server asks all clients to slow down."""
        self.wait = wait
        """Seconds that the server asks to wait; None if it does not say."""


class RequestRejected(Exception):
    """The server does not accept this request, however often it is sent, but may accept others."""


class SettingRefused(Exception):
    """The server does not, or may not, accept a setting; send the request again at once without it."""

    def __init__(self, with_schema: bool) -> None:
        super().__init__(with_schema)
        self.with_schema = with_schema
        """Whether the next try demands the answer's schema."""


class ServerUnusable(Exception):
    """The server accepts none of our requests."""


class Server:
    """A model on a server. The API key is read from OPENAI_API_KEY, and sent in the headers of requests only.

    Args:
        url: Base URL of the server.
        model: Name of the model on the server.
        timeout: Seconds to wait for an answer.
    """

    def __init__(self, url: str, model: str, timeout: float) -> None:
        self._key = os.environ.get("OPENAI_API_KEY") or ""
        self._url, self._model = url, model
        # The client refuses to start without a key, and servers that need none ignore it.
        self._client = openai.OpenAI(
            base_url=url, api_key=self._key or "none", max_retries=0, timeout=openai.Timeout(timeout, connect=CONNECT_SECONDS)
        )
        self._settings: dict[str, Any] = {"temperature": 0, "max_tokens": ANSWER_TOKENS}
        self._takes_schema: bool | None = None
        """Whether the server accepts `response_format`; None if not known yet."""

    def send(self, parts: Sequence[str | bytes], schema: dict[str, Any], with_schema: bool) -> Completion:
        """Send one request.

        Args:
            parts: Texts and JPEGs of the message, in order.
            schema: JSON schema of the answer.
            with_schema: Whether to demand the schema by `response_format`, unless the server is known to refuse that.

        Returns:
            The server's answer.

        Raises:
            TransientFailure: There was no answer; try again later.
            SettingRefused: A setting was refused; try again at once, with or without the schema as the error says.
            RequestRejected: The server rejects this request.
            ServerUnusable: The server rejects all requests.
        """
        settings, with_schema = dict(self._settings), with_schema and self._takes_schema is not False
        if with_schema:
            settings["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
        messages: Any = [{"role": "user", "content": [_part(part) for part in parts]}]
        try:
            response: Any = self._client.chat.completions.create(model=self._model, messages=messages, **settings)
        except openai.APITimeoutError:
            raise TransientFailure("no answer in time", has_response=False) from None
        except openai.APIConnectionError as error:
            raise TransientFailure(self._clean(f"no connection: {error.__cause__ or error}"), has_response=False) from None
        except openai.APIStatusError as error:
            raise self._meaning(error, settings) from None
        except (openai.APIError, ValueError) as error:
            raise TransientFailure(self._clean(f"not the protocol: {error}"), has_response=True) from None
        completion = self._read(response, parts)
        if self._takes_schema is None:
            self._takes_schema = with_schema
        return completion

    def _read(self, response: Any, parts: Sequence[str | bytes]) -> Completion:
        choices = getattr(response, "choices", None)
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = getattr(choice, "message", None)
        if choice is None or message is None:
            raise TransientFailure(self._clean(f"not the protocol: no choices in {response}"), has_response=True)
        text = message.content if isinstance(message.content, str) else ""
        usage = getattr(response, "usage", None)
        n_tokens = getattr(usage, "total_tokens", None) or _estimate_tokens(parts, text)
        return Completion(text, getattr(message, "refusal", None) or None, str(choice.finish_reason), n_tokens)

    def _meaning(self, error: openai.APIStatusError, settings: dict[str, Any]) -> Exception:
        """Return the exception that says what to do about a status code."""
        status, detail = error.status_code, self._clean(f"{error.status_code}: {_message(error)}")
        match status:
            case 401 | 403:
                return ServerUnusable(f"{detail}; {'OPENAI_API_KEY was not accepted' if self._key else 'set OPENAI_API_KEY'}")
            case 402:
                return ServerUnusable(detail)
            case 404:
                return ServerUnusable(f"{detail}; {self._list_models()}")
            case 429 if error.code == "insufficient_quota":
                return ServerUnusable(detail)
            case 408 | 409 | 425:
                return TransientFailure(detail, has_response=True)
            case 429 | 503:
                return TransientFailure(detail, has_response=True, is_busy=True, wait=_retry_after(error))
            case _ if status >= 500:
                return TransientFailure(detail, has_response=True, wait=_retry_after(error))
            case _:
                return self._drop_setting(settings, f"{error.param} {detail}".lower()) or RequestRejected(detail)

    def _drop_setting(self, settings: dict[str, Any], why: str) -> SettingRefused | None:
        """Leave out the setting that caused a refusal, or may have caused it; None if none can have."""
        had_schema = "response_format" in settings
        if "temperature" in settings and "temperature" in why:
            self._settings.pop("temperature", None)
            return SettingRefused(had_schema)
        if "max_tokens" in settings and "max_tokens" in why:  # OpenAI's newer models use the other name.
            self._settings.pop("max_tokens", None)
            self._settings["max_completion_tokens"] = ANSWER_TOKENS
            return SettingRefused(had_schema)
        if had_schema and any(word in why for word in _ABOUT_SCHEMA):
            self._takes_schema = False
            return SettingRefused(with_schema=False)
        if had_schema and self._takes_schema is None and "image" not in why:
            return SettingRefused(with_schema=False)  # The message does not name the schema; if the next try succeeds, that was the cause.
        return None

    def _list_models(self) -> str:
        """Return a sentence that lists the server's models, for a user who named one that it does not have."""
        try:
            names = sorted(model.id for model in self._client.models.list())
        except Exception:  # The error that is being reported matters more than this one.
            return f"is {self._url} the base URL (most end in /v1), and does it have a model {self._model}?"
        return self._clean(f"the server has the models {', '.join(names) or '(none)'}; model is {self._model}")

    def _clean(self, text: str) -> str:
        """Return a text on one line, cut to `DETAIL` characters, with the API key masked."""
        masked = text.replace(self._key, "***") if self._key else text
        return " ".join(masked.split())[:DETAIL]


def _part(part: str | bytes) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(part).decode()}}


def _message(error: openai.APIStatusError) -> str:
    """Return the server's own message: from its JSON, or else the whole body."""
    body: Any = error.body
    match body:
        case {"message": str(message)} | {"error": str(message)} | {"detail": str(message)}:
            return message
        case _:
            return str(body or error.message)


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Return the seconds to wait by the header Retry-After, which holds a number or a date; None if it holds neither."""
    value = error.response.headers.get("retry-after", "")
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError):
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    return None


def _estimate_tokens(parts: Sequence[str | bytes], text: str) -> int:
    """Estimate the number of tokens if the server does not count them: one per four characters, and a thousand per image."""
    n_images = sum(isinstance(part, bytes) for part in parts)
    return (sum(len(part) for part in parts if isinstance(part, str)) + len(text)) // 4 + 1000 * n_images
