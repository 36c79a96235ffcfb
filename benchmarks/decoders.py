"""From bytes to pixels: image decoders side by side, and the whole of `images.decode`.

    python benchmarks/decoders.py run --data cifar10.zip --rounds 9        # two minutes; replaces results/decoders.csv
    python benchmarks/decoders.py show

Real pictures of CIFAR-10 (the files themselves as JPEG; as PNG what Pillow writes), and larger ones made of them: 24
side by side, enlarged. "… alone" is a codec's shortest way to an array of H×W×3; `decode` is the whole call that
training and workers make, checks and limits included, to C×H×W. Passes over the pictures of one kind are timed for each
codec in turn, in another order each round, by the CPU time of this process: what else the machine does counts little.
Each is a line of the raw file. OpenCV and imagecodecs are measured where they are installed (`pip install
opencv-python-headless imagecodecs`); what is missing is named and left out. `largest difference` is that from Pillow's
pixels.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import random
import statistics
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import rows  # noqa: E402
from handlers import images, turbo  # noqa: E402
from handlers.spec import ImageInput, Limits  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "decoders.csv"
SIZES = {"32×32": (32, 32), "224×224": (224, 224), "1080p": (1920, 1080)}
SMALL = 48
"""Pictures of 32×32; of the larger sizes there are 4 and 1."""
LONGEST = 0.05
"""Seconds of one pass, about."""

Codec = Callable[[bytes], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="measure, and keep the results")
    run.add_argument("--data", type=Path, required=True, help="zip of CIFAR-10 as JPEG, train/<class>/<file>")
    run.add_argument("--rounds", type=int, default=9)
    run.add_argument("--out", type=Path, default=RESULTS)
    verbs.add_parser("show", help="print the table").add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.verb == "run":
        rows.write(options.out, measure(options.data, options.rounds))
    print(section(options.out))


def measure(data: Path, rounds: int) -> list[rows.Row]:
    """One row for each codec, kind of picture and round."""
    pictures = bodies(data)
    known = {(kind, name): codec for kind, (size, _) in pictures.items() for name, codec in codecs(kind, size).items()}
    exact = {key: furthest(codec, pictures[key[0]][1]) for key, codec in known.items()}
    pace = {key: seconds(codec, pictures[key[0]][1], 1) for key, codec in known.items()}
    found = []
    for number in range(rounds):
        order = list(known)
        random.Random(number).shuffle(order)
        for key in order:
            kind, name = key
            passes = max(1, min(50, round(LONGEST / pace[key])))
            spent = seconds(known[key], pictures[kind][1], passes) / passes / len(pictures[kind][1])
            found.append(
                {
                    "round": number,
                    "kind": kind,
                    "codec": name,
                    "microseconds": round(spent * 1e6, 3),
                    "largest difference": exact[key],
                    "load": round(os.getloadavg()[0], 2),
                    "versions": versions(name),
                }
            )
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return found


def bodies(data: Path) -> dict[str, tuple[tuple[int, int], list[bytes]]]:
    """(columns, rows) and files, for each kind of picture."""
    with zipfile.ZipFile(data) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        files = [archive.read(name) for name in random.Random(0).sample(names, max(SMALL, 24 * 4))]
    small = [Image.open(io.BytesIO(body)).convert("RGB") for body in files]
    made: dict[str, list[Image.Image]] = {"32×32": small[:SMALL]}
    for name, count in (("224×224", 4), ("1080p", 1)):
        made[name] = [enlarged(small[24 * n : 24 * (n + 1)], SIZES[name]) for n in range(count)]
    found = {}
    for size, pictures in made.items():
        found[f"PNG {size}"] = SIZES[size], [written(picture, "PNG") for picture in pictures]
        jpegs = files[:SMALL] if size == "32×32" else [written(picture, "JPEG", quality=90) for picture in pictures]
        found[f"JPEG {size}"] = SIZES[size], jpegs
    return found


def enlarged(pictures: list[Image.Image], size: tuple[int, int]) -> Image.Image:
    """Six by four of them, smoothly enlarged: natural edges and gradients, no copy of any part."""
    sheet = Image.new("RGB", (6 * 32, 4 * 32))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % 6 * 32, number // 6 * 32))
    return sheet.resize(size, Image.Resampling.BICUBIC)


def written(picture: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    return stream.getvalue()


def codecs(kind: str, size: tuple[int, int]) -> dict[str, Codec]:
    """What is installed, by name; each gives H×W×3, or C×H×W where it is `decode`."""
    png = kind.startswith("PNG")
    limits = Limits()
    found: dict[str, Codec] = {"Pillow alone": lambda body: np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))}
    found["Pillow's C codec alone"] = lambda body: inner(body, size, png)
    if (cv2 := optional("cv2")) is not None:
        found["OpenCV alone"] = lambda body: cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR_RGB)
    if (vision := optional("torchvision.io")) is not None:
        torch = importlib.import_module("torch")
        found["torchvision alone"] = lambda body: vision.decode_image(
            torch.frombuffer(bytearray(body), dtype=torch.uint8), vision.ImageReadMode.RGB
        ).permute(1, 2, 0)
    if (imagecodecs := optional("imagecodecs")) is not None:
        found["imagecodecs alone"] = imagecodecs.spng_decode if png else imagecodecs.jpeg8_decode
    if png:
        found["pyspng alone"] = lambda body: turbo.pyspng.load(body, "RGB")
    else:
        found["simplejpeg alone"] = turbo.simplejpeg.decode_jpeg
    found["turbo alone"] = lambda body: turbo.decode(body, most=limits.max_pixels, side=10_000)
    for decoder in images.PACKAGES:
        wanted = ImageInput(3, size[1], size[0], decoder=decoder)
        found[f"`decode`, {decoder}"] = lambda body, wanted=wanted: images.decode(body, wanted, limits)  # type: ignore[misc]
    return found


def inner(body: bytes, size: tuple[int, int], png: bool) -> Any:
    """What Pillow's Python would call in the end, called at once. Private to Pillow: measured, not used."""
    core = Image.core
    image = core.new("RGB", size)
    decoder = core.zip_decoder("RGB", "RGB", 0) if png else core.jpeg_decoder("RGB", "RGB", "", 1, 0)
    decoder.setimage(image, (0, 0, *size))
    decoder.decode(b"".join(stream(body)) if png else body)
    decoder.cleanup()
    packer = core.raw_encoder("RGB", "RGB", 0, 1)
    packer.setimage(image, (0, 0, *size))
    return np.frombuffer(packer.encode(size[0] * size[1] * 3)[2], np.uint8).reshape(size[1], size[0], 3)


def stream(body: bytes) -> list[bytes]:
    """The IDATs of a PNG."""
    parts, at = [], 8
    while at < len(body):
        length, name = struct.unpack_from(">I4s", body, at)
        if name == b"IDAT":
            parts.append(body[at + 8 : at + 8 + length])
        at += length + 12
    return parts


def optional(module: str) -> Any:
    """The module, or None and a word about it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        print(f"not measured: {module} ({error})", file=sys.stderr)
        return None


def furthest(codec: Codec, files: list[bytes]) -> int:
    """The largest difference of any pixel from Pillow's."""
    worst = 0
    for body in files:
        expected = np.asarray(Image.open(io.BytesIO(body)).convert("RGB")).astype(int)
        got = np.asarray(codec(body))
        if got.shape != expected.shape:
            got = got.transpose(1, 2, 0)
        worst = max(worst, int(np.abs(got - expected).max()))
    return worst


def seconds(codec: Codec, files: list[bytes], passes: int) -> float:
    began = time.process_time()
    for _ in range(passes):
        for body in files:
            codec(body)
    return time.process_time() - began


def versions(name: str) -> str:
    """Of the packages behind a codec."""
    packages = {"OpenCV": "opencv-python-headless", "torchvision": "torchvision", "imagecodecs": "imagecodecs"}
    packages |= {"pyspng": "pyspng", "simplejpeg": "simplejpeg", "turbo": " ".join(images.PACKAGES["turbo"][1:])}
    behind = next(
        (value for start, value in packages.items() if name.removeprefix("`decode`, ").startswith(start)), "pillow"
    )
    return " ".join(f"{package} {metadata.version(package)}" for package in behind.split())


def section(path: Path = RESULTS) -> str | None:
    """This benchmark's part of docs/performance.md; None before there is a raw file."""
    if not path.is_file():
        return None
    about, found = rows.read(path)
    kinds = list(dict.fromkeys(f"{format} {size}" for format in ("PNG", "JPEG") for size in SIZES))
    names = sorted({one["codec"] for one in found}, key=lambda name: (name.startswith("`"), name))
    table = []
    for name in names:
        cells = []
        for kind in kinds:
            mine = [one for one in found if (one["codec"], one["kind"]) == (name, kind)]
            values = [float(one["microseconds"]) for one in mine]
            differs = max((int(one["largest difference"]) for one in mine), default=0)
            cells.append(f"{figure(statistics.median(values))}{f' (±{differs})' if differs else ''}" if values else "")
        table.append([name, *cells])
    behind = sorted({" ".join(pair) for one in found for pair in pairs(one["versions"].split())})
    passes = 1 + max(int(one["round"]) for one in found)
    return "\n".join(
        [
            "## Image decoders",
            "",
            f"Microseconds of CPU time a picture, medians of {passes} rounds. {about}; {', '.join(behind)}. "
            "Real CIFAR-10 pictures, and larger ones made of them. “Alone” is a codec's way to H×W×3; `decode` is the "
            "whole call of training and workers, to C×H×W, limits checked. In brackets: the largest difference from "
            "Pillow's pixels, where there is one.",
            "",
            rows.markdown(["", *kinds], table),
            "",
        ]
    )


def pairs(words: list[str]) -> list[list[str]]:
    """Package and version, two by two."""
    return [words[at : at + 2] for at in range(0, len(words), 2)]


def figure(microseconds: float) -> str:
    return f"{microseconds:.1f}" if microseconds < 100 else f"{microseconds:.0f}"


if __name__ == "__main__":
    main()
