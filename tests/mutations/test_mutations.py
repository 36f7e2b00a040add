"""`prove` catches every planted fault, names the tensor and the axis, and passes what changes nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mutations.fault import Fault
from mutations.faults import FAULTS
from mutations.harmless import HARMLESS

ROOT = Path(__file__).resolve().parents[2]
# One of a gradient, one of a number over all ranks, one that must pass: the rest are slow tests.
QUICK = {
    "router gradient not summed under sequence parallelism",
    "norm that clips leaves the other ranks' experts out",
    "buckets filled in the parameters' order, not in that of the backward",
}


@pytest.fixture(scope="module")
def planter() -> Iterator["subprocess.Popen[str]"]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(Path(__file__).with_name("planter.py"))]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment, cwd=ROOT) as process:
        yield process
        process.kill()


def cases(faults: list[Fault]) -> list[Any]:
    return [pytest.param(f, id=f.name, marks=() if f.name in QUICK else pytest.mark.slow) for f in faults]


def proof_with(planter: "subprocess.Popen[str]", fault: Fault) -> dict[str, Any]:
    assert planter.stdin is not None
    assert planter.stdout is not None
    planter.stdin.write(json.dumps(fault.request()) + "\n")
    planter.stdin.flush()
    answer: dict[str, Any] = json.loads(planter.stdout.readline())
    assert "error" not in answer, answer["error"]
    return answer


@pytest.mark.parametrize("fault", cases(FAULTS))
def test_a_planted_fault_is_caught_and_named(planter: "subprocess.Popen[str]", fault: Fault) -> None:
    answer = proof_with(planter, fault)
    assert not answer["is_same"]
    assert fault.named in answer["first"]
    assert fault.quantity in ("", answer["quantity"])
    assert not fault.axis or fault.axis in answer["axes"]
    assert not fault.is_alone or answer["axes"] == []
    assert not fault.not_axis or fault.not_axis not in answer["axes"]


@pytest.mark.parametrize("fault", cases(HARMLESS))
def test_what_changes_nothing_passes(planter: "subprocess.Popen[str]", fault: Fault) -> None:
    answer = proof_with(planter, fault)
    assert (answer["is_same"], answer["first"]) == (True, "")


def test_every_fault_is_one_line_of_product_source() -> None:
    names = [fault.name for fault in [*FAULTS, *HARMLESS]]
    assert len(FAULTS) >= 15
    assert len(HARMLESS) >= 3
    assert len(set(names)) == len(names)
    for fault in [*FAULTS, *HARMLESS]:
        source = (ROOT / fault.file).read_text(encoding="utf-8")
        assert source.count(fault.old) == 1, fault.name
        assert "\n" not in fault.old + fault.new
        assert bool(fault.named or fault.quantity) == (fault in FAULTS)
        # Of each it is said whether an axis is to be blamed, and which.
        assert bool(fault.axis) + fault.is_alone == (fault in FAULTS), fault.name
