"""Data: raw text to token files (.bin/.idx), and the datasets that read them."""
