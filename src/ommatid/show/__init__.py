"""Pictures of features and dictionaries, and the report about a catalogue. Nothing here needs torch."""
