"""Does the shard job's memory stay flat as the source grows? Peak resident memory of its processes, 1x and 8x source.

    python -m tests.benchmarks.shard_memory [images]

The source is a folder and a Parquet file of JPEG images; the job runs as a backend runs it, with a Ray of its own.
Shared memory (Ray's object store, mapped files) is not counted: there the job keeps a few bytes for each image.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from diffusion_core.data.config import DatasetConfig, SourceConfig
from diffusion_core.stages.shard import ShardRequest, ShardResult
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
    """Run a program; the largest anonymous resident MiB of its own process and of any of its Ray workers (Linux)."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    driver = worker = 0.0
    while process.poll() is None:
        status = {
            int(path.parent.name): fields for path in Path("/proc").glob("[0-9]*/status") if (fields := read(path))
        }
        driver = max(driver, anonymous(status.get(process.pid, {})))
        workers = [fields for pid, fields in status.items() if descends(pid, process.pid, status)]
        worker = max([worker, *(anonymous(fields) for fields in workers if fields["Name"].startswith("ray::"))])
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return driver, worker


def read(path: Path) -> dict[str, str]:
    """The fields of a process's status file; none if the process has ended."""
    try:
        return dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)
    except (FileNotFoundError, ProcessLookupError):
        return {}


def descends(pid: int, ancestor: int, status: dict[int, dict[str, str]]) -> bool:
    while pid in status and pid != ancestor:
        pid = int(status[pid]["PPid"])
    return pid == ancestor


def anonymous(fields: dict[str, str]) -> float:
    return int(fields.get("RssAnon", "0 kB").split()[0]) / 1024


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
                driver, worker = peak_of(
                    [sys.executable, "-m", "diffusion_core.stages", "shard", f"{scratch}/request.json"]
                )
                result = ShardResult.model_validate_json((Path(scratch) / "result.json").read_bytes())
                rate = images * factor / result.seconds
                print(
                    f"{kind:8} {images * factor:6} {size:11.0f} {driver:11.0f} {worker:11.0f} {rate:9.0f}", flush=True
                )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
