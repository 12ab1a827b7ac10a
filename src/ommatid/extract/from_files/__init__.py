"""Import of activations from files: `extract.source: files`. See docs/users/activations.md."""
