"""From a `.mar` to the version that answers."""
