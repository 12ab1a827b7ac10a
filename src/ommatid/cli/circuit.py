"""The verb `circuit`: its options, checked before anything is loaded, and what it prints."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ommatid.cli.terminal import align, say
from ommatid.errors import ConfigError, InputError
from ommatid.show.numbers import DASH, interval

if TYPE_CHECKING:
    from ommatid.intervene.circuits import Circuit, Point

SUFFIXES = (".dot", ".csv", ".json")
"""Endings of the files that circuits are written to."""
N_EDGES = 16
"""Number of edges that are listed, the strongest first."""
_KEPT = {"circuit": "circuit alone", "random": "random latents", "most_active": "most active latents"}
_REMOVED = {"without": "all but the circuit", "without_random": "all but random ones", "without_most_active": "all but the most active"}
"""Headings of the arms."""


def circuit(
    class_name: str,
    and_sae: str | None,
    size: str,
    images: int,
    draws: int,
    shown: int,
    seed: int,
    sae: str | None,
    data: str,
    out: Path | None,
) -> None:
    """Print the circuits of a class, and write them to a file if one is named."""
    sizes = parse_sizes(size)
    if out is not None:
        if out.is_dir() or out.suffix.lower() not in SUFFIXES:
            raise InputError(f"{out}: circuits are written as {', '.join(SUFFIXES)}; name a file with one of these endings")
        from ommatid.show.pictures.page import check_place

        check_place(out, "--out")
    from ommatid.api import open_run

    later = parse_place(and_sae) if and_sae is not None else None
    with open_run(data) as run:
        found = run.circuit(class_name, later, sizes=sizes, n_images=images, draws=draws, shown=shown, seed=seed, sae=sae)
    for line in format_circuit(found):
        say(line)
    if out is not None:
        save(found, out)
        say(out)


def parse_sizes(text: str) -> list[int]:
    """Read sizes, such as `8,16,32`.

    Raises:
        ConfigError: One is not a whole number above 0, or is given twice.
    """
    words = [word.strip() for word in text.split(",")]
    if wrong := [word for word in words if not (word.isascii() and word.isdecimal() and int(word) > 0) or words.count(word) > 1]:
        raise ConfigError(f"--size {text!r}: {wrong[0]!r}; expected numbers above 0, each once, with commas between, such as 8,16,32")
    return [int(word) for word in words]


def parse_place(text: str) -> str | tuple[str, str]:
    """Read the root of a study, and the name of its SAE after a colon if it has several."""
    root, _, sae = text.rpartition(":")
    return (root, sae) if root and "/" not in sae else text


def format_circuit(found: "Circuit") -> list[str]:
    """Format faithfulness by size as a table, and list the strongest nodes and edges."""
    by = {(point.arm, point.size): point for point in found.points}
    chosen, measured = found.n_images
    plain, everything = by["model", None], by["all_latents", None]
    lines = [
        f"{found.class_name} at {' and '.join(found.hookpoints)}: log-odds {plain.log_odds:+.2f}, {found.empty:+.2f} with no latent; "
        f"{chosen} images chose the latents, and {measured} others measure them",
        f"all latents, without the SAE's error: faithfulness {_write(everything)}",
        "",
    ]
    sizes = sorted({point.size for point in found.points if point.size is not None})
    for arms in (_KEPT, _REMOVED):
        rows = [(str(size), *(_write(by[arm, size]) for arm in arms)) for size in sizes]
        lines += [*align([("latents", *arms.values()), *rows]), ""]
    rows = [(node.hookpoint, str(node.latent), node.label or DASH, f"{node.effect:+.3f} ± {node.half:.3f}") for node in found.nodes]
    lines += align([("hookpoint", "latent", "label", "effect on the log-odds"), *rows[: found.n_shown]])
    if found.edges:
        edges = [(str(edge.source), str(edge.target), f"{edge.effect:+.4f}") for edge in found.edges[:N_EDGES]]
        lines += ["", *align([("from", "to", "effect through it"), *edges])]
    if math.isnan(plain.faithfulness):
        lines += ["", "Faithfulness is undefined: the mean of all tokens gives the class as much as the images do."]
    return lines


def _write(point: "Point") -> str:
    """Write a faithfulness and its interval."""
    if math.isnan(point.faithfulness):
        return DASH
    return f"{point.faithfulness:.2f} ({interval(point.low, point.high, lambda value: f'{value:.2f}')})".replace("-", "−")


def save(found: "Circuit", path: Path) -> None:
    """Write a circuit as a graph, a table or JSON, by the ending of the file's name."""
    from ommatid.show.pictures.page import write_whole

    texts = {".dot": found.to_dot, ".json": found.to_json, ".csv": lambda: found.table().to_csv(index=False)}
    write_whole(path, texts[path.suffix.lower()]().encode(), "--out")
