"""Measuring past SAEs again: under the present params, on the present images, so that SAEs of all times can be compared."""
