"""Proves that params.yaml is complete and that every wrong value is refused with its key, value and what is allowed."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from ommatid.config import STAGE_NAMES, ExtractParams, Params, Section, dotted, load_params
from ommatid.errors import ConfigError
from support.study import CHECKOUT

PARAMS = CHECKOUT / "params.yaml"


def test_the_params_of_the_checkout_are_valid_and_cover_every_stage() -> None:
    assert set(STAGE_NAMES) < set(dotted(load_params(PARAMS))) | set(Params.model_fields)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.kk=3", "train.kk: unknown key; did you mean k?"),
        ("trian.k=3", "trian: unknown key; did you mean train?"),
        ("train.k=9999", "train: k is 9999, larger than d_sae 1280"),
        ("train.k=0", "train.k: got 0; input should be greater than or equal to 1"),
        ("train.lr=abc", "train.lr: got 'abc'; input should be a valid number"),
        ("train.lr=.nan", "train.lr"),
        ("images.source={kind: fodler, path: x}", "'cifar10', 'folder', 'parquet'"),
        ("images.source={kind: folder}", "images.source.path: missing"),
        ("extract.executor={kind: dask, address: null, workers: 0}", "extract.executor.workers: got 0"),
        ("extract.executor={kind: slurm}", "'local', 'dask', 'ray'"),
        ("images.source.pth=3", "images.source.pth: unknown key; did you mean path?"),
        ("images.source.column=x", "images.source.column: unknown key; known here: kind, path"),  # a key of another source
        ("extract.judge.variant=lite0", "judge must be a different encoder from model: both are lite0"),
        ("extract.judge.variant=lite9", "extract.judge.variant: got 'lite9'; input should be 'lite0' or 'lite2'"),
        ("extract.judge.size=3", "extract.judge.size: unknown key; known here: image_size, kind, variant"),
        ("extract.judge={kind: dino}", "extract.judge.kind: "),
        ("extract.judge=[]", "extract.judge: got []"),
        ("extract.judge=3", "extract.judge"),
        (
            "extract.judge=[{kind: lite, variant: lite2}, {kind: lite, size: 3}]",
            "extract.judge.1.size: unknown key; known here: image_size",
        ),
        ("extract.judge=[{kind: lite, variant: lite2}, {kind: lite}]", "judge must be a different encoder from model: both are lite0"),
        ("extract.judge=[{kind: lite, variant: lite2}, {kind: lite, variant: lite2}]", "extract: judge names lite2 twice"),
        ("extract.judge=[{kind: transformers, path: m/a}, {kind: transformers, path: ./m//a}]", "extract: judge names m/a twice"),
        ("evaluate.image_activation=median", "evaluate.image_activation: got 'median'; input should be 'max', 'mean' or 'cls'"),
        ("extract.tokens=patches", "extract.tokens: got 'patches'; input should be 'patch', 'cls', 'register', 'pooled' or 'all'"),
        ("evaluate.baselines=[ica]", "evaluate.baselines.0: got 'ica'; input should be 'sparse_neurons', 'pca', 'kmeans' or 'nmf'"),
        ("evaluate.baselines=[pca, nmf, pca]", "evaluate.baselines: names one twice: pca, nmf, pca"),
        ("intervene.latents={kind: worst}", "intervene.latents.kind: "),
        ("intervene.latents={kind: worst}", "'best', 'listed', 'firing'"),
        ("intervene.latents={kind: best, by: fame, n: 3}", "intervene.latents.by.0: got 'fame'; input should be 'ms', 'label_score', "),
        ("intervene.latents={kind: best, by: [ms, ms], n: 3}", "intervene.latents.by: names ms twice: ms, ms"),
        ("intervene.latents={kind: best, by: [], n: 3}", "intervene.latents.by: got []; the list should have at least 1 entry"),
        ("intervene.latents={kind: best, by: ms, n: 0}", "intervene.latents.n: got 0; input should be greater than or equal to 1"),
        ("intervene.latents={kind: best, by: ms}", "intervene.latents.n: missing; add it"),
        ("intervene.latents={kind: listed, latents: []}", "intervene.latents.latents: got []"),
        ("intervene.latents={kind: listed, latents: [3, -1]}", "intervene.latents.latents.1: got -1"),
        ("intervene.latents={kind: listed, latents: [3, 5, 3]}", "intervene.latents.latents: names 3 twice: 3, 5, 3"),
        ("intervene.latents={kind: firing, min_images: 0}", "intervene.latents.min_images: got 0"),
        ("intervene.latents={kind: firing, n: 3}", "intervene.latents.n: unknown key; known here: kind, min_images"),
        ("intervene.latents=7", "intervene.latents: got 7; input should be keys with values, such as {kind: ...}"),
        ("intervene.masks=''", "intervene.masks: got ''; string should have at least 1 character"),
        ("intervene.doses=[]", "intervene.doses: got []; the list should have at least 1 entry"),
        ("intervene.doses=high", "intervene.doses: got 'high'; input should be a list, such as [1, 2]"),
        ("intervene.doses=[high]", "intervene.doses.0: got 'high'; input should be a valid number"),
        ("intervene.doses=[.nan]", "intervene.doses.0: got nan; input should be a finite number"),
        ("intervene.doses=[0, -1]", "intervene.doses.1: got -1; input should be greater than or equal to 0"),
        ("intervene.doses=[101]", "intervene.doses.0: got 101; input should be less than or equal to 100"),
        ("intervene.doses=[.inf]", "intervene.doses.0: got inf"),
        ("intervene.doses=[true]", "intervene.doses.0: got True; input should be a valid number"),
        ("intervene.doses=[0.5, 1, 0.5]", "intervene.doses: names 0.5 twice: 0.5, 1, 0.5"),
        ("intervene.n_images=15", "intervene.n_images: got 15; input should be greater than or equal to 16"),
        ("intervene.draws=1", "intervene.draws: got 1; input should be greater than or equal to 3"),
        ("intervene.draws=65", "intervene.draws: got 65; input should be less than or equal to 64"),
        ("intervene.max_drift=-0.1", "intervene.max_drift: got -0.1"),
        ("intervene.seed=-1", "intervene.seed: got -1"),
        (
            "intervene.answers={}",
            "intervene.answers: a model of kind lite does not answer in words; set it to null, or extract.model to one",
        ),
        ("intervene.answers={question: ' '}", "intervene.answers.question: got ' '"),
        ("intervene.answers={max_new_tokens: 0}", "intervene.answers.max_new_tokens: got 0"),
        ("intervene.answers={dtype: int8}", "intervene.answers.dtype: got 'int8'"),
        ("intervene.answers={joint: {kind: dino}}", "intervene.answers.joint.kind: "),
        ("intervene.answers={prompt: x}", "intervene.answers.prompt: unknown key"),
        ("intervene.dose=[1]", "intervene.dose: unknown key; did you mean doses?"),
        ("train", "expected KEY=VALUE"),
        ("train.k.x=1", "k is a value, not a section"),
        ("train.k={", "not valid YAML"),
    ],
)
def test_wrong_values_are_named(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_params(PARAMS, [override])
    assert says in str(error.value)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dino", "vit", "llava", "qwen"])
def test_judge_must_not_be_the_model_however_its_path_is_spelt(kind: str) -> None:
    model = f"extract.model={{kind: {kind}, path: models/tiny}}"
    for path in ("models/tiny", "./models//tiny/", "models/other/../tiny", str(Path("models/tiny").absolute())):
        with pytest.raises(ConfigError, match="judge must be a different encoder from model: both are models/tiny"):
            load_params(PARAMS, [model, f"extract.judge={{kind: transformers, path: {path}}}"])
    load_params(PARAMS, [model, "extract.judge={kind: transformers, path: models/other}"])


def test_judges_are_one_or_a_list_and_stay_as_they_were_given() -> None:
    one = load_params(PARAMS).extract
    assert isinstance(one, ExtractParams)
    assert one.judges == (one.judge,)
    assert one.identity()["judge"] == {"kind": "lite", "variant": "lite2", "image_size": 128}
    sizes = [{"kind": "lite", "variant": "lite2", "image_size": 64}, {"kind": "lite", "variant": "lite2", "image_size": 128}]
    several = load_params(PARAMS, [f"extract.judge={sizes}"]).extract
    assert isinstance(several, ExtractParams)
    assert several.identity()["judge"] == sizes
    assert [getattr(judge, "image_size", None) for judge in several.judges] == [64, 128]
    assert ExtractParams.model_validate_json(several.model_dump_json()) == several


@pytest.mark.parametrize("kind", ["clip", "siglip", "dino", "vit"])
def test_problems_of_a_model_are_named_without_its_kind(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"extract\.model\.pth: unknown key; did you mean path\?"):
        load_params(PARAMS, [f"extract.model={{kind: {kind}, pth: x}}"])


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        load_params(PARAMS, ["train.k=0", "images.limit=-1", "lable={}"])
    assert all(key in str(error.value) for key in ("train.k", "images.limit", "lable"))


def test_overrides_are_typed_and_repeatable() -> None:
    params = load_params(PARAMS, ["train.k=8", "images.limit=null", "images.source={kind: folder, path: photos}"])
    assert dotted(params)["train.k"] == 8
    assert params.images.limit is None
    assert dotted(params)["images.source.path"] == "photos"


@pytest.mark.parametrize(("text", "says"), [(None, "no such file"), ("- 1", "expected sections"), ("a: [", "not valid YAML")])
def test_a_file_that_is_not_a_params_file_is_refused(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "params.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_params(path)


def test_every_field_has_a_description() -> None:
    def sections(model: type[BaseModel]) -> set[type[BaseModel]]:
        return {model}.union(*(sections(sub) for sub in model.__subclasses__()))

    untold = [f"{m.__name__}.{name}" for m in sections(Section) for name, f in m.model_fields.items() if not f.description]
    tags = {f"{m.__name__}.kind" for m in sections(Section)}
    whole = {f"Params.{name}" for name in Params.model_fields}
    assert set(untold) <= tags | whole
