"""What every peer shares: encoded bytes → the top five, by the same artifact. Runs in each peer's own environment.

    answers = model.answer([png, jpeg])     # [{"cat": 0.51, ...}, ...]

OpenCV decodes (pictures of the benchmark have the net's own size), ONNX Runtime computes on one thread without
spinning, and is asked for the probabilities alone.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import orjson

PORT = int(os.environ.get("PEER_PORT", "0"))
OTHER_PORT = int(os.environ.get("PEER_OTHER_PORT", "0"))
BATCH = 32
K = 5

cv2.setNumThreads(1)


class Model:
    """One session of one process."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            os.environ["PEER_MODEL"], options, providers=["CPUExecutionProvider"]
        )
        self.input = self.session.get_inputs()[0].name
        self.output = self.session.get_outputs()[0].name
        self.labels = json.loads(Path(os.environ["PEER_LABELS"]).read_text())
        self.answer([_black()])

    def answer(self, encoded: Sequence[bytes]) -> list[dict[str, float]]:
        """The five best of each picture, best first."""
        batch = np.stack([decode(one) for one in encoded])
        rows = self.session.run([self.output], {self.input: batch})[0]
        order = np.argsort(-rows, axis=1, kind="stable")[:, :K]
        values = np.take_along_axis(rows, order, axis=1).tolist()
        return [
            {self.labels[index]: value for index, value in zip(indices, row, strict=True)}
            for indices, row in zip(order.tolist(), values, strict=True)
        ]

    def bodies(self, encoded: Sequence[bytes]) -> list[bytes]:
        """The same as JSON."""
        return [orjson.dumps(one) for one in self.answer(encoded)]


def decode(encoded: bytes) -> np.ndarray:
    """uint8 3×32×32."""
    picture = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    if picture is None:
        raise ValueError("not a picture")
    if picture.shape[:2] != (32, 32):
        picture = cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA)
    return picture[:, :, ::-1].transpose(2, 0, 1)


def _black() -> bytes:
    return cv2.imencode(".png", np.zeros((32, 32, 3), np.uint8))[1].tobytes()
