"""OpenVINO: the backend, and what its layers run in."""
