"""A package, since torch-fidelity installs one of this name, which Python would find first."""
