"""Hayai: an LLM inference engine and API server built for the speed of one request."""

__version__ = "0.1.0"
