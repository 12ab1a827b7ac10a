"""Proves that training can begin with a trained SAE: latent i stays latent i, and what does not fit is said before any work."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest
import torch

from ommatid.config import Params, TrainParams, load_params
from ommatid.errors import ArtefactError, ConfigError
from ommatid.events import Event, Warned, ignore
from ommatid.pipeline.run import run_stage
from ommatid.publish import champion
from ommatid.publish.champion import resolve_start
from ommatid.sae.learner import Learner, Sample
from ommatid.sae.model import SAE
from ommatid.sae.schedule import make_plan
from ommatid.sae.trainer import Trainer
from ommatid.sources.stage import CHAMPIONS, START, write_sources
from support.activations import make_params, prepare, write_activations
from support.planted import iter_planted, make_planted, make_train_params
from support.study import CHECKOUT

CPU = torch.device("cpu")


def begin(params: TrainParams, x: torch.Tensor, start: SAE | None, target: torch.Tensor | None = None) -> Learner:
    return Learner.begin("one", params, make_plan(params, len(x)), Sample(x, target), CPU, start)


def fit(learner: Learner, x: torch.Tensor) -> SAE:
    Trainer([learner], ignore, None).fit(iter_planted(x, learner.plan.batch_size))
    return finish(learner)


def finish(learner: Learner) -> SAE:
    return learner.finish("blocks.0", "planted", None)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_before_the_first_step_the_sae_is_the_one_that_training_began_with(factor: float) -> None:
    """Also if the new data are scaled otherwise: the SAE is folded for raw activations."""
    x = make_planted(2048).x
    params = make_train_params(epochs=5)
    start = fit(begin(params, x, None), x)
    again = finish(begin(params, x * factor + 0.1, start))
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(again, name), getattr(start, name), rtol=1e-4, atol=1e-5)


def test_so_is_a_transcoder() -> None:
    planted = make_planted(2048)
    target = planted.codes @ torch.randn(planted.codes.shape[1], 20, generator=torch.Generator().manual_seed(9)) + 1
    params = make_train_params(target="blocks.1", variant="topk")
    start = begin(params, planted.x, None, target).finish("blocks.0", "planted", "blocks.1")
    again = begin(params, planted.x * 2, start, target * 2).finish("blocks.0", "planted", "blocks.1")
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(again, name), getattr(start, name), rtol=1e-4, atol=1e-5)


def test_latents_keep_their_number_on_other_data() -> None:
    planted = make_planted(8192)
    params = make_train_params(epochs=40)
    old, new = planted.x[:4096], planted.x[4096:]
    first = fit(begin(params, old, None), old)

    found = (first.W_dec @ planted.directions.T).amax(1) > 0.9  # latents for which there is something to find in the new data, too

    def same(sae: SAE) -> float:
        return float((torch.cosine_similarity(first.W_dec, sae.W_dec) > 0.9)[found].float().mean())

    assert same(fit(begin(params, new, first), new)) > 0.9 > 0.1 > same(fit(begin(params, new, None), new))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Params]:
    """A folder with activations, and an SAE of them in `start`."""
    root = tmp_path_factory.mktemp("made")
    params = make_params(root, d_sae=64, k=3, epochs=3, batch_size=256, max_dead=1.0)
    with chdir(root):
        write_activations(root)
        prepare(root, params)
        run_stage("train", params, ignore)
        (sae,) = [path for path in Path("data/sae").iterdir() if path.is_dir()]
        sae.rename("start")
        Path("data/sae").rename("first")
    return root, params


@pytest.fixture
def study(made: tuple[Path, Params], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """A test's own copy of the folder, in which it works."""
    shutil.copytree(made[0], tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    return made[1]


def changed(params: Params, **values: object) -> Params:
    section = TrainParams.model_validate(params.train.model_dump(mode="json") | values)
    return params.model_copy(update={"train": section})


def heard(params: Params) -> list[str]:
    events: list[Event] = []
    run_stage("train", params, events.append, must_pass=False)
    return [event.what for event in events if isinstance(event, Warned)]


def test_the_stage_begins_with_the_sae_that_init_names(study: Params) -> None:
    params = changed(study, init="start", lr=1e-9)
    assert not [line for line in heard(params) if "anew" in line]
    (sae,) = [path for path in Path("data/sae").iterdir() if path.is_dir()]
    torch.testing.assert_close(SAE.load(sae).W_dec, SAE.load(Path("start")).W_dec, rtol=1e-3, atol=1e-4)
    assert json.loads((sae / "manifest.json").read_text())["params"]["init"] == "start"
    assert "init" not in json.loads(Path("start/manifest.json").read_text())["params"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"init": "start", "d_sae": 32}, "begins anew: the SAE in start has d_sae 64, not 32"),
        ({"init": "start", "variant": "topk"}, "begins anew: the SAE in start has variant batch_topk, not topk"),
        ({"init": "start", "variant": "relu"}, "begins anew: an SAE of kind relu cannot be continued"),
        ({"init": "champion"}, "begins anew: train.init is champion, and there is no champion yet"),
    ],
)
def test_what_does_not_fit_begins_anew_and_says_so(study: Params, values: dict[str, object], said: str) -> None:
    assert [line for line in heard(changed(study, **values)) if line.endswith(said)]


def test_a_folder_without_an_sae_is_refused(study: Params) -> None:
    with pytest.raises(ConfigError, match=r"^train\.init: first: holds no sae\.safetensors and no cfg\.json; name the folder of an SAE"):
        run_stage("train", changed(study, init="first"), ignore)
    assert not Path("data/sae").exists()


@dataclasses.dataclass
class _Champion:
    key: str
    challenger: object


def test_champion_stands_for_the_published_sae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    params = load_params(CHECKOUT / "params.yaml", ["train.init=champion"])
    assert resolve_start(params) == params  # none yet: the stage says so
    scores = type("Scores", (), {"sae": "topk-1"})
    monkeypatch.setattr(champion, "find_champion", lambda: _Champion("0123", scores))
    with pytest.raises(ArtefactError, match=r"^train\.init: the SAE of the champion topk-1 is gone from data/published/champions/0123/sae"):
        resolve_start(params)
    (tmp_path / "data/published/champions/0123/sae").mkdir(parents=True)
    assert resolve_start(params).train.init == "data/published/champions/0123/sae"
    other = load_params(CHECKOUT / "params.yaml", ["train.init=saes/mine"])
    assert resolve_start(other) == other


Write = Callable[[str, str, str | None], None]
Look = Callable[[str], object]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes the manifest of an SAE with some content that began with another."""
    monkeypatch.chdir(tmp_path)

    def written(folder: str, content: str, init: str | None) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "manifest.json").write_text(json.dumps({"params": {"init": init}, "summary": content}))

    return written


@pytest.fixture
def look() -> Look:
    """Returns what DVC compares of the SAE that training is to begin with."""

    def looked(start: str) -> object:
        Path("photos").mkdir(exist_ok=True)
        Path("photos/a.jpg").write_bytes(b"a")
        source = "images.source={kind: folder, path: photos}"
        write_sources(load_params(CHECKOUT / "params.yaml", [source, f"train.init={start}"]))
        return json.loads(Path("data/sources/train.json").read_text())[START]

    return looked


def test_a_new_champion_makes_training_stale_but_not_the_training_that_made_it(write: Write, look: Look) -> None:
    assert CHAMPIONS == champion.CHAMPIONS
    a, b, d = (f"{CHAMPIONS}/{name}/sae" for name in "abd")
    write(a, "a", None)
    write("data/sae/one", "b", a)
    first = look(a)
    write(b, "b", a)  # the SAE in data/sae wins, and is the champion
    assert look(b) == first
    write("data/sae/one", "c", b)  # new images came in: it is trained again, from the champion
    assert look(b) == first
    write(d, "d", None)  # somebody promotes another
    assert look(d) != first


def test_another_sae_in_a_folder_of_the_user_makes_training_stale(write: Write, look: Look) -> None:
    write("mine", "a", None)
    first = look("mine")
    write("data/sae/one", "b", "mine")
    assert look("mine") == first
    write("mine", "c", None)
    assert look("mine") != first
