"""Triton by nvidia-pytriton, as its documentation on dynamic batching advises.

Two instances of the function, dynamic batching of up to 32 with a delay of at most 1 ms; HTTP with the binary extension
for the request, so that the picture is sent as it is. gRPC and metrics have ports of their own; nothing is logged.

Triton's Python stub is linked with libpython3.11.so: LD_LIBRARY_PATH names the folder of this Python's own, since with
another one's (3.11.2 beside a library of 3.11.7) the stub does not start.
"""

import model
import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


class Classifier:
    def __init__(self) -> None:
        self.net = None

    @batch
    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        self.net = self.net or model.Model()
        return {"answer": np.array(self.net.bodies(image[:, 0].tolist()), dtype=object).reshape(-1, 1)}


if __name__ == "__main__":
    config = TritonConfig(
        http_address="127.0.0.1", http_port=model.PORT, grpc_port=model.OTHER_PORT, allow_grpc=False,
        allow_metrics=False, log_verbose=0,
    )  # fmt: skip
    with Triton(config=config) as triton:
        triton.bind(
            model_name="cifar10",
            infer_func=[Classifier(), Classifier()],
            inputs=[Tensor(name="image", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="answer", dtype=bytes, shape=(1,))],
            config=ModelConfig(max_batch_size=model.BATCH, batcher=DynamicBatcher(max_queue_delay_microseconds=1000)),
        )
        triton.serve()
