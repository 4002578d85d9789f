"""The page that a search writes."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy import loaders, search, toy

from lightning_condensa.search import SearchResult
from lightning_condensa.search.overview import Overview
from lightning_condensa.search.report import Cells, trial_cells

_VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and keeps what a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name in ("href", "src", "xlink:href"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            assert not name.startswith("on")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    return search(tmp_path_factory.mktemp("run"), max_trials=3).fit(toy(), **loaders())


def test_page_is_whole_and_needs_nothing_outside(found: SearchResult, tmp_path: Path) -> None:
    text = (found.save(tmp_path) / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags["svg"] == 4
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == 0
    assert page.links and all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    used = {url.strip("'\"") for url in re.findall(r"url\(([^)]*)\)", text)}
    assert {url[1:] for url in used} <= set(page.ids)
    assert "#010203" not in text and "currentColor" in text


def test_page_has_every_trial_and_the_tensors_of_the_best(found: SearchResult) -> None:
    best = found.best
    assert best is not None
    trials, tensors = Page(found.to_html()).tables
    assert trials == [list(row) for row in (trial_cells(found).header, *trial_cells(found).rows)]
    assert [row[0] for row in trials[1:]] == [str(t.number) for t in found.trials]
    assert [row[2] for row in trials[1:]] == [f"{t.metric:.4f}" for t in found.trials]
    row = dict(zip(tensors[0], tensors[1], strict=True))
    assert row["tensor"] == "layer.weight" and row["shape"] == "40×100"
    kept = float(row["density"].rstrip("%")) / 100
    assert kept == pytest.approx(best.values["density"], abs=2 / 4000)
    assert f"{best.path.stat().st_size:,} bytes in the file" in found.to_html()
    assert "density" in found.scheme and "0.005" in found.to_html()


def test_users_strings_are_escaped(found: SearchResult) -> None:
    bad = "<script>alert('x')</script>"
    trials = [replace(t, values={bad: 0.1}, message=bad, state="failed") for t in found.trials]
    hostile = replace(
        found, trials=tuple(trials), metric=bad, objective=bad, unit=bad, scheme=bad, curve=None
    )
    text = hostile.to_html()
    page = Page(text)
    assert page.tags["script"] == 0 and "<script" not in text
    assert page.tables[0][1][-1] == bad
    table = trial_cells(hostile).to_markdown()
    assert "<script" not in table and len(table.splitlines()) == 2 + len(trials)


def test_markdown_cells_cannot_break_the_table() -> None:
    lines = Cells(["a", "b"], [["x|y\nz", "<b>"]], marked=0).to_markdown().splitlines()
    assert lines[2] == "| **x&#124;y z** | **&lt;b&gt;** |"


def test_page_says_when_nothing_is_feasible_or_was_tried(found: SearchResult) -> None:
    worse = tuple(replace(t, state="infeasible") for t in found.trials)
    text = replace(found, trials=worse).to_html()
    assert "No trial is feasible" in text and len(Page(text).tables) == 1
    assert Page(replace(found, trials=()).to_html()).tags["svg"] == 4


def test_trials_know_when_they_began(found: SearchResult) -> None:
    starts = [t.started for t in found.trials]
    assert None not in starts and starts == sorted(starts)
    for trial, following in zip(found.trials, found.trials[1:], strict=False):
        assert trial.started + trial.seconds <= following.started + 0.01
        record = trial.directory / "trial.json"
        assert trial.started - 1 <= record.stat().st_mtime <= following.started + 1


@pytest.mark.usefixtures("figures")
def test_tensorboard_has_the_same_figures_and_the_table(
    found: SearchResult, tmp_path: Path
) -> None:
    Overview(tmp_path).draw(found)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "tensors": 0}).Reload()
    names = ["metric", "pareto", "timeline", "trace"]
    assert sorted(events.Tags()["images"]) == [f"search/{name}" for name in names]
    (entry,) = events.Tensors("search/trials/text_summary")
    text = entry.tensor_proto.string_val[0].decode()
    assert f"Trial {found.best.number} is best" in text
    assert all(f"{t.metric:.4f}" in text for t in found.trials)
