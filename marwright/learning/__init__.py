"""From examples to a checkpoint, and how good it is."""
