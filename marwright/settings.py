"""Options of every command: one frozen dataclass each. The command lines are derived from them by tyro.

`Places` is what all of them share: where the recipes, the runs, the store and the server's configuration are. Defaults
are relative to the working directory, which is the checkout for every Make target.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where things are."""

    store: Path = Path("model_store")
    """Folder of the archives, their records and the journal."""
    config: Path = Path("config.properties")
    """TorchServe's hand-written configuration."""
    runs: Path = Path("runs")
    """Folder of training runs."""
    recipes: Path = Path("recipes")
    """Folder of recipes."""
    feedback: Path = Path("feedback")
    """Folder of captured requests and of labels: the spool, the bodies, the database."""
    database: str | None = None
    """SQLAlchemy URL of the feedback database; MARWRIGHT_DATABASE, else a SQLite file in the feedback folder."""
    json: bool = False
    """Print one JSON document instead of tables and sentences."""

    @property
    def serving(self) -> Path:
        """The generated configuration that TorchServe reads."""
        return self.store / "serving.properties"

    @property
    def spool(self) -> Path:
        """Where the workers leave what they captured and the labels that they were sent."""
        return self.feedback / "spool"

    @property
    def home(self) -> Path:
        """Working directory of the server: its logs and key_file.json land here."""
        return self.config.resolve().parent


@dataclass(frozen=True, kw_only=True)
class RecipeChoice(Places):
    """What to train, and on what."""

    recipe: Annotated[str, tyro.conf.arg(aliases=["-r"])] = "digits"
    """Name of a file in recipes/, or a path to a .toml file."""
    data: Path | None = None
    """Folder or zip with the examples, instead of the recipe's own source."""
    epochs: int | None = None
    """Instead of the recipe's."""
    seed: int | None = None
    """Instead of the recipe's."""
    batch_size: int | None = None
    """Training batch, instead of the recipe's."""
    lr: float | None = None
    """Learning rate, instead of the recipe's."""

    def overrides(self) -> dict[str, object]:
        """The recipe's training options that were given on the command line."""
        given = {"epochs": self.epochs, "seed": self.seed, "batch_size": self.batch_size, "lr": self.lr}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class TrainSettings(RecipeChoice):
    """Train a recipe. A run that is there already is not trained again."""

    resume: bool = True
    """Go on from the last whole epoch of an interrupted run, to the same result; or begin again."""
    nproc: int = 1
    """Processes on this machine that train together (torchrun); on a machine with CUDA, one for each device."""
    torchrun: str = ""
    """Options of torchrun's own, for several machines: --torchrun="--nnodes=2 --rdzv-endpoint=HOST:29400"."""


@dataclass(frozen=True, kw_only=True)
class ExportSettings(RecipeChoice):
    """Export a run as an artifact, and compare it with the eager net. Trains first where there is no run yet."""

    format: Literal["eager", "onnx"] | None = None
    """Instead of the recipe's."""
    run: Path | None = None
    """A finished run folder, instead of the recipe's."""

    def overrides(self) -> dict[str, object]:
        chosen = {} if self.format is None else {"format": self.format}
        return {**super().overrides(), **chosen}


@dataclass(frozen=True, kw_only=True)
class ArchiveSettings(ExportSettings):
    """Package a run as <name>-<version>.mar. Trains and exports first where that was not done."""

    version: str | None = None
    """Instead of the next one: 1.0, 1.1, …"""
    profile: Literal["latency", "balanced", "throughput"] | None = None
    """Workers, batch size, delay and threads for few clients, a handful or many, instead of the recipe's."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings(ArchiveSettings):
    """Train, export, archive, start TorchServe, and wait for a real answer."""

    timeout: float = 120.0
    """Seconds to wait for an answer."""


@dataclass(frozen=True, kw_only=True)
class StopSettings(Places):
    """Stop TorchServe; returns when it has ended."""

    timeout: float = 60.0
    """Seconds to wait before its processes are killed."""


@dataclass(frozen=True, kw_only=True)
class StatusSettings(Places):
    """What is built, what is released, and what answers."""


@dataclass(frozen=True, kw_only=True)
class PredictSettings(Places):
    """Ask the running server."""

    input: Positional[Path]
    """A picture, an .npy or .json file; `-` reads standard input."""
    model: str | None = None
    """Name of the model; the only one served when not given."""
    version: str | None = None
    """Pin a version; the default one answers otherwise."""
    grpc: bool = False
    """Over gRPC instead of REST."""
    top_k: int | None = None
    """How many classes."""


@dataclass(frozen=True, kw_only=True)
class ExplainSettings(Places):
    """Ask the running server why: its answer, and maps of what decided it, side by side in one page."""

    image: Annotated[Path, tyro.conf.arg(aliases=["--input"])]
    """A picture; or, for a regressor, a .json or .npy file with a row."""
    out: Path = Path("explained.html")
    """The self-contained page."""
    model: str | None = None
    """Name of the model; the only one served when not given."""
    version: str | None = None
    """Pin a version; the default one answers otherwise."""
    method: tuple[str, ...] = ()
    """integrated-gradients, saliency, occlusion, grad-cam, smooth-grad; all that the model offers when not given."""
    target: str | None = None
    """Class to explain, by its label or index; the best one when not given."""
    baseline: str | None = None
    """What counts as nothing: black, mean, blur or white for pictures, mean or zero for rows."""
    grpc: bool = False
    """Over gRPC instead of REST."""


@dataclass(frozen=True, kw_only=True)
class WatchSettings(Places):
    """Live view: models, versions, workers, rates, latencies, and the rollout that runs."""

    every: float = 1.0
    """Seconds between two looks."""
    looks: int | None = None
    """End after so many; at Ctrl-C when not given."""
    model: str | None = None
    """Only this one."""


@dataclass(frozen=True, kw_only=True)
class ExporterSettings(Places):
    """For Prometheus, until Ctrl-C: what the journal says should answer, beside what the server does."""

    port: int = 8083
    """On loopback; 0 takes a free one and prints it."""


@dataclass(frozen=True, kw_only=True)
class TokenSettings(Places):
    """Print a token that is valid now, renewed if need be: `curl -H "Authorization: Bearer $(marwright token)"`."""

    kind: Positional[Literal["inference", "management"]] = "inference"
    """Which API it opens."""


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(Places):
    """Bring a built version to answer, behind the gate, without losing a request; and back when it is worse."""

    version: Positional[str | None] = None
    """A version, or a .mar of the store; the newest when not given."""
    model: str | None = None
    """Name of the model, where a version is given by its number; the only one built when not given."""
    policy: Path | None = None
    """TOML file with the limits; policies/<model>.toml or policies/default.toml when not given."""
    samples: Path | None = None
    """Folder of request bodies to replay to both versions; golden and holdout examples when not given."""
    holdout: Path | None = None
    """.npz with inputs and labels that neither version has learned from; the challenger's own test part when not
    given. Labels count the classes of the version that answers."""
    dry_run: bool = False
    """List every call that would be made, and make none."""
    resume: bool = False
    """Go on with the rollout that was interrupted, to its end."""
    wait: bool = False
    """Stay until the old version is retired, instead of leaving that to the next rollout or `marwright reconcile`."""


@dataclass(frozen=True, kw_only=True)
class RollbackSettings(Places):
    """Return to the last settled version: at once while it is warm, else by registering it again.

    A rollout that was interrupted is sent back instead.
    """

    model: str | None = None
    """Name of the model; the only one built when not given."""
    policy: Path | None = None
    """TOML file with the limits; policies/<model>.toml or policies/default.toml when not given."""
    why: str = "by hand"
    """For the journal."""


@dataclass(frozen=True, kw_only=True)
class ReleasesSettings(Places):
    """The history of what answered, what answers now, and why."""

    model: str | None = None
    """Name of the model; all of them when not given."""
    all: bool = False
    """Every line of the journal."""


@dataclass(frozen=True, kw_only=True)
class ReconcileSettings(Places):
    """Make the running server what the journal says, and retire what is due."""

    policy: Path | None = None
    """TOML file with the limits; policies/<model>.toml or policies/default.toml when not given."""
    dry_run: bool = False
    """Say what would be done, and do nothing."""


@dataclass(frozen=True, kw_only=True)
class RetrainSettings(RecipeChoice):
    """Learn from newly labelled examples, and roll the result out behind the gate. Harmless where nothing is new."""

    new: Path | None = None
    """Folder or zip of newly labelled examples, <class>/<file>; new/<model> when not given."""
    every: str | None = None
    """Repeat: 30s, 15m, 1h, 1d. A turn that is overdue is made up for once; turns never overlap."""
    once: bool = False
    """One turn, for cron: the default where --every is not given."""
    turns: int | None = None
    """End after so many turns of --every; never when not given."""
    policy: Path | None = None
    """TOML file with the limits; policies/<model>.toml or policies/default.toml when not given."""
    method: Literal["scratch", "warm", "finetune", "replay", "derpp", "head"] | None = None
    """How to learn, instead of the policy's."""
    dry_run: bool = False
    """Take in what the workers left, say whether a turn would learn and why, and learn nothing."""


@dataclass(frozen=True, kw_only=True)
class PruneSettings(Places):
    """Remove what nobody needs any more: archives, runs of retraining, old requests and their bodies."""

    policy: Path | None = None
    """TOML file with the limits; policies/<model>.toml or policies/default.toml when not given."""
    days: float | None = None
    """Since the answer, for labelled requests, instead of the policy's."""
    unlabelled_days: float | None = None
    """The same for requests without a label."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings(Places):
    """The whole loop on a live server, in a few minutes: answers, drift, alarm, labels, retraining, rollout."""

    folder: Path = Path("runs/demo")
    """Emptied, and used for everything that it makes; --store, --runs and --feedback are not touched."""
    out: Path = Path("demo-loop.html")
    """The page that tells the story."""


@dataclass(frozen=True, kw_only=True)
class FeedbackIngestSettings(Places):
    """Take what the workers left in the spool into the database. Harmless twice, and while they write."""

    keep: bool = False
    """Leave the segments in the spool."""


@dataclass(frozen=True, kw_only=True)
class FeedbackImportSettings(Places):
    """Labels from a CSV file (request,label and optionally instance,source,time), or a folder of labelled pictures."""

    labels: Positional[Path]
    """A .csv, or a folder of <class>/<file>."""
    model: str | None = None
    """Whose pictures they are, for a folder; the only one built when not given."""
    source: str | None = None
    """Who says so, where the file does not; the file's name when not given."""


@dataclass(frozen=True, kw_only=True)
class FeedbackStatusSettings(Places):
    """Counts, label lag, class balance, live accuracy of each version."""

    model: str | None = None
    """Only this one."""
    policy: Path | None = None
    """TOML file; policies/<model>.toml or policies/default.toml when not given."""


@dataclass(frozen=True, kw_only=True)
class FeedbackForgetSettings(Places):
    """Remove every trace of a request: body, answer, labels, spool, training caches. Says which runs learned of it."""

    request: str
    """Its id, as the header x-request-id of its answer had it."""


@dataclass(frozen=True, kw_only=True)
class FeedbackCollectorSettings(Places):
    """Build the model `feedback`, which takes labels (POST /predictions/feedback), and load it where a server runs."""

    timeout: float = 120.0
    """Seconds to wait for its worker."""


@dataclass(frozen=True, kw_only=True)
class DriftSettings(Places):
    """Compare the latest requests with what the version that answers has learned from."""

    model: str | None = None
    """Name of the model; the only one with requests when not given."""
    policy: Path | None = None
    """TOML file; policies/<model>.toml or policies/default.toml when not given."""
    html: Path | None = None
    """Write a self-contained page with plots there."""


@dataclass(frozen=True, kw_only=True)
class LoadtestSettings(Places):
    """Send requests at their due times, however slowly they are answered, and check every answer."""

    model: str | None = None
    """Name of the model; the only one served when not given."""
    rate: float = 100.0
    """Requests a second."""
    seconds: float = 10.0
    """How long."""
    arrivals: Literal["constant", "poisson", "closed"] = "poisson"
    """When requests are due: evenly, at random, or (closed) as soon as the connection is free, to find the capacity."""
    connections: int = 64
    """For closed: how many clients."""
    grpc_share: float = 0.0
    """Share of requests over gRPC; the others are REST, keep-alive."""
    pinned_share: float = 0.0
    """Share of requests to the pinned URLs of versions that the journal calls live; the others to the default URL."""
    images: Path | None = None
    """Folder of request bodies; the golden examples of the model's archives when not given."""
    hung: float = 5.0
    """Seconds after which a request without an answer counts as hung."""
    seed: int = 0
    """Of arrivals and of the mix."""
    out: Path = Path("loadtest.csv")
    """Where every single result goes."""


@dataclass(frozen=True, kw_only=True)
class TuneSettings(Places):
    """Find how a model is served best on this machine, by load on a TorchServe of its own, in bounded time."""

    model: str = "digits"
    """Name of the model; its newest archive, or the run that it came from, is what is tried."""
    target: str = "p99=20ms"
    """What must hold for every client, counted from when a request was due: p50=1ms, p99=20ms, p99.9=50ms."""
    minutes: float = 5.0
    """How long to search, all in all."""
    connections: int = 128
    """How many clients the load comes from."""
    write: bool = False
    """Put what was found into the recipe's [serving]; everything else in the file stays as it is."""
    html: Path | None = None
    """Write a self-contained page with the curves there."""
    beside: bool = False
    """Go on although this project's server runs here: each will slow the other."""


@dataclass(frozen=True, kw_only=True)
class LoadreportSettings(Places):
    """What a load test found: counts, percentiles, the longest pause; a time line with version switches as HTML."""

    results: Positional[Path]
    """What `marwright loadtest` wrote."""
    html: Path | None = None
    """Write a self-contained page there."""


@dataclass(frozen=True, kw_only=True)
class ReleaseSettings(Places):
    """Make a version the released one, without proof. The journal says so for ever."""

    version: Positional[str]
    """The version that shall answer."""
    model: str = "digits"
    """Name of the model."""
    timeout: float = 120.0
    """Seconds to wait for its workers where the server is running."""


@dataclass(frozen=True, kw_only=True)
class ActivateSettings(Places):
    """Write JAVA_HOME and TS_CONFIG_FILE into a virtual environment's activate script."""

    venv: Path = Path(".venv")
    """The virtual environment."""
