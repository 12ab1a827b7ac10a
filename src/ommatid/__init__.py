"""Ommatid: from images and a vision-language model to a SQL catalogue of monosemantic features."""

__version__ = "0.1.0"
