import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steersman.kernels import choice, cuda_edit, triton_edit

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What each kernel's module does when it is prepared: an error to raise, or None."""
    broken: dict[str, Any] = {}

    def load(name: str) -> Any:
        kernel = name.rpartition(".")[2].removesuffix("_edit")

        def prepare(device: torch.device, width: int) -> None:
            if broken.get(kernel):
                raise broken[kernel]
            if kernel == "cuda" and width > 100:
                raise ValueError("too wide")

        return SimpleNamespace(prepare=prepare, edit=kernel)

    monkeypatch.setattr(choice.importlib, "import_module", load)
    return broken


def test_the_fastest_that_works_is_taken(kernels: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert choice.choose(CUDA, "auto") == choice.BY_SPEED[0]
    kernels[choice.BY_SPEED[0]] = RuntimeError("no compiler")
    assert choice.choose(CUDA, "auto") == choice.BY_SPEED[1]
    kernels[choice.BY_SPEED[1]] = ImportError("no triton")
    with caplog.at_level(logging.WARNING):
        assert choice.choose(CUDA, "auto") is None
    assert "no compiler" in caplog.text
    assert "no triton" in caplog.text


@pytest.mark.usefixtures("kernels")
def test_a_cpu_has_kernels_of_its_own_unless_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice.choose(CPU) is None
    assert choice.choose(CUDA, "host") is None
    monkeypatch.setenv(choice.VARIABLE, "triton")
    assert choice.choose(CPU) == "triton"


def test_a_kernel_that_is_asked_for_and_does_not_work_is_an_error(kernels: dict[str, Any]) -> None:
    kernels["cuda"] = RuntimeError("no compiler")
    with pytest.raises(RuntimeError, match="STEERSMAN_KERNEL=cuda does not work on cuda: cuda: no compiler"):
        choice.choose(CUDA, "cuda")
    with pytest.raises(ValueError, match="must be auto, host, cuda or triton"):
        choice.choose(CUDA, "opencl")


@pytest.mark.usefixtures("kernels")
def test_a_kernel_that_cannot_hold_the_widest_rows_is_passed_over() -> None:
    assert [choice.choose(CUDA, "auto", width) for width in (100, 101)] == ["cuda", "triton"]
    with pytest.raises(RuntimeError, match="too wide"):
        choice.choose(CUDA, "cuda", 101)


def test_a_kernel_has_an_edit_and_norm_of_its_own() -> None:
    assert choice.and_norm(cuda_edit.edit) is cuda_edit.edit_and_norm
    assert choice.and_norm(triton_edit.edit) is triton_edit.edit_and_norm
