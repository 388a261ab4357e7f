"""Several GPUs as one: how ranks are laid out, exchange tokens, and learn that one of them is gone."""
