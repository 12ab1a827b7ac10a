"""A finished study, opened for reading and for encoding new images."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ommatid.api.encoding import Encoder, Encoding, ImageLike, as_list, name_image, open_image
from ommatid.catalog.reader import Catalog
from ommatid.errors import ArtefactError, ConfigError, InputError, ModelError
from ommatid.pipeline import STAGES, open_stage
from ommatid.pipeline.inputs import check_lineage
from ommatid.stage import DATA
from ommatid.store import INSIDE, Artefact

if TYPE_CHECKING:
    import pandas

    from ommatid.sae.model import SAE
    from ommatid.vlm import VisionModel


class Run:
    """A finished study: its artefacts, its catalogue, its SAEs and the model that they explain.

    Artefacts, catalogue and model are opened on first use and then kept. A run is a context manager, and `close` ends the process
    that answers queries to the catalogue.

    >>> import ommatid
    >>> with ommatid.open_run("data") as run:
    ...     (n_latents,) = run.catalog.rows("SELECT count(*) FROM features")[0]
    ...     assert n_latents == run.sae().n_latents == len(run.features())
    """

    def __init__(self, data: str | Path = DATA) -> None:
        self.data = str(data)
        """Root of the artefacts, as a path or URL."""
        try:
            self._training = open_stage("train", data=self.data)
        except ArtefactError as error:
            inside = "://" not in self.data and (Path(self.data) / DATA / STAGES["train"].place.name).exists()
            hint = f"; did you mean {Path(self.data) / DATA}?" if inside else ""
            raise ArtefactError(f"{self.data} holds no finished study: {error}{hint}") from None
        self._encoders: dict[str, Encoder] = {}

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
        """The artefact of each stage that has run, by the stage's name.

        >>> import ommatid
        >>> artefacts = ommatid.open_run("data").artefacts
        >>> list(artefacts)
        ['images', 'extract', 'train', 'evaluate', 'label', 'intervene', 'catalog']
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
        """The values that each stage ran with, by section and key as in params.yaml.

        >>> import ommatid
        >>> ommatid.open_run("data").params["evaluate"]["image_activation"]
        'max'
        """
        return {name: artefact.manifest.params for name, artefact in self.artefacts.items()}

    @cached_property
    def saes(self) -> tuple[str, ...]:
        """Names of the SAEs, except those rejected by a quality gate.

        >>> import ommatid
        >>> len(ommatid.open_run("data").saes)
        1
        """
        rejected = {name for artefact in self.artefacts.values() for name in artefact.rejected}
        return tuple(name for name in self._training.children if name not in rejected)

    @cached_property
    def catalog(self) -> Catalog:
        """The catalogue, to be queried in SQL.

        Raises:
            ArtefactError: The stage `catalog` has not run.

        >>> import ommatid
        >>> run = ommatid.open_run("data")
        >>> list(run.catalog.pandas("SELECT latent, label, ms FROM features ORDER BY ms DESC NULLS LAST LIMIT 3").columns)
        ['latent', 'label', 'ms']
        """
        return Catalog(open_stage("catalog", data=self.data).file("catalog.duckdb"))

    def features(self, sae: str | None = None) -> "pandas.DataFrame":
        """Read the relation `features` of one SAE.

        Args:
            sae: Name of the SAE, from `saes` or from the catalogue; may be None if the study has a single SAE.

        Returns:
            A row for each latent, indexed by the latent.

        Raises:
            ConfigError: There is no SAE of this name, or there are several and `sae` is None.
            ArtefactError: The catalogue is missing or was built before this SAE was trained.

        >>> import ommatid
        >>> features = ommatid.open_run("data").features()
        >>> best = features.sort_values("ms", ascending=False).head(5)[["label", "ms", "density"]]
        """
        name = self._artefact_of(sae).summary["sae"]
        found = self.catalog.pandas("SELECT * FROM features WHERE sae = $sae ORDER BY latent", {"sae": name})
        if found.empty:
            raise ArtefactError(
                f"{self.data}/catalog has no features of {name}, as it was built before that SAE was trained; run `dvc repro`"
            )
        return found.set_index("latent")

    def sae(self, name: str | None = None) -> "SAE":
        """Load an SAE of the study.

        Args:
            name: Name of the SAE, from `saes` or from the catalogue; may be None if the study has a single SAE.

        Returns:
            The SAE, with its tensors on the CPU.

        Raises:
            ConfigError: There is no SAE of this name, or there are several and `name` is None.

        >>> import ommatid
        >>> run = ommatid.open_run("data")
        >>> sae, found = run.sae(), run.encode("cat.jpg")
        >>> acts = sae.encode(found.x[0])  # token activations, (tokens, latents)
        >>> x_hat = sae.decode(acts)
        >>> 0 < ommatid.fvu(found.x[0], x_hat) < 1
        True
        """
        from ommatid.sae.model import SAE

        return SAE.load(self._artefact_of(name).path)

    @cached_property
    def model(self) -> "VisionModel":
        """The model that the study explains, on the GPU if there is one; relative paths in its params start at the current folder.

        Raises:
            ModelError: The activations were imported from files, or the model cannot be loaded.

        >>> import ommatid
        >>> model = ommatid.open_run("data").model
        >>> model.d_embed == model.embed_text(["a photo of a cat"]).shape[1]
        True
        """
        from ommatid.extract.networks import load_explained

        params = open_stage("extract", data=self.data).manifest.params
        if params["source"] == "files":
            raise ModelError(
                f"{self.data}: its activations were imported from files, so their model is not known and images cannot be encoded; "
                "encode activations (tokens, d_model) with run.sae().encode(x) instead"
            )
        return load_explained(params)

    def encode(self, images: ImageLike | Iterable[ImageLike], sae: str | None = None) -> Encoding:
        """Encode images with the study's model and one of its SAEs.

        Preprocessing, hookpoint, tokens, precision and pooling are the study's, so an image of the study gets the activations in the
        relation `firings`, up to rounding differences between machines and batch sizes.

        Args:
            images: Any mixture of paths, bytes of image files, Pillow images and uint8 arrays (height, width, 3); a single one of them;
                or a uint8 array (images, height, width, 3).
            sae: Name of the SAE, from `saes` or from the catalogue; may be None if the study has a single SAE.

        Returns:
            The activations, all held in memory; use the stages for very large sets of images.

        Raises:
            InputError: An image cannot be read; the message names it and the reason.
            ConfigError: There is no SAE of this name, or there are several and `sae` is None.
            ModelError: The activations were imported from files, or the model cannot be loaded.
            ArtefactError: The study has not been evaluated, or its artefacts were not made from one another.

        >>> import ommatid
        >>> from PIL import Image
        >>> found = ommatid.open_run("data").encode(["cat.jpg", Image.open("dog.jpg")])
        >>> found.images
        ('cat.jpg', '1')
        >>> found.acts.shape[0] == found.x.shape[0] == 2
        True
        """
        import torch

        items = as_list(images)
        if not items:
            raise InputError("no images were given; name one or more")
        name = self._artefact_of(sae).summary["sae"]
        if name not in self._encoders:
            self._encoders[name] = self._make_encoder(sae)
        encoder = self._encoders[name]
        size = self.params["extract"]["batch_size"]
        starts = range(0, len(items), size)
        acts, x, boxes = [], [], []
        for at in starts:
            opened = [open_image(item, i) for i, item in enumerate(items[at : at + size], at)]
            for parts, part in zip((acts, x), encoder.run(opened), strict=True):
                parts.append(part)
            boxes += [encoder.model.preprocess.box(*image.size) for image in opened]
        names = tuple(name_image(item, i) for i, item in enumerate(items))
        return Encoding(names, torch.cat(acts), torch.cat(x), name, self.features, encoder, tuple(boxes))

    def _artefact_of(self, sae: str | None) -> Artefact:
        """The SAE's artefact, inside the artefact of the training."""
        if sae is None and len(self.saes) > 1:
            raise ConfigError(f"{self.data} has {len(self.saes)} SAEs; name one of them: {', '.join(self.saes)}")
        for name in self.saes:
            artefact = self._training.child(name, INSIDE[self._training.manifest.kind])
            if sae in (None, name, artefact.summary["sae"]):
                return artefact
        raise ConfigError(f"{self.data} has no SAE {sae!r}; it has {', '.join(self.saes) or 'none that passed the quality gate'}")

    def _make_encoder(self, name: str | None) -> "Encoder":
        model, sae = self.model, self.sae(name)
        activations, evaluations = open_stage("extract", sae.config.hookpoint, self.data), open_stage("evaluate", data=self.data)
        check_lineage("encode", {"extract": activations, "train": self._training, "evaluate": evaluations})
        return Encoder.make(model, sae, self.params["extract"], evaluations.manifest.params)


def open_run(data: str | Path = DATA) -> Run:
    """Open a finished study.

    Args:
        data: Root of its artefacts: the folder `data` of a checkout, or any path or URL, such as s3://bucket/prefix.

    Returns:
        The study.

    Raises:
        ArtefactError: There is no study at `data`, or it is damaged.

    >>> import ommatid
    >>> run = ommatid.open_run("data")
    >>> run
    Run('data', SAEs: ...)
    """
    return Run(data)


def encode(images: ImageLike | Iterable[ImageLike], run: Run | str | Path = DATA, sae: str | None = None) -> Encoding:
    """Encode images with a study's model and SAE; short for `open_run(run).encode(images, sae)`.

    To encode several times, open the run once and call its method `encode`, so that the model is loaded only once.

    Args:
        images: Any mixture of paths, bytes of image files, Pillow images and uint8 arrays (height, width, 3), or a single one of them.
        run: A run, or the root of its artefacts.
        sae: Name of the SAE; may be None if the study has a single SAE.

    Returns:
        The activations of the SAE's latents on the images.

    >>> import ommatid
    >>> found = ommatid.encode(["cat.jpg"])
    >>> found.top(1).image.tolist()
    ['cat.jpg']
    """
    return (run if isinstance(run, Run) else open_run(run)).encode(images, sae)
