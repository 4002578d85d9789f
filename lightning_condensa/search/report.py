"""A search as one HTML page that needs nothing else: no server, no network, no script."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from lightning_condensa.deploy import inspect_packed
from lightning_condensa.search.noise import Noise, noise_text
from lightning_condensa.search.summary import requirement, shown

if TYPE_CHECKING:
    from lightning_condensa.search.result import SearchResult, Trial

_PACKAGES = (
    "lightning-condensa", "torch", "pytorch-lightning", "botorch", "optuna"
)  # fmt: skip
_CAPTIONS = {
    "metric": "What compression costs: every trial, and what the search believes in between.",
    "groups": "How far each dimension was compressed; the best trial's values are bars and frames.",
    "trace": "What the trials gained, one after another.",
    "pareto": "What else could be had: the best metric evaluated for each bound on the objective.",
    "front": "What could be had: the feasible trials that no other beats in all objectives.",
    "hypervolume": "How the front grew: the volume that it dominates, from the dense model on.",
    "timeline": "When the trials ran.",
}


@dataclass(frozen=True)
class Cells:
    """A table before it is set in a markup.

    Attributes:
        header: Names of the columns.
        rows: Texts, as many per row as the header has.
        text: How many of the last columns hold words rather than numbers.
        marked: Index of the row to stress, or ``None``.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: int = 0
    marked: int | None = None

    def to_html(self) -> str:
        """As a ``<table>``, everything escaped."""
        rows = [
            self._html_row("td", row, "best" if i == self.marked else "")
            for i, row in enumerate(self.rows)
        ]
        head = self._html_row("th", self.header)
        return f"<table>\n<thead>{head}</thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table>"

    def to_markdown(self) -> str:
        """As a Markdown table, everything escaped; the stressed row in bold."""
        lines = [self._markdown_row(self.header), "|" + "---|" * len(self.header)]
        for i, row in enumerate(self.rows):
            lines.append(self._markdown_row(row, "**" if i == self.marked else ""))
        return "\n".join(lines)

    def _html_row(self, tag: str, texts: Sequence[str], kind: str = "") -> str:
        words = len(texts) - self.text
        cells = [
            f"<{tag}{' class=text' if i >= words else ''}>{escape(text)}</{tag}>"
            for i, text in enumerate(texts)
        ]
        return f"<tr{f' class={kind}' if kind else ''}>" + "".join(cells) + "</tr>"

    def _markdown_row(self, texts: Sequence[str], mark: str = "") -> str:
        safe = (" ".join(escape(text).replace("|", "&#124;").split()) for text in texts)
        return "| " + " | ".join(f"{mark}{text}{mark}" if text else "" for text in safe) + " |"


def to_html(result: SearchResult) -> str:
    """The page.

    Args:
        result: A search, finished or not.

    Returns:
        HTML that refers to nothing outside itself.
    """
    template = Template(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    best = result.best
    return template.substitute(
        title=escape(_title(result)),
        summary=escape(result.summary()),
        figures=_figures(result),
        trials=trial_cells(result).to_html(),
        tensors="" if best is None or not best.path.exists() else _tensors(best),
        settings=_definitions(_settings(result)),
        scheme=f"<pre>{escape(result.scheme)}</pre>" if result.scheme else "",
        versions=_definitions(
            {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
        ),
    )


def trial_cells(result: SearchResult) -> Cells:
    """The trials as a table, in order."""
    names = list(result.trials[0].values) if result.trials else []
    further = result.objectives[1:]
    header = ["trial", *names, result.metric, f"{result.objective} [{result.unit}]", "× dense"]
    header += [f"{info.name} [{info.unit}]" for info in further]
    header += ["P(feasible)", "noise", "from", "steps", "time", "state", "message"]
    rows = [
        [
            str(t.number),
            *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in t.values.values()),
            "" if t.metric is None else f"{t.metric:.4f}",
            "" if t.objective is None else f"{t.objective:,.5g}",
            "" if not t.objective else f"{result.ratio(t):.3g}",
            *(shown(t, info) for info in further),
            "" if t.probability is None else f"{t.probability:.2f}",
            "" if t.metric is None else f"{t.variance**0.5:.2g}, {t.basis}",
            "dense" if t.parent is None else str(t.parent),
            f"{t.steps:,}",
            f"{t.seconds:.1f} s",
            t.standing,
            t.message,
        ]
        for t in result.trials
    ]
    marked = next((i for i, t in enumerate(result.trials) if t is result.best), None)
    return Cells(header, rows, text=2, marked=marked)


def _figures(result: SearchResult) -> str:
    if importlib.util.find_spec("matplotlib") is None:
        return "<p>For figures: <code>pip install 'lightning-condensa[plots]'</code>.</p>"
    from lightning_condensa.plots import search_plots
    from lightning_condensa.plots.svg import inline_svg

    drawn = [
        f"<figure>{inline_svg(plot, name)}<figcaption>{_CAPTIONS[name]}</figcaption></figure>"
        for name, plot in search_plots(result).items()
    ]
    return '<div class="figures">\n' + "\n".join(drawn) + "\n</div>"


def _settings(result: SearchResult) -> Mapping[str, str]:
    dense = result.baseline
    samples = "" if dense.samples is None else f" on {dense.samples:,} samples"
    settings = {
        "objective": f"{result.objective} [{result.unit}], {_direction(result.direction)}",
        **{
            f"objective {i}": f"{info.name} [{info.unit}], {_direction(info.direction)}; dense: "
            f"{dense.objectives[info.name]:,.6g}"
            for i, info in enumerate(result.objectives[1:], start=2)
        },
        "metric": f"{result.metric}, {_direction(result.mode)}",
        **_asked(result),
        "dense model": f"{result.metric} {dense.metric:.5g}{samples}, "
        f"{result.objective} {dense.objective:,.6g} {result.unit}",
        "noise of the metric": _noise(result),
        "training": f"{sum(t.steps for t in result.trials):,} optimizer steps in "
        f"{len(result.trials)} trials, {sum(t.seconds for t in result.trials):,.0f} s",
    }
    if result.best is not None and result.best.probability is not None:
        settings["best feasible"] = f"with probability {result.best.probability:.2f}"
    if result.rescored is not None:
        settings["on untouched data"] = str(result.rescored)
    if result.confidence is not None:
        settings["confidence"] = f"feasible with a probability of {result.confidence:g} at least"
    return settings


def _title(result: SearchResult) -> str:
    if result.budget is None:
        names = ", ".join(info.name for info in result.objectives) or result.objective
        return f"Search: {names} with {result.metric} kept"
    return f"Search: {result.metric} with {requirement(result)}"


def _asked(result: SearchResult) -> Mapping[str, str]:
    if result.level is None:
        return {"budget": f"{requirement(result)}; the best {result.metric} within it is sought"}
    return {
        "tolerance": f"{abs(result.baseline.metric - result.level):.4g}, so {result.metric} "
        f"{'≥' if result.mode == 'max' else '≤'} {result.level:.5g}"
    }


def _noise(result: SearchResult) -> str:
    best, dense = result.best, result.baseline
    shown = dense.noise if best is None else Noise(best.variance, best.basis)
    return noise_text(*shown, dense.samples)


def _direction(direction: str) -> str:
    return "maximized" if direction == "max" else "minimized"


def _tensors(best: Trial) -> str:
    info = inspect_packed(best.path)
    rows = [
        [
            *(
                "" if t.nnz is None else f"{t.nnz:,}",
                "" if t.density is None else f"{t.density:.2%}",
            ),
            str(t.bits),
            f"{t.bytes:,.0f}",
            "×".join(map(str, t.shape)) or "scalar",
            f"{t.storage} {t.value_type}",
            t.name,
        ]
        for t in info.tensors
    ]
    cells = Cells(["non-zero", "density", "bits", "bytes", "shape", "stored", "tensor"], rows, 3)
    return (
        f"<h2>The model of trial {best.number}</h2>\n<p>{info.file_bytes:,} bytes in the file, "
        f'with {info.overhead_bytes:,} beside the tensors.</p>\n<div class="wide">\n'
        f"{cells.to_html()}\n</div>"
    )


def _definitions(facts: Mapping[str, str]) -> str:
    items: Iterable[str] = (
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items()
    )
    return "<dl>\n" + "\n".join(items) + "\n</dl>"
