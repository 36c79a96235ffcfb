"""Prometheus' configuration, rules and dashboard: as files, and in a real Prometheus beside a real server."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
import yaml

from marwright.release import dashboard
from marwright.release.properties import ServerConfig
from marwright.settings import ExporterSettings
from scripts.__main__ import VERBS
from tests import monitoring, prometheus, torchserve
from tests.archives import Built
from tests.monitoring import Scene

DEPLOY = monitoring.DEPLOY
ALERTS = [rule for rule in monitoring.rules() if "alert" in rule]
TESTS = sorted((DEPLOY / "rules" / "tests").glob("*.yml"))


# -------------------------------------------------------------------- the files


def test_the_dashboard_is_the_one_that_its_source_makes() -> None:
    committed = (torchserve.PROJECT / dashboard.FILE).read_text(encoding="utf-8")
    assert committed == dashboard.as_json(), "python -m marwright.release.dashboard writes it"


def test_prometheus_scrapes_where_the_server_and_the_exporter_listen() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    metrics = ServerConfig.from_file(torchserve.PROJECT / "config.properties").metrics_url
    assert targets == {
        "torchserve": [metrics.removeprefix("http://")],
        "marwright": [f"127.0.0.1:{ExporterSettings.port}"],
    }


def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    done = prometheus.promtool("check", "config", "prometheus.yml", cwd=DEPLOY)
    assert done.returncode == 0, done.stdout
    assert f"SUCCESS: {len(monitoring.rules())} rules found" in done.stdout


def test_alerts_fire_when_they_should_and_only_then() -> None:
    done = prometheus.promtool("test", "rules", *TESTS, cwd=DEPLOY)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("alert", [rule["alert"] for rule in ALERTS])
def test_every_alert_has_a_case_in_which_it_fires(alert: str) -> None:
    expected = [
        sample["labels"]
        for path in TESTS
        for case in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]
        for asked in case["promql_expr_test"]
        for sample in asked["exp_samples"]
        if "labels" in sample
    ]
    assert any(f'alertname="{alert}", alertstate="firing"' in labels for labels in expected)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda rule: rule["alert"])
def test_what_an_alert_says_to_type_exists(alert: dict[str, dict[str, str]]) -> None:
    says = alert["annotations"]["description"]
    commands = [command.split() for command in re.findall(r"`([^`]+)`", says)]
    assert [words for words in commands if words[0] == "marwright"], "it says nothing to type"
    for words in commands:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (torchserve.PROJECT / "Makefile").read_text(encoding="utf-8"), re.M)
        if words[0] == "marwright":
            assert words[1] in VERBS
            options = {word.removeprefix("--") for word in words if word.startswith("--")}
            module = importlib.import_module(f"scripts.{words[1]}")
            settings = module.PARTS[words[2]][0] if hasattr(module, "PARTS") else module.SETTINGS
            assert options <= {field.name for field in dataclasses.fields(settings)}


# -------------------------------------------------------------------- live


@pytest.fixture(scope="module")
def scene(digits: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    prometheus.folder()  # skips before anything is started
    with monitoring.watched(digits, tmp_path_factory.mktemp("watched")) as scene:
        yield scene


@pytest.mark.server
def test_every_query_of_the_dashboard_and_of_the_rules_has_an_answer(scene: Scene) -> None:
    found = monitoring.results(scene.prometheus, seconds=90)
    empty = [f"{query.where}: {query.asked}" for query, samples in found.items() if not samples]
    assert not empty, "\n".join(empty)
    for query, samples in found.items():
        assert all(math.isfinite(value) for _, value in samples), (query, samples)
    _wait(lambda: scene.prometheus.targets() == {"torchserve": "up", "marwright": "up"})  # a busy machine misses one
    assert {rule["health"] for rule in scene.prometheus.rules()} == {"ok"}


@pytest.mark.server
def test_prometheus_counts_what_was_asked(scene: Scene) -> None:
    """Both versions, under their own numbers, whichever URL a request came by; bad requests as bad ones."""
    wanted = {(version, "predict", code) for version in ("1.0", "1.1") for code in ("200", "415")}
    wanted |= {("1.0", "explain", "501"), ("1.1", "explain", "200")}

    def seen() -> set[tuple[str, str, str]]:
        asked = scene.prometheus.query("marwright_requests_total > 0")
        return {(labels["model_version"], labels["call"], labels["code"]) for labels, _ in asked}

    _wait(lambda: wanted <= seen())
    assert _value(scene, 'model_version:marwright_failures:ratio5m{model_version="1.0"}') == 0, "501 is no failure"
    _wait(lambda: _value(scene, 'marwright_default_version{model_version="1.0"}') == 1)
    _wait(lambda: _value(scene, 'marwright_journal_version{model_version="1.1"}') == 0)
    _wait(lambda: _value(scene, 'marwright_rollout_phase{model_version="1.1", phase="verified"}') == 1)
    _wait(lambda: (_value(scene, 'marwright_captured_total{model_version="1.0"}') or 0) > 0)
    _wait(lambda: _value(scene, 'marwright_live_labels{model_version="1.0"}') == 60)
    _wait(lambda: _value(scene, "marwright_feedback_unknown_labels") == 1)


@pytest.mark.server
def test_an_alert_tells_of_a_worker_that_died(scene: Scene) -> None:
    fired = 'count_over_time(ALERTS{alertname="MarwrightWorkerDead", alertstate="firing", model_version="1.1"}[10m])'
    assert not scene.prometheus.query(fired)
    worker = scene.client.describe("digits", "1.1")[0].workers[0]
    psutil.Process(worker.pid).kill()
    _wait(lambda: bool(scene.prometheus.query(fired)))
    _wait(lambda: "MarwrightWorkerDead" not in _firing(scene))
    assert scene.client.describe("digits", "1.1")[0].workers[0].pid != worker.pid


@pytest.mark.server
def test_an_alert_tells_of_a_version_that_should_not_answer(scene: Scene) -> None:
    assert "MarwrightWrongVersion" not in _firing(scene)
    scene.client.set_default("digits", "1.1")
    _wait(lambda: _firing(scene).get("MarwrightWrongVersion") == "1.0")
    scene.client.set_default("digits", "1.0")
    _wait(lambda: "MarwrightWrongVersion" not in _firing(scene))


@pytest.mark.server
def test_alerts_tell_of_an_exporter_and_a_server_that_are_gone(scene: Scene) -> None:
    """The last of the tests with this scene: nothing is left of it."""
    _wait(lambda: not _firing(scene).keys() & {"MarwrightServerDown", "MarwrightExporterDown"})
    scene.home.server.stop(timeout=30.0)
    _wait(lambda: _value(scene, "marwright_server_up") == 0)
    _wait(lambda: _value(scene, 'marwright_journal_version{model_version="1.0"}') == 1)  # it needs no server
    assert not scene.prometheus.query("marwright_default_version")
    _wait(lambda: "MarwrightServerDown" in _firing(scene))
    assert "MarwrightWrongVersion" not in _firing(scene)
    scene.exporter.close()
    _wait(lambda: "MarwrightExporterDown" in _firing(scene))
    assert "MarwrightServerDown" in _firing(scene), "the metrics cannot be read, either"


def _firing(scene: Scene) -> dict[str, str]:
    """The version that an alert is about, by alert; "" where it is about none."""
    return {each["alertname"]: each.get("model_version", "") for each in scene.prometheus.firing()}


def _value(scene: Scene, expression: str) -> float | None:
    samples = scene.prometheus.query(expression)
    return samples[0][1] if len(samples) == 1 else None


def _wait(ready: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.2)
