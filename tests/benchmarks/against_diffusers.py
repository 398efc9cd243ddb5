"""How fast a training step and 50-step DDIM sampling are, beside diffusers: `make bench`, or on a GPU machine

    python -m tests.benchmarks.against_diffusers

which needs torch and diffusers, but no Ray, Prefect or MLflow. The two sides take turns, in changing order, so that
whatever else the machine does strikes both; a ratio is taken in every round. Results go to tests/benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from diffusion_core.networks import UNetConfig
from tests.benchmarks.sides import Ours, Peer, Shape

RESULTS = Path(__file__).parent / "results"
ROUNDS = (3, 25)  # at least, at most

DIGITS = UNetConfig(
    base_channels=32, channel_multipliers=(1, 2), blocks_per_level=1, attention_resolutions=(4,), head_channels=32
)
SMALL = UNetConfig(base_channels=64, channel_multipliers=(1, 2, 2), attention_resolutions=(16,), head_channels=64)
LARGE = UNetConfig(base_channels=128, channel_multipliers=(1, 2, 2, 2), attention_resolutions=(16,), head_channels=64)

CPU_SHAPES = (
    Shape("digits 8x8x1", (8, 8, 1), DIGITS, train_batch=64, sample_batch=64),
    Shape("colour 32x32x3", (32, 32, 3), SMALL, train_batch=8, sample_batch=4),
)
GPU_SHAPES = (
    Shape("colour 32x32x3", (32, 32, 3), SMALL, train_batch=256, sample_batch=256),
    Shape("colour 32x32x3, wide", (32, 32, 3), LARGE, train_batch=256, sample_batch=256),
)


def main(arguments: list[str] | None = None) -> list[Path]:
    """Measure, print a table, and return the files that were written, one pair a device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="only this one; default: all there are")
    parser.add_argument("--seconds", type=float, default=12, help="seconds for each measurement (default 12)")
    parser.add_argument("--shapes", type=int, default=9, help="only the first so many network shapes")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], action="append", help="default: both")
    parser.add_argument("--compile", action="store_true", help="compile the networks of both sides")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    devices = [options.device] if options.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    written = []
    for name in devices:
        written += _write(options.out, _measure_device(torch.device(name), options), options.compile)
    return written


def _measure_device(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    report = {"machine": _machine(device), "settings": _settings(options), "results": []}
    for shape in (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES)[: options.shapes]:
        for precision in options.precision or ("float32", "bfloat16"):
            report["results"] += _measure_shape(shape, precision, device, options)
    return report


def _measure_shape(
    shape: Shape, precision: str, device: torch.device, options: argparse.Namespace
) -> list[dict[str, Any]]:
    ours, peer = (side(shape, precision, device, options.compile) for side in (Ours, Peer))
    if ours.parameters != peer.parameters:
        raise RuntimeError(f"The networks differ: {ours.parameters} parameters here, {peer.parameters} there.")
    results = []
    for task, images in (("training step", shape.train_batch), (f"DDIM, {shape.steps} steps", shape.sample_batch)):
        act = "train_step" if task == "training step" else "sample"
        trial = peer.train_step if act == "train_step" else partial(peer.sample, steps=5)
        layout = "channels_last" if options.compile else _choose_layout(peer, trial, device)
        rounds = _take_turns(getattr(ours, act), getattr(peer, act), device, options.seconds)
        result = {"shape": shape.name, "parameters": ours.parameters, "precision": precision, "task": task}
        result |= {"batch": images, "peer_layout": layout, **_figures(rounds, images)}
        result["load"] = round(os.getloadavg()[0], 1)
        print(_line(result), flush=True)
        results.append(result)
    ours.close()
    return results


def _take_turns(
    ours: Callable[[], object], peer: Callable[[], object], device: torch.device, seconds: float
) -> list[tuple[float, float]]:
    """Seconds of each side in every round. A short task is repeated until a turn takes a noticeable time."""
    _timed(peer, device, 1)
    repeats = max(1, round(0.3 / min(_timed(ours, device, 1) for _ in range(2))))
    rounds: list[tuple[float, float]] = []
    end = time.monotonic() + seconds
    while len(rounds) < ROUNDS[0] or (len(rounds) < ROUNDS[1] and time.monotonic() < end):
        if len(rounds) % 2:
            theirs, mine = _timed(peer, device, repeats), _timed(ours, device, repeats)
        else:
            mine, theirs = _timed(ours, device, repeats), _timed(peer, device, repeats)
        rounds.append((mine, theirs))
    return rounds


def _timed(act: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of one repetition."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        act()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _choose_layout(peer: Peer, act: Callable[[], object], device: torch.device) -> str:
    seconds = {}
    for layout in ("contiguous", "channels_last"):
        peer.arrange(layout)
        seconds[layout] = min(_timed(act, device, 1) for _ in range(3))
    best = min(seconds, key=lambda layout: seconds[layout])
    peer.arrange(best)
    return best


def _figures(rounds: list[tuple[float, float]], images: int) -> dict[str, Any]:
    ratios = [theirs / mine for mine, theirs in rounds]
    return {
        "rounds": len(rounds),
        "ours": _spread([images / mine for mine, _ in rounds]),
        "peer": _spread([images / theirs for _, theirs in rounds]),
        "ratio": _spread(ratios),
    }


def _spread(values: list[float]) -> dict[str, Any]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    figures = {"median": statistics.median(values), "quartiles": [low, high], "all": values}
    return json.loads(json.dumps(figures), parse_float=lambda text: float(f"{float(text):.5g}"))  # type: ignore[no-any-return]


def _machine(device: torch.device) -> dict[str, Any]:
    cpu = next((x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), "")
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "diffusers": metadata.version("diffusers"),
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        machine["cuda"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return machine


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    command = ["git", "describe", "--always", "--dirty"]
    code = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent)
    return {
        "measured": datetime.now(UTC).isoformat(timespec="minutes"),
        "code": code.stdout.strip() or "unknown",
        "threads": torch.get_num_threads(),
        "compiled": options.compile,
        "seconds_per_measurement": options.seconds,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _line(result: dict[str, Any]) -> str:
    ours, peer, ratio = (result[name]["median"] for name in ("ours", "peer", "ratio"))
    what = f"{result['shape']}, {result['precision']}, {result['task']}"
    return f"{what:58} {ours:9.2f} images/s, diffusers {peer:9.2f}, ratio {ratio:.2f}"


def _write(folder: Path, report: dict[str, Any], compiled: bool) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    device = report["machine"]["device"].lower().replace(" ", "-")
    path = folder / f"against-diffusers-{device}{'-compiled' if compiled else ''}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    path.with_suffix(".md").write_text(_markdown(report))
    print(f"written: {path}.json and .md")
    return [path.with_suffix(".json"), path.with_suffix(".md")]


def _markdown(report: dict[str, Any]) -> str:
    facts = {**report["machine"], **report["settings"]}
    lines = [
        f"# Beside diffusers on {facts['device']}",
        "",
        "Medians over rounds in which both sides took turns, with quartiles. A ratio above 1 means that this project is"
        " faster. The same parameters, attention heads and precision; the peer has the faster of two memory layouts."
        " `load` is the machine's load average at the end: above the number of threads, others worked too.",
        "",
        "| network | parameters | precision | task | batch | images/s | diffusers | ratio | rounds | load |",
        "|---|---:|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for result in report["results"]:
        ours, peer, ratio = (_shown(result[name]) for name in ("ours", "peer", "ratio"))
        lines.append(
            f"| {result['shape']} | {result['parameters'] / 1e6:.2f} M | {result['precision']} | {result['task']} "
            f"| {result['batch']} | {ours} | {peer} | {ratio} | {result['rounds']} | {result['load']} |"
        )
    return "\n".join([*lines, "", *(f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items()), ""])


def _shown(figure: dict[str, Any]) -> str:
    low, high = figure["quartiles"]
    return f"{figure['median']:.3g} ({low:.3g}–{high:.3g})"


if __name__ == "__main__":
    main()
