"""What lies on disk: schemes, checkpoints, reference records, model sources, the workspace."""
