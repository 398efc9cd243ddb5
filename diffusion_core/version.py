"""Which code is this? The answer is recorded with everything that is made."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from diffusion_core import __version__


@cache
def code_version() -> str:
    """The package's version and a digest of its sources, as `0.1.0+sources.3f2a91c04d7e`.

    From a checkout, an installed wheel, or the copy inside a registered model alike: the same sources have the same
    digest, and a changed line another.
    """
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return f"{__version__}+sources.{digest.hexdigest()[:12]}"
