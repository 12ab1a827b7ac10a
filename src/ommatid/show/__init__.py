"""What is drawn: pictures of features and dictionaries, and the report. Reads the catalogue; needs no torch."""
