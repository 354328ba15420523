"""Attention over shared projections: the op and its plain reference."""
