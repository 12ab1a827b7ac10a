"""A finished study, opened for reading and for encoding new images."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ommatid.api.contributions import Contributions, attribute_outputs, check_class
from ommatid.api.encoding import Encoder, Encoding, ImageLike, as_list, name_image, open_image
from ommatid.api.interventions import DOSES, Answers, Intervention, Patches, ask_images, make_plan, steer_images
from ommatid.api.results import Photographs
from ommatid.catalog.reader import Catalog
from ommatid.config.intervene import ONE_WORD
from ommatid.errors import ArtefactError, ConfigError, InputError, ModelError
from ommatid.pipeline import STAGES, open_stage
from ommatid.pipeline.inputs import open_of_sae
from ommatid.stage import DATA
from ommatid.store import INSIDE, Artefact

if TYPE_CHECKING:
    import pandas
    from PIL import Image

    from ommatid.api.contributions import LatentOf
    from ommatid.intervene.circuits import Circuit
    from ommatid.intervene.contributions import Method
    from ommatid.intervene.edit import ErrorTerm, Unit, Where
    from ommatid.intervene.steering import Dosed
    from ommatid.intervene.subject import Subject
    from ommatid.sae.model import SAE
    from ommatid.vlm import VisionModel
    from ommatid.vlm.speaking import DeviceMap, Speaker, SpeakerDtype


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
        self._subjects: dict[str, Subject] = {}
        self._speakers: dict[str, Speaker] = {}

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

        items = _some(images)
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

    def intervene(
        self,
        images: ImageLike | Iterable[ImageLike],
        latents: int | Sequence[int],
        doses: Sequence[float] | float = DOSES,
        *,
        texts: Sequence[str] | None = None,
        tokens: "Where" = "all",
        patches: "Patches | Image.Image | None" = None,
        kind: "Dosed" = "set",
        unit: "Unit" = "relative",
        error: "ErrorTerm" = "keep",
        draws: int = 8,
        seed: int = 0,
        sae: str | None = None,
    ) -> Intervention:
        """Set latents to chosen activations, and compare the model's output on images with that under every control.

        The images pass once through the part of the model before the hookpoint, and through the rest once for each dose and arm.

        Args:
            images: As for `encode`.
            latents: The latent, or several, which are edited together.
            doses: What the latents' activations are set to; 0 removes them.
            texts: Texts that the output is compared with. None: the classes of the study's images; if they have none, the latents' labels
                and those nearest to them.
            tokens: Tokens that are edited: all, those on which any of the latents fires (firing), or the class token (cls).
            patches: Edit only these patches: their rows and columns, a mask of bool (rows, cols) or (images, rows, cols), or a picture as
                large as every image, which marks in white.
            kind: set sets activations to the dose, add adds the dose to them, scale multiplies them by it.
            unit: relative: doses are in units of the 99th percentile of each latent's own positive activations; absolute: in activations.
            error: Whether the SAE's error is kept, so that only the latents' directions change, or dropped, as in published steering.
            draws: Number of draws of each random control.
            seed: Seed of the random controls.
            sae: Name of the SAE, from `saes` or from the catalogue; may be None if the study has a single SAE.

        Returns:
            Scores, probabilities and ranks under every arm and dose.

        Raises:
            InputError: An image cannot be read, a dose is not a finite number, a latent does not exist or is dead, or patches do not fit.
            ConfigError: There is no SAE of this name, or there are several and `sae` is None.
            ModelError: The model is not known, cannot be loaded, has no text tower for texts, or its output does not depend on the tokens.
            ArtefactError: The study has not been evaluated and labelled, or its artefacts were not made from one another.

        >>> import ommatid
        >>> run = ommatid.open_run("data")
        >>> latent = int(run.encode("cat.jpg").acts[0].argmax())
        >>> found = run.intervene(["cat.jpg", "dog.jpg"], latent, doses=[0, 1], texts=["something red", "something blue"], draws=3)
        >>> found.scores("targeted", 1).shape  # (draws, images, names)
        torch.Size([1, 2, 2])
        >>> rows = found.table(["something red"])
        >>> change = rows.score - rows.score_before  # beside every control
        """
        plan = make_plan(doses, kind, unit, tokens, error, draws, seed)
        return steer_images(self, photograph(images), latents, plan, texts, patches, sae)

    def ask(
        self,
        images: ImageLike | Iterable[ImageLike],
        latents: int | Sequence[int],
        doses: Sequence[float] | float = DOSES,
        *,
        question: str = ONE_WORD,
        tokens: "Where" = "all",
        patches: "Patches | Image.Image | None" = None,
        kind: "Dosed" = "set",
        unit: "Unit" = "relative",
        error: "ErrorTerm" = "keep",
        draws: int = 8,
        seed: int = 0,
        max_new_tokens: int = 5,
        sae: str | None = None,
        dtype: "SpeakerDtype" = "auto",
        device_map: "DeviceMap | None" = None,
    ) -> Answers:
        """Ask the whole LLaVA or Qwen-VL, of which the study explains the tower, about images while latents are set, beside every control.

        The blocks of the tower before the hookpoint run once for a batch of images, and the rest once for each dose and arm.

        Args:
            images: As for `encode`.
            latents: The latent, or several, which are edited together.
            doses: What the latents' activations are set to; 0 removes them.
            question: The question, or the path of a text file that holds it and whose name ends in .txt.
            tokens: As for `intervene`.
            patches: As for `intervene`. LLaVA-NeXT's tiles are edited where the same area of the image is.
            kind: As for `intervene`.
            unit: As for `intervene`.
            error: As for `intervene`.
            draws: Number of draws of each random control.
            seed: Seed of the random controls.
            max_new_tokens: Largest number of tokens in an answer.
            sae: Name of the SAE, from `saes` or from the catalogue; may be None if the study has a single SAE.
            dtype: Data type of the model; auto is bfloat16 if the hardware computes in it, and float32 otherwise.
            device_map: Devices of its sub-modules, which needs accelerate; None puts the model on one device.

        Returns:
            The answers under every arm and dose.

        Raises:
            InputError: As for `intervene`.
            ConfigError: As for `intervene`; or the question is empty, its file cannot be read, or it names the token of the image.
            ModelError: The model does not answer in words, cannot be loaded, does not fit into memory, or does not depend on the tokens.
            ArtefactError: As for `intervene`.

        >>> import ommatid
        >>> run = ommatid.open_run("data")
        >>> run.ask("cat.jpg", 0, [0, 1], question="Which animal is this?").table()  # in a study of LLaVA or Qwen-VL: a row for each arm
        Traceback (most recent call last):
        ommatid.errors.ModelError: extract.model.kind: ... models have no language model and cannot answer in words; ...
        """
        plan = make_plan(doses, kind, unit, tokens, error, draws, seed)
        return ask_images(self, photograph(images), latents, plan, question, max_new_tokens, patches, sae, dtype, device_map)

    def attribute(
        self,
        images: ImageLike | Iterable[ImageLike],
        texts: Sequence[str] | None = None,
        *,
        class_name: str | None = None,
        latent_of: "LatentOf | None" = None,
        method: "Method" = "cheap",
        top: int = 16,
        seed: int = 0,
        sae: str | None = None,
    ) -> Contributions:
        """Find the latents that an output of the model comes from, and where in the images.

        The effects of all latents are estimated by one backward pass (cheap) or ten (integrated), and those of the strongest are computed
        exactly as well, by ablation, beside those of some others that fire.

        Args:
            images: As for `encode`.
            texts: One text, whose similarity to the image is the output; or two: the similarity to the first minus that to the second. They
                are classes if the model has no text tower: the log-odds of one, or the logit of the first minus that of the second.
            class_name: A class of the study's images, whose log-odds among all classes are the output.
            latent_of: A latent at a later hookpoint, whose activation is the output: the run of its SAE, or the root of its artefacts; the
                SAE's name if there are several; and the latent.
            method: cheap, integrated or exact, which ablates every latent that fires.
            top: Number of latents of each image that are ablated.
            seed: Seed of the other latents that are ablated.
            sae: Name of the SAE whose latents have the effects; may be None if the study has a single SAE.

        Returns:
            Effects by image and latent, with their agreement, completeness and sparsity.

        Raises:
            InputError: An image cannot be read, no image of the study has the class, or not exactly one output is named.
            ConfigError: There is no SAE of this name, or there are several and `sae` is None.
            ModelError: The model is not known, cannot be loaded or lacks the output, or the output does not depend on the tokens.
            ArtefactError: The study has not been evaluated and labelled, or its artefacts were not made from one another.

        >>> import ommatid
        >>> run = ommatid.open_run("data")
        >>> found = run.attribute("cat.jpg", ["something red", "something blue"])
        >>> strongest = found.top()[0]
        >>> found.map(strongest).shape
        torch.Size([2, 3])
        >>> sides = found.of[0].completeness
        >>> rows = found.table(5)[["latent", "label", "effect", "exact"]]
        """
        return attribute_outputs(
            self, photograph(images), texts=texts, class_name=class_name, latent_of=latent_of, method=method, n_top=top, seed=seed, sae=sae
        )

    def circuit(
        self,
        class_name: str,
        later: "Run | str | Path | tuple[Run | str | Path, str] | None" = None,
        *,
        sizes: Sequence[int] | None = None,
        n_images: int = 96,
        draws: int = 20,
        shown: int = 16,
        seed: int = 0,
        sae: str | None = None,
    ) -> "Circuit":
        """Find the latents on which the model's answer for a class rests, and how much of the answer they alone give.

        Latents are chosen by their effects on half of the class's evaluation images. On the other half, the model runs with only these
        latents, beside random circuits of the same size, the most active latents, and everything but the circuit.

        Args:
            class_name: A class of the study's images.
            later: A study of the same images and model whose SAE is at a later hookpoint, or the root of its artefacts; with the SAE's name
                if it has several. The circuit then has latents at both hookpoints, and edges between them.
            sizes: Numbers of latents, over both hookpoints together; None: 4, 8, 16, 32, 64 and 128.
            n_images: Largest number of images of the class, and of all classes for the means that replace what is not in a circuit.
            draws: Number of random circuits of each size, at least 2.
            shown: Number of latents, those of largest effect, that the graph has.
            seed: Seed of the images and of random circuits.
            sae: Name of the SAE, from `saes` or from the catalogue; may be None if the study has a single SAE.

        Returns:
            Nodes, edges, and faithfulness by size.

        Raises:
            InputError: No image of the study has the class, its images are too few, or a size is not possible.
            ConfigError: There is no SAE of this name, or there are several and none is named.
            ModelError: The model is not known or cannot be loaded, its output cannot be read, or the SAEs do not fit each other.
            ArtefactError: A study has not been evaluated and labelled, or its artefacts were not made from one another.

        >>> import ommatid
        >>> run = ommatid.open_run("data")
        >>> name = run.catalog.rows("SELECT label FROM images WHERE label IS NOT NULL LIMIT 1")[0][0]
        >>> found = run.circuit(name, sizes=[2, 4], draws=3)
        >>> rows = found.table()[["arm", "size", "faithfulness"]]
        >>> found.to_dot().startswith("digraph")
        True
        """
        from ommatid.intervene.circuits import SIZES, find_circuit

        subjects = [self.subject(sae)[1]]
        check_class(subjects[0], class_name)
        if later is not None:
            other, *name = later if isinstance(later, tuple) else (later,)
            subjects.append((other if isinstance(other, Run) else Run(other)).subject(*name)[1])
        wanted = SIZES if sizes is None else sizes
        return find_circuit(subjects, class_name, sizes=wanted, n_images=n_images, draws=draws, n_shown=shown, seed=seed)

    def subject(self, sae: str | None = None) -> "tuple[str, Subject]":
        """Return the name of an SAE in its artefacts, and the model with this SAE, ready to be edited and read.

        Args:
            sae: Name of the SAE, from `saes` or from the catalogue; may be None if the study has a single SAE.

        Raises:
            ConfigError: There is no SAE of this name, or there are several and `sae` is None.
            ModelError: The activations were imported from files.
            ArtefactError: The study has not been evaluated and labelled, or its artefacts were not made from one another.

        >>> import ommatid
        >>> run = ommatid.open_run("data")
        >>> latent = int(run.encode("cat.jpg").acts[0].argmax())
        >>> name, subject = run.subject()
        >>> (one,) = subject.describe([latent])
        >>> editor = subject.editor([one])  # makes edits of this latent into what `subject.model.splice` takes
        """
        name, _ = self._find(sae)
        if name not in self._subjects:
            self._subjects[name] = self._make_subject(name)
        return name, self._subjects[name]

    def _make_subject(self, name: str) -> "Subject":
        from ommatid.intervene.subject import Subject

        inputs = open_of_sae("intervene", name, self._training, ("images", "evaluate", "label"), self.data)
        head = self.artefacts["intervene"].manifest.params.get("head") if "intervene" in self.artefacts else None
        return Subject(inputs, lambda: self.model, head)

    def _speaker(self, subject: "Subject", dtype: "SpeakerDtype", device_map: "DeviceMap | None") -> "Speaker":
        """The whole model, which is loaded only once for the same settings."""
        from ommatid.intervene.answers import open_speaker

        key = f"{dtype} {device_map}"
        if key not in self._speakers:
            self._speakers = {key: open_speaker(subject, dtype, device_map)}
        return self._speakers[key]

    def _artefact_of(self, sae: str | None) -> Artefact:
        """The SAE's artefact, inside the artefact of the training."""
        return self._find(sae)[1]

    def _find(self, sae: str | None) -> tuple[str, Artefact]:
        """Find the name of an SAE in the training, and its artefact there."""
        if sae is None and len(self.saes) > 1:
            raise ConfigError(f"{self.data} has {len(self.saes)} SAEs; name one of them: {', '.join(self.saes)}")
        for name in self.saes:
            artefact = self._training.child(name, INSIDE[self._training.manifest.kind])
            if sae in (None, name, artefact.summary["sae"]):
                return name, artefact
        raise ConfigError(f"{self.data} has no SAE {sae!r}; it has {', '.join(self.saes) or 'none that passed the quality gate'}")

    def _make_encoder(self, name: str | None) -> "Encoder":
        model, sae = self.model, self.sae(name)
        inputs = open_of_sae("encode", self._find(name)[0], self._training, ("evaluate",), self.data)
        return Encoder.make(model, sae, self.params["extract"], inputs["evaluate"].manifest.params)


def _some(images: ImageLike | Iterable[ImageLike]) -> list[ImageLike]:
    """List the images.

    Raises:
        InputError: There are none.
    """
    if not (items := as_list(images)):
        raise InputError("no images were given; name one or more")
    return items


def photograph(images: ImageLike | Iterable[ImageLike]) -> Photographs:
    """Open images, of any form that `Run.encode` takes.

    Raises:
        InputError: There are none, or one cannot be read.
    """
    items = _some(images)
    return Photographs(
        tuple(name_image(item, i) for i, item in enumerate(items)), tuple(open_image(item, i) for i, item in enumerate(items))
    )


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


def intervene(
    images: ImageLike | Iterable[ImageLike],
    latents: int | Sequence[int],
    doses: Sequence[float] | float = DOSES,
    run: Run | str | Path = DATA,
    **options: Any,
) -> Intervention:
    """Set latents to chosen activations; short for `open_run(run).intervene(images, latents, doses, **options)`.

    To intervene several times, open the run once and call its method `intervene`, so that the model is loaded only once.

    Args:
        images: As for `encode`.
        latents: The latent, or several, which are edited together.
        doses: What their activations are set to, in units of the 99th percentile of each latent's own positive ones.
        run: A run, or the root of its artefacts.
        options: Further arguments of `Run.intervene`.

    Returns:
        Scores, probabilities and ranks under every arm and dose.

    >>> import ommatid
    >>> latent = int(ommatid.encode("cat.jpg").acts[0].argmax())
    >>> ommatid.intervene("cat.jpg", latent, doses=[1], draws=3)
    Intervention(1 image, latent ..., dose 1, ... names)
    """
    return (run if isinstance(run, Run) else open_run(run)).intervene(images, latents, doses, **options)


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
