"""The kernel is compiled once, and where it can't be the reason is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_condensa.deploy import KernelUnavailableError, to_sparse
from lightning_condensa.deploy.sparse.compiler import load_library


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    load_library.cache_clear()
    yield
    load_library.cache_clear()


def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_library()
    (library,) = (tmp_path / "lightning-condensa").iterdir()  # and nothing else is left there
    made = library.stat().st_mtime_ns
    load_library.cache_clear()
    load_library()
    assert library.stat().st_mtime_ns == made


def test_another_compiler_makes_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_library()
    wrapper = tmp_path / "my-cc"
    wrapper.write_text('#!/bin/sh\n[ "$1" = --version ] && echo mine || exec cc "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CC", str(wrapper))
    load_library.cache_clear()
    load_library()
    assert len(list((tmp_path / "lightning-condensa").iterdir())) == 2


def test_a_compiler_without_openmp_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wrapper = tmp_path / "my-cc"
    wrapper.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*|*native*) exit 1;; esac\nexec cc "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CC", str(wrapper))
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).requires_grad_(False)
    net[0].weight[:, 1:] = 0
    x = torch.randn(2, 3, 9, 9)
    sparse = to_sparse(net, x, threads=2)
    assert "direct" in sparse.report.rows[0].seconds
    torch.testing.assert_close(sparse(x), net(x), rtol=1e-5, atol=1e-5)


def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return "there is no C compiler"


def failing_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho no luck today >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    return "no luck today"


def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    return "the sparse kernel can't be built"


@pytest.mark.parametrize("trouble", [no_compiler, failing_compiler, no_cache])
def test_without_the_kernel_torch_does_it(
    trouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = trouble(tmp_path, monkeypatch)
    with pytest.raises(KernelUnavailableError, match=reason):
        load_library()
    net = nn.Linear(64, 64).requires_grad_(False)
    net.weight[8:] = 0
    x = torch.randn(3, 64)
    sparse = to_sparse(net, x)
    (row,) = sparse.report.rows
    assert set(row.seconds) == {"dense", "csr", "bsr"}
    assert row.method != "direct"
    assert reason in row.reason
    assert reason[:9] in str(sparse.report)
    torch.testing.assert_close(sparse(x), net(x))
