"""The server's side of `model_worker.py`: starts the process that holds the model, asks it, and copes with its end.

Pages never wait for the model to load and never fail with it: a question raises `Starting` until what it needs is loaded, and
`Unavailable` if the process ends under it; the next question starts it again.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ommatid.catalog.sandbox_client import Died, Late, Peer
from ommatid.errors import InputError, ModelError, OmmatidError, QueryError
from ommatid.stage import DATA

MODULE = "ommatid.explorer.model_worker"
MAX_UPLOAD = 2**24
"""Largest image that is accepted, in bytes."""
LONGEST_TEXT = 200
"""Maximum number of characters of a text to search for."""
MOST_HITS = 1000
"""Maximum number of hits of each kind."""
MOST_TEXTS = 8
"""Maximum number of texts that visitors type for the output of the model to be compared with."""
MOST_STEERED = 8
"""Maximum number of latents that are steered at once."""
DOSES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
"""Doses of every dose curve, in units of the 99th percentile of the latent's positive activations."""
HIGHEST_DOSE = 10.0
"""Highest dose that is computed beside these."""
WAITING = 4
"""Maximum number of questions that wait while another is answered; more are refused at once, so that pages keep their threads."""
TIMEOUT = 60.0
"""Seconds within which a question must be answered; then its process is killed."""
STEERING = 300.0
"""The same for steering and attribution, which run the model more than a hundred times."""
LOADING = 900.0
"""Seconds within which the process must have loaded what a question needs."""
AGAIN_AFTER = 30.0
"""Seconds after which something that could not be loaded is tried again; a new catalogue is tried at once."""
LARGEST_ANSWER = 2**26
"""Maximum size of an answer, in bytes."""

Part = Literal["words", "model", "images", "study"]
"""What questions need: `words` are the text tower and the features' meanings, `model` is the explained model with the SAE, `images` are the
embeddings of the evaluation images, and `study` is what edits of the model's activations need of the study."""
PARTS: tuple[Part, ...] = ("words", "model", "images")
"""Parts that a search by image needs."""
Tokens = Literal["all", "firing", "cls", "patches"]
"""Tokens that are steered: all, those on which a latent fires, the class token, or chosen patches."""
Need = tuple[Part, str]
"""A part, and the SAE that it is needed for."""
GUESSES = {"start words": 8.0, "start model": 10.0, "words": 3.0, "model": 3.0, "images": 2.0, "study": 4.0, "start study": 12.0}
"""Seconds that each part takes to load, the first one with the start of the process, until they have been measured here."""


class Starting(Exception):
    """What a question needs is being loaded; ask again soon."""

    def __init__(self, elapsed: float, expected: float) -> None:
        super().__init__(f"the model is being loaded, which takes about {max(expected, 1):.0f} s; {elapsed:.0f} s have passed")
        self.elapsed = elapsed
        """Seconds since loading began."""
        self.expected = expected
        """Seconds that it takes as a whole, by earlier times on this machine."""


class Unavailable(OmmatidError):
    """A question was not answered, because others are waiting or its process ended; the same question may succeed later."""


@dataclass(frozen=True)
class Hits:
    """What is most like a query, best first."""

    found: Sequence[int]
    """Latents, or numbers of images."""
    scores: Sequence[float]
    """Score of each: a cosine, or an activation."""


@dataclass(frozen=True)
class ImageHits:
    """What is most like an image."""

    by_activation: Hits
    """Latents that fire on the image, by their image-level activations."""
    by_meaning: Hits
    """Latents, by the cosine of their meaning with the image in the joint space."""
    images: Hits
    """Evaluation images, by the cosine with the image in the joint space."""
    n_images: int
    """Number of evaluation images that were compared."""
    problem: str | None
    """Why no images, or not all, were compared; None if all evaluation images were."""


@dataclass(frozen=True)
class PatchActs:
    """The strongest latents of one patch, strongest first."""

    latents: Sequence[int]
    """The latents."""
    acts: Sequence[float]
    """Activation of each on the patch."""


@dataclass(frozen=True)
class SeenImage:
    """An image as the model sees it."""

    width: int
    """Width of the upright image, in pixels."""
    height: int
    """Its height."""
    picture: bytes
    """The upright image as WebP without metadata, scaled down if it is large."""
    picture_width: int
    """Width of the picture, in pixels."""
    picture_height: int
    """Its height."""
    seen_width: float
    """Share of the width, around the centre, that the model sees and heat maps cover."""
    seen_height: float
    """Share of the height."""
    rows: int
    """Rows of the heat maps; 0 if the tokens are not patches."""
    cols: int
    """Columns of the heat maps; 0 if the tokens are not patches."""


@dataclass(frozen=True)
class EncodedImage(SeenImage):
    """An image as the model and the SAE see it."""

    n_firing: int
    """Number of latents that fire on the image."""
    latents: Sequence[int]
    """Latents that fire, strongest first; of very many, only the strongest."""
    acts: Sequence[float]
    """Image-level activation of each, as in the relation `firings`."""
    heat: Sequence[Sequence[float]]
    """Heat map of each, row by row from the top left; empty if the tokens are not patches."""
    patches: Sequence[PatchActs]
    """The strongest latents of each patch, row by row from the top left."""


@dataclass(frozen=True)
class SteeredLatent:
    """A latent that was steered."""

    latent: int
    """The latent."""
    scale: float
    """Activation that dose 1 is: the 99th percentile of the latent's positive activations."""
    act: float
    """Its largest activation on the image's tokens before the edit."""
    heat: Sequence[float]
    """Its activations on the patches before the edit, row by row from the top left; empty if the tokens are not patches."""


@dataclass(frozen=True)
class SteeredName:
    """A class or a text that the output of the model was compared with, before and after the edit."""

    name: str
    """The class or the text."""
    kind: str
    """`text` if a visitor typed it, `label` if it is the label of a steered latent, `class` or `other`."""
    score: float
    """Score of the image before the edit."""
    rank: int
    """Rank among all names before the edit, from 1."""
    scores: Sequence[float]
    """Score after the edit, by dose."""
    ranks: Sequence[int]
    """Rank after the edit, by dose."""
    controls: Mapping[str, Sequence[tuple[float, float]]]
    """Lowest and highest score among the draws of each control, by the name of its arm and by dose."""


@dataclass(frozen=True)
class SteeredImage(SeenImage):
    """What the output of the model on an image is while latents are set to doses, beside controls."""

    latents: Sequence[SteeredLatent]
    """The latents that were steered."""
    doses: Sequence[float]
    """Doses, ascending: those of `DOSES`, and the one that was asked for."""
    measure: str
    """What scores are, such as the cosine of image and text."""
    n_names: int
    """Number of names that the output was compared with."""
    names: Sequence[SteeredName]
    """The names that were typed, those of the latents, and those that come first before the edit or after it, by their rank before it."""
    n_draws: int
    """Number of draws of each random control."""
    warnings: Sequence[str]
    """Why the numbers may mislead, a sentence each."""


@dataclass(frozen=True)
class AttributedLatent:
    """A latent to which a part of the output was attributed."""

    latent: int
    """The latent."""
    effect: float
    """Its effect: the output minus that without the latent."""
    estimate: float
    """The estimate of the effect by the gradient, by which the latent was chosen."""
    heat: Sequence[float]
    """Estimate of the effect by patch, row by row from the top left; empty if the tokens are not patches."""


@dataclass(frozen=True)
class AttributedImage(SeenImage):
    """Which latents speak for one text against another on an image."""

    score: float
    """Output that is attributed: the score of the first text, minus that of the second if there are two."""
    measure: str
    """What the score is."""
    n_firing: int
    """Number of latents that fire on the image, to all of which the output was attributed."""
    latents: Sequence[AttributedLatent]
    """Those with the largest effects, the largest first, whatever their sign."""
    others: Sequence[float]
    """Effects of other latents that fire, drawn at random, with which to compare the largest; empty if none is left."""
    warnings: Sequence[str]
    """Why the numbers may mislead, a sentence each."""


@dataclass(frozen=True)
class _Failure:
    """A failed load."""

    reason: str
    at: float
    """Time of the monotonic clock."""
    catalog: object
    """`ModelClient._identity` at that time."""


@dataclass(frozen=True)
class _Loading:
    """A load in progress."""

    since: float
    """Time of the monotonic clock at which it began."""
    expected: float
    """Seconds that it should take."""


class ModelClient:
    """Asks the process that holds the model. Methods block, and may be called from several threads; one question is answered at a time.

    The process starts at the first question, and anew after the catalogue has been replaced.

    Args:
        catalog: The catalogue, a DuckDB file. The SAE is taken from the study in `data`, or from champions/ beside the catalogue,
            wherever one has the checksum that the catalogue names.
        data: Root of the study's artefacts.
        module: Module that runs in the process.

    The methods that ask raise:
        Starting: What the question needs is being loaded.
        InputError: The text or the image cannot be used; the message says why.
        ModelError: What it needs cannot be loaded; the message says why. It is tried again after half a minute or with a new catalogue.
        Unavailable: Too many questions are waiting, or the process ended or took too long.
    """

    def __init__(self, catalog: Path, data: str | Path = DATA, module: str = MODULE) -> None:
        self._catalog = Path(catalog)
        self._data = str(data)
        self._module = module
        self._state = threading.Condition()
        """Guards everything below; notified when a load has ended."""
        self._turn = threading.Lock()
        """Held by whoever talks to the process."""
        self._places = threading.BoundedSemaphore(1 + WAITING)
        self._process: Peer | None = None
        self._opened: object = None
        """`_identity` of the catalogue that the process has open."""
        self._ready: set[Need] = set()
        self._failed: dict[Need, _Failure] = {}
        self._loading: _Loading | None = None
        self._is_closed = False

    def prepare(self, sae: str, *parts: Part, wait: float = 0) -> None:
        """Begin to load what questions need; return once it is loaded, and otherwise raise.

        Args:
            sae: Name of the SAE in the catalogue.
            parts: `words` for `search_text`, `model` for `encode`, and all for `search_image`; none for `words` and `model`.
            wait: Seconds to wait before `Starting` is raised.
        """
        self._require([(part, sae) for part in parts or ("words", "model")], time.monotonic() + wait)

    def search_text(self, sae: str, text: str, n: int = 50, wait: float = 0) -> Hits:
        """Find the latents whose meaning is nearest to a text: the cosine with their activation-weighted mean joint image embedding.

        Args:
            sae: Name of the SAE in the catalogue.
            text: The text.
            n: Maximum number of hits.
            wait: Seconds to wait for what must be loaded, before `Starting` is raised.

        Returns:
            The latents and their cosines, both sides centred.
        """
        (text,) = _check_texts([text], 1)
        return Hits(**self._ask([("words", sae)], "search_text", sae, text, _check_n(n), wait=wait))

    def search_image(self, sae: str, encoded: bytes, n: int = 50, wait: float = 0) -> ImageHits:
        """Find the latents and the images that are most like an image.

        Args:
            sae: Name of the SAE in the catalogue.
            encoded: Bytes of an image file.
            n: Maximum number of hits of each kind.
            wait: Seconds to wait for what must be loaded, before `Starting` is raised.

        Returns:
            The hits of each kind.
        """
        _check_size(encoded)
        answer = self._ask([(part, sae) for part in PARTS], "search_image", sae, encoded, _check_n(n), wait=wait)
        hits = {kind: Hits(**answer.pop(kind)) for kind in ("by_activation", "by_meaning", "images")}
        return ImageHits(**hits, **answer)

    def encode(self, sae: str, encoded: bytes, wait: float = 0) -> EncodedImage:
        """Encode an image as the study's own images were.

        Args:
            sae: Name of the SAE in the catalogue.
            encoded: Bytes of an image file.
            wait: Seconds to wait for what must be loaded, before `Starting` is raised.

        Returns:
            The latents that fire on it, and where.
        """
        _check_size(encoded)
        answer = self._ask([("model", sae)], "encode", sae, encoded, wait=wait)
        patches = [PatchActs(**patch) for patch in answer.pop("patches")]
        return EncodedImage(**answer, patches=patches)

    def steer(
        self,
        sae: str,
        encoded: bytes,
        latents: Sequence[int],
        dose: float = 1.0,
        tokens: Tokens = "all",
        patches: Sequence[int] = (),
        texts: Sequence[str] = (),
        wait: float = 0,
    ) -> SteeredImage:
        """Set latents to doses while the model looks at an image, and run the controls of the edit as well.

        Args:
            sae: Name of the SAE in the catalogue.
            encoded: Bytes of an image file.
            latents: The latents, each named once.
            dose: A dose that is computed beside `DOSES`, 0 to `HIGHEST_DOSE`.
            tokens: Tokens that are edited.
            patches: Numbers of the edited patches, row by row from the top left, if `tokens` is `patches`.
            texts: Texts that the output is compared with, beside the classes of the study's images and the labels of the latents.
            wait: Seconds to wait for what must be loaded, before `Starting` is raised.

        Returns:
            The output before and after the edit, for all doses and controls.
        """
        _check_size(encoded)
        if not 0 < len(latents) <= MOST_STEERED or len(set(latents)) < len(latents):
            raise InputError(f"latents: got {len(latents)}; choose 1 to {MOST_STEERED} latents, each once")
        if not 0 <= dose <= HIGHEST_DOSE:
            raise InputError(f"dose: got {dose:g}; expected 0 to {HIGHEST_DOSE:g}, where 1 is as strong as the latent gets")
        if tokens == "patches" and not patches:
            raise InputError("patches: none is chosen, so the edit would change nothing; choose a patch, or steer all tokens")
        doses = sorted({*DOSES, float(dose)})
        edited = sorted(set(patches)) if tokens == "patches" else []
        values = [list(latents), doses, tokens, edited, _check_texts(texts, MOST_TEXTS)]
        answer = self._ask([("study", sae)], "steer", sae, encoded, *values, wait=wait, timeout=STEERING)
        found = [SteeredLatent(**row) for row in answer.pop("latents")]
        names = [SteeredName(**row) for row in answer.pop("names")]
        return SteeredImage(**answer, latents=found, names=names)

    def attribute(self, sae: str, encoded: bytes, text: str, against: str = "", wait: float = 0) -> AttributedImage:
        """Find the latents that speak for a text on an image, or for it against another text.

        Args:
            sae: Name of the SAE in the catalogue.
            encoded: Bytes of an image file.
            text: The text; for a model without a text tower, a class of the study's images.
            against: The other text; empty for none.
            wait: Seconds to wait for what must be loaded, before `Starting` is raised.

        Returns:
            The effects of the latents, and where in the image they are.
        """
        _check_size(encoded)
        texts = _check_texts([text, *([against] if against.strip() else [])], 2)
        if len(set(texts)) < len(texts):
            raise InputError(f"against: got {texts[0]!r} twice; name two texts that differ, or one")
        answer = self._ask([("study", sae)], "attribute", sae, encoded, texts, wait=wait, timeout=STEERING)
        return AttributedImage(**answer | {"latents": [AttributedLatent(**row) for row in answer["latents"]]})

    @property
    def pid(self) -> int | None:
        """Id of the process; None if none is running."""
        with self._state:
            return self._process.pid if self._process and self._process.is_running else None

    def close(self) -> None:
        """End the process; later questions raise `Unavailable`."""
        with self._state:
            self._is_closed = True
            self._end(self._process)

    def _ask(self, needs: Sequence[Need], what: str, *values: Any, wait: float, timeout: float | None = None) -> Any:
        """Ask a question once what it needs is loaded; it must be answered within `timeout`, or `TIMEOUT`."""
        if not wait:
            self._require(needs, 0)  # `Starting` takes no place from those that wait
        if not self._places.acquire(blocking=False):
            raise Unavailable(f"{WAITING} other questions to the model are waiting already; try again in a moment")
        try:
            self._require(needs, time.monotonic() + wait)
            if not self._turn.acquire(timeout=TIMEOUT):
                raise Unavailable(f"the model was busy for {TIMEOUT:g} s; try again in a moment")
            try:
                process = self._process
                if process is None:
                    raise Unavailable("the process that holds the model has ended; ask again, and it starts anew")
                return self._talk(process, (what, *values), timeout or TIMEOUT)
            finally:
                self._turn.release()
        finally:
            self._places.release()

    def _require(self, needs: Sequence[Need], until: float) -> None:
        """Return if everything needed is loaded; otherwise begin to load it, unless that has begun.

        Args:
            needs: What is needed.
            until: Time of the monotonic clock until which to wait for a load.

        Raises:
            Starting: It is still being loaded.
            ModelError: It cannot be loaded.
        """
        with self._state:
            while True:
                self._check_process()
                missing = [need for need in needs if need not in self._ready]
                if not missing:
                    return
                for need in missing:
                    failure = self._failed.get(need)
                    if failure and failure.catalog == self._identity() and time.monotonic() < failure.at + AGAIN_AFTER:
                        raise ModelError(failure.reason)
                if self._loading is None:
                    self._begin(missing)
                    assert self._loading is not None
                if time.monotonic() >= until:
                    raise Starting(time.monotonic() - self._loading.since, self._loading.expected)
                self._state.wait(until - time.monotonic())

    def _check_process(self) -> None:
        """End the process if it reads an old catalogue, and forget it if it is dead; not while it answers, which whoever asked notices."""
        is_usable = self._process and self._process.is_running and self._opened == self._identity()
        if self._process and not is_usable and self._turn.acquire(blocking=False):
            try:
                self._end(self._process)
            finally:
                self._turn.release()

    def _begin(self, needs: Sequence[Need]) -> None:
        """Begin to load in a thread."""
        if self._is_closed:
            raise Unavailable("the server is about to end")
        measured = {**GUESSES, **self._read_seconds()}
        keys = [self._key(part, is_first=i == 0 and self._process is None) for i, (part, _) in enumerate(needs)]
        self._loading = _Loading(time.monotonic(), sum(measured.get(key, GUESSES["start model"]) for key in keys))
        threading.Thread(target=self._load, args=(needs,), daemon=True).start()

    def _load(self, needs: Sequence[Need]) -> None:
        """Load what is needed, one part after another, up to the first that fails."""
        catalog = self._identity()
        need = needs[0]
        try:
            with self._turn:
                for need in needs:
                    began, is_first = time.monotonic(), self._process is None
                    process = self._process or self._start(catalog)
                    self._talk(process, ("load", *need), LOADING)
                    with self._state:
                        if self._process is process:
                            self._ready.add(need)
                            self._failed.pop(need, None)
                    self._write_seconds(self._key(need[0], is_first), time.monotonic() - began)
        except Exception as error:  # the edge of a thread: whoever asks next is told
            reason = str(error) if isinstance(error, OmmatidError) else f"the process that holds the model cannot be started ({error})"
            with self._state:
                self._failed[need] = _Failure(reason, time.monotonic(), catalog)
                if not self._ready:
                    self._end(self._process)
        finally:
            with self._state:
                self._loading = None
                self._state.notify_all()

    def _start(self, catalog: object) -> Peer:
        """Start the process, and open the catalogue in it."""
        command = [sys.executable, "-P", "-m", self._module]
        with self._state:
            if self._is_closed:
                raise Unavailable("the server is about to end")
            process = self._process = Peer(command, [], _environment(), os.getcwd(), None)
            self._opened = catalog
        self._talk(process, ("open", str(self._catalog), self._data), LOADING)
        return process

    def _talk(self, process: Peer, message: tuple[Any, ...], timeout: float) -> Any:
        """Send a message to the process, and return its answer; after a failure of the process, end it."""
        until = time.monotonic() + timeout
        try:
            process.send(message, until)
            (kind, *found), _ = process.receive(LARGEST_ANSWER, until)
        except Late:
            self._end(process)
            raise Unavailable(
                f"the model did not answer within {timeout:g} s, and was stopped; the next question starts it again"
            ) from None
        except Died as death:
            self._end(process)
            raise Unavailable(
                f"the process that holds the model ended ({death}), usually for lack of memory; the next question starts it again"
            ) from None
        except QueryError as error:
            self._end(process)
            raise Unavailable(f"the process that holds the model was stopped: {error}") from None
        if kind == "error":
            name, text = found
            raise InputError(text) if name == InputError.__name__ else ModelError(text)
        return found[0]

    def _end(self, process: Peer | None) -> None:
        """End a process once, and forget what it had loaded."""
        with self._state:
            if process is None or self._process is not process:
                return
            self._process = None
            self._ready.clear()
        process.end()

    def _identity(self) -> object:
        """Value that differs after the catalogue has been replaced."""
        try:
            found = self._catalog.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    @staticmethod
    def _key(part: str, is_first: bool) -> str:
        return f"start {part}" if is_first else part

    def _read_seconds(self) -> dict[str, float]:
        """Read how long parts took to load on this machine."""
        with suppress(OSError, ValueError, AttributeError):
            return {key: float(value) for key, value in json.loads(self._seconds.read_text(encoding="utf-8")).items()}
        return {}

    def _write_seconds(self, key: str, seconds: float) -> None:
        """Write how long a part took, if the study's folder can be written to."""
        text = json.dumps({**self._read_seconds(), key: round(seconds, 2)})
        temporary = self._seconds.with_suffix(f".{os.getpid()}")
        with suppress(OSError):
            if Path(self._data).is_dir():
                self._seconds.parent.mkdir(exist_ok=True)
                temporary.write_text(text, encoding="utf-8")
                os.replace(temporary, self._seconds)

    @property
    def _seconds(self) -> Path:
        return Path(self._data) / ".work" / "model_seconds.json"


def _environment() -> dict[str, str]:
    """Environment of the process: one thread less than there are cores, so that pages stay fast, and none of the server's secrets."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n = str(max(1, cores - 1))
    threads = {"OMP_NUM_THREADS": n, "MKL_NUM_THREADS": n, "OPENBLAS_NUM_THREADS": n, "GOMP_SPINCOUNT": "1000"}
    path = os.pathsep.join(filter(None, map(os.path.abspath, filter(None, sys.path))))
    return {name: value for name, value in os.environ.items() if name != "OMMATID_TOKEN"} | threads | {"PYTHONPATH": path}


def _check_size(encoded: bytes) -> None:
    if len(encoded) > MAX_UPLOAD:
        raise InputError(f"the image has {len(encoded) / 2**20:.1f} MB: expected {MAX_UPLOAD // 2**20} MB or less")
    if not encoded:
        raise InputError("the image has 0 bytes; choose an image file")


def _check_texts(texts: Sequence[str], most: int) -> list[str]:
    """Return texts with single blanks between words."""
    if len(texts) > most:
        raise InputError(f"texts: got {len(texts)}; at most {most} are compared at once")
    found = [" ".join(text.split()) for text in texts]
    for text in found:
        if not text or len(text) > LONGEST_TEXT or not text.isprintable():
            has = f"{len(text):,} characters" if text.isprintable() else "characters that cannot be printed"
            raise InputError(f"the text has {has}: expected 1 to {LONGEST_TEXT} characters that can be printed")
    return found


def _check_n(n: int) -> int:
    if not 1 <= n <= MOST_HITS:
        raise InputError(f"{n} hits were asked for: expected 1 to {MOST_HITS}")
    return n
