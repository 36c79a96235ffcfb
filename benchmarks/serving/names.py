"""What the systems and bodies are called, in the order of the page, for those who only read results."""

from __future__ import annotations

KINDS = {
    "png32": "PNG 32×32",
    "jpeg32": "JPEG 32×32",
    "png224": "PNG 224×224",
    "jpeg224": "JPEG 224×224",
    "png1080": "PNG 1920×1080",
    "jpeg1080": "JPEG 1920×1080",
    "raw32": "raw tensor 3×32×32",
}
_QUIET = "quiet logs, prometheus mode, a queue of 2000"
_TUNED = f"{_QUIET}, two workers with one thread each (OMP_NUM_THREADS=1), batch 32, delay 1 ms"
TUNED = {
    "stock": "stock handler, nothing said: batch 1, a worker for each core, torch's own threads, default logs",
    "stock-batched": "stock handler, nothing said but batch 32, delay 1 ms and one worker",
    "stock-tuned": f"stock handler, {_TUNED}",
    "echo": f"stock server, a handler that does nothing, {_TUNED}",
    "marwright-latency": "profile latency, config.properties as it is, keys checked",
    "marwright-balanced": "profile balanced, config.properties as it is, keys checked",
    "marwright-throughput": "profile throughput, config.properties as it is, keys checked",
    "marwright-plain": "profile throughput, Pillow decodes, stock wire (MARWRIGHT_WIRE=off), keys checked",
    "marwright-no-keys": "profile throughput, disable_token_authorization=true, as all but ours have here",
    "fastapi": "two uvicorn processes (uvloop, httptools), each picture by itself",
    "fastapi-batched": "the same with a queue of our own: up to 32 that wait are computed together",
    "litserve": "two workers, batch 32, 1 ms, one API server, the queue for high rates, raw bytes",
    "bentoml": "two workers, adaptive batching up to 32; base64 in JSON, as a batchable endpoint wants it",
    "ray": "two replicas, serve.batch of 32 and 1 ms, RAY_SERVE_THROUGHPUT_OPTIMIZED=1",
    "mlserver": "adaptive batching up to 32, 1 ms, no parallel workers; base64 in the v2 protocol's JSON",
    "pytriton": "two instances, dynamic batching up to 32, 1 ms, v2 protocol with the binary extension",
    "stock-tuned-resnet": f"ResNet-8, stock handler, {_TUNED}",
    "marwright-throughput-resnet": "ResNet-8, profile throughput",
}
ORDER = tuple(TUNED)
PEERS = ("fastapi", "fastapi-batched", "litserve", "bentoml", "ray", "mlserver", "pytriton")
PROFILES = ("marwright-latency", "marwright-balanced", "marwright-throughput")
SHORT = ("marwright-no-keys", "stock-tuned-resnet", "marwright-throughput-resnet")
"""Asked at 1 and 64 connections alone."""
FAILURES = {"bad_status": "with another status", "wrong": "wrong", "broken": "broken off", "hung": "never answered"}
