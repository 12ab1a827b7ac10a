"""Free memory is what a container may still use, which the machine's own count does not know."""

from pathlib import Path

import psutil
import pytest
import torch

from ommatid.compute import hardware
from ommatid.compute.hardware import free_memory

CPU = torch.device("cpu")


def group(place: Path, files: dict[str, str]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (place / name).write_text(text + "\n")


def free(root: Path, own: str) -> list[int]:
    (root / "own").write_text(own)
    return list(hardware._iter_free_in_cgroups(root, root / "own"))


def test_the_limits_of_a_group_and_of_those_around_it_are_found_in_version_2(tmp_path: Path) -> None:
    stat = "anon 5\nfile 40\ninactive_file 30"
    group(tmp_path / "slice" / "box", {"memory.max": "1000", "memory.current": "900", "memory.stat": stat})
    group(tmp_path / "slice", {"memory.max": "1100", "memory.current": "1050", "memory.stat": "inactive_file 0"})
    group(tmp_path, {"memory.max": "max", "memory.current": "1", "memory.stat": stat})
    assert free(tmp_path, "0::/slice/box\n") == [130, 50]
    assert free(tmp_path, "0::/elsewhere/on/the/host\n") == []


def test_inside_a_container_the_group_is_the_root(tmp_path: Path) -> None:
    group(tmp_path, {"memory.max": "1000", "memory.current": "400", "memory.stat": "inactive_file 100"})
    assert free(tmp_path, "0::/\n") == free(tmp_path, "0::/docker/of-the-host\n") == [700]


def test_version_1_has_a_folder_and_a_line_for_memory(tmp_path: Path) -> None:
    stat = "inactive_file 1\ntotal_inactive_file 200"
    group(tmp_path / "memory" / "box", {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "700", "memory.stat": stat})
    assert free(tmp_path, "8:pids:/box\n4:memory:/box\n0::/\n") == [500]


def test_no_more_is_free_than_the_smaller_of_machine_and_container(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = psutil.virtual_memory().available
    monkeypatch.setattr(hardware, "_iter_free_in_cgroups", lambda: iter([4321, 10**18]))
    assert free_memory(CPU) == 4321
    monkeypatch.setattr(hardware, "_iter_free_in_cgroups", lambda: iter([]))
    assert machine / 2 < free_memory(CPU) < machine * 2
