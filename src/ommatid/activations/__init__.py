"""Reading of the activations that `extract` wrote: as training batches, as columns, or memory-mapped."""
