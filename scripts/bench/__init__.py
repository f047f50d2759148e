"""Benches and comparisons; README.md lists them."""

import os

# NNCF tells its makers of each call otherwise, from a process of its own, and those pile up where
# nothing answers.
os.environ.setdefault("NNCF_CI", "1")
