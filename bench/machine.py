"""The machine that a benchmark runs on: its processor, the instruction sets that matter, the time it has spent."""
import os
import platform
from pathlib import Path

from app.server.machine import usable_cores

CPUINFO = Path("/proc/cpuinfo")
# As /proc/cpuinfo names them: what fp32, int8 and bf16 networks run on.
INSTRUCTION_SETS = {"avx2": "AVX2", "avx512f": "AVX-512F", "avx_vnni": "AVX_VNNI", "avx512_vnni": "AVX512_VNNI",
                    "avx512_bf16": "AVX512_BF16", "amx_int8": "AMX int8", "amx_bf16": "AMX bf16"}

# Keeps OpenVINO and torch (both through oneDNN), torch's own kernels and MKL from using more than AVX2.
AVX2_ONLY = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def is_emulated():
    return os.environ.get("ONEDNN_MAX_CPU_ISA") == AVX2_ONLY["ONEDNN_MAX_CPU_ISA"]


def processor(cpuinfo=CPUINFO):
    """{cpu: model name, cpu_family_model: such as 26/2, instruction_sets: those of INSTRUCTION_SETS that it has}."""
    first = cpuinfo.read_text().strip().split("\n\n")[0]
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    flags = fields.get("flags", "").split()
    return {"cpu": fields.get("model name", platform.machine()),
            "cpu_family_model": f"{fields.get('cpu family')}/{fields.get('model')}",
            "instruction_sets": [name for flag, name in INSTRUCTION_SETS.items()
                                 if flag in flags and (flag == "avx2" or not is_emulated())]}


def has_avx512(machine):
    return "AVX-512F" in machine["instruction_sets"]


def has_bf16(machine):
    """Whether it computes in bf16 natively."""
    return any("bf16" in name.lower() for name in machine["instruction_sets"])


def has_low_precision(machine):
    """Whether it has instructions for int8 or bf16, not AVX2 or AVX-512F alone."""
    return has_bf16(machine) or any("VNNI" in name or "int8" in name for name in machine["instruction_sets"])


def machine():
    found = processor()
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    described = f"family/model {found['cpu_family_model']}; {', '.join(found['instruction_sets'])}"
    if is_emulated():
        described += ", emulated: limited to AVX2"
    return {"name": f"{found['cpu']} ({described}), {usable_cores()} cores, {gib:.0f} GiB", **found,
            "cores": usable_cores(), "kernel": platform.release(), "python": platform.python_version()}


def cpu_s(stat=Path("/proc/stat")):
    """Seconds of processor time since the start of the machine: (what it has spent, what its host took from it)."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.read_text().split("\n")[0].split()[1:])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / tick, steal / tick
