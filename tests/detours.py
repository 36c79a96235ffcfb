"""A way to TorchServe's management API that has faults: an HTTP and a gRPC proxy in front of one server.

    with detours.to(config) as way:
        way.faults = detours.once("cut", at="set-default")
        faults.command(stage, ["rollout"], new="1.1", detour=way.detour)
        way.met                                                  # ["cut PUT /models/digits/1.1/set-default"]

| fault    | what the client sees                                             | what the server has done |
|----------|------------------------------------------------------------------|--------------------------|
| `delay`  | the answer, after it has given up                                | all                      |
| `cut`    | half an answer, then a closed connection; over gRPC a broken one | all                      |
| `500`    | that status; over gRPC INTERNAL                                  | nothing                  |
| `503`    | that status; over gRPC UNAVAILABLE                               | nothing                  |
| `refuse` | a connection that is closed at once                              | nothing                  |
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from marwright.release.properties import ServerConfig
from tests.faults import Detour

DELAY = 10.0
"""Seconds: twice what a rollout waits for one answer."""
KINDS = ("cut", "500", "503", "refuse")
"""All that cost no time."""

Faults = Callable[[str], str]
"""From a call, as in "PUT /models/digits/1.1/set-default" or "gRPC RegisterModel", to its fault; "" is none."""


def once(fault: str, *, at: str) -> Faults:
    """The first call with `at` in its name meets that fault, and no other."""
    left = [fault]
    return lambda call: left.pop() if at in call and left else ""


def from_here_on(fault: str, *, at: str) -> Faults:
    """From the first call with `at` in its name on, every one meets that fault."""
    begun = threading.Event()

    def found(call: str) -> str:
        if at in call:
            begun.set()
        return fault if begun.is_set() else ""

    return found


def first_time() -> Faults:
    """Each call meets a fault, of all kinds in turn, and when it is made again it does not; and so on."""
    kinds = itertools.cycle(KINDS)
    failed: set[str] = set()

    def found(call: str) -> str:
        failed.symmetric_difference_update([call])
        return next(kinds) if call in failed else ""

    return found


class Way:
    """Both proxies, and the faults that they have now."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.faults: Faults = lambda _: ""
        self.met: list[str] = []
        self.over = threading.Event()
        self.detour = Detour("", "")
        self._one = threading.Lock()

    def fault(self, call: str) -> str:
        with self._one:
            found = self.faults(call)
            if found:
                self.met.append(f"{found} {call}")
            return found


@contextlib.contextmanager
def to(config: ServerConfig) -> Iterator[Way]:
    """A way to the server of that configuration; without faults at first."""
    way = Way(config)
    rest = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _rest_handler(way))
    rest.daemon_threads = True
    serving = threading.Thread(target=rest.serve_forever)
    serving.start()
    with ThreadPoolExecutor(8) as threads, grpc.insecure_channel(config.grpc_management) as channel:
        proxy = grpc.server(threads, handlers=[_GrpcHandler(way, channel)])
        port = proxy.add_insecure_port("127.0.0.1:0")
        proxy.start()
        way.detour = Detour(f"http://127.0.0.1:{rest.server_address[1]}", f"127.0.0.1:{port}")
        try:
            yield way
        finally:
            way.over.set()
            proxy.stop(grace=0).wait()
            rest.shutdown()
            serving.join()
            rest.server_close()


def _rest_handler(way: Way) -> type[http.server.BaseHTTPRequestHandler]:
    target = way.config.management_url.removeprefix("http://")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            fault = way.fault(f"{self.command} {self.path.partition('?')[0]}")
            if fault == "refuse":
                self.close_connection = True
            elif fault in ("500", "503"):
                self._answer(int(fault), json.dumps({"code": int(fault), "type": "Fault", "message": fault}).encode())
            else:
                upstream = http.client.HTTPConnection(target, timeout=30)
                with contextlib.closing(upstream):
                    headers = {name: self.headers[name] for name in ("Authorization",) if name in self.headers}
                    upstream.request(self.command, self.path, headers=headers)
                    response = upstream.getresponse()
                    body = response.read()
                if fault == "delay":
                    way.over.wait(DELAY)
                self._answer(response.status, body, cut=fault == "cut")

        def _answer(self, status: int, body: bytes, *, cut: bool = False) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):  # it may have stopped waiting
                self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = self.close_connection or cut

        do_GET = do_PUT = do_POST = do_DELETE = do_OPTIONS = _pass_on

        def log_message(self, *_: object) -> None:
            pass

    return Handler


class _GrpcHandler(grpc.GenericRpcHandler):
    """Every call as bytes, to the server and back."""

    def __init__(self, way: Way, channel: grpc.Channel) -> None:
        self._way = way
        self._channel = channel

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def passed_on(request: bytes, context: Any) -> bytes:
            fault = self._way.fault(f"gRPC {details.method.rpartition('/')[2]}")
            if fault in ("503", "refuse"):
                context.abort(grpc.StatusCode.UNAVAILABLE, "fault")
            if fault == "500":
                context.abort(grpc.StatusCode.INTERNAL, "fault")
            metadata = [(key, value) for key, value in context.invocation_metadata() if key == "authorization"]
            try:
                answer: bytes = self._channel.unary_unary(details.method)(request, metadata=metadata, timeout=30)
            except grpc.RpcError as error:
                refused: Any = error
                context.abort(refused.code(), refused.details() or "")
            if fault == "delay":
                self._way.over.wait(DELAY)
            if fault == "cut":
                context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            return answer

        return grpc.unary_unary_rpc_method_handler(passed_on)
