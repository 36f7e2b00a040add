"""The denominator of MFU is a dense peak, a measured ceiling or the user's number, and says which."""

import time

import pytest
import torch

from meshwright.launcher.observe.peak import Peak, choose_peak, measured_peak, published_peak

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX A6000", 154.8),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_a_gpu_has_its_dense_bf16_peak(name: str, tera: float) -> None:
    assert published_peak(name) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize("name", ["NVIDIA A10G", "Tesla T4", "NVIDIA H1000", "NVIDIA RTX 6000", ""])
def test_a_gpu_with_a_similar_name_is_not_taken_for_one_of_the_table(name: str) -> None:
    assert published_peak(name) is None


def test_a_known_gpu_takes_its_peak_and_an_unknown_one_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    peak = choose_peak(cuda, torch.float32)
    assert (peak.flops, peak.name) == (989e12, "NVIDIA H200 dense bf16 peak 989 TFLOP/s")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X999")
    monkeypatch.setattr("meshwright.launcher.observe.peak.measured_peak", lambda device, dtype: Peak(1.0, "measured"))
    assert choose_peak(cuda, torch.float32).name == "measured"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_is_measured_in_the_runs_dtype_within_a_second(dtype: torch.dtype) -> None:
    began = time.perf_counter()
    peak = choose_peak(CPU, dtype)
    assert time.perf_counter() - began < 5.0  # 0.3 s is aimed at; the machine may be busy
    name = str(dtype).removeprefix("torch.")
    assert peak.name.startswith(f"measured {name} matrix product on ")
    # Not far below what a plain product reaches; the rest of the factor is for a busy machine.
    x = torch.randn(512, 512).to(dtype)
    torch.mm(x, x)
    began = time.perf_counter()
    torch.mm(x, x)
    assert peak.flops > 0.02 * 2 * 512**3 / (time.perf_counter() - began)


@pytest.mark.parametrize(("threads", "words"), [(1, "1 CPU thread "), (2, "2 CPU threads ")])
def test_a_measured_peak_names_the_threads(monkeypatch: pytest.MonkeyPatch, threads: int, words: str) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert f" matrix product on {words}" in measured_peak(CPU, torch.float32, seconds=0.0).name


def test_the_measured_ceiling_counts_two_operations_for_each_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshwright.launcher.observe.peak._fastest", lambda product, x, y, until: 0.5)
    assert measured_peak(CPU, torch.float32).flops == 2 * 256**3 / 0.5
