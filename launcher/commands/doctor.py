"""`meshwright doctor`: what is on this machine, and what each missing thing would have been for.

Every probe is a real import or a real question, behind `except Exception`: a package that is half installed fails in
ways of its own (Transformer Engine without its CUDA library raises RuntimeError), and that is the answer here.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from meshwright.launcher.kept_memory import KEPT_MEMORY

Rows = Iterator[tuple[str, str]]


class Package(NamedTuple):
    """An optional package: the name to import, the name to install, what it is for, whether this version uses it."""

    module: str
    distribution: str
    purpose: str
    is_used: bool


PACKAGES = (
    Package("transformers", "transformers", "loading and verifying an export (extra `export`)", True),
    Package("triton", "triton", "torch.compile on a GPU", True),
    Package("transformer_engine.pytorch", "transformer-engine", "FP8 and fused layers on NVIDIA GPUs", False),
    Package("apex", "apex", "NVIDIA's fused optimizer and norms", False),
    Package("flash_attn", "flash-attn", "FlashAttention beyond the one in torch", False),
    Package("deepspeed", "deepspeed", "offload to CPU memory and NVMe", False),
    Package("megatron.core", "megatron-core", "weights in megatron-core's layout", False),
    Package("mpi4py.MPI", "mpi4py", "ranks that mpirun starts on several nodes: where rank 0 is", True),
    Package("wandb", "wandb", "metrics in Weights & Biases", False),
)

RANK_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_GPUS_ON_NODE",
    "SLURM_CPUS_PER_TASK",
    "SLURM_MEM_PER_NODE",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)


def doctor() -> None:
    """Say what this machine has, and what is missing for which feature.

    Nothing is changed and nothing is downloaded. What is missing is no error: only the features named beside it are
    not there, and a run file that asks for one of them is refused with the reason.
    """
    sections: dict[str, Callable[[], Rows]] = {
        "machine": machine_rows,
        "python and torch": torch_rows,
        "devices": device_rows,
        "optional packages": package_rows,
        "memory setting (CPU)": malloc_rows,
        "ranks": rank_rows,
    }
    for title, rows in sections.items():
        print(title)
        for name, text in rows():
            print(f"  {name:<22}{text}")


def machine_rows() -> Rows:
    """Yield the system, the cores and the memory that this process may use, and free room on disk."""
    yield (
        "system",
        f"{platform.system()} {platform.release()}, {platform.machine()}, {' '.join(platform.libc_ver()).strip()}",
    )
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "cores", f"{usable} usable of {os.cpu_count()}"
    memory = psutil.virtual_memory()
    limit = _cgroup_limit()
    yield (
        "memory",
        f"{_gib(memory.available)} free of {_gib(memory.total)}" + (f", limited to {_gib(limit)}" if limit else ""),
    )
    yield "disk here", f"{_gib(shutil.disk_usage('.').free)} free in {Path.cwd()}"
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    yield "C++ compiler", compiler or "none: train.compile = true will not work on a CPU"


def torch_rows() -> Rows:
    """Yield the versions of Python and torch, and the ways in which ranks can talk."""
    yield "python", f"{platform.python_version()} at {sys.executable}"
    try:
        import torch
        import torch.distributed as dist
    except Exception as error:  # a broken torch is what doctor is for
        yield "torch", f"does not load: {_reason(error)}; nothing but `check` and `prepare` will work"
        return
    yield (
        "torch",
        f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, {torch.backends.cpu.get_cpu_capability()}",
    )
    has_mkl, has_onednn = (bool(it.is_available()) for it in (torch.backends.mkl, torch.backends.mkldnn))
    yield "products on CPU", f"MKL {'yes' if has_mkl else 'no'}, oneDNN {'yes' if has_onednn else 'no'}"
    if not dist.is_available():
        yield "ranks", "this torch is built without torch.distributed: only one process can run"
        return
    backends = (("gloo", dist.is_gloo_available(), "CPU ranks"), ("nccl", dist.is_nccl_available(), "GPU ranks"))
    for name, there, purpose in backends:
        yield name, f"yes ({purpose})" if there else f"no: {purpose} cannot run"


def device_rows() -> Rows:
    """Yield the accelerators that torch can use."""
    try:
        import torch

        names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        has_mps = torch.backends.mps.is_available()
    except Exception as error:  # drivers fail in ways of their own
        yield "cuda", f"cannot be asked: {_reason(error)}"
        return
    for index, device in enumerate(names):
        yield f"cuda:{index}", f"{device.name}, {_gib(device.total_memory)}, capability {device.major}.{device.minor}"
    if not names:
        yield "cuda", 'none: run.device = "auto" takes the CPU'
    yield "mps", 'yes, for one process (run.device = "mps")' if has_mps else "none"


def package_rows() -> Rows:
    """Yield each optional package: its version, or why it is not there and what it would be for."""
    for package in PACKAGES:
        found = probe(package)
        use = "" if package.is_used else "; this version does not use it"
        yield package.distribution, f"{found} (for {package.purpose}{use})"


def probe(package: Package) -> str:
    """Import an optional package and return its version, or the reason why it cannot be used."""
    if importlib.util.find_spec(package.module.partition(".")[0]) is None:
        return "not installed"
    if package.distribution == "apex" and not _is_nvidias_apex():
        return "another program of that name, from PyPI: NVIDIA's is built from its source; `pip uninstall apex`"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(package.module)
        return importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return "yes, of unknown version"
    except Exception as error:  # whatever a half-installed package raises
        return f"installed, but does not load: {_reason(error)}"


def malloc_rows() -> Rows:
    """Yield whether freed memory is kept, which training on a CPU gains from."""
    if platform.libc_ver()[0] != "glibc":
        yield "glibc", "not the C library here; nothing to set"
        return
    for allocator in ("jemalloc", "tcmalloc"):
        if allocator in os.environ.get("LD_PRELOAD", ""):
            yield "allocator", f"{allocator} in place of glibc's"
            return
    given = [f"{name}={os.environ[name]}" for name in KEPT_MEMORY if name in os.environ]
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        given.append(f"GLIBC_TUNABLES={os.environ['GLIBC_TUNABLES']}")
    if given:
        yield "set", " ".join(given)
        return
    kept = " ".join(f"{name}={value}" for name, value in KEPT_MEMORY.items())
    yield "not set here", f"`meshwright train` starts its ranks with {kept};"
    yield "", "other programs give each large tensor back to the system, which costs time on a CPU"


def rank_rows() -> Rows:
    """Yield the variables by which a launcher tells a process which rank it is."""
    found = [(name, os.environ[name]) for name in RANK_VARIABLES if name in os.environ]
    yield from found or [("none", "no launcher's variables are set: one process, or `meshwright train --ranks N`")]


def _is_nvidias_apex() -> bool:
    """Say whether the apex that is installed is NVIDIA's; PyPI's is a login toolkit for a web framework."""
    spec = importlib.util.find_spec("apex")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return any((Path(folder) / "optimizers").is_dir() for folder in folders)


def _cgroup_limit() -> int | None:
    """Return the memory limit of this process's container or job, if there is one."""
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reason(error: Exception) -> str:
    """Return an error as one line."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _gib(number: int) -> str:
    return f"{number / 2**30:.1f} GiB"
