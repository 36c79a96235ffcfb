"""The Grafana dashboard: the one source of `deploy/grafana/marwright.json`.

    python -m marwright.release.dashboard          # writes that file; a test holds that it is up to date

Rates and ratios that an alert looks at are its recording rules (`deploy/rules`), so that the picture and the alert
cannot differ. It is made with Grafana's own types, which are among the packages for tests: no command imports this.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, StackingMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableOption, VariableRefresh

FILE = Path("deploy/grafana/marwright.json")

_SOURCE = DataSourceRef("prometheus", "${datasource}")
_CHOSEN = 'model_name=~"$model", model_version=~"$version"'
_NAME = "{{model_name}} {{model_version}}"
_WIDTH, _HEIGHT = 8, 7


@dataclass(frozen=True)
class Plot:
    """One panel: curves as (query, legend). `unit` is one of Grafana's; `says` is what its ⓘ tells."""

    title: str
    unit: str
    curves: tuple[tuple[str, str], ...]
    says: str = ""
    shares: bool = False
    """Stacked to 100 %."""


def _sum(metric: str, *labels: str) -> str:
    """Per second, by version and `labels`."""
    by = ", ".join(("model_name", "model_version", *labels))
    return f"sum by ({by}) (rate({metric}{{{_CHOSEN}}}[$__rate_interval]))"


def _mean(metric: str) -> str:
    """Of a histogram, or of a sum and a count; nothing where there was nothing to count."""
    return f"{_sum(metric + '_sum')} / ({_sum(metric + '_count')} > 0)"


def _quantile(share: float, metric: str) -> str:
    """Of a histogram; `>= 0` leaves out the NaN of no observations."""
    return f"histogram_quantile({share:g}, {_sum(metric + '_bucket', 'le')}) >= 0"


ROWS: tuple[tuple[str, tuple[Plot, ...]], ...] = (
    (
        "Answers",
        (
            Plot(
                "Requests by version",
                "reqps",
                ((f"model_version:marwright_requests:rate5m{{{_CHOSEN}}}", _NAME),),
                "Answers of the handlers, good or bad, whichever URL they came by.",
            ),
            Plot(
                "Failed requests",
                "percentunit",
                ((f"model_version:marwright_failures:ratio5m{{{_CHOSEN}}}", _NAME),),
                "Answered with 5xx. 501 (no explanations in this archive) is not among them.",
            ),
            Plot(
                "Refused and failed, by kind",
                "reqps",
                ((_sum("marwright_errors_total", "call", "kind"), f"{_NAME} {{{{call}}}}: {{{{kind}}}}"),),
                "All kinds but `failed` are the caller's.",
            ),
        ),
    ),
    (
        "Time",
        (
            Plot(
                "Time in the handler",
                "s",
                (
                    (f"model_version:marwright_handle_seconds:p50_5m{{{_CHOSEN}}}", f"{_NAME} p50"),
                    (f"model_version:marwright_handle_seconds:p99_5m{{{_CHOSEN}}}", f"{_NAME} p99"),
                ),
                "Of the batch that a request was in, without the wait in TorchServe's queue.",
            ),
            Plot(
                "Decoding, inference, explaining: p95",
                "s",
                (
                    (_quantile(0.95, "marwright_decode_seconds"), f"{_NAME} decode"),
                    (_quantile(0.95, "marwright_inference_seconds"), f"{_NAME} inference"),
                    (_quantile(0.95, "marwright_explain_seconds"), f"{_NAME} explain"),
                ),
            ),
            Plot(
                "Requests in a batch",
                "short",
                (
                    (f"model_version:marwright_batch_size:mean5m{{{_CHOSEN}}}", f"{_NAME} mean"),
                    (_quantile(0.95, "marwright_batch_size"), f"{_NAME} p95"),
                ),
            ),
        ),
    ),
    (
        "What it sees and says",
        (
            Plot(
                "Confidence",
                "percentunit",
                (
                    (f"model_version:marwright_confidence:mean30m{{{_CHOSEN}}}", f"{_NAME} half an hour"),
                    (f"model_version:marwright_confidence:mean1d{{{_CHOSEN}}}", f"{_NAME} the day before it"),
                ),
                "Mean probability of the top-1 class. An unchanged version that grows unsure sees other input.",
            ),
            Plot(
                "Entropy",
                "percentunit",
                ((f"model_version:marwright_entropy:mean5m{{{_CHOSEN}}}", _NAME),),
                "Of the probabilities: 0 is sure, 1 is any class alike.",
            ),
            Plot(
                "Class mix",
                "percentunit",
                (
                    (
                        f"{_sum('marwright_predictions_total', 'class')} / on (model_name, model_version)"
                        f" group_left () ({_sum('marwright_predictions_total')} > 0)",
                        f"{_NAME}: {{{{class}}}}",
                    ),
                ),
                "Top-1 classes, as shares of their version's; beyond the first 100 they are (other).",
                shares=True,
            ),
            Plot(
                "Brightness and contrast",
                "percentunit",
                (
                    (_mean("marwright_brightness"), f"{_NAME} brightness"),
                    (_mean("marwright_contrast"), f"{_NAME} contrast"),
                ),
                "Mean and standard deviation of an image's pixels.",
            ),
        ),
    ),
    (
        "Releases and workers",
        (
            Plot(
                "Workers",
                "short",
                (
                    (f"marwright_workers_ready{{{_CHOSEN}}}", f"{_NAME} ready"),
                    (f"marwright_workers_wanted{{{_CHOSEN}}}", f"{_NAME} wanted"),
                ),
            ),
            Plot(
                "The version that answers",
                "bool_yes_no",
                (
                    (f"marwright_default_version{{{_CHOSEN}}}", f"{_NAME} answers"),
                    (f"marwright_journal_version{{{_CHOSEN}}}", f"{_NAME} should"),
                ),
                "Where the two differ, `marwright reconcile`.",
            ),
            Plot(
                "Rollout under way",
                "short",
                ((f"marwright_rollout_phase{{{_CHOSEN}}}", f"{_NAME}: {{{{phase}}}}"),),
                "Empty while none runs.",
            ),
            Plot(
                "Rollouts ended",
                "short",
                (('marwright_rollouts_total{model_name=~"$model"}', "{{model_name}}: {{outcome}}"),),
                "Since the journal began.",
            ),
            Plot(
                "Start of a worker",
                "s",
                (
                    (
                        f"marwright_load_seconds_sum{{{_CHOSEN}}} / (marwright_load_seconds_count{{{_CHOSEN}}} > 0)",
                        f"{_NAME} loading",
                    ),
                    (
                        f"marwright_warm_up_seconds_sum{{{_CHOSEN}}}"
                        f" / (marwright_warm_up_seconds_count{{{_CHOSEN}}} > 0)",
                        f"{_NAME} warm-up",
                    ),
                ),
                "Mean of all starts so far.",
            ),
            Plot(
                "Worker starts",
                "short",
                ((f"marwright_load_seconds_count{{{_CHOSEN}}}", _NAME),),
                "One for each worker, and one more each time that one died.",
            ),
        ),
    ),
    (
        "Feedback",
        (
            Plot(
                "Live accuracy",
                "percentunit",
                (
                    (f"marwright_live_accuracy{{{_CHOSEN}}}", _NAME),
                    (f"marwright_live_accuracy_low{{{_CHOSEN}}}", f"{_NAME} at least"),
                    (f"marwright_live_accuracy_high{{{_CHOSEN}}}", f"{_NAME} at most"),
                ),
                "By the labels that came back; the bounds are those of 95 %.",
            ),
            Plot(
                "Drift: p of each test",
                "percentunit",
                ((f"marwright_drift_p{{{_CHOSEN}}}", f"{_NAME} {{{{test}}}}"),),
                "Corrected for all tests of a look: what is below the policy's false alarm rate, 5 %, has drifted.",
            ),
            Plot(
                "Looks in a row that found drift",
                "short",
                ((f"marwright_drift_looks{{{_CHOSEN}}}", _NAME),),
            ),
            Plot(
                "Labels",
                "short",
                (
                    (f"marwright_live_labels{{{_CHOSEN}}}", _NAME),
                    ("marwright_feedback_unknown_labels", "of unknown requests"),
                ),
            ),
            Plot(
                "From an answer to its label",
                "s",
                (
                    (
                        'marwright_feedback_label_lag_seconds{model_name=~"$model"}',
                        "{{model_name}} quantile {{quantile}}",
                    ),
                ),
            ),
            Plot(
                "Captured and dropped",
                "reqps",
                (
                    (_sum("marwright_captured_total"), f"{_NAME} captured"),
                    (_sum("marwright_capture_dropped_total", "reason"), f"{_NAME} dropped: {{{{reason}}}}"),
                ),
                "What is dropped is missing in the spool, and was answered all the same.",
            ),
            Plot(
                "Since the last turn of the loop",
                "s",
                (
                    (
                        'time() - marwright_turn_timestamp_seconds{model_name=~"$model"}'
                        ' * on (model_name) group_right () marwright_turn_phase{model_name=~"$model"}',
                        "{{model_name}}: {{phase}}",
                    ),
                ),
            ),
        ),
    ),
    (
        "TorchServe and its host",
        (
            Plot(
                "Up",
                "bool_on_off",
                (
                    ("marwright_server_up", "TorchServe answers"),
                    ("up", "scrape of {{job}}"),
                ),
            ),
            Plot(
                "Answers by TorchServe",
                "reqps",
                (("sum by (code) (instance_code:torchserve_answers:rate5m)", "{{code}}"),),
                "All of its ports, and what never reached a handler: 503 is a full queue or no ready worker.",
            ),
            Plot(
                "Wait in the queue",
                "s",
                (
                    (
                        'sum by (model_name) (rate(ts_queue_latency_microseconds{model_name=~"$model"}'
                        "[$__rate_interval])) / 1e6 / (sum by (model_name) (rate(ts_inference_requests_total"
                        '{model_name=~"$model"}[$__rate_interval])) > 0)',
                        "{{model_name}} mean",
                    ),
                    ("QueueTime / 1000", "the last request's"),
                ),
                "Batching delay included. TorchServe does not know the version of a request without one in its URL.",
            ),
            Plot(
                "CPU, memory and disk of the host",
                "percent",
                (
                    ("CPUUtilization", "CPU"),
                    ("MemoryUtilization", "memory"),
                    ("DiskUtilization", "disk"),
                ),
            ),
            Plot(
                "Exporter's failed looks",
                "short",
                (("marwright_exporter_errors_total", "{{source}}"),),
            ),
            Plot(
                "Alerts",
                "short",
                (
                    (
                        'sum by (alertname, model_name, model_version) (ALERTS{alertname=~"Marwright.*",'
                        ' alertstate="firing"})',
                        "{{alertname}} " + _NAME,
                    ),
                ),
                "Empty is well.",
            ),
        ),
    ),
)


def as_json() -> str:
    """The dashboard as Grafana imports it."""
    made = (
        dashboard.Dashboard("Marwright")
        .uid("marwright")
        .tags(["torchserve", "marwright"])
        .description("What each version does, and why. Made by marwright/release/dashboard.py: change it there.")
        .refresh("15s")
        .time("now-1h", "now")
        .timezone("browser")
        .readonly()
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(_choice("model", "label_values(marwright_requests_total, model_name)"))
        .with_variable(
            _choice("version", 'label_values(marwright_requests_total{model_name=~"$model"}, model_version)')
        )
    )
    number = 1
    for title, plots in ROWS:
        made = made.with_row(dashboard.Row(title).id(number))
        number += 1
        for plot in plots:
            made = made.with_panel(_panel(number, plot))
            number += 1
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


# -------------------------------------------------------------------- private


def _choice(name: str, query: str) -> dashboard.QueryVariable:
    """A variable with all its values chosen at first."""
    return (
        dashboard.QueryVariable(name)
        .label(name)
        .datasource(_SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


def _panel(number: int, plot: Plot) -> timeseries.Panel:
    legend = (
        common.VizLegendOptions()
        .show_legend(True)
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
    )
    panel = (
        timeseries.Panel()
        .id(number)
        .title(plot.title)
        .description(plot.says)
        .datasource(_SOURCE)
        .unit(plot.unit)
        .min(0)
        .span(_WIDTH)
        .height(_HEIGHT)
        .legend(legend)
    )
    if plot.shares:
        panel = panel.stacking(common.StackingConfig().mode(StackingMode.PERCENT)).fill_opacity(40)
    for letter, (query, name) in zip("ABCDEF", plot.curves, strict=False):
        panel = panel.with_target(
            prometheus.Dataquery().ref_id(letter).datasource(_SOURCE).expr(query).legend_format(name).range()
        )
    return panel


if __name__ == "__main__":
    FILE.write_text(as_json(), encoding="utf-8")
