"""Steersman: inference-time steering inside vLLM's decoder layers, for each request and each token."""

__version__ = "0.1.0"
