"""What a store holds: finding it by the names that people type, listing, tracing, verifying and pruning it.

No Prefect, no Ray, no command line: the same questions can be asked in a notebook.
"""
