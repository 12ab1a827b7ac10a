"""Sparse autoencoders: the model, one training step, the trainer. They don't know where data lives."""
