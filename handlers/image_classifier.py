"""Images → `{label: probability}` of the top k. TorchServe wants exactly one class in this module."""

from __future__ import annotations

from handlers import base


class ImageClassifier(base.BatchHandler):
    """`"handler": "handlers.image_classifier"` in an archive's manifest."""

    task = "classification"
