"""A search over several hosts with addresses of their own, one of which dies."""

from __future__ import annotations

import importlib.util

import pytest
from hosts import why_no_hosts

REASON = why_no_hosts()
if importlib.util.find_spec("distributed") is None:
    REASON = "distributed is not installed: pip install '.[distributed]'"


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=f"no hosts: {REASON}")
def test_another_host_runs_the_trials_of_a_dead_one() -> None:
    from search_hosts import lose_a_host

    found = lose_a_host(trials=6, seconds=2.0)
    dead, other = found["killed"]["host"], found["hosts"][0]
    assert dead != other and found["network namespaces"] == 2 and found["workers left"] == 1
    assert found["finished"] == found["ended once"] == found["in the study"] == 6
    assert found["begun twice"] == [found["killed"]["in"]]
    (again,) = (t for t in found["trials"] if len(t["began on"]) == 2)
    assert again["began on"] == [dead, other] and again["ended on"] == [other]
    assert {t["ended on"][0] for t in found["trials"]} == {dead, other}
