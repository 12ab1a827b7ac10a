"""The labeller `vlm`: asks a vision-language model for a label, showing it grids of images that fire a latent and of others that do not.

The model runs behind an OpenAI-compatible server; docs/users/labels-from-models.md tells how to use it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ommatid.config.label import VlmLabeller
from ommatid.images.decode import decode
from ommatid.label.evidence import DRAWING, N_TILES, choose_shown, coarse_heat, draw_grid, mark
from ommatid.label.labellers.base import Answer, Asked, Case, Example
from ommatid.label.labellers.vlm.client import Asker, Clock, Memory, Say, in_checkout
from ommatid.label.labellers.vlm.messages import (
    NAME_SCHEMA,
    SHOWN_SCHEMA,
    Question,
    Silence,
    digest,
    load_prompt,
    make_key,
    read_name,
    read_shown,
    words_of,
)


class Vlm:
    """Labeller and detector in one, so that both keep to the same budget and pace; may be shared by threads."""

    def __init__(self, name: str, params: VlmLabeller, memory: Memory, say: Say, clock: Clock | None = None) -> None:
        self.name = name
        self._model = params.model
        self._asker = Asker(params, f"label.labellers.{name}", memory, say, clock)

    def answer(self, case: Case) -> Answer:
        """The name of a latent, or what stands in for one; never raises for what a server does."""
        if not case.firing:
            return Answer("too_few_examples")
        outcome = self._asker.ask(_ask_name(choose_shown(case.firing), case.silent[:N_TILES], self._model))
        said = outcome.reply
        answer = Answer(said.status, detail=said.detail) if isinstance(said, Silence) else read_name(said)
        return replace(answer, n_requests=outcome.n_requests, n_tokens=outcome.n_tokens)

    def fires(self, label: str, images: tuple[bytes, ...]) -> tuple[float, ...] | None:
        """How far each image shows what the label says: 1, 0.5 or 0; None: at least one question about them got no usable answer.

        Images are shown in an order that has nothing to do with the one they come in, `N_TILES` at a time.
        """
        order = sorted(range(len(images)), key=lambda i: (digest([label.encode(), b"\0", images[i]]), i))
        grades = [0.0] * len(images)
        for start in range(0, len(order), N_TILES):
            shown = order[start : start + N_TILES]
            said = self._asker.ask(_ask_shown(label, [images[i] for i in shown], self._model)).reply
            found = None if isinstance(said, Silence) else read_shown(said, len(shown))
            if found is None:
                return None
            for i, grade in zip(shown, found, strict=True):
                grades[i] = grade
        return tuple(grades)


def _ask_name(firing: Sequence[Example], silent: Sequence[Example], model: str) -> Question:
    prompt = load_prompt("name")

    def parts() -> list[str | bytes]:
        said: list[str | bytes] = [prompt["task"].substitute(), prompt["firing"].substitute(n=len(firing)), _grid(firing)]
        marked = [(i, mark(example)) for i, example in enumerate(firing, start=1) if coarse_heat(example) is not None]
        if marked:
            said += [prompt["marked"].substitute(), draw_grid(marked)]
        if silent:
            said += [prompt["silent"].substitute(n=len(silent)), _grid(silent)]
        return said

    seen = [_identity(example) for example in (*firing, *silent)]
    about = ["name", str(DRAWING), words_of(prompt), str(len(firing)), *seen]
    return Question(make_key(*about, model=model, schema=NAME_SCHEMA), NAME_SCHEMA, parts)


def _ask_shown(label: str, images: Sequence[bytes], model: str) -> Question:
    prompt = load_prompt("detect")

    def parts() -> list[str | bytes]:
        tiles = [(i, decode(encoded)) for i, encoded in enumerate(images, start=1)]
        return [prompt["task"].substitute(n=len(images), label=label), draw_grid(tiles)]

    about = ["detect", str(DRAWING), words_of(prompt), label, *images]
    return Question(make_key(*about, model=model, schema=SHOWN_SCHEMA), SHOWN_SCHEMA, parts)


def _grid(examples: Sequence[Example]) -> bytes:
    return draw_grid([(i, decode(example.encoded)) for i, example in enumerate(examples, start=1)])


def _identity(example: Example) -> str:
    """Stands for all that is drawn of an example."""
    heat = coarse_heat(example)
    drawn = b"" if heat is None else repr((heat.shape, example.seen)).encode() + heat.tobytes()
    return digest(example.encoded) + digest(drawn)


__all__ = ["Memory", "Vlm", "in_checkout", "make"]


def make(name: str, params: VlmLabeller, saes: Mapping[str, int], say: Callable[[str], None]) -> Asked:
    """See `make_source`."""
    vlm = Vlm(name, params, in_checkout(), say)
    return Asked(vlm, vlm, params.concurrency)
