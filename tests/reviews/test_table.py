"""Proves that what people say survives a round trip through CSV, that no spreadsheet computes it, and that a bad file changes nothing."""

import csv
import io
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ommatid.errors import ReviewError
from ommatid.reviews import FLAGS, Imported, ReviewLog, State, follow, from_csv, history_to_csv, to_csv
from ommatid.reviews.log import Draft

ONE, TWO = "topk-8-k2-s0-0a1b2c3d", "topk-4-k2-s0-ffffffff"
SAES = {ONE: 8, TWO: 4}
FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "'=1", "''-1", "'tis", "＝1+1", '=HYPERLINK("http://x";"y")', "a;b,c", 'a "b"']


def direction(sae: str, latent: int) -> np.ndarray:
    return np.eye(8)[latent] + (sae == TWO)


def read(log: ReviewLog, data: bytes | str, saes: dict[str, int] = SAES) -> Imported:
    return from_csv(log, data.encode() if isinstance(data, str) else data, "Importer", saes, direction)


def said(state: State) -> dict[object, object]:
    """Everything that is said now, without ids and times."""
    return {
        key: (
            one.name,
            one.rename and one.rename.who,
            {who: event.value for who, event in one.ratings.items()},
            {reason: set(by) for reason, by in one.flags.items()},
            {name: event.who for name, event in one.lists.items()},
            {(event.who, event.value) for event in one.comments},  # what a person says twice is said,
        )
        for key, one in state.features().items()
        if not one.is_empty
    }


TEXT = st.one_of(st.sampled_from(FORMULAS), st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30))
PEOPLE = st.one_of(st.sampled_from(["Ada", "=Bo", "-Cy"]), TEXT.filter(lambda text: text.strip()))
SAID = st.one_of(
    st.tuples(st.just("rename"), TEXT | st.just("")),
    st.tuples(st.just("rate"), st.integers(1, 5)),
    st.tuples(st.sampled_from(["flag", "unflag"]), st.sampled_from(list(FLAGS))),
    st.tuples(st.sampled_from(["list_add", "list_remove"]), TEXT.filter(lambda text: text.strip() and ";" not in text)),
    st.tuples(st.just("comment"), st.tuples(TEXT, st.sampled_from(["", "\n", "\r\n=", "\t"]), TEXT).map("".join).filter(str.strip)),
)
EVENTS = st.lists(st.tuples(PEOPLE, st.sampled_from([ONE, TWO]), st.integers(0, 3), SAID), max_size=12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(events=EVENTS, undone=st.lists(st.integers(0, 11), max_size=3))
def test_what_is_said_survives_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, str, int, tuple[str, str | int]]], undone: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("logs")
    log, other, third = (ReviewLog(folder / f"{i}.jsonl") for i in range(3))
    recorded = log.extend(
        [Draft(who, sae, latent, *what, direction=lambda s=sae, n=latent: direction(s, n)) for who, sae, latent, what in events]
    )
    for place in undone:
        if place < len(recorded):
            log.undo("Ada", recorded[place].id)
    state = log.state()
    for data in (to_csv(state), history_to_csv(state)):
        for cell in (cell for row in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")) for cell in row):
            assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    read(other, to_csv(state))
    assert said(other.state()) == said(state)
    assert read(other, to_csv(state)).n_events == 0
    assert read(third, history_to_csv(state), {}) == Imported(len(state), 0)
    assert [event.line() for event in third.state().events()] == [event.line() for event in state.events()]
    assert said(third.state()) == said(state) and {*third.state().anchors} == {*state.anchors}
    assert read(third, history_to_csv(state), {}) == Imported(0, len(state))


@pytest.fixture
def log(tmp_path: Path) -> ReviewLog:
    return ReviewLog(tmp_path / "log.jsonl")


def test_a_file_by_hand_is_read(log: ReviewLog) -> None:
    text = 'latent;label\r\n3; horse \r\n7;"wheels; in a row"\r\n\r\n5;\r\n'
    assert read(log, text.encode("utf-8-sig"), {ONE: 8}) == Imported(2, 0)
    assert {key[1]: one.name for key, one in log.state().features().items()} == {3: "horse", 7: "wheels; in a row"}
    text = "sae,latent,rating,flags,lists,who\ntopk-8-k2-s0,3,5,wrong_name; other,a;b,Ada\ntopk-4-k2-s0-ffffffff,1,2,,,\n"
    assert read(log, text) == Imported(6, 0)
    found = log.state().feature((ONE, 3))
    assert (list(found.ratings), list(found.flags), list(found.lists)) == (["Ada"], ["wrong_name", "other"], ["a", "b"])
    assert list(log.state().feature((TWO, 1)).ratings) == ["Importer"]


def test_what_is_not_new_is_not_recorded_again(log: ReviewLog) -> None:
    read(log, "latent,name,rating\n3,horse,4\n", {ONE: 8})
    assert read(log, "latent,name,rating\n3,horse,4\n4,dog,\n", {ONE: 8}) == Imported(1, 2)
    assert read(log, "latent,name,rating\n3,pony,3\n4,,\n4,,\n", {ONE: 8}) == Imported(2, 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("latent,label\n8,horse\n", f"line 2, column latent: got '8'; {ONE} has latents 0 to 7"),
        ("latent,label\n٣,horse\n", "line 2, column latent: got '٣'"),
        ("latent,label\n1," + "x" * 501 + "\n", "line 2, column label: has 501 characters; at most 500"),
        (
            "latent,rating\n1,6\n2,4.5\n3,good\n",
            "line 2, column rating: got 6; .*; line 3, column rating: got '4.5'; .*; line 4, column rating",
        ),
        ("latent,flags\n1,other;bad\n", "line 2, column flags: got 'bad'; allowed are wrong_name"),
        ("latent,lists\n1," + "x" * 81 + "\n", "line 2, column lists: has 81"),
        ("latent,comment,who\n1,x," + "x" * 81 + "\n", "line 2, column who: has 81"),
        ("latent,name\n1,horse\n2,dog\n1,cat\n", "line 4, column latent: latent 1 has another name on line 2 already; keep one"),
        ("latent,rating,who\n1,1,Ada\n1,2,Bo\n1,3,Ada\n", "line 4, column latent: latent 1 has another rating on line 2"),
        ("latent,label,name\n1,horse,x\n", "line 1 has the columns name and label, which are the same"),
        ("latent,nam\n1,horse\n", "line 1 has the columns latent, nam; is 'nam' meant to be name"),
        ("latent,colour\n1,horse\n", "line 1 has the columns latent, colour; columns sae, latent, name"),
        ("latent,who\n1,Ada\n", "line 1 has the columns latent, who; add one of name, rating, flags, lists, comment"),
        ("sae,latent,name\ntopk-9,1,x\n", f"line 2, column sae: got 'topk-9'; this training has {ONE}"),
        ("name\nhorse\n", "line 1 has the columns name; it needs latent"),
        ('latent,name\n1,"horse\n', "line 2, not CSV"),
        ("latent,name\n1,a,b\n", "line 2, 3 cells and 2 columns"),
        ("", "is empty"),
        ("latent,name\n9,a\n1,b\n10,c\n", "line 2, .*; line 4, "),
    ],
)
def test_a_bad_file_is_refused_as_a_whole(log: ReviewLog, text: str, says: str) -> None:
    with pytest.raises(ReviewError, match=f"the CSV file was not imported: ({says})"):
        read(log, text, {ONE: 8})
    assert not log.path.exists()


def test_with_several_saes_the_file_must_say_which(log: ReviewLog) -> None:
    with pytest.raises(ReviewError, match="line 1 has the columns latent, name; it needs sae, for there are topk-8"):
        read(log, "latent,name\n1,horse\n")


@pytest.mark.parametrize(
    ("column", "cell", "says"),
    [
        ("id", "x", "column id: got 'x'"),
        ("at", "yesterday", "column at: got 'yesterday'"),
        ("at", "2999-01-31T12:00:00.000Z", "column at: 2999-01-31T12:00:00.000Z has not come yet"),
        ("who", "", "column who: is empty"),
        ("latent", "-1", "column latent: got '-1'"),
        ("sae", "vit-8-00000000", "column sae: the direction of vit-8-00000000 3 is not known"),
        ("kind", "merge", "column kind: got 'merge'"),
        ("value", "7", "column value: got 7; allowed are 1 to 5"),
        ("seen", "x", "column seen: got 'x'"),
        ("kind", "undo", "column value: got '4'; the id of an event"),
    ],
)
def test_a_bad_history_is_refused_as_a_whole(log: ReviewLog, tmp_path: Path, column: str, cell: str, says: str) -> None:
    log.append("Ada", ONE, 3, "rate", 4, direction=lambda: direction(ONE, 3))
    rows = list(csv.DictReader(io.StringIO(history_to_csv(log.state()).decode("utf-8-sig"), newline="")))
    rows[1][column] = cell
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    other = ReviewLog(tmp_path / "other.jsonl")
    with pytest.raises(ReviewError, match=f"not imported: line 3, ({says})"):
        read(other, text.getvalue())
    assert not other.path.exists()


def test_two_logs_become_one(log: ReviewLog, tmp_path: Path) -> None:
    """Two people work apart; after each has imported the other's history, both logs say the same."""
    other = ReviewLog(tmp_path / "other.jsonl")
    for who, own in (("Ada", log), ("Bo", other), ("Cy", log)):
        own.append(who, ONE, 3, "rename", f"by {who}", direction=lambda: direction(ONE, 3))
        time.sleep(0.002)  # the order within a millisecond is that of the log
    ours, theirs = history_to_csv(log.state()), history_to_csv(other.state())
    assert read(log, theirs) == Imported(1, 0) and read(other, ours) == Imported(2, 0)
    for own in (log, other):
        assert [event.who for event in own.state().feature((ONE, 3)).history] == ["Ada", "Bo", "Cy"] and said(own.state()) == said(
            log.state()
        )
        assert own.state().feature((ONE, 3)).name == "by Cy"


def test_features_are_exported_as_those_of_the_sae_in_which_they_are_found(log: ReviewLog) -> None:
    read(log, f"sae,latent,name\n{ONE},3,horse\n{ONE},4,dog\n{TWO},1,cat\n")
    state = log.state()
    found = follow(state, "new-8-0", np.eye(8)[[4, 5, 6]])
    rows = list(csv.DictReader(io.StringIO(to_csv(state, found).decode("utf-8-sig"))))
    assert [(row["sae"], row["latent"], row["name"]) for row in rows] == [("new-8-0", "0", "dog"), (TWO, "1", "cat"), (ONE, "3", "horse")]
    data = to_csv(state, found)
    assert from_csv(log, data, "Importer", {"new-8-0": 3}, lambda sae, latent: np.eye(8)[4 + latent], found) == Imported(0, 3)
