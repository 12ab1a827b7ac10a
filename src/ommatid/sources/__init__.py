"""Stage `sources`: fingerprints of what params.yaml names by path, for DVC."""
