"""`ommatid <verb>`: every stage, and questions to the catalogue. Heavy imports wait until a verb needs them."""

from ommatid.cli import early  # isort: skip - before all others, which load beside what it starts

import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from ommatid import __version__
from ommatid.cli.edge import at_edge
from ommatid.cli.terminal import say
from ommatid.errors import ConfigError

if TYPE_CHECKING:
    from ommatid.config import Model, Params
    from ommatid.estimate import Estimate
    from ommatid.sae.model import SAE
    from ommatid.vlm import Hookpoint


class _Verbs(typer.core.TyperGroup):
    """The verbs; what ends one is told at our own edge, and Typer tells only how the command line is written."""

    def invoke(self, ctx: typer.Context) -> Any:
        # Typer would end Ctrl-C in silence, and a pipe that breaks anywhere as if it were our output
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, OSError):
            with at_edge():
                raise


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="From a folder of images and a vision-language model to a SQL catalogue of monosemantic features.",
)

ParamsFile = Annotated[Path, typer.Option("--params", help="File with every value.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one value, such as train.k=32; repeatable.")
]
CatalogFile = Annotated[
    Path | None, typer.Option("--catalog", help="The DuckDB file to ask; default: catalog/catalog.duckdb below --data.", show_default=False)
]

Data = Annotated[str, typer.Option("--data", metavar="PATH|URL", help="Root of all artefacts, such as s3://bucket/prefix.")]

AllowRejected = Annotated[
    bool, typer.Option("--allow-rejected", help="End with status 0, not 3, where the gate rejects some SAEs and the others are published.")
]

DEFAULT_PARAMS = Path("params.yaml")
DEFAULT_DATA = "data"
REJECTED = 3
"""Exit status of a stage whose gate rejected some SAEs and passed others, which are published."""


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"ommatid {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    pass


@app.command()
def images(params: ParamsFile = DEFAULT_PARAMS, overrides: Overrides = None, data: Data = DEFAULT_DATA) -> None:
    """Read the image source into the data set."""
    _run("images", params, overrides, data)


@app.command()
def extract(params: ParamsFile = DEFAULT_PARAMS, overrides: Overrides = None, data: Data = DEFAULT_DATA) -> None:
    """Capture activations at one or several hookpoints and embed every image, or import activations from files."""
    _run("extract", params, overrides, data)


@app.command()
def train(
    params: ParamsFile = DEFAULT_PARAMS, overrides: Overrides = None, data: Data = DEFAULT_DATA, allow_rejected: AllowRejected = False
) -> None:
    """Train a sparse autoencoder on the activations, or several."""
    _run("train", params, overrides, data, allow_rejected)


@app.command()
def evaluate(
    params: ParamsFile = DEFAULT_PARAMS, overrides: Overrides = None, data: Data = DEFAULT_DATA, allow_rejected: AllowRejected = False
) -> None:
    """Measure every latent on the evaluation split."""
    _run("evaluate", params, overrides, data, allow_rejected)


@app.command()
def label(
    params: ParamsFile = DEFAULT_PARAMS, overrides: Overrides = None, data: Data = DEFAULT_DATA, allow_rejected: AllowRejected = False
) -> None:
    """Name every latent and score the names on held-out images."""
    _run("label", params, overrides, data, allow_rejected)


@app.command()
def catalog(params: ParamsFile = DEFAULT_PARAMS, overrides: Overrides = None, data: Data = DEFAULT_DATA) -> None:
    """Build the DuckDB catalogue from the artefacts."""
    _run("catalog", params, overrides, data)


@app.command()
def sources(params: ParamsFile = DEFAULT_PARAMS, overrides: Overrides = None) -> None:
    """Look at the files that params.yaml names by path: what DVC compares to tell whether a stage must run again."""
    from ommatid.config import load_params
    from ommatid.sources.stage import PLACE, write_sources
    from ommatid.store.filesystem import in_words

    found = [one for keys in write_sources(load_params(params, overrides or ())).values() for one in keys.values()]
    n_files, n_bytes = sum(one["n_files"] for one in found), sum(one["bytes"] for one in found)
    say(f"sources: {PLACE} holds what DVC compares, of {n_files} file{'s' * (n_files != 1)}, {in_words(n_bytes)}")


@app.command()
def estimate(params: ParamsFile = DEFAULT_PARAMS, overrides: Overrides = None, data: Data = DEFAULT_DATA) -> None:
    """Say what a run will take, by trials of every stage on samples: disk, minutes, memory."""
    from ommatid.cli.terminal import showing
    from ommatid.config import load_params
    from ommatid.estimate import estimate as make
    from ommatid.stage import study_params

    with showing(sys.stdout) as on_event:
        found = make(study_params("extract", load_params(params, overrides or ()), data, on_event), data, on_event)
    for line in [*_table(_estimate_rows(found)), *_estimate_notes(found)]:
        say(line)


@app.command()
def hookpoints(
    model: Annotated[
        str | None,
        typer.Argument(help="lite0, lite2, a folder, a name on the model hub, or module:PACKAGE.MODULE:FUNCTION; default: that of params."),
    ] = None,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Overrides = None,
) -> None:
    """List where in a model activations can be captured: name, tokens of an image, grid of the patches, width."""
    from ommatid.config import load_params
    from ommatid.vlm import load_model
    from ommatid.vlm.identify import identify

    wanted = identify(model) if model else _explained(load_params(params, overrides or ()))
    points = load_model(wanted, "float32", "cpu").hookpoints
    rows = [(name, _tokens(point), _grid(point), str(point.d_model)) for name, point in points.items()]
    for line in _table([("hookpoint", "tokens", "grid", "d_model"), *rows]):
        say(line)


@app.command()
def query(
    sql: Annotated[str, typer.Argument(help="One SQL statement.")],
    output: Annotated[str, typer.Option("--format", help="table, csv or json.")] = "table",
    max_rows: Annotated[int, typer.Option(help="Print at most so many rows.")] = 1000,
    timeout: Annotated[float, typer.Option(help="Seconds after which the query is stopped.")] = 30.0,
    memory: Annotated[
        int | None,
        typer.Option("--memory-limit", metavar="MB", help="Memory that it may take; default: 4096, or a quarter of the machine's."),
    ] = None,
    catalog: CatalogFile = None,
    data: Data = DEFAULT_DATA,
) -> None:
    """Ask the catalogue in SQL; it is opened read-only."""
    from ommatid.cli.query import answer

    answer(sql, _catalog_file(catalog, data), output, max_rows, timeout, sys.stdout, memory, early.child)


@app.command()
def show(
    latent: Annotated[int | None, typer.Argument(help="Index of the latent; without it, the ten best features.")] = None,
    sae: Annotated[str | None, typer.Option(metavar="NAME", help="Which SAE; default: the highest mean MS above its floor.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="All SAEs beside one another instead.")] = False,
    to: Annotated[
        Path | None, typer.Option(help="The PNG to write; default latent-<n>.png, best.png or comparison.png in pictures below --data.")
    ] = None,
    catalog: CatalogFile = None,
    data: Data = DEFAULT_DATA,
) -> None:
    """Write a picture of a feature: examples by decile with heat maps, its label and its numbers; or of several SAEs."""
    from ommatid.catalog.reader import Catalog
    from ommatid.show.pictures import draw_best, draw_comparison, draw_feature

    if compare and (latent is not None or sae is not None):
        raise ConfigError("show --compare draws all SAEs: give it no latent and no --sae")
    name = "comparison.png" if compare else "best.png" if latent is None else f"latent-{latent}.png"
    file = _catalog_file(catalog, data)
    path = to or _beside(file, data) / "pictures" / name
    with Catalog(file) as opened:
        if compare:
            draw_comparison(opened, path)
        elif latent is None:
            draw_best(opened, path, sae=sae)
        else:
            draw_feature(opened, latent, path, sae)
    say(path)


@app.command()
def report(
    sae: Annotated[str | None, typer.Option(metavar="NAME", help="Which SAE; default: the highest mean MS above its floor.")] = None,
    to: Annotated[Path | None, typer.Option(help="The HTML file to write; default report.html below --data.")] = None,
    catalog: CatalogFile = None,
    data: Data = DEFAULT_DATA,
) -> None:
    """Write what was found as one page that needs no network: numbers beside their controls, plots, best and worst features."""
    from ommatid.catalog.reader import Catalog
    from ommatid.show.report import write_report

    file = _catalog_file(catalog, data)
    path = to or _beside(file, data) / "report.html"
    with Catalog(file) as opened:
        write_report(opened, path, sae)
    say(path)


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="Folder or file of an SAE of another library.")],
    format_name: Annotated[str | None, typer.Option("--format", help="Default: found by the files.")] = None,
    hookpoint: Annotated[str | None, typer.Option(help="Where its activations were captured, where the files don't say.")] = None,
    model: Annotated[str | None, typer.Option(help="The model that it explains, where the files don't say.")] = None,
    target: Annotated[str | None, typer.Option(help="The hookpoint that a transcoder decodes, where the files don't say.")] = None,
    values: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="What else the files don't say, such as k=32; repeatable.")
    ] = None,
    to: Annotated[Path, typer.Option(help="Folder to write sae.safetensors and cfg.json into.")] = Path("data/imported"),
) -> None:
    """Read an SAE of SAELens, dictionary_learning, sparsify, saev, sae-for-vlm or overcomplete."""
    from ommatid.sae.interop import FORMATS, Told, find_format, import_sae, write_own

    name = format_name or find_format(path)
    if format_name is None:
        say(f"found {name} ({FORMATS[name].FILES})")
    sae = import_sae(path, Told(hookpoint, model, target, _as_mapping(values or [])), name)
    write_own(sae, to)
    say(f"import: {to} holds {_describe(sae)}")
    if not sae.config.k:
        say("k: the files don't say how many latents fire a token; say it with --set k=N: the untrained control of evaluate needs it")


@app.command()
def export(
    to: Annotated[str, typer.Option(help="saelens, dictionary_learning, sparsify, saev, sae_for_vlm or overcomplete.")],
    out: Annotated[Path, typer.Option(help="Folder to write into.")],
    sae: Annotated[Path | None, typer.Option(help="Folder with sae.safetensors and cfg.json; default: sae below --data.")] = None,
    data: Data = DEFAULT_DATA,
) -> None:
    """Write an SAE so that another library's own loader opens it."""
    from ommatid.sae.interop import export_sae, is_own, load_own
    from ommatid.store import checked_folder

    folder = sae or _trained(data)
    loaded = load_own(checked_folder(folder, "sae") if is_own(folder) else folder)
    export_sae(loaded, to, out)
    say(f"export: {out} holds {_describe(loaded)} as {to}: {', '.join(sorted(file.name for file in out.iterdir()))}")


def _catalog_file(given: Path | None, data: str) -> Path:
    """The DuckDB file of a study, on this machine."""
    if given is not None and data != DEFAULT_DATA:
        raise ConfigError(f"--catalog {given} and --data {data} are both given; name the catalogue by one of them")
    if given is None and "://" in data:
        from ommatid.stage import open_stage

        return open_stage("catalog", data=data).file("catalog.duckdb")
    return given or Path(data) / "catalog" / "catalog.duckdb"


def _beside(catalog: Path, data: str) -> Path:
    """Where pictures and reports of a catalogue go: the root of its study."""
    if "://" in data:
        raise ConfigError(f"{data} is not on this machine: say with --to FILE where to write")
    return catalog.parent.parent if catalog.parent.name == "catalog" else catalog.parent


def _trained(data: str) -> Path:
    """The folder of what was trained, on this machine; of a single SAE that of the SAE itself in an object store."""
    if "://" not in data:
        return Path(data) / "sae"
    from ommatid.stage import open_stage

    saes = open_stage("train", data=data).each()
    if len(saes) > 1:
        raise ConfigError(
            f"{data}/sae holds {len(saes)} SAEs ({', '.join(saes)}): copy one to this machine, and name its folder with --sae"
        )
    (one,) = saes.values()
    return one.path


def _as_mapping(values: list[str]) -> dict[str, str]:
    if odd := [value for value in values if "=" not in value]:
        raise ConfigError(f"--set {odd[0]!r}: expected KEY=VALUE, such as k=32")
    return dict(value.split("=", 1) for value in values)


def _describe(sae: "SAE") -> str:
    """Such as "standard (threshold), 768 -> 16384, of vision.blocks.11 of clip"."""
    config = sae.config
    target = f", decoding {config.target}" if config.target else ""
    k = f", k {config.k}" if config.k else ""
    return f"{config.variant} ({config.activation}), {config.d_model} -> {config.d_sae}{k}, of {config.hookpoint} of {config.model}{target}"


def _explained(params: "Params") -> "Model":
    if params.extract.source == "files":
        raise ConfigError("extract.source: files come from a model that is not here; name a MODEL to list its hookpoints")
    return params.extract.model


def _tokens(point: "Hookpoint") -> str:
    """Kinds and counts: "1 cls, 4 register, 256 patch"."""
    kinds = Counter(point.special)
    kinds["patch"] += point.n_tokens - len(point.special)
    return ", ".join(f"{n} {kind}" for kind, n in kinds.items() if n)


def _grid(point: "Hookpoint") -> str:
    return f"{point.grid[0]} x {point.grid[1]}" if point.grid else "-"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _estimate_rows(found: "Estimate") -> list[tuple[str, ...]]:
    from ommatid.store.filesystem import in_words

    rows = [("stage", "disk", "minutes", "memory", "by trials on")]
    for stage in found.stages:
        seconds, peak = (stage.seconds, stage.peak) if stage.sizes else (None, None)
        by = f"{' and '.join(map(str, {stage.sizes[0]: 0, stage.sizes[-1]: 0}))} images" if stage.sizes else "there already: used as it is"
        minutes, memory = "-" if seconds is None else f"{seconds / 60:.1f}", "-" if peak is None else in_words(peak)
        rows.append((stage.stage, in_words(stage.bytes), minutes, memory, by))
    return [*rows, ("total", in_words(found.bytes), f"{found.seconds / 60:.1f}", in_words(found.peak), f"of {found.n_images} images")]


def _estimate_notes(found: "Estimate") -> list[str]:
    from ommatid.store.filesystem import in_words

    lines = [f"estimated in {found.took / 60:.1f} minutes"]
    if found.untried:
        lines.append(f"label: what {' and '.join(found.untried)} will take is not in it: no model is asked before the run")
    if found.free is not None:
        verdict = "it fits" if found.missing <= found.free else "IT DOES NOT FIT: free some, or lower images.limit or extract.sample"
        more = in_words(found.while_running)
        lines.append(
            f"disk: {in_words(found.missing)} needed ({more} of it only while a stage runs), {in_words(found.free)} free: {verdict}"
        )
    return lines


def _run(name: str, params_file: Path, overrides: list[str] | None, data: str, allow_rejected: bool = False) -> None:
    from ommatid.config import load_params

    params = load_params(params_file, overrides or ())
    from ommatid.executors.workers import WAITING

    for key, value in WAITING.items():
        os.environ.setdefault(key, value)
    if name == "train" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        has_rejected = _train_together(params, data)
    else:
        has_rejected = _run_here(name, params, data)
    if has_rejected and not allow_rejected:
        raise typer.Exit(REJECTED)


def _run_here(name: str, params: "Params", data: str) -> bool:
    """Run a stage; gives whether its gate rejected some SAEs."""
    from ommatid.cli.terminal import showing
    from ommatid.stage import run_stage, study_params

    with showing(sys.stdout, len(params.train.each()) > 1) as on_event:
        artefact = run_stage(name, study_params(name, params, data, on_event), on_event, data)
    rejected = f"; {len(artefact.rejected)} rejected: {', '.join(artefact.rejected)}" if artefact.rejected else ""
    say(f"{name}: {artefact.url} holds {_sizes(artefact)}{rejected}")
    return bool(artefact.rejected)


def _train_together(params: "Params", data: str) -> bool:
    """One of the processes that `torchrun --nproc-per-node N -m ommatid train` starts; the first does and gives what a single one would."""
    from ommatid.sae import distributed
    from ommatid.stage import follow_training, study_params

    with distributed.joined():
        if distributed.mine():
            follow_training(study_params("train", params, data), data)
            return False
        return _run_here("train", params, data)


def _sizes(artefact: "object") -> str:
    from ommatid.store import Artefact
    from ommatid.store.filesystem import in_words

    assert isinstance(artefact, Artefact)
    inside = list(artefact.each().values())
    rows: Counter[str] = Counter()
    for one in inside or [artefact]:
        rows.update({table: one.rows(table) for table in one.tables})
    of = [f"{len(inside)} {'hookpoints' if artefact.manifest.kind == 'extraction' else 'SAEs'}"] if len(inside) > 1 else []
    counts = [f"{n} {table}" for table, n in rows.items()]
    return ", ".join([*of, *counts, in_words(sum(f.bytes for one in [artefact, *inside] for f in one.manifest.files))])


def main() -> None:
    """Run a verb; see `at_edge` for how errors end it."""
    with at_edge():
        try:
            app()
        finally:
            early.end()
