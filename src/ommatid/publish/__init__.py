"""Publishing: which of two SAEs is the champion, and the catalogue that users read."""
