"""Stage `sources`: fingerprints, for DVC, of the files that params.yaml names."""
