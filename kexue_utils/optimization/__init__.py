"""Chapters on optimization."""
