"""U-Nets for JAX: pure, small, exact."""

__version__ = "0.1.0"
