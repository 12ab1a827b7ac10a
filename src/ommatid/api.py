"""The Python API: a finished study opened for reading, and new images encoded as the study's own images were.

`import ommatid` offers everything here, and loads it when it is first used. torch waits until a model or an SAE is needed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ommatid.catalog.reader import Catalog
from ommatid.config import EvaluateParams
from ommatid.errors import ArtefactError, ConfigError, InputError, ModelError, gist
from ommatid.images.decode import Unreadable, decode, upright
from ommatid.stage import DATA, STAGES, TRACKED, open_stage
from ommatid.store import INSIDE, Artefact

if TYPE_CHECKING:
    import pandas
    import torch

    from ommatid.evaluate.dictionaries import Pool
    from ommatid.extract.tokens import TokenPicker
    from ommatid.sae.model import SAE
    from ommatid.vlm import Dtype, VisionModel

ImageLike = str | Path | bytes | Image.Image | np.ndarray
"""The path of an image file, its bytes, a Pillow image, or a uint8 array (height, width), (height, width, 3) or (height, width, 4)."""
MEASURES = ("label_score", "max_act", "ms", "density")
"""Columns of the relation `features` that stand beside each label and activation in `Encoding.top`."""


@dataclass(frozen=True, eq=False)
class Encoding:
    """The activations of an SAE's latents on some images.

    >>> import ommatid
    >>> found = ommatid.open_run("data").encode(["cat.jpg", "dog.jpg"])
    >>> found
    Encoding(2 images, ... latents of ...)
    >>> list(found.top(3).columns)
    ['image', 'latent', 'label', 'act', 'label_score', 'max_act', 'ms', 'density']
    """

    images: tuple[str, ...]
    """Name of each image: its path as it was given, or its number as text, counted from 0, where it had no path."""
    acts: "torch.Tensor"
    """Image-level activations, (images, latents) float32, pooled over the tokens of an image as `evaluate.image_activation` says."""
    x: "torch.Tensor"
    """Activations at the hookpoint, (images, tokens, d_model) float32, rounded to float16 as those of the study are."""
    sae: str
    """Name of the SAE in the column `sae` of the catalogue."""
    run: "Run"
    """The study that the SAE belongs to."""

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return f"Encoding({len(self)} image{'s' * (len(self) != 1)}, {self.acts.shape[1]} latents of {self.sae})"

    def top(self, n: int | None = 10) -> "pandas.DataFrame":
        """List the strongest features of each image, strongest first.

        Args:
            n: Features of each image, at most; None lists every latent that fires.

        Returns:
            A row for each image and latent that fires: `image`, `latent`, `label` (None where no labeller found one) and `act`, then what
            the catalogue says of the feature: `label_score`, `max_act` (its largest activation on a token of the evaluation split), `ms`
            and `density`.

        Raises:
            ArtefactError: The catalogue is missing, or was built before this SAE was trained.

        >>> import ommatid
        >>> rows = ommatid.open_run("data").encode("cat.jpg").top(3)
        >>> rows.image.tolist()
        ['cat.jpg', 'cat.jpg', 'cat.jpg']
        >>> rows.act.is_monotonic_decreasing
        True
        """
        import pandas as pd

        if n is not None and n < 1:
            raise InputError(f"n is {n}; it must be 1 or more, or None for every latent that fires")
        acts, latents = self.acts.sort(dim=1, descending=True, stable=True)
        shown = acts[:, :n] > 0
        rows = shown.nonzero()[:, 0].tolist()
        columns = {"image": [self.images[row] for row in rows], "latent": latents[:, :n][shown].numpy(), "act": acts[:, :n][shown].numpy()}
        found = pd.DataFrame(columns).join(self.run.features(self.sae), on="latent")
        return found.loc[:, ["image", "latent", "label", "act", *MEASURES]]


class Run:
    """A finished study: what its stages made, its catalogue, its SAEs and the model that they explain.

    Artefacts, catalogue, model and SAEs are opened when they are first used, and kept. A run is a context manager; `close` ends the
    process that answers questions to the catalogue.

    >>> import ommatid
    >>> with ommatid.open_run("data") as run:
    ...     (n_latents,) = run.catalog.rows("SELECT count(*) FROM features")[0]
    ...     assert n_latents == run.sae().n_latents == len(run.features())
    """

    def __init__(self, data: str | Path = DATA) -> None:
        self.data = str(data)
        """Root of the artefacts, a path or URL."""
        try:
            self._training = open_stage("train", data=self.data)
        except ArtefactError as error:
            inside = "://" not in self.data and (Path(self.data) / DATA / STAGES["train"].place.name).exists()
            hint = f"; did you mean {Path(self.data) / DATA}?" if inside else ""
            raise ArtefactError(f"{self.data} holds no finished study: {error}{hint}") from None
        self._encoders: dict[str, _Encoder] = {}

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Run({self.data!r}, SAEs: {', '.join(self._training.children)})"

    def close(self) -> None:
        """Release the catalogue."""
        if catalog := self.__dict__.pop("catalog", None):
            catalog.close()

    @cached_property
    def artefacts(self) -> Mapping[str, Artefact]:
        """What each stage made, by the stage's name; a stage that has not run is not among them.

        >>> import ommatid
        >>> artefacts = ommatid.open_run("data").artefacts
        >>> list(artefacts)
        ['images', 'extract', 'train', 'evaluate', 'label', 'catalog']
        >>> artefacts["images"].summary["n_images"]
        200
        """
        found = {}
        for name, stage in STAGES.items():
            if name == "train":
                found[name] = self._training
            elif (self._training.folder.parent / stage.place.name).exists():
                found[name] = open_stage(name, data=self.data)
        return found

    @property
    def params(self) -> Mapping[str, Mapping[str, Any]]:
        """The values that each stage ran with, by section and key, as params.yaml has them.

        >>> import ommatid
        >>> ommatid.open_run("data").params["evaluate"]["image_activation"]
        'max'
        """
        return {name: artefact.manifest.params for name, artefact in self.artefacts.items()}

    @cached_property
    def saes(self) -> tuple[str, ...]:
        """Names of the SAEs, without those that a quality gate rejected.

        >>> import ommatid
        >>> len(ommatid.open_run("data").saes)
        1
        """
        rejected = {name for stage in TRACKED if stage in self.artefacts for name in self.artefacts[stage].rejected}
        return tuple(name for name in self._training.children if name not in rejected)

    @cached_property
    def catalog(self) -> Catalog:
        """The catalogue, which answers questions in SQL.

        Raises:
            ArtefactError: The stage `catalog` has not run.

        >>> import ommatid
        >>> run = ommatid.open_run("data")
        >>> list(run.catalog.pandas("SELECT latent, label, ms FROM features ORDER BY ms DESC NULLS LAST LIMIT 3").columns)
        ['latent', 'label', 'ms']
        """
        return Catalog(open_stage("catalog", data=self.data).file("catalog.duckdb"))

    def features(self, sae: str | None = None) -> "pandas.DataFrame":
        """The relation `features` of one SAE, with a row for each latent and the latent as the index.

        Args:
            sae: Name of the SAE, from `saes` or from the catalogue; None: the only one.

        Raises:
            ConfigError: There is no SAE of this name, or there are several and none is named.
            ArtefactError: The catalogue is missing, or was built before this SAE was trained.

        >>> import ommatid
        >>> features = ommatid.open_run("data").features()
        >>> best = features.sort_values("ms", ascending=False).head(5)[["label", "ms", "density"]]
        """
        name = self._artefact_of(sae).summary["sae"]
        found = self.catalog.pandas("SELECT * FROM features WHERE sae = $sae ORDER BY latent", {"sae": name})
        if found.empty:
            raise ArtefactError(f"{self.data}/catalog has no features of {name}, for it was built earlier; run `dvc repro`")
        return found.set_index("latent")

    def sae(self, name: str | None = None) -> "SAE":
        """Load an SAE of the study; its tensors are on the CPU.

        Args:
            name: From `saes` or from the catalogue; None: the only one.

        Raises:
            ConfigError: There is no SAE of this name, or there are several and none is named.

        >>> import ommatid
        >>> run = ommatid.open_run("data")
        >>> sae, found = run.sae(), run.encode("cat.jpg")
        >>> acts = sae.encode(found.x[0])  # of each token, (tokens, latents)
        >>> x_hat = sae.decode(acts)
        >>> 0 < ommatid.fvu(found.x[0], x_hat) < 1
        True
        """
        from ommatid.sae.model import SAE

        return SAE.load(self._artefact_of(name).path)

    @cached_property
    def model(self) -> "VisionModel":
        """The model that the study explains, on this machine's device; a path in the study's params is relative to the current folder.

        Raises:
            ModelError: The activations were imported from files, or the model cannot be loaded.

        >>> import ommatid
        >>> model = ommatid.open_run("data").model
        >>> model.d_embed == model.embed_text(["a photo of a cat"]).shape[1]
        True
        """
        from ommatid.extract.towers import load_explained

        params = open_stage("extract", data=self.data).manifest.params
        if params["source"] == "files":
            raise ModelError(
                f"{self.data}: its activations were imported from files, so the model that made them is not known here and no image can be "
                "encoded; encode activations of yours (tokens, d_model) instead, with run.sae().encode(x)"
            )
        return load_explained(params)

    def encode(self, images: ImageLike | Iterable[ImageLike], sae: str | None = None) -> Encoding:
        """Encode images with the study's model and one of its SAEs.

        Preprocessing, hookpoint, tokens, precision and pooling are those of the study: an image of the study has the activations that
        the relation `firings` holds, but for rounding where another machine or another batch computes in another order.

        Args:
            images: Paths, bytes of image files, Pillow images or uint8 arrays (height, width, 3), in any mixture; a single one; or a uint8
                array (images, height, width, 3).
            sae: Name of the SAE, from `saes` or from the catalogue; None: the only one.

        Returns:
            The activations; all are held in memory, so a set of very many images is better given to the stages.

        Raises:
            InputError: An image cannot be read; it is named with the reason.
            ConfigError: There is no SAE of this name, or there are several and none is named.
            ModelError: The activations were imported from files, or the model cannot be loaded.
            ArtefactError: The study is not evaluated, or its artefacts were not made from one another.

        >>> import ommatid
        >>> from PIL import Image
        >>> found = ommatid.open_run("data").encode(["cat.jpg", Image.open("dog.jpg")])
        >>> found.images
        ('cat.jpg', '1')
        >>> found.acts.shape[0] == found.x.shape[0] == 2
        True
        """
        import torch

        given = _as_list(images)
        if not given:
            raise InputError("no images were given; name one or more")
        name = self._artefact_of(sae).summary["sae"]
        if name not in self._encoders:
            self._encoders[name] = self._make_encoder(sae)
        encoder = self._encoders[name]
        size = self.params["extract"]["batch_size"]
        batches = [encoder.run([_open(one, i) for i, one in enumerate(given[at : at + size], at)]) for at in range(0, len(given), size)]
        acts, x = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return Encoding(tuple(_name(one, i) for i, one in enumerate(given)), acts, x, name, self)

    def _artefact_of(self, sae: str | None) -> Artefact:
        """The SAE's artefact inside the training."""
        if sae is None and len(self.saes) > 1:
            raise ConfigError(f"{self.data} has {len(self.saes)} SAEs; name one of them: {', '.join(self.saes)}")
        for name in self.saes:
            artefact = self._training.child(name, INSIDE[self._training.manifest.kind])
            if sae in (None, name, artefact.summary["sae"]):
                return artefact
        raise ConfigError(f"{self.data} has no SAE {sae!r}; it has {', '.join(self.saes) or 'none that passed the quality gate'}")

    def _make_encoder(self, name: str | None) -> "_Encoder":
        from ommatid.evaluate.dictionaries import make_pool
        from ommatid.extract.tokens import TokenPicker
        from ommatid.vlm import check_hookpoint

        model, sae = self.model, self.sae(name)
        hookpoint = sae.config.hookpoint
        activations, evaluations = open_stage("extract", hookpoint, self.data), open_stage("evaluate", data=self.data)
        for made, stage, source in ((self._training, "extract", activations), (evaluations, "train", self._training)):
            if made.manifest.inputs[stage] != source.digest:
                raise ArtefactError(f"{made.url} was made from another {source.url} than is there now; run `dvc repro`")
        picker = TokenPicker(hookpoint, check_hookpoint(model, hookpoint), self.params["extract"]["tokens"])
        return _Encoder(model, picker, sae, make_pool(EvaluateParams(**evaluations.manifest.params), activations))


@dataclass(frozen=True)
class _Encoder:
    """The way from an image to the activations of one SAE's latents."""

    model: "VisionModel"
    picker: "TokenPicker"
    sae: "SAE"
    pool: "Pool"

    def run(self, images: Sequence[Image.Image]) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Image-level activations (images, latents) and activations at the hookpoint (images, tokens, d_model), both float32."""
        import torch

        from ommatid.extract.towers import find_device

        pixels = torch.from_numpy(np.stack([self.model.preprocess(image) for image in images])).to(find_device())
        tokens = self.picker.pick(self.model.capture(pixels, [self.picker.name]).tokens[self.picker.name])
        x = tokens.to("cpu", torch.float16).float()
        # image by image: token activations of a wide SAE are large
        acts = [self.pool(self.sae.encode(x_td)[None]) for x_td in x]
        return torch.cat(acts), x


def open_run(data: str | Path = DATA) -> Run:
    """Open a finished study.

    Args:
        data: Root of its artefacts: the folder `data` of a checkout, or another path or URL, such as s3://bucket/prefix.

    Raises:
        ArtefactError: No study is there, or it is damaged.

    >>> import ommatid
    >>> run = ommatid.open_run("data")
    >>> run
    Run('data', SAEs: ...)
    """
    return Run(data)


def encode(images: ImageLike | Iterable[ImageLike], run: Run | str | Path = DATA, sae: str | None = None) -> Encoding:
    """Encode images with a study's model and SAE: `open_run(run).encode(images, sae)`.

    Whoever encodes several times opens the run once, and calls its method `encode`: the model is then loaded once.

    Args:
        images: Paths, bytes of image files, Pillow images or uint8 arrays (height, width, 3), in any mixture; or a single one.
        run: A run, or the root of its artefacts.
        sae: Name of the SAE; None: the only one.

    >>> import ommatid
    >>> found = ommatid.encode(["cat.jpg"])
    >>> found.top(1).image.tolist()
    ['cat.jpg']
    """
    return (run if isinstance(run, Run) else open_run(run)).encode(images, sae)


def load_sae(
    path: str | Path,
    *,
    format: str | None = None,
    hookpoint: str | None = None,
    model: str | None = None,
    target: str | None = None,
    values: Mapping[str, str] | None = None,
) -> "SAE":
    """Load an SAE from a folder or file: one of Ommatid, or of SAELens, dictionary_learning, sparsify, saev, sae-for-vlm or overcomplete.

    Args:
        path: A folder with sae.safetensors and cfg.json, or the files of another library.
        format: The other library; None finds it by the files.
        hookpoint: Where its activations were captured, where the files of the other library don't say.
        model: The model that it explains, where they don't say.
        target: The hookpoint that a transcoder decodes, where they don't say.
        values: What else they don't say, such as {"k": "32"}.

    Returns:
        The SAE, with its tensors on the CPU.

    Raises:
        ModelError: There is no SAE, or it cannot be read; the message says what is there.

    >>> import ommatid
    >>> run = ommatid.open_run("data")
    >>> sae = ommatid.load_sae(f"data/sae/{run.saes[0]}")
    >>> sae.W_enc.shape == (sae.d_model, sae.n_latents)
    True
    """
    from ommatid.sae.interop import Told, import_sae, is_own, load_own
    from ommatid.store import checked_folder

    path = Path(path).expanduser()
    if is_own(path):
        return load_own(checked_folder(path, "sae"))
    return import_sae(path, Told(hookpoint, model, target, values or {}), format)


def load_model(model: str, dtype: "Dtype" = "auto", device: str | None = None) -> "VisionModel":
    """Load a vision-language model, to capture activations with.

    Args:
        model: lite0, lite2, a folder, a name on the model hub, or module:PACKAGE.MODULE:FUNCTION.
        dtype: Arithmetic of a forward pass; auto is bfloat16 where the hardware computes in it.
        device: Such as cpu or cuda; None: the GPU, where there is one.

    Raises:
        ModelError: Its files cannot be found or used; the message says which and what to do.

    >>> import ommatid, numpy as np, torch
    >>> model = ommatid.load_model("lite0", dtype="float32")
    >>> pixels = torch.zeros(1, *model.preprocess.crop, 3, dtype=torch.uint8)
    >>> captured = model.capture(pixels, ["blocks.15"])
    >>> captured.tokens["blocks.15"].shape[2] == model.hookpoints["blocks.15"].d_model
    True
    """
    from ommatid.extract.towers import find_device
    from ommatid.vlm import load_model as load
    from ommatid.vlm.identify import identify

    return load(identify(model), dtype, device or find_device())


def _as_list(images: ImageLike | Iterable[ImageLike]) -> list[ImageLike]:
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    return [images] if isinstance(images, ImageLike) else list(images)


def _name(image: ImageLike, number: int) -> str:
    return str(image) if isinstance(image, str | Path) else str(number)


def _open(image: ImageLike, number: int) -> Image.Image:
    """The image as upright 8-bit RGB, as the stage `images` decodes it.

    Raises:
        InputError: It cannot be read, or is no image.
    """
    try:
        match image:
            case str() | Path():
                return decode(Path(image).expanduser().read_bytes())
            case bytes():
                return decode(image)
            case Image.Image():
                return upright(image)
            case np.ndarray() if image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
                return upright(Image.fromarray(image))
    except (OSError, Unreadable) as error:
        raise InputError(f"image {_name(image, number)}: {error if isinstance(error, Unreadable) else gist(error)}") from None
    what = f"an array of {image.dtype} {image.shape}" if isinstance(image, np.ndarray) else f"of type {type(image).__name__}"
    raise InputError(
        f"image {number} is {what}; it must be a path, the bytes of an image file, a Pillow image, or a uint8 array of shape "
        "(height, width), (height, width, 3) or (height, width, 4)"
    )
