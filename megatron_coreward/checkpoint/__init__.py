"""Durable state of a run."""
