"""Chapters on attention as probability, compression and recurrence."""
