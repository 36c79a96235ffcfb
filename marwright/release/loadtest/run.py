"""A load test: requests go out at their due times whatever comes back, and every answer is judged.

    with watch.Watch(store, "digits") as watched:
        summary = run(config, tokens, load, bodies, checks, Path("loadtest.csv"), pinnable=watched)

One event loop on one core does all of it. Nothing is sent twice. A request has one outcome: ok; refused (a status from
400 on); broken (no connection, a torn one, an error of gRPC); hung (no answer `hung` seconds after it was due); wrong
(the wrong version, bundle or label, or nothing that can be read).

Ctrl-C ends the sending, waits for what is on its way, keeps the file and goes on as KeyboardInterrupt.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import platform
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import uvloop

from marwright.errors import MarwrightError, ServerError, SettingsError
from marwright.release.loadtest import plan
from marwright.release.loadtest.bodies import Body
from marwright.release.loadtest.calls import Alarm, Call, now
from marwright.release.loadtest.checks import OUTCOMES, Checks, Verdict
from marwright.release.loadtest.grpc_calls import Channel
from marwright.release.loadtest.plan import Load
from marwright.release.loadtest.rest import Headers, Pool
from marwright.release.loadtest.results import Writer
from marwright.release.properties import ServerConfig
from marwright.release.protos import inference_pb2
from marwright.release.tokens import Tokens

_BEAT = 0.05
"""Seconds between two looks for what hangs."""
_BURST = 200
"""Requests sent at most before the loop looks for answers again."""
_BREATHER = 0.1
"""Seconds that a closed client waits after a broken request: a dead server breaks thousands a second."""


@dataclass(frozen=True)
class Summary:
    """How a run went. `cpu_share` is this process's own, of one core, over `seconds` of wall time."""

    counts: Mapping[str, int]
    seconds: float
    cpu_share: float
    most_connections: int
    longest_stall: float
    """Seconds by which the client's own event loop was late, at the worst: longer pauses are not its own."""
    interrupted: bool
    out: Path
    failures: tuple[str, ...] = field(default=())
    """The first few, in words."""

    @property
    def requests(self) -> int:
        return sum(self.counts.values())

    @property
    def failed(self) -> int:
        return self.requests - self.counts["ok"]

    def raise_for_failures(self) -> None:
        """ServerError with the counts where an answer was not right."""
        if self.failed:
            kinds = ", ".join(f"{count} {name}" for name, count in self.counts.items() if count and name != "ok")
            few = "".join(f"\n  - {line}" for line in self.failures)
            raise ServerError(
                f"{self.failed} of {self.requests} requests failed: {kinds}{few}",
                hint=f"marwright loadreport {self.out}",
            )


def run(
    config: ServerConfig,
    tokens: Tokens | None,
    load: Load,
    bodies: Sequence[Body],
    checks: Checks,
    out: Path,
    *,
    pinnable: Callable[[], Collection[str]] = tuple,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Summary:
    """Run a load test to its end. `pinnable` says, whenever asked, which versions may be pinned now.

    SettingsError where `out` exists; ServerUnreachable where there is no token to begin with. `about` joins the first
    line of the raw file; with `progress` there is a line a second on standard error.
    """
    if not config.inference_url.startswith("http://"):
        raise SettingsError(f"{config.inference_url} is not plain http", hint="inference_address=http://…")
    if load.pinned_share and not pinnable():
        raise SettingsError(f"the journal calls no version of {load.model} live", hint="make release VERSION=…")
    keys = _Keys(config, tokens if config.token_auth else None, load.seconds + load.hung)
    with Writer(out, _about(load, bodies, about or {}), bodies) as writer:
        gc.collect()
        gc.freeze()  # collections look at what a run makes, not at all that was there before
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(_Run(config, keys, load, bodies, checks, writer, out, pinnable, progress).all())
        finally:
            gc.unfreeze()


class _Run:
    """The state of one run on its event loop."""

    def __init__(
        self,
        config: ServerConfig,
        keys: _Keys,
        load: Load,
        bodies: Sequence[Body],
        checks: Checks,
        writer: Writer,
        out: Path,
        pinnable: Callable[[], Collection[str]],
        progress: bool,
    ) -> None:
        self._config = config
        self._keys = keys
        self._load = load
        self._bodies = bodies
        self._checks = checks
        self._writer = writer
        self._out = out
        self._pinnable = pinnable
        self._progress = _Progress() if progress else None
        self._shots = plan.shots(load, len(bodies))
        self._next = next(self._shots, None)
        self._counts: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self._failures: list[str] = []
        self._flying = 0
        self._queue: deque[Call] = deque()  # by due time; those that are over leave when they come to its head
        self._messages: dict[tuple[bool, str | None, int], bytes] = {}
        self._stall = 0.0

    async def all(self) -> Summary:
        loop = asyncio.get_running_loop()
        where = urlsplit(self._config.inference_url)
        assert where.hostname is not None
        assert where.port is not None
        self._host = where.netloc
        self._rest = Pool(
            where.hostname, where.port, message=self._message, answered=self._rest_answer, broken=self._broken
        )
        self._channel = Channel(
            self._config.grpc_inference, message=self._message, answered=self._grpc_answer, broken=self._broken
        )
        self._finished: asyncio.Future[None] = loop.create_future()
        loop.set_exception_handler(self._fail)
        self._alarm = Alarm(loop, self._due)
        self._new_key()
        tasks = [loop.create_task(self._beat()), loop.create_task(self._keep_up())]
        for task in tasks:
            task.add_done_callback(lambda task: task.cancelled() or task.result())
        began, cpu = time.perf_counter(), time.process_time()
        self._start = now()
        interrupted: asyncio.CancelledError | None = None
        try:
            if self._load.arrivals == "closed":
                loop.call_later(self._load.seconds, self._stop)
                for _ in range(self._load.connections):
                    self._fire(now())
            self._due()
            try:
                await asyncio.shield(self._finished)
            except asyncio.CancelledError as cancelled:
                interrupted = cancelled
                self._stop()
                await self._finished
            seconds = time.perf_counter() - began
            summary = Summary(
                counts=dict(self._counts),
                seconds=seconds,
                cpu_share=(time.process_time() - cpu) / seconds,
                most_connections=self._rest.most,
                longest_stall=self._stall,
                interrupted=interrupted is not None,
                out=self._out,
                failures=tuple(self._failures),
            )
            ending = {key: value for key, value in asdict(summary).items() if key not in ("out", "failures")}
            self._writer.note({"event": "end", "at": now(), **ending})
        finally:
            self._alarm.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._rest.close()
            await self._channel.close()
            if self._progress:
                self._progress.end()
        if interrupted:
            raise interrupted
        return summary

    # ---------------------------------------------------------------- sending

    def _due(self) -> None:
        """Send all that is due by now; be woken for the next."""
        if self._keys.renewing or self._load.arrivals == "closed":
            return
        for _ in range(_BURST):
            if self._next is None:
                self._end_if_all_done()
                return
            wait = self._start + self._next.after - now()
            if wait > 0:
                self._alarm.set(wait)
                return
            self._fire(self._start + self._next.after)
        asyncio.get_running_loop().call_soon(self._due)

    def _fire(self, due: float) -> None:
        """Send the next request of the plan."""
        shot = self._next
        if shot is None:
            return
        self._next = next(self._shots, None)
        call = Call(due, shot.grpc, shot.pin, shot.body)
        self._flying += 1
        self._queue.append(call)
        if call.grpc:
            self._channel.send(call)
        else:
            self._rest.send(call)

    def _stop(self) -> None:
        self._next = None
        self._end_if_all_done()

    def _message(self, call: Call) -> bytes:
        """The bytes of a request as it is sent now: to a version that may be pinned now, with the key of now."""
        if call.pin is not None:
            versions = sorted(self._pinnable())
            call.version = versions[int(call.pin * len(versions))] if versions else None
        key = (call.grpc, call.version, call.body)
        message = self._messages.get(key)
        if message is None:
            message = self._messages[key] = (self._grpc_message if call.grpc else self._rest_message)(call)
        return message

    def _rest_message(self, call: Call) -> bytes:
        body = self._bodies[call.body]
        path = f"/predictions/{quote(self._load.model, safe='')}"
        if call.version is not None:
            path += f"/{quote(call.version, safe='')}"
        lines = [f"POST {path} HTTP/1.1", f"Host: {self._host}", f"Content-Type: {body.content_type}"]
        if self._keys.key:
            lines.append(f"Authorization: Bearer {self._keys.key}")
        lines.append(f"Content-Length: {len(body.data)}")
        return "\r\n".join([*lines, "", ""]).encode("ascii") + body.data

    def _grpc_message(self, call: Call) -> bytes:
        fields = {"data": self._bodies[call.body].data, "meta": b"1", "top_k": b"1"}
        request = inference_pb2.PredictionsRequest(
            model_name=self._load.model, model_version=call.version or "", input=fields
        )
        return request.SerializeToString()

    # ---------------------------------------------------------------- what becomes of it

    def _rest_answer(self, call: Call, status: int, headers: Headers, body: bytes) -> None:
        done = now()
        self._end(call, done, self._checks.rest(call, status, headers, body))

    def _grpc_answer(self, call: Call, body: bytes) -> None:
        done = now()
        self._end(call, done, self._checks.grpc(call, body))

    def _broken(self, call: Call, why: str) -> None:
        self._end(call, now(), Verdict(0, "", "broken", " ".join(why.split())[:200]))

    def _end(self, call: Call, done: float, verdict: Verdict) -> None:
        call.over = True
        self._flying -= 1
        self._counts[verdict.outcome] += 1
        self._writer.add(call, done, verdict)
        if verdict.outcome != "ok" and len(self._failures) < 5:
            target = call.version or "default URL"
            self._failures.append(f"{verdict.outcome}: {call.kind}, {target}: {verdict.status or ''} {verdict.detail}")
        if self._load.arrivals == "closed" and self._next is not None:
            loop = asyncio.get_running_loop()
            if verdict.outcome == "broken":
                loop.call_later(_BREATHER, self._again)
            else:
                loop.call_soon(self._again)
        self._end_if_all_done()

    def _again(self) -> None:
        """A closed client's next request."""
        if self._keys.renewing:
            asyncio.get_running_loop().call_later(_BEAT, self._again)
        else:
            self._fire(now())

    def _fail(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An error of ours, wherever it was raised, ends the run: no request would tell of it."""
        error = context.get("exception")
        if error is None:
            loop.default_exception_handler(context)
        elif not self._finished.done():  # the first one; others follow from it
            self._finished.set_exception(error)

    def _end_if_all_done(self) -> None:
        if self._next is None and self._flying == 0 and not self._finished.done():
            self._finished.set_result(None)

    # ---------------------------------------------------------------- beside it

    async def _beat(self) -> None:
        """Give up what hangs; every second, write what is known and say how it goes."""
        told = now()
        while True:
            slept = now()
            await asyncio.sleep(_BEAT)
            self._stall = max(self._stall, now() - slept - _BEAT)
            while self._queue and (self._queue[0].over or now() - self._queue[0].due >= self._load.hung):
                call = self._queue.popleft()
                if not call.over:
                    self._give_up(call)
            if now() - told >= 1:
                told = now()
                self._writer.flush()
                if self._progress:
                    self._progress.tell(told - self._start, self._counts, self._flying)

    def _give_up(self, call: Call) -> None:
        call.over = True
        (self._channel if call.grpc else self._rest).drop(call)
        self._end(call, now(), Verdict(0, "", "hung", f"no answer {self._load.hung:g} s after it was due"))

    async def _keep_up(self) -> None:
        """Keys that are about to expire, and versions that are new in the store."""
        while True:
            await asyncio.sleep(self._keys.interval)
            if self._keys.near_its_end():
                self._writer.note({"event": "renewing the token", "at": now()})
            if await self._keys.refresh(lambda: self._flying == 0):
                self._new_key()
            self._due()  # what was held back meanwhile
            await asyncio.to_thread(self._checks.learn)

    def _new_key(self) -> None:
        self._messages.clear()
        self._channel.metadata = (("authorization", f"Bearer {self._keys.key}"),) if self._keys.key else ()


class _Keys:
    """The inference key. It is renewed here, earlier than others would.

    The old key is worth nothing from the moment at which the server makes another, so nothing may be on its way then:
    `renewing` holds everything back, for some milliseconds once in the life of a key. What was due is late, and counts
    so.
    """

    def __init__(self, config: ServerConfig, tokens: Tokens | None, needed: float) -> None:
        """`needed`: seconds for which a key should be good, so that most runs never renew one in their midst."""
        life = config.token_minutes * 60
        self._tokens = tokens
        self._margin = min(90.0, 0.3 * life)
        self._patience = min(1.0, self._margin / 3)
        self.interval = min(1.0, 0.05 * life)
        self.renewing = False
        self.key = ""
        if tokens is not None:
            self.key = tokens.key("inference")
            if self._left() < min(needed + self._margin, 0.95 * life):
                tokens.renew("inference")
                self.key = tokens.key("inference")

    def near_its_end(self) -> bool:
        return self._tokens is not None and self._left() < self._margin

    async def refresh(self, all_answered: Callable[[], bool]) -> bool:
        """Look the key up again, and renew it near its end; whether there is another one now."""
        if self._tokens is None:
            return False
        before = self.key
        with contextlib.suppress(
            MarwrightError
        ):  # the server may be gone for a while: the key is good, or soon refused
            try:
                if self.near_its_end():
                    self.renewing = True
                    until = now() + self._patience
                    while not all_answered() and now() < until:
                        await asyncio.sleep(0.002)
                    await asyncio.to_thread(self._tokens.renew, "inference")
                self.key = await asyncio.to_thread(self._tokens.key, "inference")
            finally:
                self.renewing = False
        return self.key != before

    def _left(self) -> float:
        assert self._tokens is not None
        with contextlib.suppress(MarwrightError):
            return self._tokens.expires("inference").timestamp() - time.time()
        return 0.0


class _Progress:
    """One line on standard error: over itself on a terminal, else another each time."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._done = 0

    def tell(self, seconds: float, counts: Counter[str], flying: int) -> None:
        done = counts.total()
        line = f"{seconds:6.0f} s  {done - self._done:6d}/s  in flight {flying}  failed {done - counts['ok']}"
        self._done = done
        print(
            f"\r{line:<60}" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr, flush=True
        )

    def end(self) -> None:
        if self._terminal and self._done:
            print(file=sys.stderr)


def _about(load: Load, bodies: Sequence[Body], more: Mapping[str, Any]) -> dict[str, Any]:
    asked = asdict(load)
    if load.arrivals == "closed":
        del asked["rate"]
    else:
        del asked["connections"]
    return {
        **asked,
        "bodies": len(bodies),
        "started": time.time(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        **{name: installed(name) for name in ("uvloop", "httptools", "grpcio")},
        **more,
    }
