"""Names held in memory: words are found in them as a plain loop over all names finds them."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ommatid.explorer.texts import Texts

LETTERS = st.text(alphabet="ab é\n.\\", max_size=6)
ROWS = st.lists(st.tuples(st.integers(0, 5), LETTERS.map(str.lower), st.none() | st.sampled_from([-1.0, 0.25, 0.5])), max_size=12)


def find_by_loop(rows: list[tuple[int, str, float | None]], text: str) -> list[int]:
    """Find latents by going through all names one by one."""

    def rank(row: tuple[int, str, float | None]) -> tuple[bool, bool, float, int]:
        latent, name, merit = row
        has_word = re.search(rf"\b{re.escape(text)}\b".encode(), name.encode()) is not None
        return name != text, not has_word, float("inf") if merit is None else -merit, latent

    rows = [(latent, name.replace("\n", " "), merit) for latent, name, merit in rows]
    return list(dict.fromkeys(latent for latent, name, _ in sorted((row for row in rows if text in row[1]), key=rank)))


@given(ROWS, LETTERS.map(lambda text: " ".join(text.split())).filter(bool), st.integers(1, 5))
@example([(3, "a bee", None), (1, "bee a", 0.5), (2, "a", None)], "a", 5)
@example([(0, "a", None)], "b", 3)
@example([], "a", 1)
def test_names_are_found_as_by_a_loop_over_all(rows: list[tuple[int, str, float | None]], text: str, n: int) -> None:
    assert Texts(rows).find(text, n) == find_by_loop(rows, text)[:n]


@pytest.mark.parametrize("text", ["(", "[a", "a+", "\\d", "^", "$", ".*"])
def test_signs_of_patterns_are_taken_literally(text: str) -> None:
    names = Texts([(0, f"x {text} y", 0.1), (1, "a1 abc", 0.9)])
    assert names.find(text, 5) == [0]
