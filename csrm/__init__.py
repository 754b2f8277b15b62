"""CSRM: search relevance for markets without labels."""

__version__ = "0.1.0"
