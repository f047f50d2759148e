"""What a finished workspace is handed over as, to be served elsewhere."""
