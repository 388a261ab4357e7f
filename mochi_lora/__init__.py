"""mochi-lora: LoRA fine-tuning for Mochi-1."""

__version__ = "0.1.0"
