"""The README's commands, typed as they stand there, in a fresh checkout without Java and compilers; and its links."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from scripts.__main__ import VERBS, main
from tests import checkout
from tests.checkout import Project

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What differs from what is typed, and why.
INSTEAD = {
    "make test": "make test PYTEST_ARGS='-q tests/test_imports.py'",  # this is running in the whole suite already
    "make watch": "make watch LOOKS=2",  # it would go on for ever
    "make demo-loop": ".venv/bin/marwright demo --help",  # tests/test_demo.py runs it
    "make serve RECIPE=images DATA=pictures.zip": "make serve RECIPE=images DATA=pictures.zip EPOCHS=2",
}


def commands() -> list[str]:
    """Every line of every sh block, without its comment."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_the_readme_begins_with_its_two_commands() -> None:
    assert commands()[:2] == ["make serve", "make test"]


@pytest.mark.server
def test_every_command_of_the_readme_works() -> None:
    with checkout.fresh() as project:
        _pictures(project)
        policy = project.root / "policies" / "digits.toml"  # as it is, with a shorter watch
        policy.write_text(policy.read_text(encoding="utf-8") + "[watch]\nseconds = 2.0\n", encoding="utf-8")
        port = re.search(
            r"^inference_address=.*:(\d+)$", (project.root / "config.properties").read_text(), re.MULTILINE
        )
        assert port
        said: dict[str, str] = {}
        activated = False
        for line in commands():
            typed = INSTEAD.get(line, line).replace(":8080/", f":{port[1]}/")
            if typed == "source .venv/bin/activate":
                activated = True  # a shell of its own for each line: each sources it again
                continue
            # What is learned from a few examples may be refused by the gate, which is no failure of the command.
            said[line] = project.shell(typed, activated=activated, check="retrain" not in line).stdout
        assert "16 of 16" in said["make serve"]
        assert "accuracy 0.9" in said["make serve"]
        assert "TorchServe is running" in said["make serve"]
        assert "passed" in said["make test"]
        assert "over REST" in said["make predict IMAGE=cat.png"]
        assert "digits 1.1 answers now (was 1.0)" in said["make rollout MODEL=digits"]
        assert "set-default" in said["make rollout MODEL=digits DRY_RUN=1"]
        assert "digits 1.0 answers again (was 1.1)" in said["make rollback MODEL=digits"]
        assert "rollback from 1.1: by hand" in said["make releases"]
        assert "1.1 answers now (was 1.0)" in said["make release VERSION=1.1"]
        assert "digits 1.0 is loaded" in said["make reconcile"] or "journal" in said["make reconcile"]
        assert "digits 1.2" in said["make retrain NEW=labelled"]
        assert "TorchServe is running" in said["MARWRIGHT_CAPTURE=1 make serve"]
        assert "predictions/feedback" in said["make collector"]
        assert "a turn would not learn" in said["make retrain DRY_RUN=1"]
        assert "nothing was collected" in said["make feedback"] or "digits" in said["make feedback"]
        assert "Longest pause between two answers" in said["make loadtest MODEL=digits RATE=50 SECONDS=5"]
        assert "digits" in said["make watch"]
        assert "integrated-gradients" in said["make explain IMAGE=cat.png MODEL=digits"]
        assert "<img" in (project.root / "explained.html").read_text(encoding="utf-8")
        with Image.open(project.root / "cat-explained.png") as map_over_it:
            assert map_over_it.format == "PNG"
        assert "images" in said["make serve RECIPE=images DATA=pictures.zip"]


def test_make_help_lists_every_target_of_the_readme() -> None:
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout
    listed = set(re.findall(r"^  make ([\w-]+) ", said, re.MULTILINE))
    declared = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert declared
    assert listed == set(declared[1].split())
    assert set(re.findall(r"make ([a-z-]+)", " ".join(commands()))) <= listed


def test_every_verb_has_a_file_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
        assert f"marwright {verb}" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["no-such-verb"]) == 2
    assert main(["train", "--no-such-option"]) == 2


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def _pictures(project: Project) -> None:
    """cat.png; pictures.zip with three kinds of stripes, forty of each; and `labelled`, digits with some noise."""
    noise = np.random.default_rng(7)
    Image.fromarray(noise.integers(0, 256, (40, 30, 3), np.uint8)).save(project.root / "cat.png")
    folder = project.root / "pictures"
    rows, columns = np.mgrid[0:64, 0:64]
    for name, stripes in {"across": rows, "down": columns, "slanting": rows + columns}.items():
        (folder / name).mkdir(parents=True)
        for number in range(40):
            values = (stripes + number) // 8 % 2 * 180 + noise.integers(0, 60, (64, 64))
            Image.fromarray(values.astype(np.uint8)).convert("RGB").save(folder / name / f"{number:02}.png")
    shutil.make_archive(str(project.root / "pictures"), "zip", folder)
    scans, labels = load_digits(return_X_y=True)
    for number, (scan, label) in enumerate(zip(scans[:300], labels[:300], strict=True)):
        values = np.clip(scan.reshape(8, 8) * 15 + noise.integers(0, 30, (8, 8)), 0, 255).astype(np.uint8)
        (project.root / "labelled" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(project.root / "labelled" / str(label) / f"{number:03}.png")
