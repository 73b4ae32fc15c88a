"""The command line of step-wise switching between models."""
