"""Sparse autoencoders: the model, the training step and the trainer. Nothing here knows where data is stored."""
