"""Which archive this is, and that it is whole.

`MAR-INF/digests.json` lists every other member's sha256. A worker that finds a file changed, missing, or code that
nobody listed, does not start; nor does one that imported `handlers` from a place other than its own archive.

    bundle = Bundle.verify(Path(context.system_properties["model_dir"]))
    bundle.digest        # what every answer carries: the first 16 hex digits of the sha256 of digests.json
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import all_suffixes
from pathlib import Path, PurePosixPath

from handlers.errors import LoadError

DIGESTS = "MAR-INF/digests.json"
HOME = Path(__file__).resolve().parent
"""Where this process imported `handlers` from."""


@dataclass(frozen=True)
class Bundle:
    """An unpacked archive whose members are what `digests.json` says."""

    digest: str
    """16 hex digits."""
    members: Mapping[str, str]
    """Path in the archive → sha256, 64 hex digits."""

    @classmethod
    def verify(cls, model_dir: Path) -> Bundle:
        """`LoadError` names the first file that is not right."""
        root = model_dir.resolve()
        if root / "handlers" != HOME:
            raise LoadError(
                f"handlers was imported from {HOME}, not from the archive's {root / 'handlers'}: "
                "is there a checkout on PYTHONPATH?"
            )
        try:
            listing = (root / DIGESTS).read_bytes()
            members = json.loads(listing)
        except FileNotFoundError:
            raise LoadError(f"the archive has no {DIGESTS}: it was not built by `marwright archive`") from None
        except ValueError as error:
            raise LoadError(f"{DIGESTS} is not JSON: {error}") from None
        if not isinstance(members, dict) or not all(isinstance(value, str) for value in members.values()):
            raise LoadError(f"{DIGESTS} must map each member to its sha256")
        for name, expected in sorted(members.items()):
            _check(root, name, expected)
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.name.endswith(tuple(all_suffixes())) and "__pycache__" not in path.parts and name not in members:
                raise LoadError(f"the archive holds code that {DIGESTS} does not list: {name}")
        return cls(hashlib.sha256(listing).hexdigest()[:16], members)

    def require(self, name: str) -> None:
        """`LoadError` unless this member was verified."""
        if name not in self.members:
            raise LoadError(f"{DIGESTS} does not list {name!r}, so nobody vouches for it")


def _check(root: Path, name: str, expected: str) -> None:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise LoadError(f"{DIGESTS} lists a path outside of the archive: {name}")
    try:
        with (root / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        raise LoadError(f"{name} is listed in {DIGESTS} and missing from the archive") from None
    if found != expected:
        raise LoadError(f"{name} was changed after the archive was built: sha256 {found[:12]}…, not {expected[:12]}…")
