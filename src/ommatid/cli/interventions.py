"""The verbs `steer` and `attribute`: their options, checked before anything is loaded, and what they print."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ommatid.api.contributions import Contributions
from ommatid.api.interventions import Answers, Intervention
from ommatid.api.results import SUFFIXES, TABLES, check_path
from ommatid.cli.terminal import align, say
from ommatid.errors import ConfigError, InputError
from ommatid.show.numbers import DASH, percent

if TYPE_CHECKING:
    from ommatid.intervene.answers import Answered
    from ommatid.intervene.contributions import Attributed
    from ommatid.intervene.steering import Edited, Steered

N_NAMES = 5
"""Number of the highest names, before and after each dose, that are printed of an image."""
_PAIRS = re.compile(r"\s*\d+\s*,\s*\d+(\s+\d+\s*,\s*\d+)*\s*")
"""Patches as rows and columns, such as `3,4 3,5`."""
_ARMS = {
    "sign_flipped": "sign flipped",
    "random_latent": "random latents",
    "random_direction": "random directions",
    "diff_means": "diff. of means",
    "untouched": "x̂, no edit",
}
"""Heading of each control."""


def steer(
    photos: Sequence[Path],
    latents: Sequence[int],
    dose: str,
    absolute: bool,
    texts: Sequence[str] | None,
    asked: tuple[str, int] | None,
    tokens: str,
    patches: str | None,
    error: str,
    draws: int,
    seed: int,
    sae: str | None,
    data: str,
    out: Path | None,
) -> None:
    """Print what an edit of latents does to the model's output on photographs, and write it to a file if one is named.

    Args:
        photos: The photographs.
        latents: The latents that are edited together.
        dose: The doses, with commas between.
        absolute: Whether doses are activations.
        texts: Texts that the output is compared with, if there are any.
        asked: A question, and the largest number of tokens in its answer; None if the model is not to answer in words.
        tokens: Tokens that are edited.
        patches: Patches that are edited, if not all of them are.
        error: Whether the SAE's error is kept.
        draws: Number of draws of each random control.
        seed: Seed of the draws.
        sae: Name of the SAE.
        data: Root of the study.
        out: File to write.
    """
    doses, marked = parse_doses(dose), None if patches is None else parse_patches(patches)
    _check_choice("--tokens", tokens, ("all", "firing", "cls"))
    _check_choice("--error", error, ("keep", "drop"))
    if asked and texts:
        raise ConfigError("--question and --text are given: the answers of a model are not compared with texts; leave out one of them")
    if out is not None:
        _check_out(out, TABLES if asked else SUFFIXES)
    from ommatid.api import open_run

    options: dict[str, Any] = {
        "tokens": tokens, "patches": marked, "unit": "absolute" if absolute else "relative", "error": error, "draws": draws, "seed": seed,
        "sae": sae,
    }  # fmt: skip
    with open_run(data) as run:
        if asked:
            found = run.ask(photos, latents, doses, question=asked[0], max_new_tokens=asked[1], **options)
            lines = format_answers(found)
        else:
            found = run.intervene(photos, latents, doses, texts=texts or None, **options)
            lines = format_intervention(found)
    for line in lines:
        say(line)
    if out is not None:
        found.save(out)
        say(out)


def attribute(
    photos: Sequence[Path],
    texts: Sequence[str] | None,
    class_name: str | None,
    latent_of: str | None,
    method: str,
    top: int,
    seed: int,
    sae: str | None,
    data: str,
    out: Path | None,
) -> None:
    """Print which latents an output on photographs comes from, and write it to a file if one is named."""
    _check_choice("--method", method, ("cheap", "integrated", "exact"))
    later = None if latent_of is None else parse_latent(latent_of)
    given = [option for option, value in (("--text", texts), ("--class", class_name), ("--latent-of", latent_of)) if value]
    if len(given) != 1:
        said = f"{' and '.join(given)} are given" if given else "none is given"
        raise ConfigError(f"an output is one or two --text, a --class or a --latent-of, and {said}: name one")
    if texts and len(texts) > 2:
        raise ConfigError(f"--text is given {len(texts)} times; give one text, or two, of which the second is compared with the first")
    if out is not None:
        _check_out(out, SUFFIXES)
    from ommatid.api import open_run

    with open_run(data) as run:
        found = run.attribute(
            photos, texts or None, class_name=class_name, latent_of=later, method=method, top=top, seed=seed, sae=sae  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
    for line in format_contributions(found):
        say(line)
    if out is not None:
        found.save(out)
        say(out)


def _check_out(out: Path, suffixes: Sequence[str]) -> None:
    """Check that results can be written to a file, which is before they are computed."""
    from ommatid.show.pictures.page import check_place

    check_place(check_path(out, suffixes), "--out")


def parse_doses(text: str) -> list[float]:
    """Read doses, such as `0,0.5,1,2`.

    Raises:
        ConfigError: One is not a finite number, or one is given twice.
    """
    found: list[float] = []
    for word in text.split(","):
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ConfigError(
                f"--dose {text!r}: {word.strip()!r} is not a finite number; expected numbers with commas between, such as 0,0.5,1,2"
            )
        if value in found:
            raise ConfigError(f"--dose {text!r}: {value:g} is given twice; give each dose once")
        found.append(value)
    return found


def parse_patches(text: str) -> list[tuple[int, int]] | Image.Image:
    """Read patches: rows and columns, such as `3,4 3,5`, or the path of a picture that marks them in white.

    Raises:
        ConfigError: They are neither.
    """
    if not text.strip():
        raise ConfigError(f"--patches {text!r}: expected rows and columns of patches, such as '3,4 3,5', or a picture")
    if _PAIRS.fullmatch(text):
        numbers = [int(number) for number in re.findall(r"\d+", text)]
        return list(zip(numbers[::2], numbers[1::2], strict=True))
    from ommatid.api.encoding import open_image

    try:
        return open_image(text, 0)
    except InputError as problem:
        need = "expected rows and columns of patches, such as '3,4 3,5', or a picture that marks them in white"
        raise ConfigError(f"--patches {text!r}: {need}; {problem}") from None


def parse_latent(text: str) -> tuple[str, int] | tuple[str, str, int]:
    """Read a latent of another study: its root, the SAE's name if there are several, and the latent, with colons between.

    Raises:
        ConfigError: They have another form.
    """
    place, _, number = text.rpartition(":")
    if not (place and number.isascii() and number.isdecimal()):
        need = "expected the root of another study, the name of its SAE if it has several, and a latent, such as data-late:382"
        raise ConfigError(f"--latent-of {text!r}: {need}")
    root, _, sae = place.rpartition(":")
    return (root, sae, int(number)) if root and "/" not in sae else (place, int(number))


def _check_choice(option: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{option} {value!r}: expected {', '.join(allowed)}")


def format_intervention(found: Intervention) -> list[str]:
    """Format the effects of an edit as lines: for each image and dose a table of names, with every control beside them."""
    lines: list[str] = []
    for image, name in enumerate(found.images):
        lines += [f"{name}: {_fires(found.steered, image)}", ""]
        for place, dose in enumerate(found.steered.doses):
            lines += [_describe_dose(found.steered, place), *(f"  {line}" for line in align(_names(found.steered, image, dose))), ""]
    n = len(found.steered.of(found.steered.scores_abn, "random_latent", found.steered.doses[0]))
    lines += [
        f"#: rank among {len(found.names)} names; [ ]: range over {n} draws; most raised: name whose log-odds rise most, by how much",
        f"*: beyond sign flipped and every draw of both random controls, as {100 * found.steered.chance:.0f} % of rows are by chance",
    ]
    return lines + [f"warning: {warning}" for warning in found.warnings]


def format_answers(found: Answers) -> list[str]:
    """Format what a model answers as lines: for each image and dose a table of the arms."""
    answered, lines = found.answered, [f"question: {found.answered.question}", ""]
    for image, name in enumerate(found.images):
        lines += [f"{name}: {_fires(answered, image)}", f"as it is: {_quoted(answered, image, 'none', None)}"]
        if answered.places("prompt"):
            lines.append(f"with the label in the question: {_quoted(answered, image, 'prompt', None)}")
        lines.append("")
        for place, dose in enumerate(answered.doses):
            lines += [_describe_dose(answered, place), *(f"  {line}" for line in align(_answer_rows(answered, image, dose))), ""]
    lines.append("shift: divergence of the first token from that of the model as it is, in nats; [ ]: range over draws")
    if answered.words:
        lines.append(f"log-odds: change of the log-odds that the answer begins with {' or '.join(map(repr, answered.words))}")
    return lines + [f"warning: {warning}" for warning in found.warnings]


def _answer_rows(answered: "Answered", image: int, dose: float) -> list[tuple[str, ...]]:
    """Make the rows of the table of an image and a dose: an arm each."""
    values = {"shift": answered.shifts_ab, "log-odds": answered.log_odds_ab - answered.log_odds_ab[0]}
    if not answered.words:
        del values["log-odds"]
    rows: list[tuple[str, ...]] = [("arm", "answer", *values)]
    for arm, heading in {"targeted": "the edit", **_ARMS}.items():
        if places := answered.places(arm, dose):
            numbers = (_range(of[places, image].tolist(), what == "log-odds") for what, of in values.items())
            rows.append((heading, _quoted(answered, image, arm, dose), *numbers))
    return rows


def _quoted(answered: "Answered", image: int, arm: str, dose: float | None) -> str:
    """Quote the answers about an image under an arm, the most frequent of its draws first, with their numbers."""
    counts = Counter(answered.answers[place][image] for place in answered.places(arm, dose)).most_common()
    words = [f'"{answer}"' if answer else "(no answer)" for answer, _ in counts]
    return words[0] if len(words) == 1 else ", ".join(f"{word} x {n}" for word, (_, n) in zip(words, counts, strict=True))


def _range(values: Sequence[float], is_signed: bool) -> str:
    """Write a number, or the mean of several and their range."""
    form = "{:+.2f}" if is_signed else "{:.2f}"
    mean, low, high = (form.format(value + 0.0) for value in (sum(values) / len(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} [{low}, {high}]"


def _fires(steered: "Edited", image: int) -> str:
    """Say where the edited latents fire on an image."""
    words = []
    for place, (latent, label) in enumerate(zip(steered.latents, steered.labels, strict=True)):
        acts_k, scale = steered.acts_bkl[image, :, place], float(steered.scales_l[place])
        n, most = int((acts_k > 0).sum()), float(acts_k.max())
        fires = (
            f"fires on {n} of {len(acts_k)} tokens, at most {most:.3g}, {most / scale:.2f} times its 99th percentile" if n else "is silent"
        )
        words.append(f"latent {latent} {f'({label})' if label else '(no label)'} {fires}")
    return "; ".join(words)


def _describe_dose(steered: "Edited", place: int) -> str:
    """Describe a dose both ways: as an activation and in units of the latent's 99th percentile."""
    acts, relative = steered.acts_pl[place].tolist(), steered.relative_pl[place].tolist()
    words = [
        f"latent {latent} set to {act:.3g}, {times:.3g} times its 99th percentile"
        for latent, act, times in zip(steered.latents, acts, relative, strict=True)
    ]
    return f"dose {steered.doses[place]:g}: {'; '.join(words)}"


def _names(steered: "Steered", image: int, dose: float) -> list[tuple[str, ...]]:
    """Make the rows of the table of an image and a dose."""
    arms = [arm for arm in _ARMS if len(steered.of(steered.scores_abn, arm, dose))]
    rows: list[tuple[str, ...]] = [("name", "before", "after", *(_ARMS[arm] for arm in arms))]
    beyond_n = steered.beyond(image, dose)
    for name in steered.top(image, N_NAMES):
        at = steered.names.index(name)
        before, after, *controls = (_cell(steered, image, at, arm, dose) for arm in ("none", "targeted", *arms))
        rows.append((_line(name), before, f"{after} *" if beyond_n[at] else after, *controls))
    raised = steered.raised(image, dose)
    return [*rows, ("most raised", DASH, *(_most(raised[arm]) for arm in ("targeted", *arms)))]


def _cell(steered: "Steered", image: int, at: int, arm: str, dose: float) -> str:
    """Write a name's probability with its rank, or with its range over draws; with a single name, its score."""
    single = len(steered.names) == 1
    drawn = steered.of(steered.scores_abn if single else steered.log_p_abn.exp(), arm, dose)[:, image, at]
    low, mean, high = (float(value) for value in (drawn.min(), drawn.mean(), drawn.max()))
    if len(drawn) > 1:
        return f"{mean:.3f} [{low:.3f}, {high:.3f}]" if single else f"{percent(mean)} [{100 * low:.1f}, {100 * high:.1f}]"
    rank = int(steered.of(steered.ranks_abn, arm, dose)[0, image, at])
    return f"{mean:.3f}" if single else f"{percent(mean)} #{rank}"


def _line(name: str) -> str:
    """Return a name on one line; a text of many words is cut, so that the table keeps its columns."""
    words = " ".join(name.split())
    return words if len(words) <= 40 else f"{words[:39]}…"


def _most(raised: Sequence[tuple[str, float]]) -> str:
    """Write the name that an arm raises most, in any of its draws."""
    name, rise = max(raised, key=lambda one: one[1])
    return f"{_line(name)} {rise:+.2f}" if rise >= 0.005 else DASH


def format_contributions(found: Contributions) -> list[str]:
    """Format effects of latents on an output as lines: for each image a table of the strongest, and what is known of the estimates."""
    lines: list[str] = []
    for image, (name, one) in enumerate(zip(found.images, found.of, strict=True)):
        lines += [f"{name}: {found.output} is {one.value:.4f}; {int((one.acts_s > 0).sum())} latents fire", ""]
        lines += [f"  {line}" for line in align([_HEAD, *(_row(row) for row in found.rows(image))])]
        lines += ["", *_say_of(one, found.method), ""]
    return lines + [f"warning: {warning}" for warning in found.warnings]


_HEAD = ("latent", "label", "MS", "causal", "act", "effect", "exact", "strongest at")


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    where = DASH if row["row"] is None else f"row {row['row']}, column {row['col']}: {row['at_patch']:+.4f}"
    ms = DASH if row["ms"] is None else f"{row['ms']:.2f}"
    exact = DASH if row["exact"] is None else f"{row['exact']:+.4f}"
    return str(row["latent"]), row["label"] or DASH, ms, row["causal"] or DASH, f"{row['act']:.2f}", f"{row['effect']:+.4f}", exact, where


def _say_of(one: "Attributed", method: str) -> list[str]:
    """Say how far the effects can be believed."""
    lines = []
    if one.others:
        exact = [one.exact[latent] for latent in one.others]
        lines.append(f"{len(exact)} others that fire, drawn at random: exact effects {min(exact):+.4f} to {max(exact):+.4f}")
    if one.agreement:
        found = one.agreement.correlation
        lines.append(
            f"rank correlation of {method} and exact effects: {found.value:.2f} ({found.low:.2f} to {found.high:.2f}) over "
            f"{one.agreement.n_latents} latents"
        )
    if sides := one.completeness:
        named = (("latents", sides.latents_b), ("error", sides.error_b), ("bias", sides.bias_b))
        parts, total = " ".join(f"{float(part[0]):+.4f} ({name})" for name, part in named), float(sides.effects_b[0])
        differs = f"the output differs by {float(sides.difference_b[0]):+.4f} from that at the mean activation"
        lines.append(f"{parts} = {total:+.4f}, and {differs}")
    return [*lines, f"effective number of latents: {one.sparsity:.1f}"]
