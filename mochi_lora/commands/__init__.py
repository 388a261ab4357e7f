"""One module per command, with its parts beside it: what is plugged into what."""
