"""Which table a processor gets, by what it says of itself."""

from __future__ import annotations

import pytest

from qcompiler.targets.host import NO_VNNI, Processor, detect, host_target_name
from qcompiler.targets.target import load_target, target_names

INTEL_VNNI = """processor : 0
vendor_id : GenuineIntel
model name : Intel(R) Xeon(R) Platinum 8480+
flags : fpu sse4_2 avx2 avx512f avx512_vnni avx_vnni amx_int8
"""
INTEL_AVX_VNNI = "model name : 12th Gen Intel(R) Core(TM) i5-1240P\nflags : fpu sse4_2 avx avx2 fma avx_vnni\n"
INTEL_AVX2 = """processor : 0
model name : Intel(R) Core(TM) i7-6700 CPU @ 3.40GHz
flags : fpu sse4_2 avx avx2 fma
"""
INTEL_AVX512 = "model name : Intel(R) Xeon(R) Gold 5118 CPU @ 2.30GHz\nflags : fpu avx2 fma avx512f avx512bw avx512vl\n"
INTEL_OLD = "model name : Intel(R) Xeon(R) CPU E5-2650 0\nflags : fpu ssse3 sse4_1 sse4_2 avx\n"
ARM = """processor : 0
BogoMIPS : 50.00
Features : fp asimd evtstrm aes asimddp i8mm
CPU implementer : 0x41
"""
ARM_OLD = "processor : 0\nFeatures : fp asimd evtstrm aes pmull crc32 cpuid\n"
APPLE_ARM = """machdep.cpu.brand_string: Apple M2
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_SME: 0
"""
APPLE_OLD_ARM = "machdep.cpu.brand_string: Apple M1\nhw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\n"
APPLE_INTEL = """machdep.cpu.brand_string: Intel(R) Core(TM) i7-8750H CPU @ 2.20GHz
machdep.cpu.features: FPU SSE4.2 AVX1.0 FMA
machdep.cpu.leaf7_features: RDWRFSGS BMI1 AVX2 BMI2
"""


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "features", "target"),
    [
        (INTEL_VNNI, "x86_64", {"vnni", "avx2", "avx512f", "amx_int8"}, "ort-x86"),
        (INTEL_VNNI, "AMD64", {"vnni", "avx2", "avx512f", "amx_int8"}, "ort-x86"),
        (INTEL_AVX_VNNI, "x86_64", {"vnni", "avx2"}, "ort-x86"),
        (INTEL_AVX2, "x86_64", {"avx2", NO_VNNI}, "ort-x86-avx2"),
        (INTEL_AVX512, "x86_64", {"avx2", "avx512f", NO_VNNI}, "ort-x86-avx2"),
        (APPLE_INTEL, "x86_64", {"avx2", NO_VNNI}, "ort-x86-avx2"),
        (INTEL_OLD, "x86_64", set(), "ort-generic"),
        ("", "AMD64", set(), "ort-generic"),
        (ARM, "aarch64", {"asimddp", "i8mm"}, "ort-arm"),
        (ARM_OLD, "aarch64", set(), "ort-arm"),
        (APPLE_ARM, "arm64", {"asimddp", "i8mm"}, "ort-arm"),
        (APPLE_OLD_ARM, "arm64", {"asimddp"}, "ort-arm"),
        ("", "armv7l", set(), "ort-generic"),
        ("", "riscv64", set(), "ort-generic"),
    ],
)
def test_the_host_gets_the_table_that_its_features_allow(
    cpuinfo: str, machine: str, features: set[str], target: str
) -> None:
    processor = detect(cpuinfo, machine)
    assert processor.features == features
    name, note = host_target_name(processor)
    assert name == target
    assert (note == "") == (target in ("ort-x86", "ort-arm"))
    table = load_target(name)
    assert table.processor in ("", processor.machine)
    assert set(table.requires) <= processor.features


def test_the_safe_form_says_that_no_table_fits() -> None:
    _, note = host_target_name(Processor("riscv64", "SiFive U74", frozenset()))
    assert note == (
        "no table covers this processor (riscv64 SiFive U74); the safe form ort-generic is used: 7-bit weights, which "
        "no instruction set saturates"
    )
    assert "(riscv64);" in host_target_name(Processor("riscv64", "", frozenset()))[1]


def test_a_processor_without_vnni_is_told_what_that_costs() -> None:
    _, note = host_target_name(detect(INTEL_AVX2, "x86_64"))
    assert note == (
        "this processor (x86_64 Intel(R) Core(TM) i7-6700 CPU @ 3.40GHz) has no VNNI: ort-x86-avx2 narrows the "
        "weights, because its 8-bit products are added in 16 bits that saturate"
    )


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "model"),
    [
        (INTEL_VNNI, "x86_64", "Intel(R) Xeon(R) Platinum 8480+"),
        (APPLE_ARM, "arm64", "Apple M2"),
        (APPLE_INTEL, "x86_64", "Intel(R) Core(TM) i7-8750H CPU @ 2.20GHz"),
    ],
)
def test_the_processor_is_named_as_it_names_itself(cpuinfo: str, machine: str, model: str) -> None:
    assert detect(cpuinfo, machine).model == model


def test_this_machine_has_a_table() -> None:
    name, _ = host_target_name(detect())
    assert name in target_names()
