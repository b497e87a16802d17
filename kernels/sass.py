"""What a compiler made of a kernel, read from its text: registers, spills, counts of instructions.

NVIDIA's figures come from the log of ptxas and the disassembly of nvdisasm, AMD's from the assembly.
Both tools come with Triton; no driver is needed.
"""

from __future__ import annotations

import re
from collections import Counter

WORD = 4  # bytes of a register
# Address and predicate of a line of nvdisasm, then the opcode.
SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
GCN = re.compile(r"^\s+((?:v|s|ds|buffer|global|scratch|flat)_\w+)", re.MULTILINE)
WIDTHS = {"U8": "8", "S8": "8", "U16": "16", "S16": "16", "64": "64", "128": "128", "256": "256"}
GCN_WIDTHS = {
    **{"byte": "8", "short": "16", "dword": "32", "b32": "32"},
    **{"dwordx2": "64", "b64": "64", "dwordx3": "96", "b96": "96", "dwordx4": "128", "b128": "128"},
}
MEMORY = ("LDG", "STG", "LDGSTS")  # counted by bits of a thread
COUNTED = (  # under their own name
    *("HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "DMMA", "UTCHMMA", "UTCQMMA"),
    *("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "LDL", "STL", "MUFU", "BAR", "SHFL"),
)
ADDS = re.compile(r"(?:F|BF|U|S)?\d+(?:X\d+)?|CAS", re.IGNORECASE)


def ptxas_figures(log: str) -> dict[str, int]:
    """Figures of a `ptxas -v` log: registers per thread, stack and spill bytes, serialized as 0 or 1.

    Raises ValueError for a log without them.
    """
    used = re.search(r"Used (\d+) registers", log)
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    if used is None or frame is None:
        raise ValueError(f"ptxas reported no registers or no stack: {log[-200:]!r}")
    return {
        "registers": int(used[1]),
        "stack": int(frame[1]),
        "spill": int(frame[2]),
        "serialized": int(bool(re.search(r"wgmma\S* instructions are serialized", log))),
    }


def sass_counts(text: str) -> dict[str, int]:
    """How often each family of instructions stands in a disassembly, and all of them as "total".

    Loads and stores of global memory carry their bits ("LDGSTS.128"), atomics their type ("RED.F32x4",
    "ATOM.CAS": a loop of compare-and-swap).
    """
    counts = Counter({"total": 0})
    for opcode in SASS.findall(text):
        counts["total"] += 1
        if family := _family(opcode):
            counts[family] += 1
    return dict(counts)


def _family(opcode: str) -> str | None:
    head, *rest = opcode.split(".")
    if head in COUNTED:
        return head
    if head in MEMORY:
        return f"{head}.{next((WIDTHS[part] for part in rest if part in WIDTHS), '32')}"
    if head in ("RED", "REDG", "ATOM", "ATOMG"):
        kind = next((part for part in rest if ADDS.fullmatch(part)), "")
        return ".".join(filter(None, ("RED" if head.startswith("RED") else "ATOM", kind)))
    return None


def gcn_figures(text: str) -> dict[str, int]:
    """Figures of AMD assembly: all registers of a thread (vector and accumulator), the latter alone, stack
    and spill bytes.

    Raises ValueError for a text without them.
    """
    found = {
        name: re.search(rf"\.{name}:\s+(\d+)", text)
        for name in ("vgpr_count", "agpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    }
    missing = [name for name, match in found.items() if match is None]
    if missing:
        raise ValueError(f"the assembly has no {', '.join(missing)}")
    total, accumulators, spilled, stack = (int(match[1]) for match in found.values() if match)
    return {
        "registers": total,
        "accumulators": accumulators,
        "stack": stack,
        "spill": spilled * WORD,
        "serialized": 0,
    }


def gcn_counts(text: str) -> dict[str, int]:
    """How often each family of instructions stands in AMD assembly, and all of them as "total".

    Loads and stores of memory carry their bits: "global_load.128".
    """
    counts = Counter({"total": 0})
    for opcode in GCN.findall(text):
        counts["total"] += 1
        if opcode.startswith("v_mfma"):
            counts["v_mfma"] += 1
        elif moved := re.match(r"(buffer|global|scratch|flat)_(load|store)_u?s?(\w+)", opcode):
            bits = GCN_WIDTHS.get(moved[3].split("_")[0], "other")
            counts[f"{moved[1]}_{moved[2]}.{bits}"] += 1
        elif added := re.match(r"(buffer|global|flat)_atomic_(\w+)", opcode):
            counts[f"atomic.{added[2]}"] += 1
    return dict(counts)
