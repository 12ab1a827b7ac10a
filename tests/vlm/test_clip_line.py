"""Proves that a CLIP from a local folder, judged by another transformers model, goes through every stage that touches it."""

from pathlib import Path

from transformers import ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ommatid.evaluate.stage import evaluate
from ommatid.extract.stage import extract
from ommatid.label.stage import label
from ommatid.train.stage import run as train
from support.models import SIZES
from support.study import make_artefact, make_test_params
from support.tiles import make_images_artefact


def test_clip_goes_through_the_line(tmp_path: Path, tiny_clip: Path) -> None:
    (tmp_path / "words.txt").write_text("red\ngreen\nblue\n")
    judge = tmp_path / "judge"
    ViTModel(ViTConfig(**SIZES, image_size=48, patch_size=16)).save_pretrained(judge)
    ViTImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(judge)
    params = make_test_params(
        extract={
            "model": {"kind": "clip", "path": str(tiny_clip)},
            "hookpoints": ["vision.blocks.1"],
            "tokens": "all",
            "judge": {"kind": "transformers", "path": str(judge)},
        },
        train={"d_sae": 40, "k": 2, "epochs": 4, "batch_size": 32},
        label={"labellers": [{"kind": "vocabulary", "words": [str(tmp_path / "words.txt")]}], "min_examples": 2},
    )
    made = {"images": make_images_artefact(tmp_path, 40)}
    kinds = {"extract": "extraction", "train": "training", "evaluate": "evaluation", "label": "labels"}
    for name, stage in (("extract", extract), ("train", train), ("evaluate", evaluate), ("label", label)):
        artefact = make_artefact(tmp_path / kinds[name], kinds[name], stage, getattr(params, name), made)
        made[name] = next(iter(artefact.each().values())) if artefact.children else artefact
    first = next(made["extract"].iter_parts("eval")).slice(0, 10).to_pylist()
    assert [(row["kind"], row["row"], row["col"]) for row in first[:3]] == [("cls", -1, -1), ("patch", 0, 0), ("patch", 0, 1)]
    examples = made["evaluate"].read("examples").to_pylist()
    assert {(row["rows"], row["cols"], len(row["heat"])) for row in examples} == {(3, 3, 9)}  # the class token has no place
    labels = made["label"].read("labels").to_pylist()
    assert {row["label"] for row in labels if row["status"] == "ok"} <= {"red", "green", "blue"}
    assert any(row["status"] == "ok" for row in labels)
