"""Medians and quartiles, the order of turns, and what is timed."""

import time

import pytest
import torch
from comfyui_modelopt.utils import kernel_split, timing

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("samples", "low", "median", "high"),
    [
        ([5.0], 5, 5, 5),
        ([1.0, 3.0], 1.5, 2, 2.5),
        ([4.0, 1.0, 3.0, 2.0, 100.0], 2, 3, 4),  # one late call moves neither
        ([1.0, 2.0, 3.0, 4.0], 1.75, 2.5, 3.25),
    ],
)
def test_median_and_quartiles(samples, low, median, high):
    found = timing.summarize(samples)
    assert (found.low, found.median, found.high, found.calls) == (low, median, high, len(samples))
    assert found.iqr == high - low
    facts = found.as_dict()
    assert facts == {
        "median_ms": median,
        "low_ms": low,
        "high_ms": high,
        "iqr_ms": high - low,
        "calls": len(samples),
    }


def test_no_samples_are_an_error():
    with pytest.raises(ValueError, match="at least 1 sample"):
        timing.summarize([])


def test_turns_are_shuffled_whole_and_repeatable():
    names = list("abcdef")
    rounds = timing.orders(names, 20, seed=3)
    assert all(sorted(one) == names for one in rounds)
    assert len({tuple(one) for one in rounds}) > 10
    assert rounds == timing.orders(names, 20, seed=3) != timing.orders(names, 20, seed=4)


def test_take_turns_calls_each_as_often_as_it_says():
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    steps = []
    found = timing.take_turns(calls, CPU, 2, 3, 4, lambda: steps.append(1))
    assert {name: len(samples) for name, samples in found.items()} == dict.fromkeys("abc", 12)
    assert seen[:6] == list("aabbcc")  # warm-up, not among the samples
    assert len(seen) == len(steps) == 3 * (2 + 12)
    turns = seen[6::4]
    assert [sorted(turns[i : i + 3]) for i in (0, 3, 6)] == [list("abc")] * 3


def test_time_is_that_of_the_call_and_not_of_the_step():
    samples = timing.time_calls(lambda: time.sleep(0.01), 3, CPU, lambda: time.sleep(0.2))
    assert all(10 <= ms < 150 for ms in samples)


def test_a_step_that_raises_ends_it():
    def step() -> None:
        raise KeyboardInterrupt

    calls = []
    with pytest.raises(KeyboardInterrupt):
        timing.time_calls(lambda: calls.append(1), 5, CPU, step)
    assert calls == [1]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64", "gemm"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNN", "gemm"),
        ("sm80_xmma_fprop_implicit_gemm_indexed_f16f16_f16f32", "convolution"),
        (
            "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_f16_s16816fprop_optimized>",
            "convolution",
        ),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4, silu>", "elementwise"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::Half>", "norm"),
        ("void at::native::vectorized_layer_norm_kernel<c10::Half>", "norm"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("triton_poi_fused_add_mul_3", "elementwise"),
        ("quantize_int8_rowwise_kernel", "quantize"),
        ("aten::addmm", "gemm"),
        ("aten::scaled_dot_product_attention", "attention"),
        ("something_new", "other"),
    ],
)
def test_kernels_by_name(name, kind):
    assert kernel_split.kind_of(name) == kind


def test_profile_of_a_cpu_names_what_ran():
    a = torch.randn(256, 256)
    found = kernel_split.profile(lambda: torch.nn.functional.silu(a @ a), CPU)
    assert found["split_ms"]["gemm"] > 0 and found["split_ms"]["elementwise"] > 0
    assert "kernels" not in found  # there are none on a CPU
    assert any("mm" in name for name, _ in found["longest"])
