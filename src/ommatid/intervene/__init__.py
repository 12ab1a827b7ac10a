"""Interventions: what a latent does to the model's output, which is another question than what it shows."""
