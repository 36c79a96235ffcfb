"""Tests of marwright.learning: from examples to a run."""
