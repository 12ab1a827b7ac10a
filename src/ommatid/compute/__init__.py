"""Small tools for arrays, threads, checkpoints and hardware. Nothing here knows about SAEs."""
