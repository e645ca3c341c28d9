"""`rlflow plan`: what a recipe will cost, before anything is downloaded; estimate.py says how it is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rlflow.console import terminal
from rlflow.cost.estimate import UTILISATION, Planner, not_counted
from rlflow.cost.fit import RESERVE, make_fit, more_gpus, other_ways
from rlflow.cost.gpus import GPU


def plan_as_json(planner: Planner, gpu: GPU, gpus: int) -> dict[str, Any]:
    """Everything the command prints."""
    found, fit = planner.estimate(planner.config, gpus), make_fit(planner, gpu, gpus)
    precision = planner.config.policy.precision
    more = None if fit.fits else more_gpus(planner, gpu, gpus)
    per_image = {k: v * gpus / found.samples for k, v in asdict(found.cost).items()}
    return {
        "gpu": gpu.name,
        "gpus": gpus,
        "samples_per_iteration": found.samples,
        "network_rows_per_iteration": {**asdict(found.cost), "total": found.cost.total},
        "network_rows_per_sample": {**per_image, "total": sum(per_image.values())},
        "memory_bytes": dict(found.memory.parts),
        "not_counted": not_counted(planner.config, planner.traced(planner.config.policy.grad_checkpointing)[0]),
        "worst_moment": found.memory.worst,
        "peak_bytes": found.memory.peak,
        "limit_bytes": RESERVE * 1e9 * gpu.gigabytes,
        "fits": found.memory.peak <= RESERVE * 1e9 * gpu.gigabytes,
        "settings_that_fit": fit.overrides if fit.fits else None,
        "smallest": {"settings": fit.overrides, "peak_bytes": fit.estimate.memory.peak},
        "more_gpus": None if more is None else {"gpus": more[0], "settings": more[1].overrides},
        "tflop_per_iteration": found.flops * gpus / 1e12,
        "network_seconds_per_iteration": found.seconds(gpu, precision),
    }


def print_plan(planner: Planner, gpu: GPU, gpus: int) -> None:
    """Tables on the terminal."""
    from rich.table import Table

    values, console = plan_as_json(planner, gpu, gpus), terminal()
    rows = Table("network evaluations", "per sample", f"per iteration ({values['samples_per_iteration']} samples)")
    for name, each in values["network_rows_per_sample"].items():
        rows.add_row(name, f"{each:.2f}", f"{values['network_rows_per_iteration'][name] * gpus:,}")
    console.print(rows)
    memory = Table(f"memory of a process at its worst moment ({values['worst_moment']})", "MiB")
    for name, size in values["memory_bytes"].items():
        memory.add_row(name, f"{size / 2**20:,.1f}")
    memory.add_row("peak", f"{values['peak_bytes'] / 2**20:,.1f}")
    memory.add_row(f"limit: {RESERVE:.0%} of {gpu.gigabytes:g} GB", f"{values['limit_bytes'] / 2**20:,.1f}")
    console.print(memory)
    if values["not_counted"]:
        console.print(f"Not counted: {', '.join(values['not_counted'])}", soft_wrap=True)
    console.print(_verdict(values, gpu), soft_wrap=True)
    if values["settings_that_fit"] is None:
        console.print(_help(values, gpu) + other_ways(planner.config), soft_wrap=True)


def _words(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={str(value).lower()}" for name, value in settings.items())


def _verdict(values: Mapping[str, Any], gpu: GPU) -> str:
    tflop, seconds = values["tflop_per_iteration"], values["network_seconds_per_iteration"]
    time = f"{tflop:.3g} TFLOP an iteration: {seconds:.2g} s at {UTILISATION:.0%} of the peak of {gpu.name}"
    time += " (an estimate, of the network alone: no rewards, no simulators)"
    if values["fits"]:
        return f"{time}\nFits."
    smallest, settings = values["smallest"]["peak_bytes"] / 1e9, _words(values["smallest"]["settings"])
    if values["settings_that_fit"] is not None:
        return f"{time}\nDoes not fit. It fits, at {smallest:.1f} GB, with: {settings}"
    return f"{time}\nDoes not fit: it needs {smallest:.1f} GB{', with: ' if settings else ''}{settings}"


def _help(values: Mapping[str, Any], gpu: GPU) -> str:
    more = values["more_gpus"]
    if more is None:
        return "No number of such GPUs was found to do, with groups and minibatches shared out evenly."
    settings = _words(more["settings"])
    return f"It fits on {more['gpus']} x {gpu.name}{', with: ' if settings else ''}{settings}"
