"""Comparisons: several trainings with the same data and seeds, resumable, and tables of what came out."""
