"""Engines in use: diffusers pipelines, Triton packages, schedules for C++, a client."""
