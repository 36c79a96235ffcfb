"""Requests over gRPC: one channel, as one client has, and no second attempt of any kind.

channel = Channel("127.0.0.1:7070", message=…, answered=…, broken=…)
channel.send(call)      channel.drop(call)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from marwright.release.loadtest.calls import Call, now
from marwright.release.protos import inference_pb2

_PREDICTIONS = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"


class Channel:
    """One HTTP/2 connection to one server, on the running event loop."""

    def __init__(
        self,
        target: str,
        *,
        message: Callable[[Call], bytes],
        answered: Callable[[Call, bytes], None],
        broken: Callable[[Call, str], None],
    ) -> None:
        """`message` gives the serialised request at the moment it is sent; `answered` gets the `prediction`."""
        self.metadata: tuple[tuple[str, str], ...] = ()
        """Sent with every call: the token."""
        self._message = message
        self._answered = answered
        self._broken = broken
        options: list[tuple[str, Any]] = [
            ("grpc.enable_retries", 0),  # gRPC repeats a call by itself where it thinks that nobody has seen it
            ("grpc.enable_http_proxy", 0),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        self._channel = grpc.aio.insecure_channel(target, options=options)
        self._predict: Any = self._channel.unary_unary(
            _PREDICTIONS, request_serializer=None, response_deserializer=inference_pb2.PredictionResponse.FromString
        )
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, call: Call) -> None:
        task = asyncio.get_running_loop().create_task(self._ask(call))
        call.carrier = task
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def drop(self, call: Call) -> None:
        if call.carrier is not None:
            call.carrier.cancel()

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close(None)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()  # an error of ours ends the run, by the loop's exception handler

    async def _ask(self, call: Call) -> None:
        message = self._message(call)
        call.sent = now()
        try:
            reply = await self._predict(message, metadata=self.metadata)
        except grpc.aio.AioRpcError as error:
            if not call.over:
                self._broken(call, f"{error.code().name}: {error.details() or 'no details'}")
            return
        finally:
            call.carrier = None
        if not call.over:
            self._answered(call, reply.prediction)
