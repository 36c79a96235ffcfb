"""The handler bundle: what runs inside a TorchServe worker, and ships whole in every archive."""
