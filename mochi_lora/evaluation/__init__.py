"""From numbers to conclusions: which clips are made and measured, statistics, verdict."""
