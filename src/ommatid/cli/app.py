"""The verbs of `ommatid`: one for each stage, and others that prepare runs, read their results or convert SAEs.

Heavy libraries are imported inside the verbs that need them, so that every other verb starts quickly.
"""

from ommatid.cli import query_process  # isort: skip - first, so that the process it starts loads while the other imports run

import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from ommatid import __version__
from ommatid.cli.error_boundary import at_edge
from ommatid.cli.terminal import align, say, showing
from ommatid.errors import ConfigError

if TYPE_CHECKING:
    from ommatid.config import Model, Params
    from ommatid.sae.model import SAE
    from ommatid.vlm import Hookpoint


class _Verbs(typer.core.TyperGroup):
    """The group of verbs; it leaves interrupts and broken pipes to `at_edge` instead of to Typer."""

    def invoke(self, ctx: typer.Context) -> Any:
        # Typer exits silently on Ctrl-C, and takes any broken pipe for one of our own output
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

ParamsFile = Annotated[Path, typer.Option("--params", help="Path of the params file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one value, such as train.k=32; repeatable.")
]
CatalogFile = Annotated[
    Path | None,
    typer.Option("--catalog", help="The catalogue's DuckDB file; default: catalog/catalog.duckdb under --data.", show_default=False),
]

Data = Annotated[str, typer.Option("--data", metavar="PATH|URL", help="Root of all artefacts, such as s3://bucket/prefix.")]

AllowRejected = Annotated[
    bool, typer.Option("--allow-rejected", help="Exit with status 0 instead of 3 if the gate rejects some SAEs and publishes the rest.")
]

SaeName = Annotated[
    str | None, typer.Option(metavar="NAME", help="Name of the SAE; default: the one with the highest mean MS above its floor.")
]

DEFAULT_PARAMS = Path("params.yaml")
DEFAULT_DATA = "data"


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
    """Read the images from their source into the data set."""
    _run("images", params, overrides, data)


@app.command()
def extract(params: ParamsFile = DEFAULT_PARAMS, overrides: Overrides = None, data: Data = DEFAULT_DATA) -> None:
    """Capture activations at one or several hookpoints and embed every image, or import activations from files."""
    _run("extract", params, overrides, data)


@app.command()
def train(
    params: ParamsFile = DEFAULT_PARAMS, overrides: Overrides = None, data: Data = DEFAULT_DATA, allow_rejected: AllowRejected = False
) -> None:
    """Train one or several sparse autoencoders on the activations."""
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
    """Label every latent and score the labels on held-out images."""
    _run("label", params, overrides, data, allow_rejected)


@app.command()
def intervene(
    params: ParamsFile = DEFAULT_PARAMS, overrides: Overrides = None, data: Data = DEFAULT_DATA, allow_rejected: AllowRejected = False
) -> None:
    """Set latents to chosen activations and measure what the model's output does then, beside controls."""
    _run("intervene", params, overrides, data, allow_rejected)


@app.command()
def catalog(params: ParamsFile = DEFAULT_PARAMS, overrides: Overrides = None, data: Data = DEFAULT_DATA) -> None:
    """Build the DuckDB catalogue from the artefacts."""
    _run("catalog", params, overrides, data)


@app.command()
def sources(params: ParamsFile = DEFAULT_PARAMS, overrides: Overrides = None) -> None:
    """Record the state of the files that params.yaml names by path, and of each stage's code, so that DVC notices when one changes."""
    from ommatid.config import load_params
    from ommatid.sources.changes import explain_changes
    from ommatid.sources.stage import PLACE, write_sources
    from ommatid.store.filesystem import in_words

    values = load_params(params, overrides or ())
    if values.train.init:
        from ommatid.publish.champion import resolve_start

        values = resolve_start(values)
    entries = [entry for keys in write_sources(values).values() for entry in keys.values()]
    # of a log of reviews only the names are recorded, not its size
    n_files, n_bytes = sum(entry.get("n_files", 1) for entry in entries), sum(entry.get("bytes", 0) for entry in entries)
    say(f"sources: recorded the state of {n_files} file{'s' * (n_files != 1)}, {in_words(n_bytes)}, in {PLACE}")
    for stage, changes in explain_changes().items():
        say(f"sources: {stage}: changed since its last run: {changes}")


@app.command()
def backfill(params: ParamsFile = DEFAULT_PARAMS, overrides: Overrides = None) -> None:
    """Measure all past SAEs that are kept under the present params, and write a catalogue that compares them; only what is new is computed.

    Run it after a judge, a labeller or a metric was added. Past SAEs are the champions that are kept, and those of the checkout.
    """
    from ommatid.backfill.measure import backfill as measure
    from ommatid.cli.terminal import showing
    from ommatid.config import load_params

    with showing(sys.stdout) as on_event:
        made = measure(load_params(params, overrides or ()), on_event)
    say(f"backfill: {made.summary}")
    say(f'ommatid query --catalog {made.catalog} "SELECT sae, decided_at, ms, ms_floor, label_score FROM runs"')


@app.command()
def estimate(params: ParamsFile = DEFAULT_PARAMS, overrides: Overrides = None, data: Data = DEFAULT_DATA) -> None:
    """Estimate the disk space, time and memory of a run from trials of every stage on samples."""
    from ommatid.cli.estimate import format_estimate
    from ommatid.cli.terminal import showing
    from ommatid.config import load_params
    from ommatid.estimate import estimate as make_estimate
    from ommatid.pipeline.inputs import study_params

    with showing(sys.stdout) as on_event:
        made = make_estimate(study_params("extract", load_params(params, overrides or ()), data, on_event), data, on_event)
    for line in format_estimate(made):
        say(line)


@app.command()
def hookpoints(
    model: Annotated[
        str | None,
        typer.Argument(help="lite0, lite2, a folder, a name on the model hub, or module:PACKAGE.MODULE:FUNCTION; default: extract.model."),
    ] = None,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Overrides = None,
) -> None:
    """List a model's hookpoints: name, tokens per image, grid of the patches and width."""
    from ommatid.config import load_params
    from ommatid.vlm import load_model
    from ommatid.vlm.identify import identify

    config = identify(model) if model else _explained_model(load_params(params, overrides or ()))
    points = load_model(config, "float32", "cpu").hookpoints
    rows = [(name, _format_tokens(point), _format_grid(point), str(point.d_model)) for name, point in points.items()]
    for line in align([("hookpoint", "tokens", "grid", "d_model"), *rows]):
        say(line)


@app.command()
def query(
    sql: Annotated[str, typer.Argument(help="One SQL statement.")],
    output: Annotated[str, typer.Option("--format", help="table, csv or json.")] = "table",
    max_rows: Annotated[int, typer.Option(help="Maximum number of rows to print.")] = 1000,
    timeout: Annotated[float, typer.Option(help="Seconds after which the query is stopped.")] = 30.0,
    memory: Annotated[
        int | None,
        typer.Option(
            "--memory-limit", metavar="MB", help="Memory limit of the query; default: 4096 or, if less, a quarter of the machine's."
        ),
    ] = None,
    catalog: CatalogFile = None,
    data: Data = DEFAULT_DATA,
) -> None:
    """Query the catalogue in SQL. The file is opened read-only."""
    from ommatid.cli.query import answer

    answer(sql, _catalog_file(catalog, data), output, max_rows, timeout, sys.stdout, memory, query_process.child)


@app.command()
def show(
    latent: Annotated[int | None, typer.Argument(help="Index of the latent; without it, the ten best features are drawn.")] = None,
    sae: SaeName = None,
    compare: Annotated[bool, typer.Option("--compare", help="Draw a comparison of all SAEs instead of features.")] = False,
    to: Annotated[
        Path | None,
        typer.Option(help="The PNG file to write; default: latent-<n>.png, best.png or comparison.png in pictures under --data."),
    ] = None,
    catalog: CatalogFile = None,
    data: Data = DEFAULT_DATA,
) -> None:
    """Draw a feature with its label, numbers and examples by decile, the best features, or a comparison of all SAEs."""
    from ommatid.catalog.reader import Catalog
    from ommatid.show.pictures import draw_best, draw_comparison, draw_feature

    if compare and (latent is not None or sae is not None):
        raise ConfigError("show --compare draws all SAEs: leave out the latent and --sae")
    name = "comparison.png" if compare else "best.png" if latent is None else f"latent-{latent}.png"
    file = _catalog_file(catalog, data)
    path = to or _output_root(file, data) / "pictures" / name
    with Catalog(file) as opened:
        if compare:
            draw_comparison(opened, path)
        elif latent is None:
            draw_best(opened, path, sae=sae)
        else:
            draw_feature(opened, latent, path, sae)
    say(path)


Photos = Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="Image files.")]
OwnSae = Annotated[str | None, typer.Option("--sae", metavar="NAME", help="Name of the SAE; default: the study's only one.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of what is drawn at random.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write a picture (.png) or the whole table (.csv, .json) as well.")]


@app.command()
def steer(
    photos: Photos,
    latent: Annotated[list[int], typer.Option("--latent", help="Index of a latent to edit; repeatable.")],
    dose: Annotated[str, typer.Option(metavar="N,N,...", help="Activations to set, as multiples of the 99th percentile.")] = "0,0.5,1,2",
    absolute: Annotated[bool, typer.Option("--absolute", help="Doses are activations, not multiples.")] = False,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="A text to compare the output with; repeatable. Default: the classes of the images.")
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(metavar="TEXT|FILE.txt", help="Ask the whole LLaVA or Qwen-VL this about each photograph, and print its answers."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens in an answer.")] = 5,
    tokens: Annotated[str, typer.Option(help="Tokens to edit: all, firing (those on which it fires) or cls.")] = "all",
    patches: Annotated[
        str | None,
        typer.Option(metavar="'R,C R,C'|MASK", help="Edit only these patches: rows and columns, or a picture that marks them in white."),
    ] = None,
    error: Annotated[str, typer.Option(help="keep or drop what the SAE does not explain of the activations.")] = "keep",
    draws: Annotated[int, typer.Option(min=1, help="Number of draws of each random control.")] = 8,
    seed: Seed = 0,
    sae: OwnSae = None,
    data: Data = DEFAULT_DATA,
    out: Out = None,
) -> None:
    """Set latents to chosen activations on photographs, and print what the model's output does then, beside every control."""
    from ommatid.cli.interventions import steer as run

    asked = None if question is None else (question, max_new_tokens)
    run(photos, latent, dose, absolute, text, asked, tokens, patches, error, draws, seed, sae, data, out)


@app.command()
def attribute(
    photos: Photos,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="The output: the similarity to this text; given twice, to the first against the second."),
    ] = None,
    class_name: Annotated[str | None, typer.Option("--class", metavar="NAME", help="The output: the log-odds of a class.")] = None,
    latent_of: Annotated[
        str | None, typer.Option(metavar="DATA[:SAE]:LATENT", help="The output: a latent at a later hookpoint, of the study at DATA.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="cheap (one gradient), integrated (ten) or exact (ablates every latent that fires).")
    ] = "cheap",
    top: Annotated[int, typer.Option(min=1, help="Number of the strongest latents to list and to ablate.")] = 16,
    seed: Seed = 0,
    sae: OwnSae = None,
    data: Data = DEFAULT_DATA,
    out: Out = None,
) -> None:
    """List the latents that an output of the model on photographs comes from, and where in the image they have their effect."""
    from ommatid.cli.interventions import attribute as run

    run(photos, text, class_name, latent_of, method, top, seed, sae, data, out)


@app.command()
def circuit(
    class_name: Annotated[str, typer.Argument(metavar="CLASS", help="A class of the study's images.")],
    and_sae: Annotated[
        str | None, typer.Option(metavar="DATA[:SAE]", help="A study with an SAE at a later hookpoint, for latents and edges there.")
    ] = None,
    size: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of latents.")] = "4,8,16,32,64,128",
    images: Annotated[int, typer.Option(min=1, help="Largest number of images of the class.")] = 96,
    draws: Annotated[int, typer.Option(min=2, help="Number of random circuits of each size.")] = 20,
    shown: Annotated[int, typer.Option(min=1, help="Number of latents to list, and of those in the graph.")] = 16,
    seed: Seed = 0,
    sae: OwnSae = None,
    data: Data = DEFAULT_DATA,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the graph (.dot), the table (.csv) or everything (.json) as well.")
    ] = None,
) -> None:
    """Find the latents on which the model's answer for a class rests, and what they alone give of it, beside random ones."""
    from ommatid.cli.circuit import circuit as run

    run(class_name, and_sae, size, images, draws, shown, seed, sae, data, out)


@app.command()
def audit(
    name: Annotated[str | None, typer.Option("--class", metavar="NAME", help="Class whose features are listed; default: all.")] = None,
    sae: SaeName = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of features to describe, the suspects first.")] = 10,
    catalog: CatalogFile = None,
    data: Data = DEFAULT_DATA,
) -> None:
    """List features that go with a class for the wrong reason, and what the model does without them."""
    from ommatid.cli.audit import iter_lines

    for line in iter_lines(_catalog_file(catalog, data), name, sae, limit):
        say(line)


@app.command()
def report(
    sae: SaeName = None,
    to: Annotated[Path | None, typer.Option(help="The HTML file to write; default: report.html under --data.")] = None,
    catalog: CatalogFile = None,
    data: Data = DEFAULT_DATA,
) -> None:
    """Write a report of the results as one HTML page that needs no network: numbers with their controls, plots, best and worst features."""
    from ommatid.catalog.reader import Catalog
    from ommatid.show.report import write_report

    file = _catalog_file(catalog, data)
    path = to or _output_root(file, data) / "report.html"
    with Catalog(file) as opened:
        write_report(opened, path, sae)
    say(path)


@app.command()
def serve(
    published: Annotated[bool, typer.Option("--published", help="Serve the champion's catalogue, and follow each promotion.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on; any but this machine's own needs OMMATID_TOKEN.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8321,
    read_only: Annotated[bool, typer.Option("--read-only", help="Show reviews, but accept none.")] = False,
    catalog: CatalogFile = None,
    data: Data = DEFAULT_DATA,
) -> None:
    """Serve the explorer: pages on which people look at the features, search, compare and review them."""
    from ommatid.explorer.app import serve as run
    from ommatid.explorer.web import Settings

    if published and (catalog is not None or data != DEFAULT_DATA):
        raise ConfigError("--published names the champion's catalogue in data/published: leave out --catalog and --data")
    file = Path("data/published/catalog.duckdb") if published else _catalog_file(catalog, data)
    if catalog is not None and catalog.absolute().parent.name == "catalog":
        data = str(catalog.absolute().parent.parent)  # the study that the catalogue lies in, for pictures and the model
    token = os.environ.get("OMMATID_TOKEN") or None
    run(Settings(file, data, published, read_only, host, port, token))


@app.command()
def gc(
    names: Annotated[list[str] | None, typer.Argument(metavar="[CACHE]...", help="Names of caches; default: all.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what the caches hold and what would be removed.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Remove all entries of these caches.")] = False,
    data: Data = DEFAULT_DATA,
) -> None:
    """List the caches, and remove what is beyond their bounds, was not used for long, or was left by runs that ended early."""
    from ommatid.cli.gc import clean

    for line in clean(Path("data" if "://" in data else data), dry_run, everything, names or ()):
        say(line)


@app.command()
def drift(
    limit: Annotated[int, typer.Option(min=1, help="Number of latents to list, those with the strongest evidence first.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Overrides = None,
) -> None:
    """Compare new images with those of the champion, and list the latents that fire differently on them."""
    from ommatid.cli.drift import run

    run(params, overrides or [], limit, as_json)


champion = typer.Typer(no_args_is_help=True, help="Show the published SAEs of this checkout; promote one by hand, or return to one.")
app.add_typer(champion, name="champion")

Why = Annotated[str | None, typer.Option(metavar="TEXT", help="Why, for the log.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@champion.command("list")
def list_champions(as_json: AsJson = False) -> None:
    """List every decision, the newest first: champions, challengers that did not win, promotions by hand and rollbacks."""
    from ommatid.cli.champion import print_list

    print_list(as_json)


@champion.command("show")
def show_champion(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[KEY|SAE]", help="A champion's key, the beginning of it, or its name; default: the present one."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a champion: its scores, by what it won, which features it kept, where it comes from, and what was decided about it."""
    from ommatid.cli.champion import show as run

    run(name, as_json)


@champion.command()
def promote(
    name: Annotated[str, typer.Argument(metavar="SAE|KEY", help="An SAE of the checkout's catalogue, or a former champion that is kept.")],
    why: Why = None,
    params: ParamsFile = DEFAULT_PARAMS,
) -> None:
    """Make an SAE the champion, whatever a comparison says; the published catalogue and the alias in the registry follow."""
    from ommatid.cli.champion import promote as run

    run(name, why, params)


@champion.command()
def rollback(
    to: Annotated[str | None, typer.Option(metavar="KEY|SAE", help="A former champion; default: the one before the present.")] = None,
    why: Why = None,
    params: ParamsFile = DEFAULT_PARAMS,
) -> None:
    """Return to a former champion: the log, the published catalogue and the alias. What is rolled back does not win again by itself."""
    from ommatid.cli.champion import roll_back

    roll_back(to, why, params)


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="Folder or file that another library saved the SAE in.")],
    format_name: Annotated[str | None, typer.Option("--format", help="Name of the library; default: recognised from the files.")] = None,
    hookpoint: Annotated[str | None, typer.Option(help="Hookpoint that the SAE encodes, if the files do not name it.")] = None,
    model: Annotated[str | None, typer.Option(help="Model that the SAE explains, if the files do not name it.")] = None,
    target: Annotated[str | None, typer.Option(help="Hookpoint that a transcoder decodes, if the files do not name it.")] = None,
    values: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another value that the files lack, such as k=32; repeatable."),
    ] = None,
    to: Annotated[Path, typer.Option(help="Folder to write sae.safetensors and cfg.json to.")] = Path("data/imported"),
) -> None:
    """Import an SAE from SAELens, dictionary_learning, sparsify, saev, sae-for-vlm or overcomplete."""
    from ommatid.sae.interop import FORMATS, Overrides, find_format, import_sae, write_native

    name = format_name or find_format(path)
    if format_name is None:
        say(f"recognised {name} ({FORMATS[name].FILES})")
    sae = import_sae(path, Overrides(hookpoint, model, target, _as_mapping(values or [])), name)
    write_native(sae, to)
    say(f"import: {to} holds {_describe(sae)}")
    if not sae.config.k:
        say("k: the files do not say how many latents fire; set it with --set k=N, as evaluate needs it for its untrained control")


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    what: Annotated[str | None, typer.Argument(metavar="[site]", help="site: the explorer's pages as files. Without it, an SAE.")] = None,
    to: Annotated[
        str | None, typer.Option(help="Format of the SAE: saelens, dictionary_learning, sparsify, saev, sae_for_vlm or overcomplete.")
    ] = None,
    sae: Annotated[
        str | None,
        typer.Option(help="Folder with sae.safetensors and cfg.json; default: the only SAE under --data. For site: a name; default: all."),
    ] = None,
    latents: Annotated[str | None, typer.Option(metavar="N,N,...", help="Latents that site copies; default: all that fire.")] = None,
    most: Annotated[
        int | None, typer.Option(min=1, help="Number of features that site copies, those with the highest MS above its floor.")
    ] = None,
    catalog: CatalogFile = None,
    data: Data = DEFAULT_DATA,
) -> None:
    """Export an SAE in the format of another library, or `site`: a static copy of the explorer that opens without a server."""
    if what not in (None, "site"):
        raise ConfigError(f"export {what!r}: expected site, or no name to export an SAE with --to FORMAT")
    if what == "site":
        if to is not None:
            raise ConfigError("--to names the format of an SAE, and export site writes pages: leave out one of them")
        _export_site(out, sae, latents, most, _catalog_file(catalog, data), data)
        return
    named = {"--latents": latents, "--most": most, "--catalog": catalog}
    if given := [option for option, value in named.items() if value is not None]:
        raise ConfigError(f"{given[0]} belongs to `ommatid export site`; leave it out to export an SAE")
    if to is None:
        raise ConfigError("export needs --to FORMAT: saelens, dictionary_learning, sparsify, saev, sae_for_vlm or overcomplete")
    from ommatid.sae.interop import export_sae, is_native, load_native
    from ommatid.store import checked_folder

    folder = Path(sae) if sae else _trained_sae(data)
    loaded = load_native(checked_folder(folder, "sae") if is_native(folder) else folder)
    export_sae(loaded, to, out)
    say(f"export: {out} holds {_describe(loaded)} as {to}: {', '.join(sorted(file.name for file in out.iterdir()))}")


def _export_site(out: Path, sae: str | None, latents: str | None, most: int | None, catalog: Path, data: str) -> None:
    from ommatid.explorer.site import write_site
    from ommatid.store.filesystem import in_words

    if latents is not None and most is not None:
        raise ConfigError("--latents and --most both choose features; leave out one of them")
    chosen = None
    if latents is not None:
        numbers = [number.strip() for number in latents.split(",")]
        if wrong := [number for number in numbers if not (number.isascii() and number.isdecimal())]:
            raise ConfigError(f"--latents: got {wrong[0]!r}; expected numbers with commas between them, such as 1,5,9")
        chosen = [int(number) for number in numbers]
    with showing(sys.stdout) as on_event:
        site = write_site(catalog, out, data, sae, chosen, most, on_event)
    counts = f"{site.n_features} features, {site.n_pages} pages and {site.n_pictures} pictures, {in_words(site.n_bytes)}"
    say(f"export: {out} holds {counts}; open {(out / 'index.html').absolute().as_uri()}")


def _run(name: str, params_file: Path, overrides: list[str] | None, data: str, allow_rejected: bool = False) -> None:
    from ommatid.cli.stage import run

    status = run(name, params_file, overrides or (), data, allow_rejected)
    if status:
        raise typer.Exit(status)


def _catalog_file(catalog: Path | None, data: str) -> Path:
    """Path of a study's catalogue, fetched first if the study is in an object store."""
    if catalog is not None and data != DEFAULT_DATA:
        raise ConfigError(f"--catalog {catalog} and --data {data} are both given; name the catalogue by one of them")
    if catalog is None and "://" in data:
        from ommatid.pipeline import open_stage

        return open_stage("catalog", data=data).file("catalog.duckdb")
    return catalog or Path(data) / "catalog" / "catalog.duckdb"


def _output_root(catalog: Path, data: str) -> Path:
    """Root of the study, where pictures and reports of its catalogue are written."""
    if "://" in data:
        raise ConfigError(f"{data} is not on this machine: name the file to write with --to FILE")
    return catalog.parent.parent if catalog.parent.name == "catalog" else catalog.parent


def _trained_sae(data: str) -> Path:
    """Folder of the study's SAE, fetched first if the study is in an object store."""
    from ommatid.pipeline import open_stage

    saes = open_stage("train", data=data).each()
    if len(saes) != 1:
        remedy = "copy one to this machine, and name its folder with --sae" if "://" in data else "name the folder of one with --sae"
        raise ConfigError(f"{data}/sae holds {len(saes)} SAEs ({', '.join(saes) or 'all were rejected'}): {remedy}")
    (sae,) = saes.values()
    return sae.path


def _as_mapping(values: list[str]) -> dict[str, str]:
    if malformed := [value for value in values if "=" not in value]:
        raise ConfigError(f"--set {malformed[0]!r}: expected KEY=VALUE, such as k=32")
    return dict(value.split("=", 1) for value in values)


def _describe(sae: "SAE") -> str:
    """Describe an SAE on one line, such as "standard (threshold), 768 -> 16384, of vision.blocks.11 of clip"."""
    config = sae.config
    target = f", decoding {config.target}" if config.target else ""
    k = f", k {config.k}" if config.k else ""
    return f"{config.variant} ({config.activation}), {config.d_model} -> {config.d_sae}{k}, of {config.hookpoint} of {config.model}{target}"


def _explained_model(params: "Params") -> "Model":
    if params.extract.source == "files":
        raise ConfigError(
            "extract.source is files: the model that the activations come from is not known; name a MODEL to list its hookpoints"
        )
    return params.extract.model


def _format_tokens(point: "Hookpoint") -> str:
    """Number of tokens of each kind, such as "1 cls, 4 register, 256 patch"."""
    kinds = Counter(point.special)
    kinds["patch"] += point.n_tokens - len(point.special)
    return ", ".join(f"{n} {kind}" for kind, n in kinds.items() if n)


def _format_grid(point: "Hookpoint") -> str:
    return f"{point.grid[0]} x {point.grid[1]}" if point.grid else "-"


def main() -> None:
    """Run a verb; see `at_edge` for how errors end it."""
    with at_edge():
        try:
            app()
        finally:
            query_process.end()
