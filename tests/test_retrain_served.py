"""The whole loop with a real TorchServe: labels in, a better version out; killed half-way; a worse one refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import checkout
from tests.checkout import Project

pytestmark = pytest.mark.server

POLICY = """
[shadow]
requests = 30

[gate]
margin = 0.03
looks = 1

[watch]
seconds = 4.0

[settle]
warm_seconds = 60.0
"""
RETRAIN = "marwright retrain --epochs 4 --policy fast.toml"


@pytest.fixture(scope="module")
def project() -> Iterator[Project]:
    with checkout.fresh("retrain") as made:
        (made.root / "fast.toml").write_text(POLICY, encoding="utf-8")
        made.make("serve", "EPOCHS=4")
        yield made


def label(folder: Path, count: int, *, seed: int, off: int = 0) -> None:
    """Noisy digits, as somebody labelled them; `off` is added to every label."""
    from sklearn.datasets import load_digits

    found, random = load_digits(), np.random.default_rng(seed)
    for i in random.choice(len(found.images), count, replace=False):
        grey = np.clip(found.images[i] * 255 / 16 + random.normal(0, 20, (8, 8)), 0, 255).astype(np.uint8)
        target = folder / str((int(found.target[i]) + off) % 10)
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey).save(target / f"{seed}-{i}.png")


def test_the_loop_goes_on_after_a_kill_and_stops_what_is_worse(project: Project) -> None:
    new = project.root / "new" / "digits"
    assert ": nothing new: 0 new examples" in project.shell(RETRAIN).stdout

    label(new, 300, seed=1)
    killed = project.shell(
        f"{{ {RETRAIN} > turn.log 2>&1 & }}; pid=$!; for _ in $(seq 2000); do"
        " grep -q 'watching for' turn.log && break; kill -0 $pid || break; sleep 0.1; done; kill -9 $pid; cat turn.log"
    ).stdout
    assert "watching for 4 s" in killed
    assert "settled" not in killed
    said = project.shell(RETRAIN).stdout
    assert ": nothing new: the interrupted rollout of 1.1 is settled; 0 new examples" in said
    assert "1.1" in project.shell("marwright status | grep answers").stdout

    label(new, 1500, seed=2, off=1)
    refused = project.shell(RETRAIN, check=False)
    assert refused.returncode == 3, refused.stdout
    assert "gated: the gate says no" in refused.stdout
    again = project.shell(f"{RETRAIN} --every 1s --turns 2").stdout
    assert len(re.findall(r": refused before: .*1500 new examples; ", again)) == 2  # what it retired may come between
    assert "1.1" in project.shell("marwright status | grep answers").stdout
