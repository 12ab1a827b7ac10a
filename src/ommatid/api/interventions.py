"""Interventions on single images: what an edit of latents does to the model's output, or to its answers."""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ommatid.api.results import Boxes, Photographs, Results, check_texts, listed
from ommatid.errors import InputError

if TYPE_CHECKING:
    import pandas
    import torch

    from ommatid.api.run import Run
    from ommatid.intervene.answers import Answered
    from ommatid.intervene.steering import Edited, Plan, Steered
    from ommatid.intervene.subject import Subject
    from ommatid.show.pictures.page import Page
    from ommatid.vlm.preprocess import Preprocess
    from ommatid.vlm.speaking import DeviceMap, SpeakerDtype

Patches = Sequence[tuple[int, int]] | np.ndarray
"""Patches by row and column, or whether each patch is chosen, (rows, cols) or (images, rows, cols) bool."""
DOSES = (0.0, 0.5, 1.0, 2.0)
"""Doses that are run unless others are asked for."""


@dataclass(frozen=True, eq=False)
class _OfEdit(Results):
    """What is done by an edit of latents on some images, at several doses, beside all of its controls."""

    @property
    @abstractmethod
    def _edited(self) -> "Edited":
        """The edit, and what the SAE says of the images."""

    @property
    @abstractmethod
    def _compared(self) -> str:
        """What is compared between arms, in words."""

    def __repr__(self) -> str:
        latents, doses, n = self._edited.latents, self._edited.doses, len(self.images)
        of = f"latent{'s' * (len(latents) > 1)} {listed(latents)}, dose{'s' * (len(doses) > 1)} {listed(doses)}"
        return f"{type(self).__name__}({n} image{'s' * (n != 1)}, {of}, {self._compared})"

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
        return self._edited.warnings

    def _places(self, arm: str, dose: float | None) -> list[int]:
        """Return the places of an arm at a dose, one for each draw.

        Raises:
            InputError: The arm was not run at this dose.
        """
        if not (places := self._edited.places(arm, dose)):
            ran = ", ".join(dict.fromkeys(key.name for key in self._edited.arms))
            raise InputError(f"arm {arm!r} was not run at dose {dose}; arms are {ran}, and doses {listed(self._edited.doses)}")
        return places

    def _named(self, rows: list[dict[str, Any]]) -> "pandas.DataFrame":
        """Make a table of rows in which images are numbers."""
        import pandas as pd

        return pd.DataFrame([{**row, "image": self.images[row["image"]]} for row in rows])

    def _about(self) -> dict[str, Any]:
        edited = self._edited
        latents = [
            {"latent": latent, "label": label, "scale": scale}
            for latent, label, scale in zip(edited.latents, edited.labels, edited.scales_l.tolist(), strict=True)
        ]
        doses = [
            {"dose": dose, "acts": acts, "relative": relative}
            for dose, acts, relative in zip(edited.doses, edited.acts_pl.tolist(), edited.relative_pl.tolist(), strict=True)
        ]
        return {"latents": latents, "doses": doses, "kind": edited.kind, "fvu": edited.fvu_b.tolist()}


@dataclass(frozen=True, eq=False, repr=False)
class Intervention(_OfEdit):
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

    boxes: Boxes
    """Part of each image that the model sees."""
    steered: "Steered"
    """Scores, probabilities and ranks by arm, dose, image and name, as tensors."""
    follow: str | None
    """Name whose dose curve is drawn: the first text. None chooses one for each image."""

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
    def _edited(self) -> "Steered":
        return self.steered

    @property
    def _compared(self) -> str:
        return f"{len(self.names)} names"

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
        return self.steered.scores_abn[self._places(arm, dose)]

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
        if names is not None and (unknown := [name for name in names if name not in self.names]):
            raise InputError(f"name {unknown[0]!r} was not compared with the output; names are {listed(self.names)}")
        return self._named(self.steered.table(names))

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


@dataclass(frozen=True, eq=False, repr=False)
class Answers(_OfEdit):
    """What a model that answers in words says of some images while latents of its tower are edited, beside all controls.

    >>> import ommatid
    >>> run = ommatid.open_run("data")
    >>> run.ask("cat.jpg", 0)  # of a study of LLaVA or Qwen-VL: Answers(1 image, latent 0, doses 0, 0.5, 1 and 2, 'What is ...')
    Traceback (most recent call last):
    ommatid.errors.ModelError: extract.model.kind: ... models have no language model and cannot answer in words; ...
    """

    answered: "Answered"
    """Answers, shifts and log-odds by arm, dose and image."""

    @property
    def _edited(self) -> "Answered":
        return self.answered

    @property
    def _compared(self) -> str:
        return repr(self.answered.question)

    def answers(self, arm: str = "targeted", dose: float | None = None) -> list[tuple[str, ...]]:
        """Return the answer about each image under one arm, for each of its draws.

        Args:
            arm: none, untouched, targeted, sign_flipped, random_latent, random_direction, diff_means or prompt.
            dose: One of the doses; None for `none`, `untouched` and `prompt`.

        Raises:
            InputError: The arm was not run at this dose.
        """
        return [self.answered.answers[place] for place in self._places(arm, dose)]

    def table(self) -> "pandas.DataFrame":
        """List the answers before and after, under every arm, dose and draw: the columns of `ommatid.intervene.answers.Answered.table`."""
        return self._named(self.answered.table())

    def _about(self) -> dict[str, Any]:
        return {**super()._about(), "question": self.answered.question, "words": self.answered.words}


def make_plan(doses: Sequence[float] | float, *options: Any) -> "Plan":
    """Return a plan of one dose, or of several in any form; the options are the further fields of `Plan`, in their order."""
    from ommatid.intervene.steering import Plan

    return Plan(_as_list(doses), *options)


def steer_images(
    run: "Run",
    photographs: Photographs,
    latents: Sequence[int] | int,
    plan: "Plan",
    texts: Sequence[str] | None,
    patches: Patches | Image.Image | None,
    sae: str | None,
) -> Intervention:
    """Run the model on images with latents edited; see `Run.intervene`."""
    from ommatid.intervene.steering import choose_readout, steer

    chosen = _check_latents(latents)
    check_texts(texts)
    _check_photographs(photographs, patches)
    name, subject = run.subject(sae)
    for latent in chosen:
        subject.check_latent(latent)
    plan = _restrict(plan, subject, patches, photographs)
    described, preprocess = list(subject.describe(chosen)), subject.model.preprocess
    steered = steer(subject, photographs.pixels(preprocess), described, plan, choose_readout(subject, described, texts))
    return Intervention(photographs, name, photographs.boxes(preprocess), steered, texts[0] if texts else None)


def ask_images(
    run: "Run",
    photographs: Photographs,
    latents: Sequence[int] | int,
    plan: "Plan",
    question: str,
    max_new_tokens: int,
    patches: Patches | Image.Image | None,
    sae: str | None,
    dtype: "SpeakerDtype",
    device_map: "DeviceMap | None",
) -> Answers:
    """Ask a model about images with latents edited; see `Run.ask`."""
    from ommatid.intervene.answers import ask, find_speaker, read_question

    chosen = _check_latents(latents)
    read_question(question, "question")
    _check_photographs(photographs, patches)
    name, subject = run.subject(sae)
    find_speaker(subject)
    for latent in chosen:
        subject.check_latent(latent)
    speaker = run._speaker(subject, dtype, device_map)
    plan = _restrict(plan, subject, patches, photographs)
    described = list(subject.describe(chosen))
    return Answers(photographs, name, ask(subject, speaker, photographs.opened, described, plan, question, max_new_tokens))


def _as_list(values: Any) -> list[Any]:
    """Return values as a list: the numbers of an array or a tensor, or the only one."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]


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


def _restrict(plan: "Plan", subject: "Subject", patches: Patches | Image.Image | None, photographs: Photographs) -> "Plan":
    """Return the plan with an edit of these patches only, if any are given."""
    import torch

    if patches is None:
        return plan
    picker = subject.writes
    if plan.tokens != "all":
        raise InputError(f"tokens are {plan.tokens!r} and patches are given as well; leave out one of them")
    if picker.grid is None:
        kinds = listed(dict.fromkeys(place.kind for place in picker.places))
        raise InputError(f"patches: the tokens at {picker.name} are {kinds}, which have no place in an image; leave out patches")
    if isinstance(patches, Image.Image):
        chosen = _marked(patches, subject.model.preprocess, picker.grid)
    else:
        chosen = _chosen(patches, picker.grid, len(photographs.names))
    if not chosen.any():
        raise InputError("patches: none is chosen, so the edit would change nothing; choose at least one")
    others = np.zeros((*chosen.shape[:-2], len(picker.places) - picker.grid[0] * picker.grid[1]), bool)
    mask = torch.from_numpy(np.concatenate([others, chosen.reshape(*chosen.shape[:-2], -1)], -1))
    return dataclasses.replace(plan, tokens=mask)


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
