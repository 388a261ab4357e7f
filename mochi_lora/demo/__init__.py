"""The demo page: base and adapter side by side. Only `page` and `serve` know Gradio."""
