"""What makes the embedded model, and what measures the toolchain (``bench``); not in the wheel."""
