"""Adapters and bases in other makers' formats, and arithmetic on adapters: merge, change of rank, extraction."""
