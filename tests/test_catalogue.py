"""Names of models and the cards that say what they are."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from pykvq import catalogue
from pykvq.catalogue import ModelNotFoundError, parse_card, resolve
from pykvq.errors import KvqError, ModelError
from pykvq.fetch import Artifact, Url, WheelMember, Wheels

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------


def test_an_existing_file_is_returned_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "weights.bin").write_bytes(b"x")
    assert resolve("weights.bin") == Path("weights.bin")
    assert resolve(tmp_path / "weights.bin") == tmp_path / "weights.bin"
    assert resolve("~/weights.bin") == tmp_path / "weights.bin"


@pytest.mark.parametrize(
    "name", ["no.gguf", "no/model.GGUF", "./smollm2", "/no/such", "~/no", "a\\b"]
)
def test_a_path_that_does_not_exist_is_an_error(name: str) -> None:
    with pytest.raises(
        ModelNotFoundError, match="is not there; a GGUF file was expected"
    ) as caught:
        resolve(name)
    assert isinstance(caught.value, KvqError)
    assert isinstance(caught.value, FileNotFoundError)
    assert name in str(caught.value)


def test_a_directory_is_not_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFoundError, match="is a directory, not a regular file"):
        resolve(tmp_path)
    (tmp_path / "user" / "repo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="user/repo is a directory"):
        resolve("user/repo")


def test_an_empty_name_is_said_to_be_empty() -> None:
    with pytest.raises(
        ModelNotFoundError, match="name of the model is empty; expected is the path"
    ):
        resolve("")


@pytest.mark.parametrize("name", ["smollm3", "a/b/c", "a b", "user/", "user/repo:"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(
        ModelNotFoundError, match=r"one of: qwen2\.5-coder-0\.5b, smollm2\."
    ) as caught:
        resolve(name)
    assert repr(name) in str(caught.value)


def test_a_known_name_is_found_in_any_case_and_in_spite_of_a_directory_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("PYKVQ_CACHE", str(cache))
    monkeypatch.setattr(catalogue, "cards", lambda: {"tiny": CARD})
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    cache.mkdir()
    (cache / "tiny.gguf").write_bytes(b"abc")
    for name in ("tiny", "Tiny", "TINY"):
        assert resolve(name, offline=True) == cache / "tiny.gguf"


def test_a_repository_of_the_hub_is_told_from_its_quantization(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def fake(*args: Any, **options: Any) -> Path:
        asked.append((args, options["offline"]))
        return Path("x")

    monkeypatch.setattr(catalogue, "fetch_from_hub", fake)
    resolve("user/My_Repo-GGUF")
    resolve("user/repo.v2:q8_0", offline=True)
    assert asked == [(("user/My_Repo-GGUF", None), False), (("user/repo.v2", "q8_0"), True)]


# ---------------------------------------------------------------------------------------------
# Cards
# ---------------------------------------------------------------------------------------------

CARD_ENTRIES: dict[str, Any] = {
    "title": "Tiny",
    "quantization": "Q8_0",
    "license": "MIT",
    "homepage": "https://example.org",
    "file": "tiny.gguf",
    "bytes": 3,
    "sha256": hashlib.sha256(b"abc").hexdigest(),
    "source": {"url": "https://example.org/tiny.gguf"},
}
CARD = parse_card("tiny", json.dumps(CARD_ENTRIES))
WHEEL = {"package": "p", "version": "1", "member": "p/x"}


def test_a_card_is_read() -> None:
    assert (CARD.name, CARD.title, CARD.quantization, CARD.license, CARD.homepage) == (
        "tiny",
        "Tiny",
        "Q8_0",
        "MIT",
        "https://example.org",
    )
    source = Url("https://example.org/tiny.gguf")
    assert CARD.artifact == Artifact("tiny.gguf", 3, CARD_ENTRIES["sha256"], source)
    wheels = parse_card("w", json.dumps({**CARD_ENTRIES, "source": {"wheels": [WHEEL] * 2}}))
    assert wheels.artifact.source == Wheels((WheelMember("p", "1", "p/x"),) * 2)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"bytes": "3"}, "bytes '3'"),
        ({"bytes": True}, "bytes True"),
        ({"extra": 1}, "extra"),
        ({"title": None}, "title None"),
        ({"file": "../tiny.gguf"}, "../tiny.gguf"),
        ({"sha256": "ABC"}, "sha256"),
        ({"source": {}}, "source"),
        ({"source": {"ftp": "x"}}, "ftp"),
        ({"source": {"url": "x", "wheels": []}}, "exactly one"),
        ({"source": {"url": "http://example.org"}}, "http://example.org"),
        ({"source": {"wheels": []}}, "list of wheels"),
        ({"source": {"wheels": [{**WHEEL, "path": "x"}]}}, "path"),
        ({"source": {"wheels": [{**WHEEL, "version": 1}]}}, "version 1"),
    ],
)
def test_a_bad_card_is_refused_with_what_was_found(change: dict[str, Any], found: str) -> None:
    with pytest.raises(ModelError, match=r"^The model card tiny .*\.$") as caught:
        parse_card("tiny", json.dumps({**CARD_ENTRIES, **change}))
    assert found in str(caught.value)


def test_a_card_that_is_no_object_or_no_json_or_lacks_an_entry_is_refused() -> None:
    short = {k: v for k, v in CARD_ENTRIES.items() if k != "license"}
    for text in ("[]", "{", json.dumps(short)):
        with pytest.raises(ModelError, match="The model card tiny"):
            parse_card("tiny", text)
    with pytest.raises(ModelError, match="lower case"):
        parse_card("Tiny", json.dumps(CARD_ENTRIES))


def test_the_cards_of_this_repository_are_valid_and_in_its_readme() -> None:
    cards = catalogue.cards()
    readme = (ROOT / "models" / "README.md").read_text(encoding="utf-8")
    assert set(cards) == {p.stem for p in (ROOT / "models").glob("*.json")} >= {"smollm2"}
    for card in cards.values():
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{card.name}` |"))
        assert card.title in row
        assert row.endswith(f"| {card.license} |")
    assert len({card.artifact.file for card in cards.values()}) == len(cards)


def test_cards_of_an_installed_package_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.json").write_text(json.dumps(CARD_ENTRIES))
    (tmp_path / "models" / "README.md").write_text("not a card")
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    assert dict(catalogue.cards.__wrapped__()) == {"tiny": CARD}
    (tmp_path / "models" / "tiny.json").unlink()
    with pytest.raises(ModelError, match="not complete"):
        catalogue.cards.__wrapped__()
