"""Attention over pages: one small interface, one module a backend, one place that chooses."""
