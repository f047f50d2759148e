"""Whole images on a CPU: ours beside every other program that a user could pick.

``__main__`` has the command, ``rows`` the programs, ``prepare`` makes what they read, ``workers``
run one each, in the environment of its program, and ``report`` writes the page.
"""
