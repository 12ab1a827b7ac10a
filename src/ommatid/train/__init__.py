"""Stage `train`: one or several SAEs trained in one pass over the activations, or imported."""
