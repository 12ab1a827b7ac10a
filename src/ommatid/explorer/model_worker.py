"""The process that answers what needs the model: search by meaning and by image, the encoding of new images, steering and attribution.

`model_client.py` starts it with `python -m` and talks to it over standard input, which is a socket, as `catalog.sandbox.Wire` does. It ends
with the server, leaves Ctrl-C to it, and yields to it: it has a lower priority, and is the first that the kernel ends if memory runs out.
An uploaded image is held in memory only.

Suffixes of names: f features, d the width d_joint of the joint image-text space, t tokens, l latents.
"""

import json
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int, UInt8
from PIL import Image

from ommatid.activations.joint import read_joint
from ommatid.api.encoding import Encoder
from ommatid.catalog.database import physical_mb
from ommatid.catalog.reader import Catalog
from ommatid.catalog.sandbox import Wire, end_with_parent, set_soft
from ommatid.catalog.vectors import unpack
from ommatid.compute.controls import N_DRAWS
from ommatid.compute.evenly import spread_evenly
from ommatid.compute.nearest import largest
from ommatid.errors import ArtefactError, InputError, ModelError, OmmatidError, describe, find_lack
from ommatid.extract.classifier import embed_texts
from ommatid.extract.networks import find_device, load_explained
from ommatid.extract.tokens import TokenPicker
from ommatid.images.decode import FORMATS, Unreadable, decode
from ommatid.images.examine import to_webp
from ommatid.intervene.attribution import Agreement, Attributor
from ommatid.intervene.contributions import attribute_image, compare_texts
from ommatid.intervene.readout import Readout
from ommatid.intervene.steering import Plan, Steered, independent, steer
from ommatid.intervene.subject import Described, Subject
from ommatid.label.scoring import Texts
from ommatid.metrics import unit
from ommatid.pipeline import open_stage
from ommatid.pipeline.inputs import open_of_sae
from ommatid.sae.model import SAE
from ommatid.store import Artefact, open_artefact
from ommatid.vlm import VisionModel, imagenet_classes

NICENESS = 5
"""Amount by which the process is nicer than the server."""
MEMORY_SHARE = 0.75
"""Share of the machine's memory that it may take."""
KEPT = 2
"""Number of SAEs of which weights and meanings stay in memory."""
N_CENTRE = 64
"""Number of texts whose mean is subtracted from every text; a large text tower takes minutes for thousands.

On the demo, with its 347 labels as queries, a feature that has the label is among the first 10 hits for 61 % of them with the mean of 64
labels or of all, 57 % with that of all 5,110 words, and 58 % with none; for 1 % if labels are shuffled among features."""
ROWS = 2**14
"""Rows of `meanings` that are read at once."""
MOST_IMAGES = 100_000
"""Maximum number of evaluation images that are compared with a query."""
MOST_LATENTS = 500
"""Maximum number of firing latents of an encoded image of which heat maps are returned."""
N_OF_PATCH = 8
"""Number of latents that are returned of each patch."""
PICTURE = 768
"""Longest side of the picture of an encoded image, in pixels."""
N_FIRST = 5
"""Names that are returned of those that come first before an edit, and after it at any dose."""
N_OTHERS = 64
"""Labels of other latents that the output is compared with, if the study's images have no classes."""
N_DESCRIBED = 64
"""Choices of latents of which scales and differences of means stay in memory."""
MOST_EMBEDDED = 2**14
"""Maximum number of texts whose embeddings stay in memory."""
N_DRAWN = 8
"""Latents that are ablated beside these, drawn at random from the others that fire."""
N_ATTRIBUTED = 24
"""Latents that are ablated, and returned, of those to which an output is attributed."""


@dataclass(frozen=True)
class Rows:
    """Vectors in the joint space that queries are compared with."""

    numbers: Int[np.ndarray, " rows"]
    """Latent or image of each row, `(rows,)`."""
    unit_rd: Float32[np.ndarray, "rows d"]
    """The vectors, centred and of unit norm, `(rows, d)`."""

    def search(self, query_d: Float32[np.ndarray, " d"], n: int) -> dict[str, list[Any]]:
        """Find the rows nearest to a centred query of unit norm; see `model_client.Hits`."""
        cosines = self.unit_rd @ query_d
        best = largest(cosines[None], n)[0]
        return {"found": self.numbers[best].tolist(), "scores": cosines[best].tolist()}


@dataclass(frozen=True)
class Images:
    """What images are compared with."""

    rows: Rows | None
    """Joint embeddings of the evaluation images; None if they are not at hand."""
    mean_d: Float32[np.ndarray, " d"]
    """Mean embedding of the evaluation images, `(d,)`, which is subtracted from every image."""
    problem: str | None
    """Why no evaluation images, or not all of them, are compared; None if all are."""


class Study:
    """A catalogue, and the networks, SAEs and embeddings that questions about it need. Each is loaded when it is first needed.

    What model an SAE explains, and how, is in the relation `runs` of the catalogue, so that a published catalogue and its SAE suffice for
    everything but a search for similar images, which needs the study's activations.

    Args:
        catalog: Path of the catalogue.
        data: Root of the study's artefacts.

    Raises:
        QueryError: The catalogue cannot be read.
    """

    def __init__(self, catalog: str, data: str) -> None:
        self._catalog = Path(catalog)
        self._data = data
        with self._open() as opened:
            self._runs = {row["sae"]: row for row in opened.ask("FROM runs").dicts()}
        self._network = lru_cache(4)(self._load_network)
        self._meanings = lru_cache(KEPT)(self._load_meanings)
        self._texts = lru_cache(KEPT)(self._load_texts)
        self._encoder = lru_cache(KEPT)(self._load_encoder)
        self._images = lru_cache(KEPT)(self._load_images)
        self._subject = lru_cache(1)(self._load_subject)
        self._describe = lru_cache(N_DESCRIBED)(self._describe_latents)
        self._embedded: dict[tuple[str, str], torch.Tensor] = {}
        """Embeddings of texts that outputs are compared with, by SAE and text."""

    def load(self, part: str, sae: str) -> None:
        """Load a part that questions about an SAE need; see `model_client.Part`.

        Raises:
            OmmatidError: It cannot be loaded; the message says why.
        """
        if part == "words":
            self._meanings(sae)
            self._texts(sae)
        elif part == "model":
            self._encoder(sae)
        elif part == "study":
            subject = self._subject(sae)
            _ = subject.sample, subject.densities  # for these, and for the texts of the classes, the first answer would wait
            if (names := _name_kinds(subject, [], [])) and subject.model.d_embed is not None:
                self._readout(sae, list(names))
        else:
            assert part == "images", part
            self._images(sae)

    def search_text(self, sae: str, text: str, n: int) -> dict[str, Any]:
        """Answer `ModelClient.search_text`."""
        return self._meanings(sae).search(self._texts(sae).embed([text])[0].numpy(), n)

    def search_image(self, sae: str, encoded: bytes, n: int) -> dict[str, Any]:
        """Answer `ModelClient.search_image`."""
        image, encoder = open_upload(encoded), self._encoder(sae)
        acts_l = encoder.run([image])[0][0].numpy()
        firing = largest(acts_l[None], n)[0]
        firing = firing[acts_l[firing] > 0]
        meanings, images = self._meanings(sae), self._images(sae)
        query_d = _unit(self._embed(sae, image) - images.mean_d)
        return {
            "by_activation": {"found": firing.tolist(), "scores": acts_l[firing].tolist()},
            "by_meaning": meanings.search(query_d, n),
            "images": images.rows.search(query_d, n) if images.rows else {"found": [], "scores": []},
            "n_images": len(images.rows.numbers) if images.rows else 0,
            "problem": images.problem,
        }

    def encode(self, sae: str, encoded: bytes) -> dict[str, Any]:
        """Answer `ModelClient.encode`."""
        image, encoder = open_upload(encoded), self._encoder(sae)
        acts_tl = encoder.sae.encode(encoder.capture([image])[0])
        acts_l = encoder.pool(acts_tl[None])[0]
        n_firing = int((acts_l > 0).sum())
        latents = largest(acts_l.numpy()[None], min(n_firing, MOST_LATENTS))[0]
        rows, cols = encoder.picker.grid or (0, 0)
        patches_pl = acts_tl[len(acts_tl) - rows * cols :]
        return {
            **_see(encoder.model, encoder.picker, image),
            "n_firing": n_firing,
            "latents": latents.tolist(),
            "acts": acts_l[latents].tolist(),
            "heat": patches_pl[:, latents].T.tolist(),
            "patches": [_strongest(acts) for acts in patches_pl],
        }

    def steer(
        self, sae: str, encoded: bytes, latents: list[int], doses: list[float], tokens: str, patches: list[int], texts: list[str]
    ) -> dict[str, Any]:
        """Answer `ModelClient.steer`."""
        image, subject = open_upload(encoded), self._subject(sae)
        described = self._describe(sae, tuple(latents))
        where: Any = _mask(subject.writes, patches) if tokens == "patches" else tokens
        kinds = _name_kinds(subject, [one.label for one in described], texts)
        if not kinds:
            raise InputError("texts: the study's images have no classes, and no latent has a label; type a text to compare the output with")
        readout = self._readout(sae, list(kinds)) if subject.model.d_embed is not None else subject.readout
        draws = _count_draws(subject, described)
        plan = Plan(doses, tokens=where, draws=draws)
        found = steer(subject, _pixels(subject.model, image), described, plan, readout)
        heat = found.heat(0)
        return {
            **_see(subject.model, subject.writes, image),
            "latents": [
                {
                    "latent": one.latent,
                    "scale": one.scale,
                    "act": float(found.acts_bkl[0, :, place].max()),
                    "heat": [] if heat is None else heat[place].flatten().tolist(),
                }
                for place, one in enumerate(described)
            ],
            "doses": list(found.doses),
            "measure": "logit" if subject.model.d_embed is None else "cosine",
            "n_names": len(found.names),
            "names": _describe_names(found, kinds),
            "n_draws": draws,
            "warnings": list(found.warnings),
        }

    def attribute(self, sae: str, encoded: bytes, texts: list[str]) -> dict[str, Any]:
        """Answer `ModelClient.attribute`."""
        image, subject = open_upload(encoded), self._subject(sae)
        readout = subject.readout if subject.model.d_embed is None else self._readout(sae, texts)
        output = compare_texts(readout, texts, subject.model.name)
        attributor = Attributor(subject.model, subject.device_sae, subject.reads, subject.writes)
        pixels, rng = _pixels(subject.model, image), np.random.default_rng(0)
        found = attribute_image(attributor, pixels, output, n_top=N_ATTRIBUTED, n_others=N_DRAWN, rng=rng)
        if found is None:
            raise ModelError(independent(subject, output.name))
        effects = {latent: effect for latent, effect in found.exact.items() if latent not in found.others}
        order = sorted(effects, key=lambda latent: -abs(effects[latent]))
        maps, n_firing = found.maps(order), int((found.acts_s > 0).sum())
        rows, cols = subject.writes.grid or (0, 0)
        return {
            **_see(subject.model, subject.writes, image),
            "score": found.value,
            "measure": output.measure,
            "n_firing": n_firing,
            "latents": [
                {
                    "latent": latent,
                    "effect": effects[latent],
                    "estimate": float(found.effects_s[latent]),
                    "heat": maps[len(maps) - rows * cols :, place].tolist(),
                }
                for place, latent in enumerate(order)
            ],
            "others": [found.exact[latent] for latent in found.others],
            "warnings": _warn_of_estimates(found.agreement, n_firing),
        }

    def _open(self) -> Catalog:
        return Catalog(self._catalog, at_once=1)

    def _run(self, sae: str) -> Mapping[str, Any]:
        if sae not in self._runs:
            raise ModelError(f"{self._catalog} has no SAE {sae!r}; it has {', '.join(self._runs)}")
        return self._runs[sae]

    def _params(self, sae: str) -> Mapping[str, Any]:
        """Params that the SAE's study ran with, by section.

        Raises:
            ModelError: They name no model.
        """
        params = json.loads(self._run(sae)["params"])
        if "model" not in params.get("extract", {}) or params["extract"].get("source") == "files":
            raise ModelError(
                f"the activations of {sae} were imported from files, so its model is not known: neither images nor texts can be encoded"
            )
        return params

    def _namer(self, sae: str) -> VisionModel:
        """Model whose joint space features are named in."""
        extract = self._params(sae)["extract"]
        return self._network(json.dumps({**extract, "model": extract["namer"] or extract["model"], "namer": None}, sort_keys=True))

    def _load_network(self, extract: str) -> VisionModel:
        """Load the model of a section `extract`, which is JSON."""
        return load_explained(json.loads(extract))

    def _load_encoder(self, sae: str) -> Encoder:
        params = self._params(sae)
        model = self._network(json.dumps({**params["extract"], "namer": None}, sort_keys=True))
        return Encoder.make(model, self._load_sae(sae), params["extract"], params["evaluate"])

    def _load_sae(self, sae: str) -> SAE:
        """Load the SAE that the catalogue describes, which its checksum tells, from the study or the champion's folder."""
        for artefact in self._iter_candidates(self._run(sae)["name"]):
            if artefact.digest == self._run(sae)["sae_digest"]:
                return SAE.load(artefact.path)
        raise ModelError(
            f"{sae} is neither in {self._data}/sae nor in {self._catalog.parent}/champions, at least not the version that this catalogue "
            "was built from; run `dvc repro`, or open the catalogue beside its study with --data"
        )

    def _iter_candidates(self, name: str) -> Iterator[Artefact]:
        with suppress(ArtefactError):
            yield open_stage("train", data=self._data).child(name, "sae")
        for folder in sorted(self._catalog.parent.glob("champions/*/sae")):
            with suppress(ArtefactError):
                yield open_artefact(folder, "sae")

    def _load_meanings(self, sae: str) -> Rows:
        """Read the meaning of each latent that fires.

        Raises:
            ModelError: The catalogue has none.
        """
        again = "build it again with `dvc repro catalog`"
        latents, blocks = [np.empty(0, np.int32)], []
        with self._open() as opened:
            if "meanings" not in opened.relations():
                raise ModelError(f"{self._catalog} has no relation meanings, as an older version of Ommatid built it; {again}")
            ((last,),) = opened.rows("SELECT coalesce(max(latent), -1) FROM meanings WHERE sae = $sae", {"sae": sae})
            for first in range(0, last + 1, ROWS):
                table = opened.arrow(_MEANINGS, {"sae": sae, "first": first, "stop": first + ROWS})
                if len(table):
                    latents.append(table["latent"].to_numpy())
                    blocks.append(unpack(table["embedding"].to_pylist()))
        if not blocks:
            raise ModelError(f"{self._catalog} has no meanings of {sae}, as no latent fires or its model has no joint image-text space")
        return Rows(np.concatenate(latents), np.concatenate(blocks))

    def _load_texts(self, sae: str) -> Texts:
        """Load the text tower, and choose the texts whose mean is subtracted: some of the labels, or words if there are too few labels."""
        namer = self._namer(sae)
        if namer.d_embed is None:
            raise ModelError(f"{namer.name} has no text tower, so that there is no space in which to compare texts with images")
        with self._open() as opened:
            sql = "SELECT DISTINCT label FROM features WHERE sae = $sae AND label IS NOT NULL ORDER BY label"
            labels = [label for (label,) in opened.rows(sql, {"sae": sae})]
        words = _spread(labels, N_CENTRE)
        words += _spread(sorted({*imagenet_classes()} - {*words}), N_CENTRE - len(words))
        return Texts(namer, words)

    def _load_images(self, sae: str) -> "Images":
        """Read the joint embeddings of the evaluation images, or estimate their mean if the study's activations are not at hand."""
        run = self._run(sae)
        try:
            activations = open_stage("extract", run["hookpoint"], self._data)
        except ArtefactError:
            problem = f"{self._data} does not hold the activations of this catalogue"
            return Images(None, self._estimate_mean(sae), f"similar images are not searched for, as {problem}")
        if activations.digest != run["activations_digest"]:
            problem = f"the activations in {self._data} were made anew since; run `dvc repro`"
            return Images(None, self._estimate_mean(sae), f"similar images are not searched for, as {problem}")
        with self._open() as opened:
            sql = "SELECT image, count(*) OVER () FROM images WHERE split = 'eval' ORDER BY image LIMIT $most"
            found = opened.rows(sql, {"most": MOST_IMAGES})
        numbers, n_all = np.array([image for image, _ in found], np.int64), found[0][1]
        problem = f"only the first {len(numbers):,} of {n_all:,} evaluation images are compared" if n_all > len(numbers) else None
        joint_rd = read_joint(activations, numbers).numpy()
        mean_d = joint_rd.mean(0)
        joint_rd -= mean_d
        return Images(Rows(numbers, _unit(joint_rd)), mean_d, problem)

    def _load_subject(self, sae: str) -> Subject:
        """Open what edits need: the study's artefacts, as long as they are those that the catalogue was built from.

        Raises:
            ModelError: They are not at hand, or not those.
        """
        params, run = self._params(sae), self._run(sae)
        try:
            training = open_stage("train", data=self._data)
            inputs = open_of_sae("steering", run["name"], training, ("images", "evaluate", "label"), self._data)
        except ArtefactError as error:
            raise ModelError(f"an edit is made with the study that the catalogue was built from, which is not at hand: {error}") from None
        if (inputs["train"].digest, inputs["extract"].digest) != (run["sae_digest"], run["activations_digest"]):
            raise ModelError(f"the study in {self._data} is not the one that the catalogue was built from; run `dvc repro`")
        extract = json.dumps({**params["extract"], "namer": None}, sort_keys=True)
        return Subject(inputs, lambda: self._network(extract), params.get("intervene", {}).get("head"))

    def _describe_latents(self, sae: str, latents: tuple[int, ...]) -> list[Described]:
        """Return scale, label and difference of means of latents.

        Raises:
            InputError: A latent does not exist, or is dead.
        """
        subject = self._subject(sae)
        for latent in latents:
            subject.check_latent(latent)
        return list(subject.describe(latents))

    def _readout(self, sae: str, names: Sequence[str]) -> Readout:
        """Return a readout of texts, of which only the cosines are used: to fit a scale for probabilities would take seconds."""
        model = self._subject(sae).model
        if len(self._embedded) + len(names) > MOST_EMBEDDED:
            self._embedded.clear()
        if new := [name for name in names if (sae, name) not in self._embedded]:
            rows = unit(embed_texts(model, [name.replace("_", " ") for name in new]))
            self._embedded |= {(sae, name): row for name, row in zip(new, rows, strict=True)}
        return Readout(tuple(names), torch.stack([self._embedded[sae, name] for name in names]), model.logit_scale or 1.0)

    def _estimate_mean(self, sae: str) -> Float32[np.ndarray, " d"]:
        """Estimate the mean joint embedding of the evaluation images from some thumbnails."""
        with self._open() as opened:
            thumbnails = opened.rows(_THUMBNAILS, {"n": N_CENTRE})
        return np.stack([self._embed(sae, decode(thumbnail)) for (thumbnail,) in thumbnails]).mean(0)

    def _embed(self, sae: str, image: Image.Image) -> Float32[np.ndarray, " d"]:
        """Embed an image in the joint space, with unit norm."""
        namer = self._namer(sae)
        embedding = namer.capture(torch.from_numpy(namer.preprocess(image)[None]).to(find_device()), ()).embedding
        assert embedding is not None, namer.name
        return _unit(embedding[0].float().cpu().numpy())


_MEANINGS = "SELECT latent, embedding FROM meanings WHERE sae = $sae AND latent >= $first AND latent < $stop ORDER BY latent"
_THUMBNAILS = """
    SELECT thumbnail FROM images
    WHERE split = 'eval' AND thumbnail IS NOT NULL ORDER BY hash(image_id) LIMIT $n
"""


def open_upload(encoded: bytes) -> Image.Image:
    """Decode an uploaded image as the stage `images` does.

    Raises:
        InputError: The bytes are not an image that can be decoded.
    """
    try:
        return decode(encoded)
    except Unreadable as error:
        formats = f"; formats that can be read are {', '.join(FORMATS)}" if error.reason == "not_an_image" else ""
        reason, detail = error.reason.replace("_", " "), error.detail.rstrip(".")
        raise InputError(f"the image cannot be read ({reason}): {detail}{formats}") from None


def _see(model: VisionModel, picker: TokenPicker, image: Image.Image) -> dict[str, Any]:
    """Describe an image as the model sees it, and scale it down; see `model_client.SeenImage`."""
    width, height = image.size
    left, top, right, bottom = model.preprocess.box(width, height)
    rows, cols = picker.grid or (0, 0)
    image.thumbnail((PICTURE, PICTURE))
    picture = to_webp(image)
    return {
        "width": width,
        "height": height,
        "picture": picture,
        "picture_width": image.width,
        "picture_height": image.height,
        "seen_width": (right - left) / width,
        "seen_height": (bottom - top) / height,
        "rows": rows,
        "cols": cols,
    }


def _pixels(model: VisionModel, image: Image.Image) -> UInt8[torch.Tensor, "1 height width 3"]:
    return torch.from_numpy(model.preprocess(image)[None]).to(find_device())


def _mask(picker: TokenPicker, patches: Sequence[int]) -> Bool[torch.Tensor, " kept"]:
    """Return the mask of the kept tokens that are patches of given numbers.

    Raises:
        InputError: There is no such patch.
    """
    rows, cols = picker.grid or (0, 0)
    if not rows:
        raise InputError(f"patches: the tokens of {picker.name} are no patches, so that none can be chosen; steer all tokens")
    if patches[-1] >= rows * cols:
        raise InputError(f"patches: got {patches[-1]}; the image has {rows} x {cols} patches, 0 to {rows * cols - 1}")
    mask = torch.zeros(len(picker.places), dtype=torch.bool)
    mask[len(mask) - rows * cols + torch.tensor(patches)] = True
    return mask


def _count_draws(subject: Subject, described: Sequence[Described]) -> int:
    """Return how often each random control can be drawn, at most `N_DRAWS` times.

    Raises:
        InputError: There are too few other latents for even one draw.
    """
    problem = ""
    for draws in (N_DRAWS, N_DRAWS // 2, N_DRAWS // 4, 1):
        try:
            subject.controls(described, 0, draws)
            return draws
        except InputError as error:
            problem = str(error).partition("; ")[0]
    raise InputError(f"latents: there is no control, as {problem}; steer fewer latents at once, or others")


def _name_kinds(subject: Subject, labels: Sequence[str | None], texts: Sequence[str]) -> dict[str, str]:
    """Return what the output is compared with, and of what kind each name is; see `model_client.SteeredName`.

    Raises:
        InputError: Texts were typed, but the model has no text tower.
    """
    if subject.model.d_embed is None:
        if texts:
            name = subject.model.name
            raise InputError(f"texts: {name} has no text tower, so its output can only be compared with classes; leave texts empty")
        return dict.fromkeys(subject.readout.names, "class")
    classes = sorted(set(subject.classes.values()))
    others = [] if classes else _spread(sorted({row["label"] for row in subject.labels.values()}), N_OTHERS)
    kinds = dict.fromkeys(others, "other") | dict.fromkeys(classes, "class")
    return kinds | dict.fromkeys(filter(None, labels), "label") | dict.fromkeys(texts, "text")


def _describe_names(found: Steered, kinds: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the names that are shown, by their rank before the edit; see `model_client.SteeredName`."""
    plain_n, ranks_n = found.of(found.scores_abn, "none")[0, 0], found.of(found.ranks_abn, "none")[0, 0]
    by_dose = [
        (found.of(found.scores_abn, "targeted", dose)[0, 0], found.of(found.ranks_abn, "targeted", dose)[0, 0]) for dose in found.doses
    ]
    arms = list(dict.fromkeys(key.name for key in found.arms if key.name not in ("none", "targeted")))
    controls = {arm: [found.of(found.scores_abn, arm, dose)[:, 0] for dose in found.doses] for arm in arms}
    own = [name for name, kind in kinds.items() if kind in ("text", "label")]
    shown = sorted({found.names.index(name) for name in {*own, *found.top(0, N_FIRST)}}, key=lambda place: int(ranks_n[place]))
    return [
        {
            "name": found.names[place],
            "kind": kinds[found.names[place]],
            "score": float(plain_n[place]),
            "rank": int(ranks_n[place]),
            "scores": [float(scores_n[place]) for scores_n, _ in by_dose],
            "ranks": [int(ranks[place]) for _, ranks in by_dose],
            "controls": {
                arm: [(float(draws_rn[:, place].min()), float(draws_rn[:, place].max())) for draws_rn in of_doses]
                for arm, of_doses in controls.items()
            },
        }
        for place in shown
    ]


def _warn_of_estimates(agreed: Agreement | None, n_firing: int) -> list[str]:
    """Return what to say of latents that were chosen by an estimate, before the largest of them were ablated."""
    if agreed is None or not agreed.is_low or n_firing <= N_ATTRIBUTED:
        return []
    return [
        f"of the {n_firing:,} latents that fire, {N_ATTRIBUTED} were chosen by an estimate of their effect, which follows the exact effect "
        f"poorly here (rank correlation {agreed.correlation.value:.2f}): others may have larger effects"
    ]


def _unit(x: Float32[np.ndarray, "*rows d"]) -> Float32[np.ndarray, "*rows d"]:
    """Scale vectors to unit norm; those of zeros stay zero."""
    norms = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norms > 0, norms, 1)


def _strongest(acts_l: torch.Tensor) -> dict[str, list[Any]]:
    """Return the strongest latents of a patch that fire; see `model_client.PatchActs`."""
    acts, latents = acts_l.topk(min(N_OF_PATCH, len(acts_l)))
    return {"latents": latents[acts > 0].tolist(), "acts": acts[acts > 0].tolist()}


def _spread(values: list[str], n: int) -> list[str]:
    """Return up to n of the values, evenly spaced."""
    return [values[place] for place in spread_evenly(len(values), n)]


def serve(wire: Wire) -> None:
    """Open the study named in the first message, then answer one question after another."""
    study: Study | None = None
    while True:
        what, *values = wire.receive()
        try:
            if what == "open":
                study, answer = Study(*values), None
            else:
                assert what in ("load", "search_text", "search_image", "encode", "steer", "attribute"), what
                answer = getattr(study, what)(*values)
            wire.send("answer", answer)
        except OmmatidError as error:
            wire.send("error", type(error).__name__, str(error))
        except Exception as error:  # the edge of the process; the traceback goes where the server's own errors go
            traceback.print_exc()
            lack = find_lack(error)
            wire.send("error", "", f"the model failed: {lack.value[0] if lack else describe(error)}")


def main() -> None:
    """Answer questions until the server ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server handles Ctrl-C
    end_with_parent(int(sys.argv[1]))
    os.nice(NICENESS)
    with suppress(OSError):  # only Linux has it
        Path("/proc/self/oom_score_adj").write_text("500")
    if find_device() == "cpu":  # drivers of GPUs reserve more memory than there is
        set_soft(resource.RLIMIT_DATA, int(physical_mb() * MEMORY_SHARE) * 2**20)
    serve(Wire(socket.socket(fileno=0)))


if __name__ == "__main__":
    main()
