"""Publishing: the choice between champion and challenger, and the catalogue that users read."""
