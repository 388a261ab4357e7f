"""Mochi's parts: flow, transformer, VAE, text encoder, adapter."""
