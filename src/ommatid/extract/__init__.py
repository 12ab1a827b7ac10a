"""Stage `extract`: images through the model and the judges, or activations that were made elsewhere."""
