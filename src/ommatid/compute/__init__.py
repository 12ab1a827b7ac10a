"""Compute: small tools for arrays, threads and hardware that know nothing of SAEs."""
