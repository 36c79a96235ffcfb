"""Ray Serve, as its documentation on dynamic batching and on performance advises.

Two replicas with a CPU each, `serve.batch` of up to 32 with a wait of at most 1 ms, as many requests let into a replica
as there are connections, no access log, no dashboard and no usage report. RAY_SERVE_THROUGHPUT_OPTIMIZED=1 is its own
switch for high rates. The body is taken from the Starlette request, the answer is a bare Response.
"""

import os
import signal

os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import model
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response


@serve.deployment(num_replicas=2, max_ongoing_requests=512, ray_actor_options={"num_cpus": 1})
class Classifier:
    def __init__(self) -> None:
        self.net = model.Model()

    @serve.batch(max_batch_size=model.BATCH, batch_wait_timeout_s=0.001)
    async def answer(self, encoded: list[bytes]) -> list[bytes]:
        return self.net.bodies(encoded)

    async def __call__(self, request: Request) -> Response:
        return Response(await self.answer(await request.body()), media_type="application/json")


if __name__ == "__main__":
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=os.environ["TMPDIR"],
    )
    serve.start(
        http_options={"host": "127.0.0.1", "port": model.PORT},
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    serve.run(Classifier.bind(), route_prefix="/predict")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
