"""What scripts/gpu_acceptance.py runs, and how."""
