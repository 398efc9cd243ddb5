"""Does the shard job's memory stay flat as the source grows? Peak resident memory of its processes, 1x and 8x source.

    python -m tests.benchmarks.shard_memory [images]

The source is a folder and a Parquet file of JPEG images; the job runs as a backend runs it, with a Ray of its own.
Shared memory (Ray's object store) is counted in every process that maps it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from diffusion_core.data.config import DatasetConfig, SourceConfig
from diffusion_core.jobs.requests import ShardRequest, ShardResult
from tests.image_files import encoded, pixels, write_parquet

SIDE, MIB = 128, 1 << 20


def make_source(root: Path, kind: str, images: int) -> Path:
    if kind == "parquet":
        return write_parquet(root / "train.parquet", [encoded(pixels(i, SIDE, SIDE), "JPEG") for i in range(images)])
    root.mkdir()
    for i in range(images):
        (root / f"{i}.jpg").write_bytes(encoded(pixels(i, SIDE, SIDE), "JPEG"))
    return root


def peak_of(command: list[str]) -> tuple[float, float]:
    """Run a program; the largest resident MiB of its own process and of any of its Ray workers."""
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    driver = worker = 0.0
    while process.poll() is None:
        try:
            driver = max(driver, process.memory_info().rss / MIB)
            workers = [child for child in process.children(recursive=True) if "ray::" in " ".join(child.cmdline())]
            worker = max([worker, *(child.memory_info().rss / MIB for child in workers)])
        except psutil.Error:
            continue  # a process ended while it was looked at
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return driver, worker


def main(images: int) -> None:
    print("source   images  source MiB  driver MiB  worker MiB  images/s")
    for kind in ("folder", "parquet"):
        for factor in (1, 8):
            with tempfile.TemporaryDirectory() as scratch:
                root = make_source(Path(scratch) / "source", kind, images * factor)
                size = sum(path.stat().st_size for path in root.parent.rglob("*.*") if path.is_file()) / MIB
                config = DatasetConfig(name="x", image_size=64, rows_per_shard=512)
                request = ShardRequest(store=scratch, source=SourceConfig(uri=str(root)), dataset=config)
                (Path(scratch) / "request.json").write_text(request.model_dump_json())
                driver, worker = peak_of([sys.executable, "-m", "diffusion_core.jobs.shard", f"{scratch}/request.json"])
                result = ShardResult.model_validate_json((Path(scratch) / "result.json").read_bytes())
                rate = images * factor / result.seconds
                print(
                    f"{kind:8} {images * factor:6} {size:11.0f} {driver:11.0f} {worker:11.0f} {rate:9.0f}", flush=True
                )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
