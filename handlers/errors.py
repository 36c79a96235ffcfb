"""The two ways in which a worker says no.

raise BadRequest(415, "not an image: PNG, JPEG, WebP, BMP and GIF are read")   # this request alone
raise LoadError("spec.json names the decoder 'spng', which is not installed")  # this worker, for good
"""

from __future__ import annotations

PHRASES = {
    400: "Bad Request",
    413: "Payload Too Large",
    415: "Unsupported Media Type",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
}
"""The status line's words. Fixed and ASCII: a line break here would kill the server's worker thread."""

KINDS = {
    400: "malformed",
    413: "too_large",
    415: "unsupported",
    422: "unusable",
    429: "too_busy",
    500: "failed",
    501: "not_offered",
    503: "failed",
}
"""What metrics call each of them."""


class BadRequest(Exception):
    """One request that cannot be answered; `reason` is safe to show to whoever sent it.

    400 malformed · 413 over a limit · 415 not an image, or the wrong content type · 422 the right form with unusable
    values · 429 too busy for it now · 500 our own fault · 501 not offered · 503 send it again
    later.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status = status
        self.reason = reason

    def at(self, index: int) -> BadRequest:
        """The same, naming which instance of the request it was (counted from 0)."""
        return BadRequest(self.status, f"instance {index}: {self.reason}")


class LoadError(RuntimeError):
    """The archive must not be served; one line. TorchServe reports a RuntimeError and dies of anything else."""
