"""Pictures of a user: a folder or a zip in ImageFolder layout.

    cats/1.png  dogs/2.png                              split for the user
    train/cats/1.png  test/cats/9.png                   as it is; validation/ too, where there is one
    mine/train/cats/1.png  …                            folders around it all are looked through

Newly labelled pictures come as `<class>/<file>` too, of classes that are known already: `labelled`.

A zip is read where it is, never extracted. Names may hold spaces and any script; they are kept in Unicode's composed
form (NFC), since systems differ in how they store them.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.progress import track

from marwright.errors import DataError
from marwright.learning.examples import Body, Examples

PARTS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test",
    "val": "validation", "valid": "validation", "validation": "validation",
}  # fmt: skip
LAYOUT = "<class>/<file>, or train/<class>/<file> and test/<class>/<file>"
CHUNK = 2**20
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
_NOISE = {"__MACOSX", "Thumbs.db", "desktop.ini"}
_UNFINISHED = (".part", ".partial", ".tmp", ".temp", ".crdownload", ".filepart")

Steps = tuple[str, ...]


@dataclass(frozen=True)
class _Tree:
    """Files by their steps from the top (NFC), folders that hold nothing, and a way to open a file."""

    where: Path
    files: dict[Steps, Callable[[], IO[bytes]]]
    empty: tuple[Steps, ...]


@dataclass(frozen=True)
class _Entry:
    part: str
    label: str
    name: str
    digest: str
    open: Callable[[], IO[bytes]]


def find(where: Path, *, progress: bool = False) -> Examples:
    """The pictures of a folder or zip, listed and hashed; `DataError` for what cannot be learned from."""
    tree = _folder(where) if where.is_dir() else _zip(where)
    if not tree.files:
        raise DataError(f"{where} holds no files", hint=f"put pictures there: {LAYOUT}")
    tree = _unwrapped(tree)
    tops = {steps[0] for steps in (*tree.files, *tree.empty)}
    parted = any(PARTS.get(top.lower()) == "train" for top in tops)
    if not parted and any(PARTS.get(top.lower()) == "test" for top in tops):
        raise DataError(f"{where} has a test folder and no train folder", hint=f"wanted: {LAYOUT}")
    depth = 3 if parted else 2
    used = [steps for steps in tree.files if len(steps) >= depth and (not parted or steps[0].lower() in PARTS)]
    notes = []
    if ignored := len(tree.files) - len(used):
        notes.append(f"{ignored} files that are in no class folder were ignored")
    if not used:
        raise DataError(f"{where} holds no class folders with pictures", hint=f"wanted: {LAYOUT}")
    entries = []
    for steps in track(used, "reading", disable=not progress, transient=True):
        part = PARTS[steps[0].lower()] if parted else ""
        digest = _digest(tree, steps)
        entries.append(_Entry(part, steps[depth - 2], "/".join(steps), digest, tree.files[steps]))
    classes = tuple(sorted({entry.label for entry in entries}))
    _learnable(where, tree, entries, classes, parted=parted)
    # By content: neighbours in the store are of mixed classes, and a folder and its zip come in the same order.
    entries.sort(key=lambda entry: (entry.digest, entry.name))
    index = {label: i for i, label in enumerate(classes)}
    return Examples(
        names=[entry.name for entry in entries],
        digests=[entry.digest for entry in entries],
        targets=[index[entry.label] for entry in entries],
        parts=[entry.part for entry in entries],
        raw=lambda i: _body(entries[i]),
        classes=classes,
        notes=tuple(notes),
    )


def labelled(where: Path, classes: Sequence[str], *, progress: bool = False) -> Examples:
    """Newly labelled pictures of `classes`, listed and hashed; none of them, or not of every class, is no error.

    Others may be copying into the folder: what bears the name of an unfinished copy is left out. `DataError` names
    every class that is not known; a body raises it if the file is no longer what was hashed.
    """
    tree = _unwrapped(_folder(where) if where.is_dir() else _zip(where), known=classes)
    whole = {steps: opener for steps, opener in tree.files.items() if not steps[-1].lower().endswith(_UNFINISHED)}
    used = [steps for steps in whole if len(steps) >= 2]
    counts = Counter(steps[0] for steps in used)
    unknown = sorted(set(counts) - set(classes))
    if unknown:
        raise DataError(
            f"{where} has classes that the model does not know: "
            + ", ".join(f"{label!r} ({counts[label]} files)" for label in unknown),
            hint=f"known are: {', '.join(map(repr, classes))}; a new class goes into the recipe's own data",
        )
    notes = []
    if later := len(tree.files) - len(whole):
        notes.append(f"{later} unfinished copies were left for later")
    if ignored := len(whole) - len(used):
        notes.append(f"{ignored} new files that are in no class folder were ignored")
    entries = [
        _Entry("", steps[0], "/".join(steps), _digest(tree, steps), whole[steps])
        for steps in track(used, "reading", disable=not progress, transient=True)
    ]
    entries.sort(key=lambda entry: (entry.digest, entry.name))
    index = {label: i for i, label in enumerate(classes)}
    return Examples(
        names=[entry.name for entry in entries],
        digests=[entry.digest for entry in entries],
        targets=[index[entry.label] for entry in entries],
        parts=[""] * len(entries),
        raw=lambda i: _unchanged(where, entries[i]),
        classes=tuple(classes),
        notes=tuple(notes),
    )


def _learnable(where: Path, tree: _Tree, entries: list[_Entry], classes: tuple[str, ...], *, parted: bool) -> None:
    """All that is wrong with the classes, at once."""
    depth = 2 if parted else 1
    problems = [f"the folder {'/'.join(steps)} is empty" for steps in sorted(tree.empty) if len(steps) == depth]
    if len(classes) == 1:
        problems.append(f"there is one class only: {classes[0]!r}; a classifier needs two or more")
    counts = Counter((entry.part, entry.label) for entry in entries)
    for part in sorted({entry.part for entry in entries}):
        missing = [label for label in classes if not counts[part, label] and len(classes) > 1]
        if missing and parted:
            problems.append(f"{part} has no examples of: {', '.join(map(repr, missing))}")
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise DataError(
            f"{where} cannot be learned from:\n{lines}",
            hint=f"give each class pictures in each part, or remove its folders ({LAYOUT})",
        )


def _unwrapped(tree: _Tree, *, known: Collection[str] = ()) -> _Tree:
    """Without the folders around it all: as long as every picture is in one, not directly, and it is no known class."""
    deep = [steps for steps in tree.files if len(steps) > 1]
    tops = {steps[0] for steps in (*deep, *tree.empty)}
    if len(tops) != 1 or not all(len(steps) > 2 for steps in deep):
        return tree
    if (top := next(iter(tops))) in known or top.lower() in PARTS:
        return tree
    inside = {steps[1:]: tree.files[steps] for steps in deep}
    empty = tuple(steps[1:] for steps in tree.empty if len(steps) > 1)
    return _unwrapped(_Tree(tree.where, inside, empty), known=known)


def _folder(where: Path) -> _Tree:
    found: dict[Steps, Callable[[], IO[bytes]]] = {}
    empty = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(where, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _noise(name))
        base = tuple(_nfc(step) for step in Path(folder).relative_to(where).parts)
        kept = sorted(name for name in names if not _noise(name))
        if not kept and not folders and base:
            empty.append(base)
        for name in kept:
            steps = (*base, _nfc(name))
            if steps in found:
                raise DataError(f"{where}: two files are called {'/'.join(steps)}", hint="rename one of them")
            found[steps] = _opener(Path(folder) / name)
    return _Tree(where, found, tuple(empty))


def _zip(where: Path) -> _Tree:
    if not where.exists():
        raise DataError(f"no folder or zip at {where}", hint="check the path; the recipe digits needs none")
    try:
        archive = zipfile.ZipFile(where)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{where} is not a folder or a zip: {error}", hint="give a folder, or a zip of one") from None
    found: dict[Steps, Callable[[], IO[bytes]]] = {}
    folders: set[Steps] = set()
    odd = []
    for info in archive.infolist():
        steps = tuple(_nfc(step) for step in info.filename.removeprefix("./").rstrip("/").split("/"))
        reason = _odd(info, steps)
        if reason:
            odd.append(f"{info.filename!r}: {reason}")
        elif any(_noise(step) for step in steps):
            continue
        elif info.is_dir():
            folders.add(steps)
        elif steps in found:
            odd.append(f"{info.filename!r}: is there twice")
        else:
            found[steps] = _member(archive, info)
    if odd:
        lines = "\n".join(f"  - {one}" for one in odd)
        raise DataError(
            f"{where} has {len(odd)} members that cannot be used:\n{lines}",
            hint="make the zip again from within the folder: `cd pictures && zip -r ../pictures.zip .`",
        )
    full = {steps[:i] for steps in (*found, *folders) for i in range(1, len(steps))}
    return _Tree(where, found, tuple(sorted(folders - full)))


def _odd(info: zipfile.ZipInfo, steps: Steps) -> str:
    """Why this member's path is not one of a plain file below the top; empty if it is."""
    # zipfile cuts names at a NUL and, on some systems, turns separators round: the original name tells.
    name = info.orig_filename
    if name.startswith("/") or (len(name) > 1 and name[1] == ":"):
        return "an absolute path"
    if "\\" in name:
        return "backslashes in its path"
    if ".." in steps:
        return "leads outside by .."
    if "\0" in name or "" in steps or "." in steps:
        return "an empty step in its path"
    if info.flag_bits & 0x1:
        return "encrypted"
    return ""


def _digest(tree: _Tree, steps: Steps) -> str:
    try:
        digest = hashlib.sha256()
        with tree.files[steps]() as stream:
            while piece := stream.read(CHUNK):
                digest.update(piece)
        return digest.hexdigest()
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise DataError(
            f"{tree.where}: {'/'.join(steps)} cannot be read: {error}", hint="check the file, or make the zip again"
        ) from None


def _body(entry: _Entry) -> Body:
    with entry.open() as stream:
        suffix = Path(entry.name).suffix.lower()
        return Body(stream.read(), suffix if suffix in SUFFIXES else ".bin")


def _unchanged(where: Path, entry: _Entry) -> Body:
    """The body that was hashed: it is in training or in test by its content."""
    try:
        body = _body(entry)
    except (OSError, zipfile.BadZipFile, EOFError):
        body = None
    if body is None or hashlib.sha256(body.data).hexdigest() != entry.digest:
        raise DataError(f"{where}: {entry.name} changed or went while it was used", hint="the next turn reads it again")
    return body


def _opener(path: Path) -> Callable[[], IO[bytes]]:
    return lambda: path.open("rb")


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[], IO[bytes]]:
    return lambda: archive.open(info)


def _noise(name: str) -> bool:
    """What systems leave behind in folders."""
    return name.startswith(".") or name in _NOISE


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
