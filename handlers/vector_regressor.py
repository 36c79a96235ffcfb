"""Rows of numbers → `{target: value}`. TorchServe wants exactly one class in this module."""

from __future__ import annotations

from handlers import base


class VectorRegressor(base.BatchHandler):
    """`"handler": "handlers.vector_regressor"` in an archive's manifest."""

    task = "regression"
