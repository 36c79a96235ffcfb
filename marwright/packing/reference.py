"""The reference that travels in an archive: what requests looked like when its version was made.

reference.read(store / record.file)      # a Reference; None in an archive of before there were any
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from marwright.errors import ArchiveError
from marwright.learning.reference import FILE, Reference
from marwright.runs import Run

HINT = "put the built file back, or build the next version: `marwright archive`"


def members(run: Run) -> dict[str, Path]:
    """What `archive` packs: nothing of a run that was trained before there were references."""
    path = run.path / FILE
    return {FILE: path} if path.is_file() else {}


def read(mar: Path) -> Reference | None:
    """The reference of a `.mar`, or of the folder it was unpacked into; None where it has none. ArchiveError where it
    cannot be read."""
    try:
        if mar.is_dir():
            data = (mar / FILE).read_bytes()
        else:
            with zipfile.ZipFile(mar) as archive:
                data = archive.read(FILE)
        return Reference.from_bytes(data)
    except KeyError:
        return None
    except FileNotFoundError:
        if mar.is_dir():
            return None
        raise ArchiveError(f"there is no {mar}", hint=HINT) from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ArchiveError(f"the reference in {mar} cannot be read: {error}", hint=HINT) from None
