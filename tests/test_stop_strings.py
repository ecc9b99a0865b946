"""Stop strings in streamed text, against a search in the whole text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pykvq.stop_strings import StopStrings


def stream(stops: StopStrings, pieces: Sequence[str]) -> str:
    return "".join(stops.feed(piece) for piece in pieces) + stops.finish()


def test_a_stop_string_split_across_pieces_never_appears() -> None:
    stops = StopStrings(["<|im_end|>"])
    assert [stops.feed(p) for p in ["Hi", " <", "|im_", "end|", "> more", "x"]] == [
        "Hi", " ", "", "", "", "",
    ]  # fmt: skip
    assert (stops.stopped, stops.matched) == (True, "<|im_end|>")
    assert stops.finish() == ""


def test_a_tail_that_was_no_stop_string_is_given_back() -> None:
    stops = StopStrings("END")
    assert [stops.feed(p) for p in ["aE", "N", "EN", "d"]] == ["a", "", "EN", "ENd"]
    assert stops.feed("!E") == "!"
    assert stops.finish() == "E"
    assert (stops.stopped, stops.matched) == (False, None)


def test_nothing_is_held_back_that_cannot_begin_a_stop_string() -> None:
    assert StopStrings(["stop"]).feed("a longer piece") == "a longer piece"
    assert StopStrings([]).feed("text") == "text"


def test_overlapping_beginnings() -> None:
    assert stream(StopStrings(["aab"]), ["a", "a", "a", "b", "c"]) == "a"
    # "b" is complete at once, but "abc" would begin before it.
    assert stream(StopStrings(["b", "abc"]), ["xa", "b", "c"]) == "x"
    assert stream(StopStrings(["b", "abc"]), ["xa", "b", "d"]) == "xa"
    assert stream(StopStrings(["b", "abc"]), ["xa", "b"]) == "xa"


def test_of_two_stop_strings_at_one_place_the_shorter_is_named() -> None:
    for pieces in (["ab", "c"], ["abc"]):
        stops = StopStrings(["abc", "ab"])
        assert stream(stops, pieces) == ""
        assert stops.matched == "ab"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=8),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
)
@example(pieces=["a", "b"], stops=["b", "abc"])
def test_the_output_is_the_text_before_the_earliest_stop_string(
    pieces: list[str], stops: list[str]
) -> None:
    text = "".join(pieces)
    places = [text.find(stop) for stop in stops if stop in text]
    streamed = StopStrings(stops)
    assert stream(streamed, pieces) == text[: min(places, default=len(text))]
    assert streamed.stopped == bool(places)
    if streamed.matched is not None:
        assert streamed.matched in stops
        assert text.find(streamed.matched) == min(places)
