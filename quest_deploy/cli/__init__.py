"""The command line, one file per command; heavy packages are imported where a command needs
them.
"""
