"""Trained models at work: loading a checkpoint, generating text with a halved cache."""
