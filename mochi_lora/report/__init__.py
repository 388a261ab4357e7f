"""From conclusions to what people read: one HTML page, Markdown, plots, pictures."""
