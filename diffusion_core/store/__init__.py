"""The store: local folders and S3 prefixes behind one small interface, and what is built on it alone.

`Directory` is a place in the store. `create`, which writes only if nothing is there, is how everything is committed;
`lease` and `turns` let one process at a time do a piece of work; `patience` says how long an outage is waited for.
"""

from diffusion_core.store.directory import Directory, check_reachable
from diffusion_core.store.place import Entry, StoreFull

__all__ = ["Directory", "Entry", "StoreFull", "check_reachable"]
