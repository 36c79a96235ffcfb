"""LitServe, as its documentation on batching and on throughput advises.

Two workers on the CPU, batches of up to 32 with a wait of at most 1 ms, one API server (a second one takes a core from
the workers here), the queue for high rates (`fast_queue`, over ZeroMQ), no access log. The body comes as bytes, which
FastAPI allows where the type says so, and not as base64 in JSON, which is more work.
"""

from typing import Annotated

import litserve
import model
from fastapi import Body, Response


class Classifier(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.net = model.Model()

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]) -> bytes:
        return request

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return inputs

    def predict(self, encoded: list[bytes]) -> list[bytes]:
        return self.net.bodies(encoded)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="application/json")


if __name__ == "__main__":
    api = Classifier(max_batch_size=model.BATCH, batch_timeout=0.001)
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=2, fast_queue=True)
    server.run(
        host="127.0.0.1", port=model.PORT, num_api_servers=1, generate_client_file=False, log_level="warning",
        access_log=False,
    )  # fmt: skip
