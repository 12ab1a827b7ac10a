"""Activations: reading what `extract` wrote, as training batches, as columns, or mapped from the disk."""
