"""MLServer (Seldon), as its documentation on adaptive batching and on parallel inference advises.

Batches of up to 32 with a wait of at most 1 ms; no parallel workers: its documentation says that they pay where the
model is slow, and here the copy to another process costs more than the model. Requests and answers are the inference
protocol's own (v2): the picture as base64 in JSON, the top five as one JSON text in the output. No gRPC, no access log.
"""

import asyncio
import os

import model
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import Base64Codec, StringCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse


class Classifier(MLModel):
    async def load(self) -> bool:
        self.net = model.Model()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        encoded = Base64Codec.decode_input(payload.inputs[0])
        answers = [body.decode() for body in self.net.bodies(encoded)]
        output = StringCodec.encode_output("answer", answers, use_bytes=False)
        return InferenceResponse(model_name=self.name, outputs=[output])


async def main() -> None:
    settings = Settings(
        host="127.0.0.1",
        http_port=model.PORT,
        grpc_port=model.OTHER_PORT,
        metrics_endpoint=None,
        parallel_workers=int(os.environ.get("PEER_WORKERS", "0")),
        debug=False,
    )
    server = MLServer(settings)
    one = ModelSettings(
        name="cifar10",
        implementation=Classifier,
        max_batch_size=model.BATCH,
        max_batch_time=0.001,
        parameters=ModelParameters(version="1.0"),
    )
    await server.start([one])


if __name__ == "__main__":
    asyncio.run(main())
