"""Interventions on single images: what an edit of latents does to the model's output, and which latents an output comes from."""

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from PIL import Image

from ommatid.errors import InputError, ModelError

if TYPE_CHECKING:
    import pandas
    import torch

    from ommatid.api.pictures import Photograph, Source
    from ommatid.api.run import Run
    from ommatid.extract.tokens import TokenPicker
    from ommatid.intervene.answers import Answered
    from ommatid.intervene.contributions import Attributed, Method, Output
    from ommatid.intervene.edit import ErrorTerm, Unit, Where
    from ommatid.intervene.steering import Dosed, Steered
    from ommatid.intervene.subject import Subject
    from ommatid.show.pictures.page import Page
    from ommatid.vlm.preprocess import Preprocess
    from ommatid.vlm.speaking import DeviceMap, SpeakerDtype

    LatentOf = tuple[Run | str | Path, int] | tuple[Run | str | Path, str, int]
    """A latent at a later hookpoint: its run, or the root of its artefacts; the name of its SAE, if there are several; its index."""

Patches = Sequence[tuple[int, int]] | np.ndarray
"""Patches by row and column, or whether each patch is chosen, (rows, cols) or (images, rows, cols) bool."""
DOSES = (0.0, 0.5, 1.0, 2.0)
"""Doses that are run unless others are asked for."""
N_COMPARED = 16
"""Number of latents, drawn from those that fire, that are ablated beside the strongest, to compare their effects with the estimates."""


@dataclass(frozen=True, eq=False)
class Photographs:
    """Images that were given, as the model sees them."""

    names: tuple[str, ...]
    """Name of each image: its path, or its index as text if it had no path."""
    opened: tuple[Image.Image, ...]
    """The images, upright and RGB."""

    def pixels(self, preprocess: "Preprocess") -> "torch.Tensor":
        """Return the model's pixels, uint8 (images, height, width, 3)."""
        import torch

        return torch.from_numpy(np.stack([preprocess(image) for image in self.opened]))

    def drawn(self, boxes: Sequence[tuple[float, float, float, float]]) -> "list[Photograph]":
        """Return the images for a page, given the part of each that the model sees."""
        from ommatid.api.pictures import Photograph

        return [Photograph(*one) for one in zip(self.names, self.opened, boxes, strict=True)]


@dataclass(frozen=True, eq=False)
class Intervention:
    """What an edit of latents does to the model's output on some images, at several doses, beside all of its controls.

    >>> import ommatid
    >>> run = ommatid.open_run("data")
    >>> latent = int(run.encode("cat.jpg").acts[0].argmax())
    >>> found = run.intervene("cat.jpg", latent, doses=[0, 1], draws=3)
    >>> found
    Intervention(1 image, latent ..., doses 0 and 1, ... names)
    >>> table = found.table()
    >>> table[(table.arm == "targeted") & (table.dose == 1)][["name", "rank_before", "rank"]].columns.tolist()
    ['name', 'rank_before', 'rank']
    """

    photographs: Photographs
    """The images."""
    boxes: tuple[tuple[float, float, float, float], ...]
    """Part of each image that the model sees: (left, top, right, bottom) in pixels of the upright image."""
    sae: str
    """Name of the SAE in the column `sae` of the catalogue."""
    steered: "Steered"
    """Scores, probabilities and ranks by arm, dose, image and name, as tensors."""
    follow: str | None
    """Name whose dose curve is drawn: the first text. None chooses one for each image."""

    def __repr__(self) -> str:
        latents, doses, n = _listed(self.steered.latents), _listed(self.steered.doses), len(self.images)
        of, at = "s" * (len(self.steered.latents) > 1), "s" * (len(self.steered.doses) > 1)
        return f"Intervention({n} image{'s' * (n != 1)}, latent{of} {latents}, dose{at} {doses}, {len(self.names)} names)"

    @property
    def images(self) -> tuple[str, ...]:
        """Name of each image: its path, or its index as text if it had no path.

        >>> import ommatid
        >>> run = ommatid.open_run("data")
        >>> latent = int(run.encode("cat.jpg").acts[0].argmax())
        >>> run.intervene("cat.jpg", latent, doses=[1], draws=3).images
        ('cat.jpg',)
        """
        return self.photographs.names

    @property
    def names(self) -> tuple[str, ...]:
        """Names that the output is compared with: texts, or the classes of the study's images.

        >>> import ommatid
        >>> run = ommatid.open_run("data")
        >>> latent = int(run.encode("cat.jpg").acts[0].argmax())
        >>> run.intervene("cat.jpg", latent, doses=[1], draws=3).names
        ('blue', 'green', 'red')
        """
        return self.steered.names

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the results less sure than they look, a sentence each.

        >>> import ommatid
        >>> run = ommatid.open_run("data")
        >>> latents = run.encode("cat.jpg").acts[0].topk(2).indices.tolist()
        >>> found = run.intervene("cat.jpg", latents, doses=[1], draws=2)
        >>> found.warnings[0]
        '2 latents are edited at once, which do not compose: ...'
        """
        return self.steered.warnings

    def scores(self, arm: str = "targeted", dose: float | None = None) -> "torch.Tensor":
        """Return the score of each name, a cosine or a logit, under one arm.

        Args:
            arm: none, untouched, targeted, sign_flipped, random_latent, random_direction or diff_means.
            dose: One of the doses; None for `none` and `untouched`.

        Returns:
            The scores, (draws, images, names) float64.

        Raises:
            InputError: The arm was not run at this dose.

        >>> import ommatid
        >>> run = ommatid.open_run("data")
        >>> latent = int(run.encode("cat.jpg").acts[0].argmax())
        >>> found = run.intervene(["cat.jpg", "dog.jpg"], latent, doses=[0, 1], draws=3)
        >>> found.scores("random_direction", 1).shape == (3, 2, len(found.names))
        True
        """
        values = self.steered.of(self.steered.scores_abn, arm, dose)  # pyright: ignore[reportArgumentType]
        if not len(values):
            ran = ", ".join(dict.fromkeys(key.name for key in self.steered.arms))
            raise InputError(f"arm {arm!r} was not run at dose {dose}; arms are {ran}, and doses {_listed(self.steered.doses)}")
        return values

    def table(self, names: Sequence[str] | None = None) -> "pandas.DataFrame":
        """List scores, probabilities and ranks before and after, under every arm and dose.

        Args:
            names: Names to list; None for all.

        Returns:
            A row for each image, dose, arm and name, with the columns that `ommatid.intervene.steering.Steered.table` describes.

        >>> import ommatid
        >>> run = ommatid.open_run("data")
        >>> latent = int(run.encode("cat.jpg").acts[0].argmax())
        >>> table = run.intervene("cat.jpg", latent, draws=3).table()
        >>> table.arm.unique().tolist()
        ['none', 'untouched', 'targeted', 'sign_flipped', 'random_latent', 'random_direction', 'diff_means']
        """
        import pandas as pd

        if names is not None and (unknown := [name for name in names if name not in self.names]):
            raise InputError(f"name {unknown[0]!r} was not compared with the output; names are {_listed(self.names)}")
        found = pd.DataFrame(self.steered.table(names))
        found["image"] = [self.images[image] for image in found.image]
        return found

    def heat(self, image: int = 0) -> "torch.Tensor | None":
        """Map where in an image the edited latents fire, (latents, rows, cols); None if the study's tokens are not patches.

        >>> import ommatid
        >>> run = ommatid.open_run("data")
        >>> latents = run.encode("cat.jpg").acts[0].topk(2).indices.tolist()
        >>> found = run.intervene("cat.jpg", latents, draws=2)
        >>> found.heat().shape  # of the tiles in this example, (latents, rows, cols)
        torch.Size([2, 2, 3])
        """
        return self.steered.heat(image)

    def draw(self) -> "Page":
        """Draw the images, where the latents fire, and the dose curve of one name with the lines of all controls.

        >>> import ommatid
        >>> run = ommatid.open_run("data")
        >>> latent = int(run.encode("cat.jpg").acts[0].argmax())
        >>> png = run.intervene("cat.jpg", latent, draws=3).draw().png()
        """
        from ommatid.api.pictures import draw_steered

        return draw_steered(self.steered, self.photographs.drawn(self.boxes), self.follow)

    def save(self, path: str | Path) -> None:
        """Write a picture (.png) or the table (.csv, or .json with doses, latents and warnings).

        Raises:
            InputError: The path has another ending.
            QueryError: The file cannot be written there.

        >>> import ommatid
        >>> run = ommatid.open_run("data")
        >>> latent = int(run.encode("cat.jpg").acts[0].argmax())
        >>> run.intervene("cat.jpg", latent, draws=3).save("steered.png")
        """
        save(self, path)


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model that answers in words says of some images while latents of its tower are edited, beside all controls.

    >>> import ommatid
    >>> run = ommatid.open_run("data")
    >>> run.ask("cat.jpg", 0)  # of a study of LLaVA or Qwen-VL: Answers(1 image, latent 0, doses 0, 0.5, 1 and 2, 'What is ...')
    Traceback (most recent call last):
    ommatid.errors.ModelError: extract.model.kind: ... models have no language model and cannot answer in words; ...
    """

    photographs: Photographs
    """The images."""
    sae: str
    """Name of the SAE in the column `sae` of the catalogue."""
    answered: "Answered"
    """Answers, shifts and log-odds by arm, dose and image."""

    def __repr__(self) -> str:
        latents, doses, n = _listed(self.answered.latents), _listed(self.answered.doses), len(self.images)
        of, at = "s" * (len(self.answered.latents) > 1), "s" * (len(self.answered.doses) > 1)
        return f"Answers({n} image{'s' * (n != 1)}, latent{of} {latents}, dose{at} {doses}, {self.answered.question!r})"

    @property
    def images(self) -> tuple[str, ...]:
        """Name of each image: its path, or its index as text if it had no path."""
        return self.photographs.names

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the results less sure than they look, a sentence each."""
        return self.answered.warnings

    def answers(self, arm: str = "targeted", dose: float | None = None) -> list[tuple[str, ...]]:
        """Return the answer about each image under one arm, for each of its draws.

        Args:
            arm: none, untouched, targeted, sign_flipped, random_latent, random_direction, diff_means or prompt.
            dose: One of the doses; None for `none`, `untouched` and `prompt`.

        Raises:
            InputError: The arm was not run at this dose.
        """
        if not (places := self.answered.places(arm, dose)):
            ran = ", ".join(dict.fromkeys(key.name for key in self.answered.arms))
            raise InputError(f"arm {arm!r} was not run at dose {dose}; arms are {ran}, and doses {_listed(self.answered.doses)}")
        return [self.answered.answers[place] for place in places]

    def table(self) -> "pandas.DataFrame":
        """List the answers before and after, under every arm, dose and draw: the columns of `ommatid.intervene.answers.Answered.table`."""
        import pandas as pd

        found = pd.DataFrame(self.answered.table())
        found["image"] = [self.images[image] for image in found.image]
        return found

    def save(self, path: str | Path) -> None:
        """Write the table (.csv, or .json with the question, doses, latents and warnings).

        Raises:
            InputError: The path has another ending.
            QueryError: The file cannot be written there.
        """
        save(self, path)


@dataclass(frozen=True, eq=False)
class Contributions:
    """Which latents an output of the model comes from, on some images, and where in them.

    >>> import ommatid
    >>> found = ommatid.open_run("data").attribute("cat.jpg", texts=["red", "blue"])
    >>> found
    Contributions(1 image, 'red' − 'blue', cheap)
    >>> found.table(3).columns.tolist()[:6]
    ['image', 'rank', 'latent', 'label', 'ms', 'causal']
    """

    photographs: Photographs
    """The images."""
    boxes: tuple[tuple[float, float, float, float], ...]
    """Part of each image that the model sees."""
    sae: str
    """Name of the SAE."""
    output: str
    """The output, in words."""
    method: "Method"
    """How effects were computed."""
    of: "tuple[Attributed, ...]"
    """Effects on each image."""
    n_top: int
    """Number of the strongest latents of each image whose effects were computed exactly."""
    described: "Callable[[int], dict[str, Any]]"
    """Function that returns label, MS and causal status of a latent."""
    picker: "TokenPicker"
    """The kept tokens, in the order of maps."""

    def __repr__(self) -> str:
        n = len(self.images)
        return f"Contributions({n} image{'s' * (n != 1)}, {self.output}, {self.method})"

    @property
    def images(self) -> tuple[str, ...]:
        """Name of each image: its path, or its index as text if it had no path.

        >>> import ommatid
        >>> ommatid.open_run("data").attribute("cat.jpg", ["red"]).images
        ('cat.jpg',)
        """
        return self.photographs.names

    @cached_property
    def effects(self) -> "torch.Tensor":
        """Effect of each latent on each image, (images, latents); 0 where it is silent.

        >>> import ommatid
        >>> found = ommatid.open_run("data").attribute(["cat.jpg", "dog.jpg"], texts=["red"])
        >>> found.effects.shape[0]
        2
        """
        import torch

        return torch.stack([one.effects_s for one in self.of])

    def top(self, image: int = 0, n: int | None = None) -> list[int]:
        """List the latents with the largest effects on an image, either way, strongest first; silent ones are left out.

        >>> import ommatid
        >>> found = ommatid.open_run("data").attribute("cat.jpg", ["red"])
        >>> strongest = found.top(0, 1)[0]
        >>> bool((found.effects[0].abs() <= found.effects[0, strongest].abs()).all())
        True
        """
        effects = self.of[image].effects_s
        order = effects.abs().sort(descending=True, stable=True).indices[: self.n_top if n is None else n]
        return [latent for latent in order.tolist() if effects[latent]]

    def map(self, latent: int, image: int = 0) -> "torch.Tensor | None":
        """Map where in an image a latent has its effect, (rows, cols); None if the study's tokens are not patches.

        Exact effects have no places; the map is then that of cheap ones.

        >>> import ommatid
        >>> found = ommatid.open_run("data").attribute("cat.jpg", ["red"])
        >>> strongest = found.top()[0]
        >>> bool((found.map(strongest).sum() - found.effects[0, strongest]).abs() < 1e-5)
        True
        """
        if self.picker.grid is None:
            return None
        rows, cols = self.picker.grid
        return self.of[image].maps([latent])[-rows * cols :, 0].unflatten(0, (rows, cols))

    def table(self, n: int | None = None) -> "pandas.DataFrame":
        """List the latents with the largest effects on each image.

        Args:
            n: Largest number of latents of each image; None for as many as were ablated.

        Returns:
            A row for each image and latent: `image`, `rank`, `latent`, `label`, `ms`, `causal` (its status, or None if the stage
            `intervene` has not run), `act`, `effect`, `exact` (missing if the latent was not ablated), and `row`, `col` and `at_patch`, the
            patch with the largest effect in the same direction and that effect (missing if tokens have no place in an image).

        >>> import ommatid
        >>> found = ommatid.open_run("data").attribute(["cat.jpg", "dog.jpg"], class_name="red")
        >>> table = found.table(3)
        >>> table.groupby("image")["rank"].first().tolist()
        [1, 1]
        """
        import pandas as pd

        columns = ["image", "rank", "latent", "label", "ms", "causal", "act", "effect", "exact", "row", "col", "at_patch"]
        rows = [row for image in range(len(self.of)) for row in self.rows(image, n)]
        return pd.DataFrame(rows, columns=columns).astype({"row": "Int64", "col": "Int64"})

    def rows(self, image: int = 0, n: int | None = None) -> list[dict[str, Any]]:
        """Return the rows of `table` about one image, as plain values; None where a value is missing.

        >>> import ommatid
        >>> row, *_ = ommatid.open_run("data").attribute("cat.jpg", ["red"]).rows()
        >>> row["rank"]
        1
        """
        return [self._row(image, rank, latent) for rank, latent in enumerate(self.top(image, n), start=1)]

    def _row(self, image: int, rank: int, latent: int) -> dict[str, Any]:
        one = self.of[image]
        effect, place = float(one.effects_s[latent]), {"row": None, "col": None, "at_patch": None}
        if (found := self.map(latent, image)) is not None:
            at = int((found * (1 if effect > 0 else -1)).argmax())
            place = {"row": at // found.shape[1], "col": at % found.shape[1], "at_patch": float(found.flatten()[at])}
        numbers = {"act": float(one.acts_s[latent]), "effect": effect, "exact": one.exact.get(latent)}
        return {"image": self.images[image], "rank": rank, "latent": latent, **self.described(latent), **numbers, **place}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the results less sure than they look, a sentence each.

        >>> import ommatid
        >>> found = ommatid.open_run("data").attribute("cat.jpg", ["red"])
        >>> for warning in found.warnings:
        ...     assert warning.startswith("cat.jpg: ")
        """
        from ommatid.intervene.attribution import TOLERATED

        notes: list[str] = []
        for image, one in zip(self.images, self.of, strict=True):
            if one.agreement and one.agreement.is_low:
                notes.append(f"{image}: {one.agreement.note}")
            if (sides := one.completeness) and sides.gap > TOLERATED * abs(float(sides.difference_b[0])):
                what = (
                    "take --method integrated" if self.method == "cheap" else "the output jumps between the mean activation and the image"
                )
                notes.append(
                    f"{image}: {self.method} effects do not add up: latents, error and bias make {float(sides.effects_b[0]):.3g} of a "
                    f"difference of {float(sides.difference_b[0]):.3g}: {what}"
                )
        return tuple(notes)

    def draw(self) -> "Page":
        """Draw the strongest latents of each image with their exact effects, and where in the image they have them.

        >>> import ommatid
        >>> png = ommatid.open_run("data").attribute("cat.jpg", ["red"]).draw().png()
        """
        from ommatid.api.pictures import draw_attributed

        sources = [[self._source(image, latent) for latent in self.top(image, 16)] for image in range(len(self.of))]
        return draw_attributed(self.output, self.method, self.photographs.drawn(self.boxes), sources, self.warnings)

    def _source(self, image: int, latent: int) -> "Source":
        from ommatid.api.pictures import Source

        one, found = self.of[image], self.map(latent, image)
        where = None if found is None else found.numpy()
        return Source(latent, self.described(latent)["label"], float(one.effects_s[latent]), one.exact.get(latent), where)

    def save(self, path: str | Path) -> None:
        """Write a picture (.png) or the table (.csv, or .json with the output, agreement, completeness and warnings).

        Raises:
            InputError: The path has another ending.
            QueryError: The file cannot be written there.

        >>> import ommatid
        >>> ommatid.open_run("data").attribute("cat.jpg", ["red"]).save("red.csv")
        """
        save(self, path)


def _listed(values: Any) -> str:
    """List values as words, such as `0, 1 and 2`; at most eight."""
    words = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    if len(words) > 8:
        return f"{', '.join(words[:8])} and {len(words) - 8} more"
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def steer_images(
    run: "Run",
    photographs: Photographs,
    latents: Sequence[int] | int,
    *,
    doses: Sequence[float] | float,
    texts: Sequence[str] | None,
    tokens: "Where",
    patches: Patches | Image.Image | None,
    kind: "Dosed",
    unit: "Unit",
    error: "ErrorTerm",
    draws: int,
    seed: int,
    sae: str | None,
) -> Intervention:
    """Run the model on images with latents edited; see `Run.intervene`."""
    from ommatid.intervene.steering import check_doses, choose_readout, steer

    chosen, doses = _check_latents(latents), check_doses(_as_list(doses))
    _check_seed(seed)
    _check_texts(texts)
    _check_photographs(photographs, patches)
    name, subject = run.subject(sae)
    for latent in chosen:
        subject.check_latent(latent)
    where = _choose_tokens(subject, tokens, patches, photographs)
    described = list(subject.describe(chosen))
    steered = steer(
        subject,
        photographs.pixels(subject.model.preprocess),
        described,
        doses=doses,
        kind=kind,
        unit=unit,
        tokens=where,
        error=error,
        readout=choose_readout(subject, described, texts),
        draws=draws,
        seed=seed,
    )
    return Intervention(photographs, _boxes(subject, photographs), name, steered, texts[0] if texts else None)


def ask_images(
    run: "Run",
    photographs: Photographs,
    latents: Sequence[int] | int,
    *,
    question: str,
    doses: Sequence[float] | float,
    tokens: "Where",
    patches: Patches | Image.Image | None,
    kind: "Dosed",
    unit: "Unit",
    error: "ErrorTerm",
    draws: int,
    seed: int,
    max_new_tokens: int,
    sae: str | None,
    dtype: "SpeakerDtype",
    device_map: "DeviceMap | None",
) -> Answers:
    """Ask a model about images with latents edited; see `Run.ask`."""
    from ommatid.intervene.answers import ask, find_speaker, read_question
    from ommatid.intervene.steering import check_doses

    chosen, doses = _check_latents(latents), check_doses(_as_list(doses))
    _check_seed(seed)
    read_question(question, "question")
    _check_photographs(photographs, patches)
    name, subject = run.subject(sae)
    find_speaker(subject)
    for latent in chosen:
        subject.check_latent(latent)
    speaker = run._speaker(subject, dtype, device_map)
    answered = ask(
        subject,
        speaker,
        photographs.opened,
        list(subject.describe(chosen)),
        question=question,
        doses=doses,
        kind=kind,
        unit=unit,
        tokens=_choose_tokens(subject, tokens, patches, photographs),
        error=error,
        draws=draws,
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    return Answers(photographs, name, answered)


def attribute_outputs(
    run: "Run",
    photographs: Photographs,
    *,
    texts: Sequence[str] | None,
    class_name: str | None,
    latent_of: "LatentOf | None",
    method: "Method",
    n_top: int,
    seed: int,
    sae: str | None,
) -> Contributions:
    """Compute effects of all latents on one output; see `Run.attribute`."""
    from ommatid.intervene.attribution import Attributor
    from ommatid.intervene.contributions import Method, attribute_image
    from ommatid.intervene.steering import independent

    if method not in (methods := get_args(Method)):
        raise InputError(f"method is {method!r}; allowed values are {', '.join(methods)}")
    if n_top < 1:
        raise InputError(f"top is {n_top}; it must be 1 or more")
    _check_seed(seed)
    _check_photographs(photographs, None)
    _check_output(texts, class_name, latent_of)
    name, subject = run.subject(sae)
    if class_name is not None:
        check_class(subject, class_name)
    output, read = _make_output(run, subject, texts, class_name, latent_of)
    attributor = Attributor(subject.model, subject.device_sae, subject.reads, subject.writes, read)
    pixels, mean_d = photographs.pixels(subject.model.preprocess).to(subject.device), subject.mean.to(subject.device)
    found = []
    for place, image in enumerate(photographs.names):
        one = attribute_image(
            attributor, pixels[place : place + 1], output, method=method, n_top=n_top, n_others=N_COMPARED,
            rng=np.random.default_rng([seed, place]), baseline_d=mean_d,
        )  # fmt: skip
        if one is None and latent_of is not None:
            silent = "it is silent on this image; choose an image on which it fires"
            raise InputError(f"{image}: {output.name} does not depend on any latent there: {silent}")
        if one is None:
            raise ModelError(independent(subject, output.name))
        found.append(one)
    about = _describer(run, subject, name)
    return Contributions(photographs, _boxes(subject, photographs), name, output.name, method, tuple(found), n_top, about, subject.writes)


def _make_output(
    run: "Run", subject: "Subject", texts: Sequence[str] | None, class_name: str | None, latent_of: "LatentOf | None"
) -> "tuple[Output, str | None]":
    """Return the output, and the later hookpoint at which it is read."""
    from ommatid.intervene.attribution import activation
    from ommatid.intervene.contributions import Output, compare_texts
    from ommatid.intervene.steering import choose_readout

    if class_name is not None:
        return Output(f"log-odds of {class_name!r}", subject.readout.log_odds(class_name), "log-odds"), None
    if texts is not None:
        readout = subject.readout if subject.model.d_embed is None else choose_readout(subject, [], texts)
        return compare_texts(readout, texts, subject.model.name), None
    assert latent_of is not None
    root, *sae, latent = latent_of
    name, later = _open(root).subject(*map(str, sae))
    later.check_latent(latent)
    own, other = (of.inputs["extract"].manifest.params["model"] for of in (subject, later))
    if own != other:
        raise ModelError(
            f"{name} is of the model {other}, and the latents of {subject.sae.name} are of {own}: name an SAE of the same model"
        )
    if later.reads.name == subject.writes.name:
        raise InputError(
            f"latent {latent} of {name} is at {later.reads.name}, where those of {subject.sae.name} are: name one at a later hookpoint"
        )
    score = activation(later.device_sae, later.reads, latent)
    return Output(f"activation of latent {latent} of {name}", score, "activation"), later.reads.name


def _open(run: "Run | str | Path | int") -> "Run":
    from ommatid.api.run import Run

    return run if isinstance(run, Run) else Run(str(run))


def _describer(run: "Run", subject: "Subject", sae: str) -> Callable[[int], dict[str, Any]]:
    """Return the function that describes a latent by its label, its MS and its causal status, which is None if the stage has not run."""
    status: dict[int, str] = {}
    if "intervene" in run.artefacts:
        rows = run.artefacts["intervene"].each()[sae].read("effects", ["latent", "status"]).to_pylist()
        status = {row["latent"]: row["status"] for row in rows}

    def describe(latent: int) -> dict[str, Any]:
        label = subject.labels.get(latent, {}).get("label")
        return {"label": label, "ms": subject.latents[latent]["ms"], "causal": status.get(latent)}

    return describe


def _boxes(subject: "Subject", photographs: Photographs) -> tuple[tuple[float, float, float, float], ...]:
    return tuple(subject.model.preprocess.box(*image.size) for image in photographs.opened)


def _as_list(values: Any) -> list[Any]:
    """Return values as a list: the numbers of an array or a tensor, or the only one."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise InputError(f"seed is {seed!r}; it must be a whole number, 0 or above")


def _check_texts(texts: Sequence[str] | None) -> None:
    if texts is not None and (isinstance(texts, str) or not all(isinstance(text, str) for text in texts)):
        raise InputError(f"texts are {texts!r}; give a list of texts, such as ['a truck', 'a ship']")


def _check_latents(latents: Sequence[int] | int) -> list[int]:
    latents = _as_list(latents)
    if not len(latents):
        raise InputError("latents: there are none; name one or more")
    if odd := [latent for latent in latents if isinstance(latent, bool) or not isinstance(latent, int | np.integer)]:
        raise InputError(f"latents: got {odd[0]!r}; expected the indices of latents, such as 382")
    if len(set(latents)) < len(latents):
        raise InputError(f"latents: {', '.join(map(str, latents))} names a latent twice; name each once")
    return [int(latent) for latent in latents]


def _check_photographs(photographs: Photographs, patches: Patches | Image.Image | None) -> None:
    """Check that a mask that is an image is as large as each photograph."""
    if isinstance(patches, Image.Image):
        for name, image in zip(photographs.names, photographs.opened, strict=True):
            if image.size != patches.size:
                sizes = "{} x {} pixels, but {} has {} x {}".format(*patches.size, name, *image.size)
                raise InputError(f"patches: the mask has {sizes}; make the mask as large as the upright image")


def _check_output(texts: Sequence[str] | None, class_name: str | None, latent_of: "LatentOf | None") -> None:
    given = [name for name, value in (("texts", texts), ("class_name", class_name), ("latent_of", latent_of)) if value is not None]
    if len(given) != 1:
        said = f"{_listed(given)} are given" if given else "none is given"
        raise InputError(f"an output is one or two texts, a class, or a latent at a later hookpoint, and {said}: name one")
    if texts is not None and (isinstance(texts, str) or not 1 <= len(texts) <= 2):
        raise InputError(f"texts are {texts!r}; give a list of one text, or of two, of which the second is compared with the first")
    _check_texts(texts)
    if class_name is not None and not isinstance(class_name, str):
        raise InputError(f"class_name is {class_name!r}; give the name of a class, such as 'cat'")
    if latent_of is not None and not (isinstance(latent_of, tuple) and len(latent_of) in (2, 3)):
        need = "the run of the later SAE or the root of its artefacts, its name if there are several, and the latent"
        raise InputError(f"latent_of is {latent_of!r}; give {need}, such as ('late/data', 382)")


def check_class(subject: "Subject", name: str) -> None:
    """Check that the output can be read as the log-odds of a class, without loading the model.

    Raises:
        InputError: There is no such class.
    """
    classes = subject.readout.names if subject.head else sorted(set(subject.classes.values()))
    if name not in classes:
        near = difflib.get_close_matches(name, classes, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        has = (
            f"they have {_listed(classes)}"
            if classes
            else "they are not of several classes: label them (images.source), or attribute a text"
        )
        raise InputError(f"class {name!r}: {'the head does not know' if subject.head else 'no evaluation image has'} it; {guess}{has}")


def _choose_tokens(
    subject: "Subject", tokens: "Where", patches: Patches | Image.Image | None, photographs: Photographs
) -> "Where | torch.Tensor":
    """Return the tokens that are edited: a choice by name, or the mask of patches."""
    import torch

    if patches is None:
        return tokens
    picker = subject.writes
    if tokens != "all":
        raise InputError(f"tokens are {tokens!r} and patches are given as well; leave out one of them")
    if picker.grid is None:
        kinds = _listed(dict.fromkeys(place.kind for place in picker.places))
        raise InputError(f"patches: the tokens at {picker.name} are {kinds}, which have no place in an image; leave out patches")
    if isinstance(patches, Image.Image):
        chosen = _marked(patches, subject.model.preprocess, picker.grid)
    else:
        chosen = _chosen(patches, picker.grid, len(photographs.names))
    if not chosen.any():
        raise InputError("patches: none is chosen, so the edit would change nothing; choose at least one")
    others = np.zeros((*chosen.shape[:-2], len(picker.places) - picker.grid[0] * picker.grid[1]), bool)
    return torch.from_numpy(np.concatenate([others, chosen.reshape(*chosen.shape[:-2], -1)], -1))


def _marked(mask: Image.Image, preprocess: "Preprocess", grid: tuple[int, int]) -> np.ndarray:
    """Return the patches of which a mask marks at least half, (rows, cols) bool; it is resized and cropped like the image."""
    seen = dataclasses.replace(preprocess, interpolation="nearest")(
        Image.fromarray((np.asarray(mask.convert("L")) > 127).astype(np.uint8) * 255)
    )
    return np.asarray(Image.fromarray(seen[..., 0]).resize((grid[1], grid[0]), Image.Resampling.BOX)) > 127


def _chosen(patches: Patches, grid: tuple[int, int], n_images: int) -> np.ndarray:
    """Return whether each patch is chosen, (rows, cols) or (images, rows, cols) bool."""
    rows, cols = grid
    patches = np.asarray(patches) if hasattr(patches, "__array__") else patches
    if isinstance(patches, np.ndarray) and patches.dtype == bool:
        if patches.shape not in (grid, (n_images, *grid)):
            raise InputError(
                f"patches: the mask is {patches.shape}; the model has ({rows}, {cols}) patches: give that, or one for each image"
            )
        return patches
    chosen = np.zeros(grid, bool)
    for patch in patches:
        at = tuple(patch) if isinstance(patch, Iterable) else ()
        if len(at) != 2 or any(not isinstance(i, int | np.integer) or isinstance(i, bool) for i in at):
            raise InputError(f"patches: got {patch!r}; expected pairs of row and column, such as (0, 3), or a mask of bool")
        if not (0 <= at[0] < rows and 0 <= at[1] < cols):
            raise InputError(f"patches: row {at[0]}, column {at[1]} is not a patch; rows are 0 to {rows - 1}, columns 0 to {cols - 1}")
        chosen[at] = True
    return chosen


SUFFIXES = (".png", ".csv", ".json")
"""Endings of the files that results are written to."""
TABLES = (".csv", ".json")
"""Endings of those that answers are written to."""


def check_path(path: str | Path, suffixes: Sequence[str] = SUFFIXES) -> Path:
    """Return a path that results can be written to.

    Raises:
        InputError: Its ending is not one of those given, or a folder is there.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file that ends in {', '.join(suffixes)}")
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{path}: results are written as {', '.join(suffixes)}; give the file one of these endings")
    return path


def save(found: Intervention | Answers | Contributions, path: str | Path) -> None:
    """Write results as a picture or as a table; answers as a table only."""
    from ommatid.show.pictures.page import write_whole

    path = check_path(path, TABLES if isinstance(found, Answers) else SUFFIXES)
    match path.suffix.lower():
        case ".csv":
            content = found.table().to_csv(index=False).encode()
        case ".json":
            content = (json.dumps(_as_json(found), ensure_ascii=False, indent=1) + "\n").encode()
        case _:
            assert not isinstance(found, Answers), path
            content = found.draw().png()
    write_whole(path, content, "--out")


def _as_json(found: Intervention | Answers | Contributions) -> dict[str, Any]:
    rows = json.loads(str(found.table().to_json(orient="records")))
    if not isinstance(found, Contributions):
        steered = found.steered if isinstance(found, Intervention) else found.answered
        latents = [
            {"latent": latent, "label": label, "scale": scale}
            for latent, label, scale in zip(steered.latents, steered.labels, steered.scales_l.tolist(), strict=True)
        ]
        doses = [
            {"dose": dose, "acts": acts, "relative": relative}
            for dose, acts, relative in zip(steered.doses, steered.acts_pl.tolist(), steered.relative_pl.tolist(), strict=True)
        ]
        about = {"sae": found.sae, "latents": latents, "doses": doses, "kind": steered.kind, "fvu": steered.fvu_b.tolist()}
        about |= {"question": found.answered.question, "words": found.answered.words} if isinstance(found, Answers) else {}
    else:
        about = {"sae": found.sae, "output": found.output, "method": found.method, "images": [_numbers(one) for one in found.of]}
    return {**about, "warnings": list(found.warnings), "rows": rows}


def _numbers(one: "Attributed") -> dict[str, Any]:
    found: dict[str, Any] = {"value": one.value, "sparsity": one.sparsity, "others": {latent: one.exact[latent] for latent in one.others}}
    if one.agreement:
        found["rank_correlation"], found["n_compared"] = dataclasses.asdict(one.agreement.correlation), one.agreement.n_latents
    if sides := one.completeness:
        parts = {"latents": sides.latents_b, "error": sides.error_b, "bias": sides.bias_b, "difference": sides.difference_b}
        found["completeness"] = {name: float(part[0]) for name, part in parts.items()}
    return json.loads(json.dumps(found).replace("NaN", "null"))
