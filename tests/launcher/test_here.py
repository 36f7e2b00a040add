"""What this machine lacks for a run is found without torch."""

import importlib.util
from importlib.machinery import ModuleSpec

import pytest
from runfile_cases import MOE, run_file

from meshwright.launcher import here
from meshwright.launcher.here import problems_here

DEEP_EP = run_file(model=MOE, parallel={"ep": 2, "expert_exchange": "deep_ep"})
NO_GPU = "runs on NVIDIA GPUs, and CUDA finds none on this machine"
NO_PACKAGE = "the package deep_ep is not installed on this machine"


@pytest.mark.parametrize(
    ("gpus", "is_installed", "rule"),
    [(8, False, NO_PACKAGE), (0, True, NO_GPU), (0, False, f"{NO_GPU}; {NO_PACKAGE}"), (8, True, "")],
)
def test_deep_ep_needs_a_gpu_and_its_package(
    monkeypatch: pytest.MonkeyPatch, gpus: int, is_installed: bool, rule: str
) -> None:
    monkeypatch.setattr(here, "count_gpus", lambda: gpus)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None) if is_installed else None)
    line = f'parallel.expert_exchange = "deep_ep": {rule}; "all_to_all" would fit'
    assert problems_here(DEEP_EP) == ([line] if rule else [])
    assert problems_here(run_file(model=MOE, parallel={"ep": 2})) == []


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(here.ctypes, "CDLL", no_driver)
    assert here.count_gpus() == 0


def test_gpus_are_those_that_the_driver_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def __init__(self, name: str) -> None:
            assert name == "libcuda.so.1"

        def cuInit(self, flags: int) -> int:
            return flags

        def cuDeviceGetCount(self, count: object) -> int:
            count._obj.value = 3
            return 0

    monkeypatch.setattr(here.ctypes, "CDLL", Driver)
    assert here.count_gpus() == 3
