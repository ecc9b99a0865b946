"""From what a user calls a model to a GGUF file on this machine.

A known model is a card, `models/<name>.json`, described in models/README.md: a new model is a new
card and no code. Downloads are those of `pykvq.fetch` (cards) and `pykvq.hub` (Hugging Face).
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pykvq.errors import ModelError
from pykvq.fetch import (
    Artifact,
    Progress,
    RemoteFile,
    Source,
    Url,
    WheelMember,
    Wheels,
    cache_dir,
    fetch,
)
from pykvq.hub import fetch_from_hub, files_of_hub, other_parts

if TYPE_CHECKING:
    from importlib.abc import Traversable

__all__ = [
    "Card",
    "ModelNotFoundError",
    "ShippedProfile",
    "cards",
    "is_cached",
    "is_url",
    "parse_card",
    "profile_of",
    "remote_files",
    "resolve",
]

_HUB_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(:(?P<quant>\w[\w.-]*))?", re.ASCII)


class ModelNotFoundError(ModelError, FileNotFoundError):
    """No file and no known model has the name that was given."""


@dataclass(frozen=True)
class ShippedProfile:
    """A profile that lies beside the cards.

    Attributes:
        file: Its name.
        fingerprint: `Model.fingerprint` of the model that it is for.
    """

    file: str
    fingerprint: int


@dataclass(frozen=True)
class Card:
    """What is known of a model.

    Attributes:
        name: What users call it; the name of the card's file.
        title: Its full name.
        quantization: The weight format, in the words of GGUF file names, such as Q4_K_M.
        license: SPDX identifier of the licence of the weights.
        homepage: Where the model is described by its makers.
        artifact: The file, and where it can be had.
        profile: What calibration found for it, if that comes with pykvq.
    """

    name: str
    title: str
    quantization: str
    license: str
    homepage: str
    artifact: Artifact
    profile: ShippedProfile | None = None


def resolve(
    name: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    offline: bool = False,
    verify: bool = False,
) -> Path:
    """Return the path of a model's GGUF file, fetching it if it is not on this machine.

    Tried in this order:

    1. a path of an existing file, which is returned as it is;
    2. the name of a card, in any case, such as `smollm2`: `pykvq.fetch.cache_dir` holds the file;
    3. `user/repository` or `user/repository:quantization` of the Hugging Face hub.

    Args:
        name: What the user calls the model.
        progress: Told how far a download is: (what, bytes done, bytes in all).
        offline: Download nothing.
        verify: Of a card's file that is in the cache, compare the checksum as well, and fetch it
            anew, with a warning, if it is another one.

    Raises:
        ModelNotFoundError: If there is no such file and the name is not known.
        DownloadError: If the model is known but cannot be had.
    """
    text = os.fspath(name)
    if not text:
        raise ModelNotFoundError(f"The name of the model is empty; expected is {_expected()}.")
    path = Path(text).expanduser()
    if path.is_file():
        return path
    card = None if _looks_like_path(text, path) else cards().get(text.lower())
    if card is not None:
        return fetch(card.artifact, progress=progress, offline=offline, verify=verify)
    if path.exists():
        found = "a directory, not" if path.is_dir() else "not"
        raise ModelNotFoundError(f"The model file {text} is {found} a regular file.")
    if is_url(text):
        raise ModelNotFoundError(
            f"The model {text} is a URL, which only `pykvq plan` reads; expected is {_expected()}."
        )
    if _looks_like_path(text, path):
        raise ModelNotFoundError(f"The model file {text} is not there; a GGUF file was expected.")
    hub = _HUB_NAME.fullmatch(text)
    if hub is not None:
        return fetch_from_hub(hub["repo"], hub["quant"], progress=progress, offline=offline)
    raise ModelNotFoundError(f"The model {text!r} is not known; expected is {_expected()}.")


def is_cached(name: str, path: str | os.PathLike[str]) -> bool:
    """Whether a file is the one that the cache holds for the card of this name."""
    card = cards().get(name.lower())
    return card is not None and Path(path) == cache_dir() / card.artifact.file


def remote_files(name: str) -> list[RemoteFile]:
    """Where a model can be read in parts, without fetching all of it.

    Args:
        name: A URL of a GGUF file, which `resolve` does not take; else as for `resolve`.

    Returns:
        Its files, the first part first; none if only fetching all of it helps.

    Raises:
        DownloadError: If it is of the Hugging Face hub, which does not have it or cannot be
            reached.
    """
    if is_url(name):
        folder, _, first = name.rpartition("/")
        return [Url(f"{folder}/{part}") for part in (first, *other_parts(first))]
    card = cards().get(name.lower())
    if card is not None:
        return [card.artifact.source] if isinstance(card.artifact.source, Url) else []
    hub = _HUB_NAME.fullmatch(name)
    return [] if hub is None else list(files_of_hub(hub["repo"], hub["quant"]))


def is_url(name: str) -> bool:
    """Whether a name of a model is the address of a file of a web server."""
    return name.startswith(("https://", "http://"))


def _expected() -> str:
    return (
        "the path of a GGUF file, user/repository of the Hugging Face hub, or one of:"
        f" {', '.join(sorted(cards()))}"
    )


def _looks_like_path(text: str, path: Path) -> bool:
    return (
        path.suffix.lower() == ".gguf"
        or path.is_absolute()
        or text.startswith((".", "~"))
        or "\\" in text
    )


# ---------------------------------------------------------------------------------------------
# Cards
# ---------------------------------------------------------------------------------------------


@functools.cache
def cards() -> Mapping[str, Card]:
    """All cards by name.

    Raises:
        ModelError: If a card is not valid or this installation has none.
    """
    folder = _folder()
    found = {}
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.name.endswith(".json"):
                name = entry.name.removesuffix(".json")
                found[name] = parse_card(name, entry.read_text(encoding="utf-8"))
    if not found:
        raise ModelError(f"No model card is in {folder}; this installation is not complete.")
    return found


def _folder() -> Traversable:
    """Where the cards are: an installed package has them inside, a source checkout beside it."""
    inside = resources.files("pykvq").joinpath("models")
    return inside if inside.is_dir() else Path(__file__).resolve().parent.parent / "models"


def profile_of(fingerprint: int) -> Path | None:
    """The profile that comes with pykvq for the model of this fingerprint, if there is one.

    Raises:
        ModelError: A card is not valid, or names a profile that this installation does not have.
    """
    for card in cards().values():
        if card.profile is not None and card.profile.fingerprint == fingerprint:
            path = Path(str(_folder().joinpath(card.profile.file)))
            if not path.is_file():
                raise ModelError(
                    f"The model card {card.name} names the profile {path}, which is not there; this"
                    " installation is not complete."
                )
            return path
    return None


def parse_card(name: str, text: str) -> Card:
    """Read a card.

    Args:
        name: The name of its file without the ending.
        text: JSON, as models/README.md describes it.

    Raises:
        ModelError: If it is not valid.
    """
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelError(f"The model card {name} is not JSON: {error}.") from error
    if name != name.lower():
        raise ModelError(f"The model card {name} must have a name in lower case.")
    entries = _checked(name, "card", entries, _CARD, _CARD_OPTIONAL)
    _require_plain(name, entries["file"])
    if re.fullmatch("[0-9a-f]{64}", entries["sha256"]) is None:
        raise ModelError(f"The model card {name} has a sha256 that is not 64 hexadecimal digits.")
    source = entries["source"]
    if len(source) != 1 or not source.keys() <= _SOURCES.keys():
        raise ModelError(
            f"The model card {name} has the source {sorted(source)}, but exactly one of"
            f" {', '.join(_SOURCES)} was expected."
        )
    [(kind, value)] = source.items()
    return Card(
        name,
        entries["title"],
        entries["quantization"],
        entries["license"],
        entries["homepage"],
        Artifact(entries["file"], entries["bytes"], entries["sha256"], _SOURCES[kind](name, value)),
        _profile(name, entries["profile"]) if "profile" in entries else None,
    )


def _require_plain(name: str, file: str) -> None:
    if Path(file).name != file:
        raise ModelError(
            f"The model card {name} names the file {file!r}, which is not a plain name."
        )


def _profile(name: str, value: object) -> ShippedProfile:
    entries = _checked(name, "profile", value, _PROFILE)
    _require_plain(name, entries["file"])
    if re.fullmatch("[0-9a-f]{16}", entries["fingerprint"]) is None:
        raise ModelError(
            f"The model card {name} has a fingerprint that is not 16 hexadecimal digits."
        )
    return ShippedProfile(entries["file"], int(entries["fingerprint"], 16))


def _wheels(name: str, value: object) -> Source:
    if not isinstance(value, list) or not value:
        raise ModelError(f"The model card {name} has no list of wheels, but {value!r}.")
    return Wheels(tuple(WheelMember(**_checked(name, "wheel", item, _WHEEL)) for item in value))


def _url(name: str, value: object) -> Source:
    if not isinstance(value, str) or not value.startswith("https://"):
        raise ModelError(f"The model card {name} has the url {value!r}, but https is expected.")
    return Url(value)


#: The kinds of source that a card can name.
_SOURCES: Mapping[str, Callable[[str, object], Source]] = {"wheels": _wheels, "url": _url}

_CARD: Mapping[str, type] = {
    "title": str,
    "quantization": str,
    "license": str,
    "homepage": str,
    "file": str,
    "bytes": int,
    "sha256": str,
    "source": dict,
}
_CARD_OPTIONAL: Mapping[str, type] = {"profile": dict}
_PROFILE: Mapping[str, type] = {"file": str, "fingerprint": str}
_WHEEL: Mapping[str, type] = {"package": str, "version": str, "member": str}


def _checked(
    name: str,
    what: str,
    value: Any,
    types: Mapping[str, type],
    optional: Mapping[str, type] = MappingProxyType({}),
) -> dict[str, Any]:
    """Require an object with exactly these entries, but for the optional ones."""
    if not isinstance(value, dict) or value.keys() - optional.keys() != types.keys():
        found = sorted(value) if isinstance(value, dict) else value
        raise ModelError(
            f"The model card {name} has a {what} with the entries {found}, but {sorted(types)} were"
            " expected."
        )
    for key in value:
        expected = types.get(key) or optional[key]
        if type(value[key]) is not expected:
            raise ModelError(
                f"The model card {name} has the {what} entry {key} {value[key]!r}, but its type"
                f" must be {expected.__name__}."
            )
    return value
