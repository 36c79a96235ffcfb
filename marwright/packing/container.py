"""The zip under a `.mar`: written so that the same members give the same bytes, unpacked so that none gets outside.

container.write(path, {"spec.json": b"…", "model.onnx": Path("runs/…/model.onnx")})
container.unpack(path, empty_folder)
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

from marwright.errors import ArchiveInvalid

EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every member: the earliest that a zip can say."""

Content = bytes | Path


def write(path: Path, members: Mapping[str, Content]) -> None:
    """Stored, sorted, one time and one mode for all, sizes in front of the data (fact 36)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            content = members[name]
            info = zipfile.ZipInfo(name, EPOCH)
            info.create_system = 3
            info.external_attr = 0o100644 << 16
            info.file_size = content.stat().st_size if isinstance(content, Path) else len(content)
            with archive.open(info, "w") as member:
                if isinstance(content, Path):
                    with content.open("rb") as source:
                        while piece := source.read(1 << 20):
                            member.write(piece)
                else:
                    member.write(content)


def unpack(path: Path, folder: Path) -> None:
    """Into an empty folder; a member that would land outside is refused. ArchiveInvalid lists all faults."""
    root = folder.resolve()
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            outside = [name for name in names if "\\" in name or not (root / name).resolve().is_relative_to(root)]
            if outside:
                raise ArchiveInvalid(f"{path.name} reaches outside its folder", outside)
            archive.extractall(root)
    except zipfile.BadZipFile as error:
        raise ArchiveInvalid(f"{path.name} is not a whole archive", [str(error)]) from None
