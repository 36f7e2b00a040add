"""Proves with a fault planted: a process that has loaded torch once, and forks for each fault.

    stdin     one fault as JSON on a line        stdout    one answer on a line: is_same, first, axes, or error

The fork reads Meshwright's own modules anew, one of them with a line changed; nothing on the disk is touched.
"""

import importlib.abc
import importlib.machinery
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy  # noqa: F401
import psutil  # noqa: F401
import pydantic  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp


class Planted(importlib.machinery.SourceFileLoader):
    """Reads a module with one line changed."""

    old, new = "", ""

    def get_code(self, fullname: str) -> Any:
        source = Path(self.path).read_text(encoding="utf-8")
        assert source.count(self.old) == 1, f"{self.path} has {self.old!r} {source.count(self.old)} times"
        return compile(source.replace(self.old, self.new), self.path, "exec")


class Planter(importlib.abc.MetaPathFinder):
    def __init__(self, fault: dict[str, Any]) -> None:
        self.module = "meshwright." + fault["file"].removesuffix(".py").replace("/", ".")
        Planted.old, Planted.new = fault["old"], fault["new"]
        self.found = False

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = Planted(name, spec.origin)
        self.found = True
        return spec


def prove_with(fault: dict[str, Any]) -> dict[str, Any]:
    planter = Planter(fault)
    sys.meta_path.insert(0, planter)
    from meshwright.launcher.proof.prove import plan_proof, prove
    from meshwright.launcher.proof.world import usual_world
    from meshwright.launcher.runfile.read import examine

    tables = {
        "run": {"name": "planted"},
        "model": fault["model"],
        "data": {"store": "counted", "seq_len": 64, "mask_documents": fault["mask_documents"]},
        "train": {"steps": 10, "global_batch_size": 16, "micro_batch_size": 2} | fault["train"],
        "learning_rate": {"peak": 1e-2},
        "parallel": fault["layout"],
        "zero": {"stage": fault["zero"]},
    } | fault["tables"]
    run_file, problems = examine(tables)
    assert run_file is not None, problems
    world = usual_world(run_file.parallel)
    run_file, problems = examine(tables, world_size=world)
    assert run_file is not None
    assert not problems, problems
    plan = plan_proof(run_file, world)
    proof = prove(type(plan)(plan.run_file, plan.target, plan.cover, plan.narrowed, tuple(fault["passes"])))
    assert planter.found, f"nothing imported {planter.module}"
    verdicts = [verdict for result in proof.results for verdict in result.verdicts.values()]
    return {
        "is_same": proof.is_same,
        "quantity": next((verdict.differences[0].what for verdict in verdicts if verdict.differences), ""),
        "first": next((result.first for result in proof.results if not result.is_same), ""),
        "axes": list(proof.blame.axes) if proof.blame else [],
        "seconds": proof.seconds,
    }


def serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        read, write = os.pipe()
        if os.fork() == 0:
            try:
                answer = prove_with(json.loads(line))
            except BaseException:
                answer = {"error": traceback.format_exc()}
            os.write(write, json.dumps(answer).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            print(pipe.read().decode(), flush=True)
        os.wait()


if __name__ == "__main__":
    serve()
