"""The service that `server.py` starts."""

import base64

import bentoml
import model

QUIET = {"logging": {"access": {"enabled": False}}, "metrics": {"enabled": False}, "traffic": {"timeout": 60}}


@bentoml.service(workers=2, **QUIET)
class Classifier:
    def __init__(self) -> None:
        self.net = model.Model()

    @bentoml.api(batchable=True, max_batch_size=model.BATCH)
    def classify(self, encoded: list[str]) -> list[dict[str, float]]:
        return self.net.answer([base64.b64decode(one) for one in encoded])
