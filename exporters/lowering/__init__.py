"""The portable graph, rewritten for one backend a file. Lowerings share passes and never import
each other.
"""
