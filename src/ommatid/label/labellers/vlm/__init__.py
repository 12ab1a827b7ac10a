"""The labeller `vlm`: shows a vision-language model grids of images that fire a latent and of images that do not, and asks for a label.

The model runs on an OpenAI-compatible server; docs/users/labels-from-models.md describes how to set one up.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ommatid.config.label import VlmLabeller
from ommatid.images.decode import decode
from ommatid.label.grid import GRID_VERSION, N_TILES, choose_tiles, coarse_heat, draw_grid, mark
from ommatid.label.labellers.base import Answer, Case, Example, ImageLabeller
from ommatid.label.labellers.vlm.client import AnswerCache, Client, Clock, Warn, open_checkout_cache
from ommatid.label.labellers.vlm.messages import (
    DETECT_SCHEMA,
    NAME_SCHEMA,
    NoAnswer,
    Question,
    digest,
    load_prompt,
    make_key,
    prompt_text,
    read_detections,
    read_name,
)
from ommatid.store import Artefact


class Vlm:
    """Labeller and detector in one, so that both share a budget and a rate limit. Threads may share it.

    Args:
        name: Name of the labeller, the column `labels.labeller`.
        params: The labeller's section of the params.
        cache: Answers of earlier runs.
        warn: Called with a sentence for the user when the server is given up.
        clock: Time and randomness; None for those of the system.
    """

    def __init__(self, name: str, params: VlmLabeller, cache: AnswerCache, warn: Warn, clock: Clock | None = None) -> None:
        self.name = name
        self._model = params.model
        self._client = Client(params, f"label.labellers.{name}", cache, warn, clock)

    def answer(self, case: Case) -> Answer:
        """Ask for a label of a latent. Failures of the server become statuses and are never raised."""
        if not case.firing:
            return Answer("too_few_examples")
        outcome = self._client.ask(_name_question(choose_tiles(case.firing), case.silent[:N_TILES], self._model))
        reply = outcome.reply
        answer = Answer(reply.status, detail=reply.detail) if isinstance(reply, NoAnswer) else read_name(reply)
        return replace(answer, n_requests=outcome.n_requests, n_tokens=outcome.n_tokens)

    def fires(self, label: str, images: tuple[bytes, ...]) -> tuple[float, ...] | None:
        """Ask which images show what a label says.

        The images are shown `N_TILES` at a time, in an order that is independent of the order in which they are given.

        Args:
            label: The label to check.
            images: Image files.

        Returns:
            1 for each image that clearly shows it, 0.5 if it may, 0 if it does not; None if a question got no usable answer.
        """
        order = sorted(range(len(images)), key=lambda i: (digest([label.encode(), b"\0", images[i]]), i))
        grades = [0.0] * len(images)
        for start in range(0, len(order), N_TILES):
            shown = order[start : start + N_TILES]
            reply = self._client.ask(_detect_question(label, [images[i] for i in shown], self._model)).reply
            shown_grades = None if isinstance(reply, NoAnswer) else read_detections(reply, len(shown))
            if shown_grades is None:
                return None
            for i, grade in zip(shown, shown_grades, strict=True):
                grades[i] = grade
        return tuple(grades)


def _name_question(firing: Sequence[Example], silent: Sequence[Example], model: str) -> Question:
    prompt = load_prompt("name")

    def parts() -> list[str | bytes]:
        message: list[str | bytes] = [prompt["task"].substitute(), prompt["firing"].substitute(n=len(firing)), _grid(firing)]
        marked = [(i, mark(example)) for i, example in enumerate(firing, start=1) if coarse_heat(example) is not None]
        if marked:
            message += [prompt["marked"].substitute(), draw_grid(marked)]
        if silent:
            message += [prompt["silent"].substitute(n=len(silent)), _grid(silent)]
        return message

    shown = [_identity(example) for example in (*firing, *silent)]
    about = ["name", str(GRID_VERSION), prompt_text(prompt), str(len(firing)), *shown]
    return Question(make_key(*about, model=model, schema=NAME_SCHEMA), NAME_SCHEMA, parts)


def _detect_question(label: str, images: Sequence[bytes], model: str) -> Question:
    prompt = load_prompt("detect")

    def parts() -> list[str | bytes]:
        tiles = [(i, decode(encoded)) for i, encoded in enumerate(images, start=1)]
        return [prompt["task"].substitute(n=len(images), label=label), draw_grid(tiles)]

    about = ["detect", str(GRID_VERSION), prompt_text(prompt), label, *images]
    return Question(make_key(*about, model=model, schema=DETECT_SCHEMA), DETECT_SCHEMA, parts)


def _grid(examples: Sequence[Example]) -> bytes:
    return draw_grid([(i, decode(example.encoded)) for i, example in enumerate(examples, start=1)])


def _identity(example: Example) -> str:
    """Return a digest of everything about an example that is drawn."""
    heat = coarse_heat(example)
    drawn = b"" if heat is None else repr((heat.shape, example.seen)).encode() + heat.tobytes()
    return digest(example.encoded) + digest(drawn)


__all__ = ["AnswerCache", "Vlm", "make", "open_checkout_cache"]


def make(name: str, params: VlmLabeller, saes: Mapping[str, Artefact], warn: Callable[[str], None]) -> ImageLabeller:
    """Make the labeller; see `make_source`."""
    vlm = Vlm(name, params, open_checkout_cache(), warn)
    return ImageLabeller(vlm, vlm, params.concurrency)
