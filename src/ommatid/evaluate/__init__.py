"""Stage `evaluate`: what every latent does on the evaluation split, beside controls."""
