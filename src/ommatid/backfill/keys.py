"""Keys of what is computed about an SAE: digests of all that determines a result, and of nothing else.

A result is found again whichever run made it, as long as its key is the same. Activations are known by their rows, and embeddings by the
column of each judge, so that another judge changes no key but its own; an evaluation is known to labellers by its firings and examples.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ommatid.config import Labeller, LabelParams, Params
from ommatid.schemas import judge_columns
from ommatid.sources.stage import CODE, PLACE, code_of
from ommatid.store import Artefact
from ommatid.store.code import Code

LENGTH = 16
"""Number of hex digits of a key."""
READ_ROWS = 4096
"""Number of embeddings read at once."""


def make_key(*parts: Any) -> str:
    """Return the key of values that can be written as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:LENGTH]


def digest_of_tables(artefact: Artefact, tables: Iterable[str]) -> str:
    """Return a digest of the files of some tables of an artefact."""
    known = {file.name: file.sha256 for file in artefact.manifest.files}
    return make_key([[name, known[name]] for table in tables for name in artefact.parts(table)])


class Keys:
    """Keys under the present params, code, images and activations."""

    def __init__(self, params: Params) -> None:
        code = Code()
        self._params = params
        self._code = {stage: make_key(code_of(stage, params, code)) for stage in ("evaluate", "label")}
        self._columns: dict[str, dict[str, str]] = {}

    def is_current(self, stage: str) -> bool:
        """Return whether the checkout's artefact of a stage was made with the present code, as DVC's lock and `data/sources` say."""
        recorded, lock = PLACE / f"{stage}.json", Path("dvc.lock")
        if not (recorded.exists() and lock.exists()):
            return False
        made_with = ((yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages") or {}).get(stage, {}).get("deps", ())
        digest = hashlib.md5(recorded.read_bytes(), usedforsecurity=False).hexdigest()
        is_its = any(dep.get("path") == recorded.as_posix() and dep.get("md5") == digest for dep in made_with)
        return is_its and make_key(json.loads(recorded.read_bytes()).get(CODE)) == self._code[stage]

    def evaluation(self, inputs: Mapping[str, Artefact]) -> str:
        """Return the key of an SAE's evaluation, whoever the judges are."""
        rows = {
            name: [digest_of_tables(inputs[name], ("train", "eval")), self._tower(inputs[name])]
            for name in ("extract", "target")
            if name in inputs
        }
        return make_key(self._code["evaluate"], inputs["train"].digest, inputs["images"].digest, rows, self._params.evaluate.identity())

    def judges(self, activations: Artefact) -> dict[str, str]:
        """Return a digest of the embeddings of each judge, by the judge's name, the main judge first."""
        judges = activations.summary["judges"]
        columns = self._embeddings(activations)
        return {judge["judge"]: columns[column] for judge, column in zip(judges, judge_columns(len(judges)), strict=True)}

    def labels(self, inputs: Mapping[str, Artefact], labeller: Labeller) -> str:
        """Return the key of the labels that one labeller gives an SAE's latents.

        Args:
            inputs: The images, the activations, the SAE and its evaluation.
            labeller: Params of the labeller.
        """
        activations = inputs["extract"]
        seen = digest_of_tables(inputs["evaluate"], ("firings", "examples"))
        params = activations.manifest.params
        namer = params["namer"] or params["model"]
        one = one_labeller(self._params.label, labeller).identity()
        joint = self._embeddings(activations)["joint"]
        return make_key(self._code["label"], inputs["train"].digest, inputs["images"].digest, seen, namer, params["dtype"], joint, one)

    def _tower(self, activations: Artefact) -> list[Any]:
        """What is needed of the params to run the explained model again."""
        return [activations.manifest.params[key] for key in ("model", "tokens", "dtype")]

    def _embeddings(self, activations: Artefact) -> dict[str, str]:
        """Return a digest of each column of the embeddings; all hookpoints of an extraction have the same."""
        files = digest_of_tables(activations, ("embeddings",))
        if files not in self._columns:
            names = [
                "image",
                *(["joint"] if activations.summary.get("d_joint") else []),
                *judge_columns(len(activations.summary["judges"])),
            ]
            digests = {name: hashlib.sha256() for name in names}
            for batch in activations.iter_batches("embeddings", names, n_rows=READ_ROWS):
                for name, digest in digests.items():
                    column = batch[name]
                    width = column.type.bit_width // 8
                    start = column.offset * width
                    digest.update(memoryview(column.buffers()[1])[start : start + len(column) * width])
            image = digests.pop("image").hexdigest()
            self._columns[files] = {"joint": "", **{name: make_key(image, digest.hexdigest()) for name, digest in digests.items()}}
        return self._columns[files]


def one_labeller(params: LabelParams, labeller: Labeller) -> LabelParams:
    """Return the section `label` with one labeller."""
    return params.model_copy(update={"labellers": (labeller,)})
