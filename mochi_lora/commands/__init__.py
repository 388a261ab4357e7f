"""One module per command: what is plugged into what."""
