"""What `deploy/` runs by a timer: systemd takes the units, our command line takes the words, the manifest is whole."""

from __future__ import annotations

import configparser
import importlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml

from marwright.settings import (
    FeedbackCollectorSettings,
    Places,
    RetrainSettings,
    ServeSettings,
    StopSettings,
)
from scripts.__main__ import VERBS

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
SERVICE = DEPLOY / "systemd" / "marwright-retrain@.service"
TIMER = DEPLOY / "systemd" / "marwright-retrain@.timer"
CRONTAB = DEPLOY / "cron" / "crontab"
KUBERNETES = DEPLOY / "kubernetes" / "marwright.yaml"
HOME = "/opt/marwright"


def parsed(words: Sequence[str]) -> Any:
    """The settings that a command line makes, as `marwright` itself parses it."""
    program, verb, *rest = words
    assert program in ("marwright", ".venv/bin/marwright", f"{HOME}/.venv/bin/marwright")
    assert verb in VERBS
    module = importlib.import_module(f"scripts.{verb}")
    if hasattr(module, "PARTS"):
        return tyro.cli(module.PARTS[rest[0]][0], args=rest[1:])
    return tyro.cli(module.SETTINGS, args=rest)


def unit(path: Path) -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None, strict=False, delimiters=("=",))
    found.optionxform = str  # type: ignore[method-assign,assignment]
    found.read_string(path.read_text(encoding="utf-8"))
    return found


def documents() -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(KUBERNETES.read_text(encoding="utf-8")) if one]


def named(kind: str) -> dict[str, Any]:
    [found] = [one for one in documents() if one["kind"] == kind]
    return found


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command of ours in `deploy/`, as words."""
    yield "systemd", shlex.split(unit(SERVICE)["Service"]["ExecStart"].replace("%i", "digits"))
    for line in CRONTAB.read_text(encoding="utf-8").splitlines():
        yield from (("cron", words) for words in _ours(line) if not line.startswith("#"))
    [server] = named("StatefulSet")["spec"]["template"]["spec"]["containers"]
    yield from (("pod", words) for words in _ours(server["command"][-1]))
    yield "stop", server["lifecycle"]["preStop"]["exec"]["command"]
    [turn] = named("CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    yield "job", turn["command"][turn["command"].index("--") + 1 :]


def _ours(line: str) -> Iterator[list[str]]:
    for part in re.split(r"&&|\||;", line):
        words = shlex.split(part)
        places = [index for index, word in enumerate(words) if word.endswith("/marwright") and word != HOME]
        for index in places:
            yield [word for word in words[index:] if not re.match(r"\d*>", word)]


def test_every_command_in_deploy_is_one_that_our_command_line_takes() -> None:
    found = [(where, parsed(words)) for where, words in commands()]
    kinds = [(where, type(settings)) for where, settings in found]
    assert kinds == [
        ("systemd", RetrainSettings),
        ("cron", RetrainSettings),
        ("pod", ServeSettings),
        ("pod", FeedbackCollectorSettings),
        ("stop", StopSettings),
        ("job", RetrainSettings),
    ]
    for _, settings in found:
        if isinstance(settings, RetrainSettings):
            assert (settings.once, settings.every, settings.recipe) == (True, None, "digits")


def test_a_command_that_is_not_ours_any_more_would_be_noticed() -> None:
    with pytest.raises(SystemExit):
        parsed(["marwright", "retrain", "--twice"])


def test_the_timer_makes_up_for_what_was_missed_and_the_service_is_no_danger_to_the_server() -> None:
    timer, service = unit(TIMER)["Timer"], unit(SERVICE)["Service"]
    assert timer["Persistent"] == "true"
    assert timer["RandomizedDelaySec"]
    assert unit(TIMER)["Install"]["WantedBy"] == "timers.target"
    assert service["Type"] == "oneshot"
    assert service["PrivateTmp"] == "no", "the server's pid file is in /tmp"
    assert service["SuccessExitStatus"].split() == ["3", "130"]
    assert service["KillSignal"] == "SIGINT"


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: the units are not verified (Debian: apt-get install systemd)")
    program = tmp_path / "marwright"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for path in (SERVICE, TIMER):
        text = path.read_text(encoding="utf-8").replace(f"{HOME}/.venv/bin/marwright", str(program))
        (tmp_path / path.name.replace("@.", "@digits.")).write_text(text, encoding="utf-8")
    assert _verified(tmp_path) == ""
    service = tmp_path / "marwright-retrain@digits.service"
    service.write_text(service.read_text(encoding="utf-8").replace("KillSignal=SIGINT", "KillSignal=SIGWHAT"))
    assert "SIGWHAT" in _verified(tmp_path), "systemd-analyze notices nothing here"


def _verified(folder: Path) -> str:
    """What systemd says against the units in a folder, of them alone."""
    units = sorted(str(path) for path in folder.glob("marwright-*"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *units],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return "\n".join(line for line in done.stderr.splitlines() if "marwright" in line)


def test_the_crontab_has_five_fields_and_no_percent_sign() -> None:
    lines = [line for line in CRONTAB.read_text(encoding="utf-8").splitlines() if re.match(r"[\d*]", line)]
    assert len(lines) == 1
    assert all(re.fullmatch(r"[\d*/,-]+", field) for field in lines[0].split()[:5])
    assert "%" not in lines[0], "cron takes it for a line break"


def test_the_job_forbids_two_at_a_time_and_may_reach_the_server_pod_alone() -> None:
    job, role, binding = named("CronJob"), named("Role"), named("RoleBinding")
    assert job["spec"]["concurrencyPolicy"] == "Forbid"
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    [turn] = pod["containers"]
    assert turn["command"][:2] == ["kubectl", "exec"]
    target = turn["command"][2]
    assert target == f"{named('StatefulSet')['metadata']['name']}-0"
    granted = {resource: rule for rule in role["rules"] for resource in rule["resources"]}
    assert granted.keys() == {"pods", "pods/exec"}
    assert all(rule["resourceNames"] == [target] for rule in granted.values())
    assert set(granted["pods/exec"]["verbs"]) == {"create", "get"}
    account = named("ServiceAccount")["metadata"]["name"]
    assert pod["serviceAccountName"] == binding["subjects"][0]["name"] == account
    assert binding["roleRef"]["name"] == role["metadata"]["name"]


def test_the_pod_keeps_what_must_outlive_it() -> None:
    spec = named("StatefulSet")["spec"]
    assert spec["replicas"] == 1
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    [server] = spec["template"]["spec"]["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in server["volumeMounts"]}
    places = Places()
    assert set(mounts.values()) == {f"{HOME}/{folder}" for folder in (places.store, places.runs, places.feedback)}
    assert server["workingDir"] == HOME
    claims = {claim["metadata"]["name"]: claim["spec"] for claim in spec["volumeClaimTemplates"]}
    assert claims.keys() == mounts.keys()
    assert all(claim["accessModes"] == ["ReadWriteOnce"] for claim in claims.values())


def test_kubernetes_names_and_kinds_are_well_formed() -> None:
    apis = {
        "ServiceAccount": "v1",
        "Role": "rbac.authorization.k8s.io/v1",
        "RoleBinding": "rbac.authorization.k8s.io/v1",
        "StatefulSet": "apps/v1",
        "CronJob": "batch/v1",
    }
    assert {one["kind"]: one["apiVersion"] for one in documents()} == apis
    assert len(documents()) == len(apis)
    for one in documents():
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", one["metadata"]["name"])
