"""BentoML, as its documentation on adaptive batching and on workers advises: `service.py` has the service.

Two workers, each with adaptive batching up to 32; how long it waits the dispatcher finds out by itself. The latency
budget stays at its default: beyond a smaller one it answers 503 (with 100 ms, two thirds at 64 connections). A
batchable endpoint takes lists in JSON and no raw body, so the picture goes as base64 and the answer comes in a list of
one. No access log, no metrics, no usage report.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ |= {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": os.environ["TMPDIR"]}
    command = str(Path(sys.executable).parent / "bentoml")
    words = [command, "serve", "service:Classifier", "--host", "127.0.0.1", "--port", os.environ["PEER_PORT"]]
    os.execv(command, [*words, "--working-dir", str(Path(__file__).parent)])
