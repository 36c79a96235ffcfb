"""From a checkpoint to an artifact to a `.mar` that can be trusted."""
