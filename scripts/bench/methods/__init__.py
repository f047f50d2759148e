"""Methods measured against each other: cells, each in a process of its own, a table and a plot."""
