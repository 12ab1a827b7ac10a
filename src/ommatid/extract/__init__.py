"""Stage `extract`: computes activations and embeddings of images, or imports activations that were made elsewhere."""
