"""Break each projection in one line, in a copy of the package, and see whether its tests notice.

    python benchmarks/mutations.py
    python benchmarks/mutations.py --only "ternary scale" --redo

Each mutation replaces one text that occurs once in the source; then the tests of schemes run until
the first one fails. A mutation that no test notices is reported as survived, and the script ends
with an error.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, environment, read_results, update_results

NAME = "mutations"
ROOT = Path(__file__).resolve().parents[1]
#: What a mutation of a projection may be noticed by.
TESTS = (
    "tests/functional",
    "--ignore=tests/functional/test_distributed.py",  # its processes take longer than the rest
    "tests/schemes",
    "tests/test_testing.py",
    "tests/test_layers_table.py",
)
COPIED = ("lightning_condensa", "tests", "docs", "examples", "pyproject.toml", "setup.cfg")


@dataclass(frozen=True)
class Mutation:
    """One line that is broken.

    Attributes:
        name: What is broken.
        path: File within the package.
        old: Text that occurs once in it.
        new: What takes its place.
    """

    name: str
    path: str
    old: str
    new: str


MUTATIONS = [
    Mutation(
        "top-k: ties beyond the count",
        "functional/topk.py",
        ".nonzero().squeeze(1)[:ties]",
        ".nonzero().squeeze(1)",
    ),
    Mutation(
        "top-k: the last ties survive, not the first",
        "functional/topk.py",
        ".nonzero().squeeze(1)[:ties]",
        ".nonzero().squeeze(1)[-ties:]",
    ),
    Mutation(
        "top-k: floors are ignored",
        "functional/topk.py",
        "cuts[i].above + cuts[i].ties < floors[i]",
        "cuts[i].above + cuts[i].ties < 0",
    ),
    Mutation(
        "Prune: signed values are compared",
        "schemes/prune.py",
        "    absolute: ClassVar[bool] = True",
        "    absolute: ClassVar[bool] = False",
    ),
    Mutation(
        "density: counts are rounded down",
        "schemes/prune.py",
        "kept = round(pool.density * total)",
        "kept = int(pool.density * total)",
    ),
    Mutation(
        "layer scope: one threshold for all",
        "schemes/prune.py",
        'if self.scope == "layer":\n                yield',
        'if self.scope == "none":\n                yield',
    ),
    Mutation(
        "criterion l2: not averaged",
        "functional/criteria.py",
        "total.div(n).sqrt()",
        "total.sqrt()",
    ),
    Mutation(
        "criterion min: padding counts",
        "functional/criteria.py",
        "if bool(padding.any()):",
        "if bool(padding.all() and not padding.any()):",
    ),
    Mutation(
        "filters of transposed convolutions: groups by inputs",
        "functional/grouping.py",
        "return grouped.transpose(1, 2).flatten(0, 1).flatten(1)",
        "return grouped.flatten(0, 1).transpose(0, 1).repeat(self.groups, 1, *[1] * "
        "(grouped.dim() - 3)).flatten(1)",
    ),
    Mutation(
        "blocks: padded on the wrong side",
        "functional/grouping.py",
        "for p in (0, pad)])",
        "for p in (pad, 0)])",
    ),
    Mutation(
        "blocks: only the first row counts",
        "functional/grouping.py",
        "functools.reduce(criterion.join, reduced.unbind(dim))",
        "functools.reduce(criterion.join, reduced.unbind(dim)[:1])",
    ),
    Mutation(
        "N:M: the smallest survive",
        "functional/grouping.py",
        "groups.sort(dim=1, descending=True, stable=True)",
        "groups.sort(dim=1, descending=False, stable=True)",
    ),
    Mutation(
        "N:M: groups along outputs",
        "functional/grouping.py",
        "inputs_last = weight.abs().movedim(1, -1)",
        "inputs_last = weight.abs().movedim(0, -1)",
    ),
    Mutation(
        "align: rounded up",
        "schemes/structured.py",
        "max(round(count / self.align), 1)",
        "max(-(-count // self.align), 1)",
    ),
    Mutation(
        "biases of removed units stay",
        "schemes/joint.py",
        "target.weights + (target.biases if self.prune_bias else ())",
        "target.weights",
    ),
    Mutation(
        "joint groups: scored by their first weight",
        "schemes/joint.py",
        "[m.spans.split(whole(codes[m.name]))[0] for m in target.weights], dim=1",
        "[m.spans.split(whole(codes[m.name]))[0] for m in target.weights[:1]], dim=1",
    ),
    Mutation(
        "coupled: a group lives if one member does",
        "schemes/slices.py",
        "keeps[name].view(-1)[units.to(keep.device)] = keep[:, None]",
        "keeps[name].view(-1)[units.to(keep.device)] |= keep[:, None]",
    ),
    Mutation(
        "γ and β: a channel goes when one of its units does",
        "schemes/coupling.py",
        "return stays[self.units.to(stays.device)].any(1)",
        "return stays[self.units.to(stays.device)].all(1)",
    ),
    Mutation(
        "integers: the scale only covers",
        "functional/quantization.py",
        "        better = error < best_error\n",
        "        better = error < -best_error\n",
    ),
    Mutation(
        "integers: rounded towards zero",
        "functional/quantization.py",
        "codes[at] = exact.round_().clamp_(low, high)",
        "codes[at] = exact.trunc_().clamp_(low, high)",
    ),
    Mutation(
        "integers: scales keep all their bits",
        "functional/quantization.py",
        "torch.ldexp((mantissa * 2**17).round_() / 2**17, exponent)",
        "torch.ldexp(mantissa, exponent)",
    ),
    Mutation(
        "asymmetric integers: the sign is not turned",
        "functional/quantization.py",
        "sign = torch.where(most > least, -sign, sign)",
        "sign = torch.where(most > least, sign, sign)",
    ),
    Mutation(
        "binary: pruned weights count in the mean",
        "schemes/quantize.py",
        'if encoded.mask is not None and self.dtype == "binary":',
        'if encoded.mask is not None and self.dtype == "none":',
    ),
    Mutation(
        "binary: zero has no sign",
        "functional/quantization.py",
        "codes[at] = piece.view(torch.int8).mul_(2).sub_(1)",
        "codes[at] = rows[at].sign().to(torch.int8)",
    ),
    Mutation(
        "float8: twice the least scale",
        "functional/quantization.py",
        "exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)",
        "exponent = torch.where(mantissa == 0.5, exponent - 1, exponent + 1)",
    ),
    Mutation(
        "float16: overflows become infinite",
        "functional/quantization.py",
        "return weight.to(dtype).clamp(-limit, limit).add_(0.0)",
        "return weight.to(dtype).add_(0.0)",
    ),
    Mutation(
        "scales of groups: along outputs",
        "schemes/quantize.py",
        "block[1 - target.channel_dim] = self.group",
        "block[target.channel_dim] = self.group",
    ),
    Mutation(
        "k-means: no cluster is added where it helps most",
        "functional/kmeans.py",
        "total * total / (mass[ends + 1] - mass[starts])",
        "total * total / (1 + mass[ends + 1] - mass[starts])",
    ),
    Mutation(
        "k-means: no iterations from the bins",
        "functional/kmeans.py",
        "_ITERATIONS = 8",
        "_ITERATIONS = 0",
    ),
    Mutation(
        "codebook: boundaries are not kept",
        "schemes/codebook.py",
        "        if held is None:",
        "        if True:",
    ),
    Mutation(
        "codebook: the middle of kept boundaries runs after outliers",
        "schemes/codebook.py",
        "middle * min(growth, 1.0)",
        "middle * growth",
    ),
    Mutation(
        "codebook: latent weights run beyond the entries",
        "schemes/codebook.py",
        "    return 2 * first - second, 2 * ends[-1] - ends[-2]",
        "    return 3 * first - 2 * second, 3 * ends[-1] - 2 * ends[-2]",
    ),
    Mutation(
        "integers: latent weights run beyond the codes",
        "schemes/quantize.py",
        "        return low - 1.0, high + 1.0",
        "        return None",
    ),
    Mutation(
        "limits of latent weights: a negative scale turns them",
        "schemes/encoded.py",
        "torch.minimum(*ends)), torch.maximum(*ends))",
        "ends[0]), ends[1])",
    ),
    Mutation(
        "k-means: a cell without values lies at zero",
        "functional/kmeans.py",
        "    if empty.any() and len(cuts) > 0:",
        "    if False:",
    ),
    Mutation(
        "ternary: a kept threshold does not follow the weights",
        "functional/quantization.py",
        "    threshold = thresholds * root_mean_square(rows, ranks)",
        "    threshold = thresholds",
    ),
    Mutation(
        "codebook: the next higher entry",
        "functional/kmeans.py",
        "    return cells(values, middles(torch.from_numpy(table)))",
        "    return cells(values, torch.from_numpy(table[:-1]).double())",
    ),
    Mutation(
        "codebook: pruned weights have a say",
        "schemes/codebook.py",
        "kept.append(values.flatten() if encoded.mask is None else values[whole(encoded.mask)])",
        "kept.append(values.flatten())",
    ),
    Mutation(
        "low rank: one singular vector too few",
        "functional/lowrank.py",
        "vectors, matrix = self.vectors[:, :rank], self.matrix.to(torch.float64)",
        "vectors, matrix = self.vectors[:, :rank].clone(), self.matrix.to(torch.float64); "
        "vectors[:, -1] = 0",
    ),
    Mutation(
        "low rank: energy of singular values, not of squares",
        "functional/lowrank.py",
        "kept = self.values.square().cumsum(0)",
        "kept = self.values.cumsum(0)",
    ),
    Mutation(
        "low rank: costs of a rank are ignored",
        "functional/lowrank.py",
        "(-(float(value) ** 2) / sum(shape), index)",
        "(-(float(value) ** 2), index)",
    ),
    Mutation(
        "Add: a term that raises the error is taken",
        "schemes/add.py",
        "                elif distance < error:",
        "                elif distance > error:",
    ),
    Mutation(
        "composition: an earlier mask is forgotten",
        "schemes/encoded.py",
        "mask = elementwise(torch.logical_and, mask, self.mask)",
        "mask = elementwise(torch.logical_or, mask, self.mask)",
    ),
    Mutation(
        "bits: scales are not counted",
        "schemes/encoded.py",
        "return nnz * self.value_bits + scale + self.table_bits",
        "return nnz * self.value_bits + self.table_bits",
    ),
]


def first_failure(folder: Path, tests: Sequence[str]) -> str | None:
    """The first test that fails in the folder; ``None`` where all pass.

    Raises:
        RuntimeError: If the tests could not be run.
    """
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?)(?:\[.*)?(?: - .*)?$", ended.stdout, re.MULTILINE)
    if ended.returncode not in (0, 1) or (ended.returncode == 1 and failed is None):
        raise RuntimeError(f"{ended.stdout[-2000:]}{ended.stderr[-2000:]}")
    return None if failed is None else failed[1]


def run(mutation: Mutation, folder: Path) -> dict[str, Any]:
    """Break a copy, run the tests until one fails, and mend it; that one must pass then.

    Raises:
        ValueError: If the text does not occur exactly once.
        RuntimeError: If the tests could not be run, or fail in the unbroken copy too.
    """
    file = folder / "lightning_condensa" / mutation.path
    source = file.read_text()
    if source.count(mutation.old) != 1:
        raise ValueError(f"{mutation.name}: the text occurs {source.count(mutation.old)} times")
    file.write_text(source.replace(mutation.old, mutation.new))
    try:
        noticed = first_failure(folder, TESTS)
    finally:
        file.write_text(source)
    if noticed is not None and first_failure(folder, [noticed]) is not None:
        raise RuntimeError(f"{mutation.name}: {noticed} fails without it, too")
    return {
        "mutation": mutation.name,
        "file": mutation.path,
        "old": mutation.old,
        "new": mutation.new,
        "noticed_by": noticed,
    }


def main() -> None:
    """Try the mutations that were not tried yet, and record each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [mutation.name for mutation in MUTATIONS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--redo", action="store_true", help="try those that were tried, too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder / name)
        for mutation in (m for m in MUTATIONS if m.name in options.only):
            tried = {m["mutation"] for m in read_results(NAME, options.out).get("mutations", [])}
            if mutation.name in tried and not options.redo:
                continue
            found = run(mutation, folder)

            def add(results: dict[str, Any], found: dict[str, Any] = found) -> None:
                kept = [
                    m
                    for m in results.get("mutations", [])
                    if m["mutation"] != found["mutation"] and m["mutation"] in names
                ]
                kept.append(found)
                kept.sort(key=lambda m: names.index(m["mutation"]))
                results.update({"environment": environment(), "mutations": kept})

            update_results(NAME, add, options.out)
            print(f"{mutation.name}: {found['noticed_by'] or 'SURVIVED'}", flush=True)
    rows = read_results(NAME, options.out)["mutations"]
    if survived := [m["mutation"] for m in rows if m["noticed_by"] is None]:
        sys.exit(f"no test notices: {'; '.join(survived)}")


if __name__ == "__main__":
    main()
