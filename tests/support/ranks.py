"""Several ranks on the CPU: processes with gloo, one thread each."""

from __future__ import annotations

import faulthandler
import gc
import json
import logging
import multiprocessing
import socket
import sys
import warnings
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.support.models import build
from tests.support.runs import fit

__all__ = [
    "added",
    "check_ranks",
    "grouped",
    "imported",
    "launch",
    "launch_nodes",
    "place",
    "recorded",
]

LIMIT = 300.0  # seconds; a rank that runs for longer waits for another that never comes


def imported() -> ForkServerContext:
    """Starts processes off one that has done the imports, which cost far more than most tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.support.runs", "tests.support.models", "torch.distributed.run"]
    )
    return context


def launch(world: int, function: Callable[..., Any], *args: Any) -> dict[int, Any]:
    """Run a function on every rank, as torchrun would; its results by rank."""
    imported()
    config = _config(world, rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    found = elastic_launch(config, _quietly)(function, *args)
    return dict(sorted(found.items()))  # not as they ended


def check_ranks(solve: Callable[..., dict[str, Any]], rows: int, atol: float) -> None:
    """Two ranks solve what one does, with all examples on one of them or some on each.

    Args:
        solve: Values by name, from the rows of each rank.
        rows: Rows in all.
        atol: Largest difference, as a share of the largest value where that is above 1.
    """
    alone = solve([slice(0, rows)])
    most = rows * 5 // 8
    shares = [(slice(0, most), slice(most, rows)), (slice(0, rows), slice(0, 0))]
    found = launch(2, grouped, solve, shares)
    assert found[0] == found[1]
    for both in found[0]:
        assert set(both) == set(alone)
        for name, value in alone.items():
            mine, other = torch.tensor(both[name]), torch.tensor(value)
            most = atol * max(1.0, float(other.abs().max()))
            assert torch.allclose(mine, other, rtol=0, atol=most), name


def launch_nodes(nodes: int, function: Callable[..., Any], *args: Any) -> list[int | None]:
    """The same with an agent for each node and one rank each; exit codes of the agents.

    ``torchrun --nnodes`` builds the same configuration of its words.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    agents = [
        imported().Process(target=_agent, args=(node, nodes, endpoint, function, *args))
        for node in range(nodes)
    ]
    for agent in agents:
        agent.start()
    for agent in agents:
        agent.join()
    return [agent.exitcode for agent in agents]


def _config(world: int, **options: Any) -> LaunchConfig:
    given = {"min_nodes": 1, "max_nodes": 1, "start_method": "forkserver", **options}
    return LaunchConfig(nproc_per_node=world, max_restarts=0, monitor_interval=0.1, **given)


def _agent(node: int, nodes: int, endpoint: str, function: Callable[..., Any], *args: Any) -> None:
    # Its ranks limit themselves: a watching thread here would not outlive the fork.
    config = _config(
        1,
        min_nodes=nodes,
        max_nodes=nodes,
        start_method="fork",  # this process has done the imports, and nothing else
        run_id="none",
        rdzv_backend="static",
        rdzv_endpoint=endpoint,
        rdzv_configs={"rank": node, "timeout": LIMIT},
    )
    elastic_launch(config, _quietly)(function, *args)


def place() -> tuple[int, int]:
    """Rank and number of ranks; those of the only one outside a group."""
    group = torch.distributed
    return (group.get_rank(), group.get_world_size()) if group.is_initialized() else (0, 1)


def added(sums: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks."""
    if place()[1] > 1:
        torch.distributed.all_reduce(sums)
    return sums


def grouped(function: Callable[[Any], Any], parts: list[Any]) -> list[Any]:
    """Results of a function on each of the parts, run inside a group of all ranks.

    Every DDP module must be gone before its group is: as the group's last owner, its destructor
    joins gloo's threads with the GIL held, and one of them may be waiting for just that. So a
    failing function leaves the group to the end of the process: its traceback owns what it made.
    """
    torch.distributed.init_process_group("gloo")
    results = [function(part) for part in parts]
    gc.collect()
    torch.distributed.destroy_process_group()
    return results


def _quietly(function: Callable[..., Any], *args: Any) -> Any:
    # The launcher has no limit of its own: without this one the whole suite stands still.
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    build("bert")  # imports the rest
    gc.collect()
    gc.freeze()  # every change of size collects garbage, and what was imported is none
    result = function(*args)
    faulthandler.cancel_dump_traceback_later()
    return result


def recorded(folder: Path, devices: int, nodes: int) -> None:
    """One run; a JSON file for each rank."""
    trainer, _, watch = fit(folder, strategy="ddp", devices=devices, num_nodes=nodes)
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(watch.digests))


if (
    __name__ == "__main__"
):  # python -m tests.support.ranks FOLDER: two ranks of Lightning's own launcher
    _quietly(recorded, Path(sys.argv[1]), 2, 1)
