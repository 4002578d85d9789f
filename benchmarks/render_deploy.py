"""Tables of what compressed models cost when they run."""

from __future__ import annotations

from collections import Counter
from typing import Any

from common import read_results
from tables import NONE, cells_source, source, table

ENGINES = {
    "eager": "eager, dense",
    "compile": "`torch.compile`, dense",
    "onnxruntime": "ONNX Runtime, dense",
    **{f"csr {d}": f"CSR, {d:.0%}" for d in (0.05, 0.02, 0.01)},
    **{f"sparse {d}": f"**sparse, {d:.0%}**" for d in (0.05, 0.02, 0.01)},
}


def sparse_execution() -> str | None:
    """Milliseconds of every engine, and how many times faster than ONNX Runtime it is."""
    results = read_results("sparse_execution")
    if not results:
        return None
    networks = list(dict.fromkeys(r["network"] for r in results["summary"]))
    note = (
        f"\nMilliseconds, median of {_repeats(results)} repeats, and times faster than ONNX "
        "Runtime (median, and range of repeats), in rounds in which every engine has a turn.\n"
    )
    return (
        "\n".join(_network(results, n) for n in networks)
        + note
        + cells_source("sparse_execution", results, "runs")
    )


def _network(results: dict[str, Any], network: str) -> str:
    rows = [r for r in results["summary"] if r["network"] == network]
    found = {(r["engine"], r["batch"], r["threads"]): r for r in rows}
    settings = list(dict.fromkeys((r["batch"], r["threads"]) for r in rows))
    header = [network, *(f"batch {b}, {t} thread{'s' * (t > 1)}" for b, t in settings)]
    lines = [
        [label, *(_cell(found.get((engine, *setting))) for setting in settings)]
        for engine, label in ENGINES.items()
        if any((engine, *setting) in found for setting in settings)
    ]
    return table(header, lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return NONE
    low, high = row["times_range"]
    return f"{row['ms']:.2f} ms, {row['times']:.2f} × ({low:.1f}–{high:.1f})"


def _repeats(results: dict[str, Any]) -> str:
    """How many repeats a case has, as a range where some have more."""
    cases = Counter((r["network"], r["batch"], r["threads"]) for r in results["runs"])
    least, most = min(cases.values()), max(cases.values())
    return str(most) if least == most else f"{least} to {most}"


def deploy() -> str | None:
    """Times faster than dense in the same engine, beside the limit that operations set."""
    results = read_results("deploy")
    if not results:
        return None
    names = {"eager": "eager", "compile": "inductor", "onnxruntime": "ORT"}
    settings = [(engine, batch) for engine in names for batch in (1, 16)]
    rows = []
    for case in results["cases"]:
        dense, left = case["parameters"]
        rows.append(
            [
                f"{case['network']}, **{case['method']}**",
                f"÷ {dense / left:.1f}",
                f"{case['flops_limit']:.1f}",
                f"÷ {case['dense_bytes'] / case['file_bytes']:.1f}",
                *(_times(case, "ours", setting) for setting in settings),
            ]
        )
        peer = case["peer"]
        if isinstance(peer, dict):
            rows.append(
                [
                    f"{case['network']}, torch-pruning",
                    f"÷ {dense / peer['parameters']:.1f}",
                    f"{peer['flops_limit']:.1f}",
                    NONE,
                    *(_times(case, "torch-pruning", setting) for setting in settings),
                ]
            )
    header = ["", "parameters", "limit", "file", *(f"{names[e]}, {b}" for e, b in settings)]
    failed = {
        c["network"]: c["peer"]
        for c in results["cases"]
        if isinstance(c["peer"], str) and c["peer"] not in ("not its job", "not installed")
    }
    notes = "".join(f" torch-pruning on {n}: `{why}`." for n, why in failed.items())
    note = (
        "\nTimes faster than the dense network in the same engine at batch 1 and 16 on one thread, "
        "medians of rounds in which both have a turn; *limit*: dense operations over those left; "
        f"*file*: the packed file against dense safetensors.{notes}\n"
    )
    return table(header, rows) + note + source(results)


def _times(case: dict[str, Any], model: str, setting: tuple[str, int]) -> str:
    for row in case["times"]:
        if row["model"] == model and (row["engine"], row["batch"]) == setting:
            return f"{row['times']:.2f} ×"
    return NONE


def end_to_end() -> str | None:
    """Accuracy, bytes and milliseconds of networks that were trained and compressed."""
    results = read_results("end_to_end")
    if not results:
        return None
    rows = []
    for cell in results["cells"]:
        for model in ("dense", "compressed"):
            found = cell[model]
            rows.append(
                [
                    f"{cell['task']}, {model}",
                    f"{found['test']:.2f} %",
                    f"{found['ort_test']:.2f} %",
                    f"{found['bytes']:,}",
                    f"{found['onnx_bytes']:,}",
                    f"{found['ms']:.3f}" if "ms" in found else NONE,
                ]
            )
    header = ["", "test, torch", "test, ORT", "bytes", "bytes of ONNX", "ms in ORT"]
    note = (
        "\nBytes: safetensors of the dense network, packed file of the compressed one; ms: batch "
        "1, one thread, float32 against int8.\n"
    )
    return table(header, rows) + note + source(results)
