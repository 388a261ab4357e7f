"""Clips in, batches out. Knows no model."""
