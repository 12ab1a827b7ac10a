"""What tests are made of: models, planted truths, artefacts, servers and processes."""
