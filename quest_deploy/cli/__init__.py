"""The command line; heavy packages are imported where a command needs them."""
