"""Engines: one interface, four backends."""
