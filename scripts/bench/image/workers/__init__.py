"""A module for each program. It runs where only that program is installed: beside it, it imports
nothing but the standard library and :mod:`scripts.bench.image.workers.measuring`.
"""
