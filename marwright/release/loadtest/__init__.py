"""An open-loop load test of a running server, every answer checked."""
