"""Sparse feature circuits: the few latents at one or two hookpoints on which the model's answer for a class rests.

Nodes are latents, and edges lead from latents at one hookpoint to those at a later one (Marks et al. 2024, arXiv 2403.19647; for one
hookpoint, Cunningham et al. 2023, arXiv 2309.08600). The output m is the log-odds of the class. A bar marks means over the kept tokens of
images of all classes.

Effect of a node: m(x) − m(x with latent k at its mean), estimated as Σ (c_k − c̄_k) (g · d_k) over kept tokens, in which g is the mean of
    ∂m/∂x along the line from x̄ to x (integrated gradients), and averaged over images of the class.
Effect of an edge from u to v: the part of the effect of u that passes through v, Σ (c_u − c̄_u) (∂s_v/∂x · d_u), in which s_v is
    Σ (g · d_v) c_v over kept tokens at the later hookpoint, whose first factor is held fixed. Where v is silent, nothing passes through it.
Circuit C: the model runs with x̄ + Σ_{k in C} (c_k − c̄_k) d_k in the place of x, at each hookpoint. What the other latents and the SAE's
    error say of an image is gone.
Faithfulness of C: (m(C) − m(∅)) / (m(model) − m(∅)), a ratio of means over images. ∅ has no latents, so x̄ takes the place of every token.
    It may exceed 1, because what is gone may have spoken against the class.

Latents are chosen on one half of the images of the class, and faithfulness is measured on the other half. A circuit is known to say
anything only beside others of the same size: `random` ones of latents that fire on images of the class, and the `most_active` latents
there. The arms `without` keep everything but the latents of a circuit: if these are necessary, faithfulness falls, and further than
`without_random` and `without_most_active`.

Suffixes: b images of a batch, k kept tokens, d d_model, s latents.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64, UInt8
from torch import Tensor

from ommatid.errors import InputError, ModelError
from ommatid.extract.tokens import TokenPicker
from ommatid.intervene.attribution import ENTRIES, VALUES, Attributor, MeanEffects
from ommatid.intervene.subject import Subject
from ommatid.metrics import Interval, share_of_means
from ommatid.sae.model import SAE
from ommatid.vlm import Replacement, Score, VisionModel

if TYPE_CHECKING:
    import pandas

ArmName = Literal[
    "model", "all_latents", "circuit", "most_active", "random", "without", "without_most_active", "without_random"
]  # fmt: skip
SIZES = (4, 8, 16, 32, 64, 128)
"""Numbers of latents of circuits, unless others are asked for."""
N_STEPS = 10
"""Number of steps of integrated effects from the mean tokens to those of an image."""
LEAST_IMAGES = 8
"""Smallest number of images of the class, half of which choose the latents and half of which measure them."""


@dataclass(frozen=True)
class Node:
    """A latent of a circuit."""

    hookpoint: str
    """Hookpoint of its SAE."""
    latent: int
    """Index of the latent."""
    label: str | None
    """Its label; None if it has none."""
    effect: float
    """Mean effect on the log-odds of the class, in nats, over the images that chose it."""
    half: float
    """Half the width of its 95 % interval over images."""


@dataclass(frozen=True)
class Edge:
    """The part of the effect of a latent that passes through a latent at the later hookpoint."""

    source: int
    """Latent at the earlier hookpoint."""
    target: int
    """Latent at the later hookpoint."""
    effect: float
    """Mean effect on the log-odds of the class, in nats."""


@dataclass(frozen=True)
class Point:
    """What is left of the model's answer in circuits of one size and arm."""

    arm: ArmName
    """What is kept: see the module."""
    size: int | None
    """Number of latents of the circuit; None for `model` and `all_latents`."""
    n_draws: int
    """Number of circuits: 1, except for random ones."""
    log_odds: float
    """Mean log-odds of the class."""
    faithfulness: float
    """Faithfulness, the mean over draws."""
    low: float
    """Lower end of its 95 % interval over images; of random circuits, the smallest of the draws."""
    high: float
    """Upper end of its interval; of random circuits, the largest of the draws."""


@dataclass(frozen=True)
class Circuit:
    """Circuits of a class by size, and the graph of the strongest nodes."""

    class_name: str
    """The class."""
    hookpoints: tuple[str, ...]
    """The hookpoint of each SAE, the earlier one first."""
    n_images: tuple[int, int]
    """Number of images of the class that chose the latents, and of others that measured faithfulness."""
    empty: float
    """Mean log-odds with no latents, m(∅)."""
    points: tuple[Point, ...]
    """Faithfulness by arm and size."""
    nodes: tuple[Node, ...]
    """Nodes of the largest circuit, the largest effect first."""
    edges: tuple[Edge, ...]
    """Edges between the first nodes, the largest effect first; none for a single hookpoint."""
    n_shown: int
    """Number of nodes that the graph has."""

    def __repr__(self) -> str:
        sizes = [str(point.size) for point in self.points if point.arm == "circuit"]
        of = sizes[0] if len(sizes) == 1 else f"{', '.join(sizes[:-1])} and {sizes[-1]}"
        return f"Circuit({self.class_name!r} at {' and '.join(self.hookpoints)}, {of} latents)"

    def table(self) -> "pandas.DataFrame":
        """Return a row for each arm and size, with the fields of `Point` as columns."""
        import pandas

        return pandas.DataFrame([asdict(point) for point in self.points])

    def to_json(self) -> str:
        """Return everything as JSON; numbers that are not finite are null."""
        return json.dumps(_finite(asdict(self)), indent=1, ensure_ascii=False) + "\n"

    def to_dot(self) -> str:
        """Return the graph of the first nodes in Graphviz's language; edges below a twentieth of the strongest are left out."""
        lines = ["digraph circuit {", "  rankdir=BT;", "  node [shape=box, style=rounded];"]
        shown = self.nodes[: self.n_shown]
        for place, hookpoint in enumerate(self.hookpoints):
            names = [_dot_node(place, node) for node in shown if node.hookpoint == hookpoint]
            lines += [f"  subgraph level{place} {{ rank=same; {' '.join(names)} }}"] if names else []
        lines.append(f"  output [label={_quoted(self.class_name)}, shape=ellipse];")
        last = len(self.hookpoints) - 1
        links = [(f"n{last}_{node.latent}", "output", node.effect) for node in shown if node.hookpoint == self.hookpoints[last]]
        links += [(f"n0_{edge.source}", f"n1_{edge.target}", edge.effect) for edge in self.edges]
        largest = max((abs(effect) for *_, effect in links), default=0.0)
        for source, target, effect in links:
            if abs(effect) >= largest / 20 and effect:
                style = f"penwidth={0.5 + 4 * abs(effect) / largest:.2f}, color={'black' if effect > 0 else 'red'}"
                lines.append(f'  {source} -> {target} [label="{effect:+.3g}", {style}];')
        return "\n".join([*lines, "}", ""])


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'


def _dot_node(place: int, node: Node) -> str:
    label = _quoted(node.label or "no label")[:-1] + f'\\nlatent {node.latent}, {node.effect:+.3g}"'
    return f"n{place}_{node.latent} [label={label}];"


@dataclass(frozen=True, eq=False)
class Level:
    """One hookpoint of a circuit, with the means that stand for what is not in it."""

    sae: SAE
    """The SAE, on the device of the model."""
    tokens: TokenPicker
    """Tokens that are encoded and replaced."""
    mean_s: Float[Tensor, " latents"]
    """Mean activation of each latent, `(s,)`."""
    mean_d: Float[Tensor, " d"]
    """Mean token, `(d,)`."""

    def keep(self, latents: Int64[Tensor, " kept_latents"]) -> Replacement:
        """Return the replacement that keeps only what some latents say: x̄ + Σ (c_k − c̄_k) d_k."""
        return self._replacing(lambda x: self.mean_d.expand_as(x) + self._deviation(x, latents))

    def remove(self, latents: Int64[Tensor, " removed_latents"]) -> Replacement:
        """Return the replacement that sets some latents to their means, and keeps everything else: x − Σ (c_k − c̄_k) d_k."""
        return self._replacing(lambda x: x - self._deviation(x, latents))

    def reconstruct(self) -> Replacement:
        """Return the replacement that keeps all latents, but not the SAE's error."""
        mean_x_hat = self.mean_s @ self.sae.W_dec + self.sae.b_dec

        def replace(x: Tensor) -> Tensor:
            rows = x.flatten(0, 1).split(max(1, ENTRIES // self.sae.n_latents))
            x_hat = torch.cat([self.sae.decode(self.sae.encode(some)) for some in rows]).view(x.shape)
            return x_hat - mean_x_hat + self.mean_d

        return self._replacing(replace)

    def _replacing(self, replace: Any) -> Replacement:
        return lambda tokens: self.tokens.put(tokens, replace(self.tokens.pick(tokens).to(self.sae.W_dec)))

    def _deviation(self, x_bkd: Float[Tensor, "images kept d"], latents: Int64[Tensor, " latents"]) -> Tensor:
        if not len(latents):
            return torch.zeros_like(x_bkd)
        acts = self.sae.encode_latents(x_bkd.flatten(0, 1), latents) - self.mean_s[latents]
        return (acts @ self.sae.W_dec[latents]).view(x_bkd.shape)


def find_circuit(
    subjects: Sequence[Subject],
    class_name: str,
    *,
    sizes: Sequence[int] = SIZES,
    n_images: int = 96,
    draws: int = 20,
    n_shown: int = 16,
    seed: int = 0,
) -> Circuit:
    """Find the circuits of a class.

    Args:
        subjects: A study's model and SAE; or two, of the same model, the second of which has its SAE at a later hookpoint.
        class_name: A class of the evaluation images.
        sizes: Numbers of latents, over both hookpoints together.
        n_images: Largest number of images of the class, and of all classes together for the means.
        draws: Number of random circuits of each size.
        n_shown: Number of nodes, those of largest effect, between which edges are computed.
        seed: Seed of the images and of random circuits.

    Returns:
        Nodes, edges and faithfulness.

    Raises:
        InputError: The class or a size is not possible, or the images of the class are too few.
        ModelError: The SAEs are of different models, one is a transcoder, or the hookpoints are not in order.
    """
    first = subjects[0]
    sizes = _check_sizes(sizes)
    if draws < 2:
        raise InputError(f"draws is {draws}; random circuits need 2 or more")
    _check_subjects(subjects)
    score = first.readout.log_odds(class_name)
    rng = np.random.default_rng(seed)
    chosen, measured, all_ = _draw_images(first, class_name, n_images, rng)
    levels = [_measure_means(first, subject, all_) for subject in subjects]
    ranked = _rank(first, levels, score, chosen)
    n_firing = sum(int(fires.sum()) for fires in ranked.fires)
    if sizes[-1] > n_firing:
        raise InputError(f"a circuit of {sizes[-1]} latents: only {n_firing} fire on images of {class_name!r}; choose smaller sizes")
    kept = _draw_circuits(ranked, sizes, draws, rng)
    points, empty = _measure_circuits(first, levels, score, measured, kept)
    nodes = tuple(_nodes(subjects, ranked, sizes[-1]))
    edges = _find_edges(first, levels, score, chosen, nodes[:n_shown]) if len(levels) == 2 else ()
    names = tuple(level.tokens.name for level in levels)
    return Circuit(class_name, names, (len(chosen), len(measured)), empty, points, nodes, edges, n_shown)


def _check_sizes(sizes: Sequence[int]) -> list[int]:
    if not sizes or len(set(sizes)) < len(sizes) or min(sizes) < 1:
        raise InputError(f"sizes are {list(sizes)}; give one or more numbers of latents, 1 or above, each once")
    return sorted(sizes)


def _check_subjects(subjects: Sequence[Subject]) -> None:
    if len(subjects) not in (1, 2):
        raise InputError(f"{len(subjects)} SAEs: give one, or two at different hookpoints")
    if odd := [subject.sae.name for subject in subjects if subject.sae.config.target]:
        raise ModelError(f"{odd[0]} is a transcoder, which does not reconstruct the tokens that it reads: give other SAEs")
    if len(subjects) == 2:
        of = [subject.inputs["extract"].manifest.params["model"] for subject in subjects]
        if of[0] != of[1]:
            raise ModelError(f"{subjects[0].sae.name} is of the model {of[0]}, {subjects[1].sae.name} of {of[1]}: give SAEs of one model")
        names = [subject.reads.name for subject in subjects]
        if names[0] == names[1]:
            raise ModelError(f"both SAEs are at {names[0]}: give a second one at a later hookpoint")


def _draw_images(subject: Subject, class_name: str, n_images: int, rng: np.random.Generator) -> tuple[list[int], list[int], list[int]]:
    """Draw images of the class that choose latents, others of the class that measure them, and images of all classes."""
    of_class = [image for image, name in subject.classes.items() if name == class_name]
    if len(of_class) < LEAST_IMAGES or n_images < LEAST_IMAGES:
        n = min(len(of_class), n_images)
        raise InputError(f"{n} images of {class_name!r}: at least {LEAST_IMAGES} are needed, of which half choose the latents")
    some = rng.permutation(of_class)[:n_images].tolist()
    all_ = rng.permutation(list(subject.classes))[:n_images].tolist()
    return sorted(some[::2]), sorted(some[1::2]), sorted(all_)


def _iter_pixels(subject: Subject, images: Sequence[int]) -> Iterator[UInt8[Tensor, "batch height width 3"]]:
    return (pixels for _, pixels in subject.load_pixels(images))


def _measure_means(first: Subject, subject: Subject, images: Sequence[int]) -> Level:
    """Measure the mean activation of each latent and the mean token over images."""
    sae, tokens = subject.device_sae, subject.reads
    attributor = Attributor(first.model, sae, tokens, tokens)
    n, mean_s, mean_d = 0, sae.W_dec.new_zeros(sae.n_latents), torch.zeros_like(sae.b_dec)
    for pixels in _iter_pixels(first, images):
        code = attributor.encode(pixels)
        mean_s.index_add_(0, code.entries.latents, code.entries.values)
        x = tokens.pick(first.model.capture(pixels, [tokens.name]).tokens[tokens.name]).to(sae.W_dec)
        mean_d += x.sum((0, 1))
        n += code.entries.n_tokens
    return Level(sae, tokens, mean_s / n, mean_d / n)


@dataclass(frozen=True, eq=False)
class _Ranked:
    """What the images that choose latents say of them, at each hookpoint."""

    effects: list[MeanEffects]
    """Effects of latents."""
    fires: list[Bool[Tensor, " _latents"]]
    """Whether each latent fires on any of the images, `(s,)`."""
    activity: list[Float64[Tensor, " _latents"]]
    """Mean activation of each latent, times the norm of its direction, `(s,)`."""

    def order(self, by: Sequence[Float64[Tensor, " _latents"]]) -> list[tuple[int, int]]:
        """Return the hookpoint and index of every latent, by falling size of a value."""
        values = torch.cat([one.abs() for one in by])
        bounds = np.cumsum([0, *(len(one) for one in by)])
        flat = values.argsort(descending=True, stable=True).numpy()
        level = np.searchsorted(bounds, flat, side="right") - 1
        return list(zip(level.tolist(), (flat - bounds[level]).tolist(), strict=True))


def _rank(first: Subject, levels: Sequence[Level], score: Score, images: Sequence[int]) -> _Ranked:
    effects = [MeanEffects(level.sae.n_latents) for level in levels]
    sums = [torch.zeros(level.sae.n_latents, dtype=torch.float64) for level in levels]
    attributors = [Attributor(first.model, level.sae, level.tokens, level.tokens) for level in levels]
    for pixels in _iter_pixels(first, images):
        for level, attributor, mean, total in zip(levels, attributors, effects, sums, strict=True):
            found = attributor.integrated(pixels, score, N_STEPS, baseline_d=level.mean_d)
            mean.add(attributor.from_means(found, level.mean_s))
            total += found.code.by_image(found.code.entries.values).sum(0).double().cpu()
    lengths = [level.sae.W_dec.norm(dim=1).double().cpu() for level in levels]
    fires = [total > 0 for total in sums]
    return _Ranked(effects, fires, [total * length for total, length in zip(sums, lengths, strict=True)])


Kept = list[Int64[Tensor, " _latents"]]
"""Latents of a circuit at each hookpoint."""


def _split(latents: Sequence[tuple[int, int]], n_levels: int) -> Kept:
    return [torch.tensor([latent for at, latent in latents if at == level], dtype=torch.int64) for level in range(n_levels)]


def _draw_circuits(ranked: _Ranked, sizes: Sequence[int], draws: int, rng: np.random.Generator) -> list[tuple[ArmName, int, Kept]]:
    """Return the arm, the size and the latents of every circuit."""
    n_levels = len(ranked.fires)
    by_effect, by_activity = ranked.order([one.mean for one in ranked.effects]), ranked.order(ranked.activity)
    firing = [np.flatnonzero(fires.numpy()) for fires in ranked.fires]
    made: list[tuple[ArmName, int, Kept]] = []
    for size in sizes:
        circuit, active = _split(by_effect[:size], n_levels), _split(by_activity[:size], n_levels)
        for _ in range(draws):
            drawn = [torch.from_numpy(rng.permutation(live)[: len(own)]) for live, own in zip(firing, circuit, strict=True)]
            made.extend((("random", size, drawn), ("without_random", size, drawn)))
        made.extend((("circuit", size, circuit), ("without", size, circuit)))
        made.extend((("most_active", size, active), ("without_most_active", size, active)))
    return made


def _measure_circuits(
    first: Subject, levels: Sequence[Level], score: Score, images: Sequence[int], circuits: Sequence[tuple[ArmName, int, Kept]]
) -> tuple[tuple[Point, ...], float]:
    """Measure the log-odds with each circuit, and the faithfulness; returns the points and m(∅)."""
    empty = [torch.empty(0, dtype=torch.int64)] * len(levels)
    fixed = [
        [lambda tokens: tokens for _ in levels],
        [level.keep(none) for level, none in zip(levels, empty, strict=True)],
        [level.reconstruct() for level in levels],
    ]
    made = [[_replacement(level, arm, of) for level, of in zip(levels, kept, strict=True)] for arm, _, kept in circuits]
    batches = [_run(first.model, levels, pixels, score, [*fixed, *made]) for pixels in _iter_pixels(first, images)]
    plain, nothing, everything, *found = torch.cat(batches, 1).double().cpu()

    def faithful(of: Tensor) -> Interval:
        return share_of_means(of - nothing, plain - nothing)

    points = [Point("model", None, 1, float(plain.mean()), *_ends(faithful(plain)))]
    points.append(Point("all_latents", None, 1, float(everything.mean()), *_ends(faithful(everything))))
    by_arm: dict[tuple[ArmName, int], list[Tensor]] = {}
    for (arm, size, _), of in zip(circuits, found, strict=True):
        by_arm.setdefault((arm, size), []).append(of)
    for (arm, size), of in by_arm.items():
        shares, mean = [faithful(one) for one in of], float(torch.stack(of).mean())
        if arm in ("random", "without_random"):
            values = [share.value for share in shares]
            points.append(Point(arm, size, len(of), mean, sum(values) / len(values), min(values), max(values)))
        else:
            points.append(Point(arm, size, 1, mean, *_ends(shares[0])))
    return tuple(points), float(nothing.mean())


def _ends(of: Interval) -> tuple[float, float, float]:
    return of.value, of.low, of.high


def _replacement(level: Level, arm: ArmName, latents: Int64[Tensor, " latents"]) -> Replacement:
    latents = latents.to(level.mean_s.device)
    return level.remove(latents) if arm.startswith("without") else level.keep(latents)


def _run(
    model: VisionModel, levels: Sequence[Level], pixels: Tensor, score: Score, replacements: Sequence[Sequence[Replacement]]
) -> Float[Tensor, "circuits images"]:
    """Return the output of images under replacements at each hookpoint, `(circuits, b)`."""
    names, found = [level.tokens.name for level in levels], []
    width = max(point.n_tokens * point.d_model for point in (level.tokens.hookpoint for level in levels))
    at_once = max(1, VALUES // (len(pixels) * width))
    for start in range(0, len(replacements), at_once):
        some = replacements[start : start + at_once]
        now = [each[0] for each in some]
        if len(levels) == 2:
            read = model.splice(pixels, names[0], now, names[1])
            now = [_after(each[1], tokens) for each, tokens in zip(some, read, strict=True)]
        found += [score(outputs) for outputs in model.splice(pixels, names[-1], now)]
    return torch.stack(found)


def _after(replace: Replacement, read: Tensor) -> Replacement:
    """Return the replacement by given tokens, which another one has changed."""
    return lambda tokens: replace(read.to(tokens))


def _nodes(subjects: Sequence[Subject], ranked: _Ranked, n: int) -> Iterator[Node]:
    for level, latent in ranked.order([one.mean for one in ranked.effects])[:n]:
        subject, effects = subjects[level], ranked.effects[level]
        label: Mapping[str, Any] = subject.labels.get(latent, {})
        yield Node(subject.reads.name, latent, label.get("label"), float(effects.mean[latent]), float(effects.half_width[latent]))


def _find_edges(first: Subject, levels: Sequence[Level], score: Score, images: Sequence[int], nodes: Sequence[Node]) -> tuple[Edge, ...]:
    """Compute the effects of the nodes at the first hookpoint through each node at the second."""
    earlier, later = levels
    sources, targets = ([node.latent for node in nodes if node.hookpoint == level.tokens.name] for level in levels)
    attributor = Attributor(first.model, earlier.sae, earlier.tokens, earlier.tokens, later.tokens.name)
    at_later = Attributor(first.model, later.sae, later.tokens, later.tokens)
    effects, n = torch.zeros(len(sources), len(targets), dtype=torch.float64), 0
    for pixels in _iter_pixels(first, images) if sources and targets else ():
        found = at_later.integrated(pixels, score, N_STEPS, baseline_d=later.mean_d)
        slopes_bkn = found.code.maps(found.effects_n / found.code.entries.values, targets)
        code, n = attributor.encode(pixels), n + len(pixels)
        for column, target in enumerate(targets):
            through = _through(later, target, slopes_bkn[..., column])
            of_all = attributor.from_means(attributor.cheap(pixels, through, code), earlier.mean_s)
            effects[:, column] += of_all[:, sources].sum(0).double().cpu()
    edges = [
        Edge(source, target, float(effects[row, column]) / n) for row, source in enumerate(sources) for column, target in enumerate(targets)
    ]
    return tuple(sorted(edges, key=lambda edge: -abs(edge.effect)))


def _through(level: Level, latent: int, slopes_bk: Float[Tensor, "images kept"]) -> Score:
    """Return the score Σ slope · activation of a latent over kept tokens, in which the slopes are fixed."""
    index = torch.tensor([latent], device=level.sae.W_enc.device)

    def score(tokens: Tensor) -> Tensor:
        kept = level.tokens.pick(tokens).to(level.sae.W_enc)
        return (level.sae.encode_latents(kept.flatten(0, 1), index).view(kept.shape[:2]) * slopes_bk).sum(1)

    return score
