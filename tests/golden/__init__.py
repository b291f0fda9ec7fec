"""Stored results of the published implementations against this project's modules."""
