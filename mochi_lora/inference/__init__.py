"""From a model and prompts to videos."""
