"""Quantize diffusion models after training and run them at low bits in JAX."""
