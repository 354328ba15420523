"""Attention operations over shared projections: the op, its decode form and the plain reference."""
