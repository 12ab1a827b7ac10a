"""Proves circuits on a model built by hand, in which a class is read from one later coordinate that sums two earlier ones.

All layers are linear, and the latents are the coordinates, so that effects, edges and faithfulness are known.
"""

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from ommatid.errors import InputError, ModelError
from ommatid.extract.tokens import TokenPicker
from ommatid.intervene.circuits import Circuit, Point, find_circuit
from ommatid.intervene.readout import Readout
from ommatid.sae.model import SAE, SAEConfig
from ommatid.vlm import Captured, Differentiated, Hookpoint, Replacement

D, T, N = 12, 5, 60
HOOKPOINT = Hookpoint(D, ("cls",), (2, 2))
SOURCES, TARGET, LOUD = (1, 5), 2, (7, 8, 9)
"""Coordinates that make the class at the earlier hookpoint, the one that they make at the later, and strong ones that mean nothing."""


class Layers:
    """A model that looks up an image's tokens by its first pixel, maps each by a matrix, and averages the patches."""

    name, d_embed, d_output = "layers", D, D
    hookpoints = {"early": HOOKPOINT, "late": HOOKPOINT}  # noqa: RUF012

    def __init__(self, table: Tensor) -> None:
        self.table, self.M = table, torch.eye(D, dtype=torch.float64)
        self.M[:, TARGET] = 0
        self.M[SOURCES, TARGET] = torch.tensor([1.0, 0.5], dtype=torch.float64)

    def tokens(self, pixels: Tensor) -> dict[str, Tensor]:
        x = self.table[pixels[:, 0, 0, 0].long()]
        return {"early": x, "late": x @ self.M}

    def onward(self, hookpoint: str, x: Tensor, read: str | None) -> Tensor:
        y = x @ self.M if hookpoint == "early" else x
        if read:
            assert (hookpoint, read) == ("early", "late")
        return y if read else y[:, 1:].mean(1)

    def capture(self, pixels: Tensor, hookpoints: Sequence[str]) -> Captured:
        return Captured(self.tokens(pixels), None)

    def splice(self, pixels: Tensor, hookpoint: str, replacements: Sequence[Replacement], read: str | None = None) -> tuple[Tensor, ...]:
        x = self.tokens(pixels)[hookpoint]
        return tuple(self.onward(hookpoint, replacement(x), read) for replacement in replacements)

    def differentiate(self, pixels: Tensor, hookpoint: str, score: Any, replacement: Any = None, read: str | None = None) -> Differentiated:
        x = self.tokens(pixels)[hookpoint].clone().requires_grad_()
        outputs = self.onward(hookpoint, x, read)
        return Differentiated(x.detach(), outputs.detach(), torch.autograd.grad(score(outputs).sum(), x)[0])


def make_sae(hookpoint: str, target: str | None = None) -> SAE:
    config = SAEConfig("relu", D, D, 4, hookpoint, "layers", target=target)
    eye, zeros = torch.eye(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    return SAE(config, eye, zeros, eye.clone(), zeros.clone(), torch.tensor(0.0, dtype=torch.float64))


def make_subjects(*hookpoints: str, name: str = "layers") -> list[Any]:
    rng = np.random.default_rng(0)
    table = torch.from_numpy(rng.uniform(0.1, 1.0, (N, T, D)))
    table[:, :, list(LOUD)] += 4
    table[: N // 2, :, list(SOURCES)] += 2  # the first half of the images has the class
    model = Layers(table)
    weights = torch.zeros(2, D, dtype=torch.float64)
    weights[0, TARGET] = 3.0

    def load_pixels(images: Sequence[int]) -> Any:
        for start in range(0, len(images), 16):
            numbers = np.array(images[start : start + 16])
            yield numbers, torch.from_numpy(numbers.astype(np.uint8))[:, None, None, None].expand(-1, 2, 2, 3)

    same = dict(
        model=model, classes={image: "boat" if image < N // 2 else "cat" for image in range(N)}, load_pixels=load_pixels,
        readout=Readout(("boat", "cat"), weights, 1.0, torch.zeros(2, dtype=torch.float64)),
        inputs={"extract": SimpleNamespace(manifest=SimpleNamespace(params={"model": name}))},
    )  # fmt: skip
    made = []
    for hookpoint in hookpoints:
        sae = make_sae(hookpoint)
        labels = {TARGET: {"label": 'a "boat"'}}
        made.append(SimpleNamespace(**same, sae=sae, device_sae=sae, reads=TokenPicker(hookpoint, HOOKPOINT, "patch"), labels=labels))
    return made


def find(*hookpoints: str, **changes: Any) -> Circuit:
    return find_circuit(make_subjects(*hookpoints), "boat", **{"sizes": [2, 3, 6], **changes})


def of(found: Circuit) -> dict[tuple[str, int | None], Point]:
    return {(point.arm, point.size): point for point in found.points}


def test_the_planted_circuit_between_two_hookpoints_is_found_and_no_other_says_as_much() -> None:
    found = find("early", "late")
    assert {(node.hookpoint, node.latent) for node in found.nodes[:3]} == {("late", TARGET), *(("early", one) for one in SOURCES)}
    assert found.nodes[0].latent == TARGET and found.nodes[0].label == 'a "boat"'
    points = of(found)
    assert points["model", None].faithfulness == pytest.approx(1) == points["all_latents", None].faithfulness
    assert points["circuit", 3].faithfulness == pytest.approx(1)
    assert points["circuit", 3].log_odds == pytest.approx(points["model", None].log_odds)
    assert points["without", 3].faithfulness == pytest.approx(0, abs=1e-9)
    assert points["most_active", 3].faithfulness == pytest.approx(0, abs=1e-9)
    assert points["without_most_active", 3].faithfulness == pytest.approx(1)
    assert points["without_random", 3].faithfulness > 0.5
    random = points["random", 3]
    assert random.n_draws == 20 and random.low <= random.faithfulness <= random.high and random.faithfulness < 0.1
    assert 0.5 < points["circuit", 2].faithfulness < 0.9  # without the weaker source
    assert (found.n_images, found.hookpoints) == ((15, 15), ("early", "late"))


def test_effects_and_edges_are_those_of_a_direct_computation() -> None:
    subjects = make_subjects("early", "late")
    found = find_circuit(subjects, "boat", sizes=[6], n_images=2 * N, n_shown=6)
    table = subjects[0].model.table[:, 1:]
    above = table[: N // 2].mean((0, 1)) - table.mean((0, 1))
    effects = {(node.hookpoint, node.latent): node.effect for node in found.nodes}
    edges = {(edge.source, edge.target): edge.effect for edge in found.edges}
    for source, weight in zip(SOURCES, (3.0, 1.5), strict=True):
        assert effects["early", source] == pytest.approx(weight * float(above[source]), rel=0.1)  # by half of the images of the class
        assert edges[source, TARGET] == pytest.approx(effects["early", source])
    assert effects["late", TARGET] == pytest.approx(effects["early", 1] + effects["early", 5])
    assert all(abs(effect) < 1e-12 for (source, target), effect in edges.items() if source not in SOURCES or target != TARGET)


def test_a_single_hookpoint_has_a_circuit_without_edges() -> None:
    found = find("early", sizes=[1, 2])
    assert [node.latent for node in found.nodes] == list(SOURCES) and found.edges == ()
    points = of(found)
    assert points["circuit", 2].faithfulness == pytest.approx(1) and points["circuit", 1].faithfulness == pytest.approx(2 / 3, abs=0.1)
    assert points["circuit", 1].low < points["circuit", 1].faithfulness < points["circuit", 1].high
    assert found.table().arm.tolist()[:3] == ["model", "all_latents", "random"]


def test_latents_are_chosen_on_other_images_than_those_that_measure_them() -> None:
    (subject,) = make_subjects("early")
    load, loaded = subject.load_pixels, list[list[int]]()
    subject.load_pixels = lambda images: loaded.append(list(images)) or load(images)
    find_circuit([subject], "boat", sizes=[2])
    of_means, chosen, measured = loaded
    assert len(chosen) == len(measured) == 15 and not set(chosen) & set(measured) and max(chosen + measured) < N // 2 <= max(of_means)


def test_random_circuits_are_of_latents_that_fire() -> None:
    """Of all that fire there is one circuit only."""
    (subject,) = make_subjects("early")
    subject.model.table[:, :, [0, 3, 4, 6, 10, 11]] *= -1
    random = of(find_circuit([subject], "boat", sizes=[6]))["random", 6]
    assert random.low == random.high == pytest.approx(1)


def test_the_most_active_latents_are_those_that_move_tokens_most() -> None:
    """A latent with ten times the activation, along a tenth of the direction, is as active as before."""
    (plain,), (scaled,) = make_subjects("early"), make_subjects("early")
    scaled.sae.W_enc[:, SOURCES[0]] *= 10
    scaled.sae.W_dec[SOURCES[0]] /= 10
    found = [of(find_circuit([one], "boat", sizes=[3]))["most_active", 3].faithfulness for one in (plain, scaled)]
    assert found == pytest.approx([0, 0], abs=1e-9)


def test_without_the_error_what_it_is_on_average_is_kept() -> None:
    (subject,) = make_subjects("early")
    subject.sae.b_enc -= 0.05  # the SAE leaves 0.05 of every coordinate unexplained
    assert of(find_circuit([subject], "boat", sizes=[2]))["all_latents", None].faithfulness == pytest.approx(1)


def test_the_same_seed_gives_the_same_circuit() -> None:
    assert find("early", "late", seed=3).to_json() == find("early", "late", seed=3).to_json() != find("early", "late", seed=4).to_json()


def test_the_graph_has_the_strongest_nodes_and_edges_with_text_quoted() -> None:
    found = find("early", "late", n_shown=3)
    dot = found.to_dot()
    assert dot.startswith("digraph circuit {") and 'n1_2 [label="a \\"boat\\"\\nlatent 2, +' in dot
    assert {line.split(" [")[0].strip() for line in dot.splitlines() if "->" in line} == {"n0_1 -> n1_2", "n0_5 -> n1_2", "n1_2 -> output"}
    read = json.loads(found.to_json())
    assert read["class_name"] == "boat" and len(read["nodes"]) == 6 and len(read["points"]) == 2 + 3 * 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": []}, "sizes are \\[\\]"),
        ({"sizes": [4, 4]}, "each once"),
        ({"sizes": [0]}, "1 or above"),
        ({"sizes": [25]}, "a circuit of 25 latents: only 24 fire on images of 'boat'"),
        ({"draws": 1}, "draws is 1; random circuits need 2 or more"),
        ({"n_images": 6}, "6 images of 'boat': at least 8 are needed"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        find("early", "late", **changes)


def test_classes_and_saes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="'plane' is not among the names that are read from the output: 'boat', 'cat'"):
        find_circuit(make_subjects("early"), "plane")
    with pytest.raises(ModelError, match="both SAEs are at late: give a second one at a later hookpoint"):
        find("late", "late")
    other = [*make_subjects("early"), *make_subjects("late", name="other")]
    with pytest.raises(ModelError, match=r"is of the model layers, .* of other: give SAEs of one model"):
        find_circuit(cast(Any, other), "boat")
    (transcoder,) = make_subjects("early")
    transcoder.sae = make_sae("early", target="late")
    with pytest.raises(ModelError, match="is a transcoder"):
        find_circuit([transcoder], "boat")
