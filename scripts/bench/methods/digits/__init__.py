"""The small model that the comparison of methods is about: a UNet of digits, and their judge."""
