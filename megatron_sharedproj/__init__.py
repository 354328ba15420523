"""Train, measure and ship transformers whose attention shares projections.

Importing the package imports neither Megatron-Core nor the compiled extension.
"""

__version__ = "0.1.0"
