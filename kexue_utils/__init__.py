"""Implementations and checks behind *Derivations that run*."""
