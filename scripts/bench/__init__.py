"""Benches and comparisons; README.md lists them."""
