"""What a new version has to show before it answers, how long it is watched, and when the next one is learned: one
strict TOML file.

    limits = policy.load(None, "digits")     # policies/digits.toml, else policies/default.toml, else the defaults
    limits.gate.margin                       # 0.02

Exactly one file counts, and a key that it leaves out has its default from here: files do not stack, so whoever reads
one has read all of it. `docs/policy.md` says why each default is what it is.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from marwright.errors import SettingsError

POLICIES = Path("policies")

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Megabytes = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Ratio = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Confidence = Annotated[float, Field(ge=0.5, lt=1)]
Count = Annotated[int, Field(ge=0, le=10**9)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ReadyPolicy(_Table):
    """A registered version becomes able to answer."""

    seconds: Seconds = 120.0
    """Until all workers are READY."""


class ShadowPolicy(_Table):
    """Requests are answered by both versions; callers get the champion's answer."""

    requests: Count = 200
    """Replayed to both, in turns, again and again where there are fewer; 0 leaves the phase out."""
    min_agreement: Share = 0.5
    """Share of requests with the same best label; of a regressor, with a value within 10 % of the champion's."""
    max_errors: Count = 0
    """Requests that the champion answers and the challenger does not."""
    max_latency_ratio: Ratio = 3.0
    """Of the medians, challenger to champion."""
    max_growth_mb: Megabytes = 50.0
    """MB (10⁶ bytes) that a worker of the challenger grows by while it answers, beyond the champion's own growth."""


class GatePolicy(_Table):
    """Limits of `gate.decide`."""

    margin: Annotated[float, Field(ge=0, lt=1)] = 0.005
    """Accuracy that may be lost, as a share of 1; of a regressor, a share of the champion's mean absolute error.

    0 wants proof that the challenger is better."""
    confidence: Confidence = 0.95
    """One-sided, of a whole rollout: the error is split over the looks."""
    looks: Annotated[int, Field(ge=1, le=20)] = 3
    """How often the gate may look, each time at more examples."""
    class_confidence: Confidence = 0.95
    """That no class is called worse which is not, over all classes (Holm) and all looks."""
    max_class_drop: Share = 0.05
    """Recall that one class may lose; a larger drop fails where it is also significant."""
    max_ece_rise: Share = 0.02
    """Expected calibration error, challenger minus champion."""
    max_latency_ratio: Ratio = 1.5
    """Median of the ratios of paired latencies, challenger to champion."""
    max_size_ratio: Ratio = 2.0
    """Bytes of the archive, challenger to champion."""
    max_memory_ratio: Ratio = 1.5
    """Bytes of the largest worker, challenger to champion."""


class WatchPolicy(_Table):
    """After the switch, while the champion is still warm."""

    seconds: Seconds = 30.0
    every: Seconds = 1.0
    """Seconds between two looks."""
    max_error_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Answers with 5xx among this version's own, as its handlers count them."""
    max_latency_ratio: Ratio = 3.0
    """Of the medians, after the switch to before it: of the watch's own requests, and of all that handlers timed."""
    max_p99_ratio: Ratio = 10.0
    """The same of the 99th percentiles, as handlers timed them."""
    max_confidence_drop: Share = 0.2
    """Mean top-1 probability of the champion's requests, minus that of this version's."""
    max_refused_rise: Share = 0.5
    """Share of predictions that this version refuses with 4xx, minus that of the champion."""
    min_requests: Count = 100
    """That callers must have made of either version before latencies, confidence and refusals are compared."""
    max_worker_restarts: Count = 0


class SettlePolicy(_Table):
    """The old version is drained, kept warm, retired."""

    idle_seconds: Seconds = 2.0
    """Without a request for the old version."""
    drain_seconds: Seconds = 60.0
    """Until it is idle; after that the rollout says what still uses it."""
    warm_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 600.0
    """That the old version stays loaded, so that a rollback is one call."""


class ServerPolicy(_Table):
    """Patience with TorchServe."""

    answer_seconds: Seconds = 5.0
    """How long one answer is waited for."""
    call_seconds: Seconds = 30.0
    """How long one call is insisted on, retries included, before its phase fails."""


class TriggerPolicy(_Table):
    """When to learn again: `feedback.trigger.should_retrain`. Whichever comes first."""

    min_labels: Annotated[int, Field(ge=1, le=10**9)] = 200
    """New labelled examples that are reason enough."""
    floor: Annotated[int, Field(ge=1, le=10**9)] = 30
    """New labelled examples below which nothing else is a reason: there would be nothing to learn from."""
    days: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Since the champion was released; 0 keeps no schedule."""
    min_accuracy: Share = 0.0
    """Live accuracy that the champion must hold; 0 does not ask."""
    accuracy_false_alarm: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Probability that a champion which holds it is ever called worse, however often one looks."""
    drift_false_alarm: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Probability that one look at undrifted requests finds drift, over all its tests together."""
    drift_window: Annotated[int, Field(ge=20, le=100_000)] = 500
    """Latest requests that are compared with the reference."""
    drift_looks: Annotated[int, Field(ge=1, le=100)] = 2
    """Looks one after another that must find drift before it is a reason."""


class LearnPolicy(_Table):
    """What is learned from, and how."""

    method: Literal["scratch", "warm", "finetune", "replay", "derpp", "head"] = "warm"
    """See `learning.methods`."""
    conflict: Literal["last", "first", "majority"] = "last"
    """Which of several labels of one request counts."""
    max_source_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of the new examples of a class, how many may come from one source; 1 does not ask."""
    judge_share: Annotated[float, Field(gt=0, lt=0.9)] = 0.3
    """Of the new examples, the latest: the judge's alone."""


class JudgePolicy(_Table):
    """Whether what was learned may go on to an archive: on the old holdout and on the new one."""

    max_forgetting: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Accuracy on the old holdout that may be lost, as a share of 1."""
    confidence: Confidence = 0.95
    """One-sided, of each of the two."""
    min_examples: Annotated[int, Field(ge=1, le=10**9)] = 30
    """Of the new holdout; with fewer nothing is judged, and nothing released."""
    max_label_noise: Share = 0.15
    """Estimated share of wrong labels, in any class of the new examples."""


class KeepPolicy(_Table):
    """What is kept for how long; `marwright retrain` removes the rest in each turn, `marwright prune` at any time."""

    versions: Annotated[int, Field(ge=1, le=10**6)] = 10
    """Archives that answered last, whatever else may answer or was built last."""
    days: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 365.0
    """Labelled requests, since their answer."""
    unlabelled_days: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0
    """Requests without a label."""


class Policy(_Table):
    """All limits of a rollout, and of the loop that leads to one. `Policy()` is the default."""

    ready: ReadyPolicy = ReadyPolicy()
    shadow: ShadowPolicy = ShadowPolicy()
    gate: GatePolicy = GatePolicy()
    watch: WatchPolicy = WatchPolicy()
    settle: SettlePolicy = SettlePolicy()
    server: ServerPolicy = ServerPolicy()
    trigger: TriggerPolicy = TriggerPolicy()
    learn: LearnPolicy = LearnPolicy()
    judge: JudgePolicy = JudgePolicy()
    keep: KeepPolicy = KeepPolicy()

    def to_dict(self) -> dict[str, Any]:
        """Every key, defaults filled in; what the journal holds. `from_dict` gives it back."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], *, origin: str = "policy") -> Policy:
        """Parse and validate; a `SettingsError` lists all that is wrong."""
        try:
            return cls.model_validate(dict(document))
        except ValidationError as error:
            problems = [_sentence(dict(one)) for one in error.errors()]
        lines = "\n".join(f"  - {problem}" for problem in problems)
        count = "one thing" if len(problems) == 1 else f"{len(problems)} things"
        raise SettingsError(
            f"{origin}: {count} not allowed\n{lines}", hint="policies/default.toml shows every key with its default"
        )


def load(path: Path | None, model: str, *, folder: Path = POLICIES) -> Policy:
    """The policy in `path`, else in `folder/<model>.toml`, else in `folder/default.toml`, else the defaults."""
    if path is None:
        path = next((one for one in (folder / f"{model}.toml", folder / "default.toml") if one.is_file()), None)
        if path is None:
            return Policy()
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"the policy {path} cannot be read: {error.strerror}", hint="copy policies/default.toml, or leave it out"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not TOML: {error}", hint="compare it with policies/default.toml") from None
    return Policy.from_dict(document, origin=str(path))


def _sentence(error: dict[str, Any]) -> str:
    """One pydantic complaint → `key is value; allowed: …`."""
    *tables, last = (str(step) for step in error["loc"])
    key = ".".join((*tables, last))
    if error["type"] == "extra_forbidden":
        table: Any = Policy.model_fields[tables[0]].annotation if tables else Policy
        allowed = sorted(table.model_fields)
        close = difflib.get_close_matches(last, allowed, n=1)
        return f"{key} is unknown{f' (did you mean {close[0]}?)' if close else ''}; allowed: {', '.join(allowed)}"
    if error["type"] == "model_type":
        return f"{key} is {error['input']!r}; allowed: a table, [{key}]"
    return f"{key} is {error['input']!r}; allowed: {error['msg'].removeprefix('Input should be ')}"
