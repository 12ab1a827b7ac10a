"""Contributions of latents to an output of the model on single images: which latents the output comes from, and where in the images."""

import dataclasses
import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from ommatid.api.results import Boxes, Photographs, Results, check_texts, listed
from ommatid.errors import InputError, ModelError

if TYPE_CHECKING:
    import pandas
    import torch

    from ommatid.api.pictures import Source
    from ommatid.api.run import Run
    from ommatid.extract.tokens import TokenPicker
    from ommatid.intervene.contributions import Attributed, Method, Output
    from ommatid.intervene.subject import Subject
    from ommatid.show.pictures.page import Page

    LatentOf = tuple[Run | str | Path, int] | tuple[Run | str | Path, str, int]
    """A latent at a later hookpoint: its run, or the root of its artefacts; the name of its SAE, if there are several; its index."""

N_COMPARED = 16
"""Number of latents, drawn from those that fire, that are ablated beside the strongest, to compare their effects with the estimates."""


@dataclass(frozen=True, eq=False)
class Contributions(Results):
    """Which latents an output of the model comes from, on some images, and where in them.

    >>> import ommatid
    >>> found = ommatid.open_run("data").attribute("cat.jpg", texts=["red", "blue"])
    >>> found
    Contributions(1 image, 'red' − 'blue', cheap)
    >>> found.table(3).columns.tolist()[:6]
    ['image', 'rank', 'latent', 'label', 'ms', 'causal']
    """

    boxes: Boxes
    """Part of each image that the model sees."""
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

    def _about(self) -> dict[str, Any]:
        return {"output": self.output, "method": self.method, "images": [_numbers(one) for one in self.of]}


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
    from ommatid.intervene.steering import check_seed, independent

    if method not in (methods := get_args(Method)):
        raise InputError(f"method is {method!r}; allowed values are {', '.join(methods)}")
    if n_top < 1:
        raise InputError(f"top is {n_top}; it must be 1 or more")
    check_seed(seed)
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
    boxes = photographs.boxes(subject.model.preprocess)
    return Contributions(photographs, name, boxes, output.name, method, tuple(found), n_top, about, subject.writes)


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


def _check_output(texts: Sequence[str] | None, class_name: str | None, latent_of: "LatentOf | None") -> None:
    given = [name for name, value in (("texts", texts), ("class_name", class_name), ("latent_of", latent_of)) if value is not None]
    if len(given) != 1:
        said = f"{listed(given)} are given" if given else "none is given"
        raise InputError(f"an output is one or two texts, a class, or a latent at a later hookpoint, and {said}: name one")
    if texts is not None and (isinstance(texts, str) or not 1 <= len(texts) <= 2):
        raise InputError(f"texts are {texts!r}; give a list of one text, or of two, of which the second is compared with the first")
    check_texts(texts)
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
            f"they have {listed(classes)}"
            if classes
            else "they are not of several classes: label them (images.source), or attribute a text"
        )
        raise InputError(f"class {name!r}: {'the head does not know' if subject.head else 'no evaluation image has'} it; {guess}{has}")


def _numbers(one: "Attributed") -> dict[str, Any]:
    found: dict[str, Any] = {"value": one.value, "sparsity": one.sparsity, "others": {latent: one.exact[latent] for latent in one.others}}
    if one.agreement:
        found["rank_correlation"], found["n_compared"] = dataclasses.asdict(one.agreement.correlation), one.agreement.n_latents
    if sides := one.completeness:
        parts = {"latents": sides.latents_b, "error": sides.error_b, "bias": sides.bias_b, "difference": sides.difference_b}
        found["completeness"] = {name: float(part[0]) for name, part in parts.items()}
    return json.loads(json.dumps(found).replace("NaN", "null"))
