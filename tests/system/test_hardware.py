"""How much memory there is: every limit above this process counts, in both generations of control groups."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from airstream.system import memory as hardware
from airstream.system.memory import _cgroup_room, available_host_bytes, default_device, process_bytes

V1_UNLIMITED = 9_223_372_036_854_771_712


def member_of(tmp_path: Path, *lines: str) -> Path:
    """What /proc/self/cgroup would say."""
    membership = tmp_path / "membership"
    membership.write_text("".join(f"{line}\n" for line in lines))
    return membership


def group_v2(folder: Path, limit: int | str, usage: int, active: int = 0, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    stat = f"anon 123456\nfile {active + inactive}\nactive_file {active}\ninactive_file {inactive}\nslab 99999\n"
    (folder / "memory.stat").write_text(stat)


def group_v1(folder: Path, limit: int, usage: int, active: int = 0, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
    stat = f"cache 7\nactive_file 7\ninactive_file 7\ntotal_active_file {active}\ntotal_inactive_file {inactive}\n"
    (folder / "memory.stat").write_text(stat)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "cgroup").mkdir()
    return tmp_path / "cgroup"


# --------------------------------------------------------------------------------------------------------- version 2


def test_v2_limit_of_the_own_group(tmp_path: Path, root: Path) -> None:
    group_v2(root / "app.slice" / "job", limit=1000, usage=300)
    assert list(_cgroup_room(root, member_of(tmp_path, "0::/app.slice/job"))) == [700]


def test_v2_page_cache_counts_as_free(tmp_path: Path, root: Path) -> None:
    group_v2(root / "job", limit=1000, usage=900, active=200, inactive=400)
    assert list(_cgroup_room(root, member_of(tmp_path, "0::/job"))) == [700]


def test_v2_every_group_above_counts(tmp_path: Path, root: Path) -> None:
    group_v2(root / "a" / "b" / "c", limit=5000, usage=1000)
    group_v2(root / "a" / "b", limit="max", usage=1000)
    group_v2(root / "a", limit=2000, usage=1500)
    assert sorted(_cgroup_room(root, member_of(tmp_path, "0::/a/b/c"))) == [500, 4000]


def test_v2_without_any_limit(tmp_path: Path, root: Path) -> None:
    group_v2(root / "job", limit="max", usage=1000)
    assert list(_cgroup_room(root, member_of(tmp_path, "0::/job"))) == []


def test_v2_in_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path, root: Path) -> None:
    group_v2(root, limit=1000, usage=400)
    assert list(_cgroup_room(root, member_of(tmp_path, "0::/"))) == [600]


def test_v2_in_a_container_that_sees_the_path_but_not_the_group(tmp_path: Path, root: Path) -> None:
    group_v2(root, limit=1000, usage=400)
    assert list(_cgroup_room(root, member_of(tmp_path, "0::/kubepods/pod1/abc"))) == [600]


def test_v2_more_used_than_allowed(tmp_path: Path, root: Path) -> None:
    group_v2(root / "job", limit=1000, usage=1200, inactive=100)
    assert list(_cgroup_room(root, member_of(tmp_path, "0::/job"))) == [0]


def test_v2_of_a_group_whose_name_has_a_colon(tmp_path: Path, root: Path) -> None:
    group_v2(root / "a:b", limit=1000, usage=0)
    assert list(_cgroup_room(root, member_of(tmp_path, "0::/a:b"))) == [1000]


@pytest.mark.parametrize("name", ["memory.max", "memory.current"])
@pytest.mark.parametrize("text", ["", "lots\n"])
def test_v2_files_that_cannot_be_read_are_no_limit(tmp_path: Path, root: Path, name: str, text: str) -> None:
    group_v2(root / "a" / "b", limit=700, usage=100)
    group_v2(root / "a", limit=1000, usage=100)
    (root / "a" / "b" / name).write_text(text)
    assert list(_cgroup_room(root, member_of(tmp_path, "0::/a/b"))) == [900]


# --------------------------------------------------------------------------------------------------------- version 1


def test_v1_limit_of_the_own_group(tmp_path: Path, root: Path) -> None:
    group_v1(root / "memory" / "docker" / "abc", limit=1000, usage=800, active=100, inactive=200)
    lines = ["12:pids:/docker/abc", "5:cpu,cpuacct:/docker/abc", "4:memory:/docker/abc", "1:name=systemd:/docker/abc"]
    assert list(_cgroup_room(root, member_of(tmp_path, *lines))) == [500]


def test_v1_every_group_above_counts(tmp_path: Path, root: Path) -> None:
    group_v1(root / "memory" / "a" / "b", limit=V1_UNLIMITED, usage=800)
    group_v1(root / "memory" / "a", limit=2000, usage=800)
    group_v1(root / "memory", limit=V1_UNLIMITED, usage=5000)
    assert min(_cgroup_room(root, member_of(tmp_path, "4:memory:/a/b"))) == 1200


def test_v1_other_controllers_are_none_of_its_business(tmp_path: Path, root: Path) -> None:
    group_v1(root / "memory" / "a", limit=1000, usage=0)
    assert list(_cgroup_room(root, member_of(tmp_path, "5:cpu,cpuacct:/a", "3:memory_extra:/a"))) == []


def test_v1_in_a_container_that_sees_the_path_but_not_the_group(tmp_path: Path, root: Path) -> None:
    group_v1(root / "memory", limit=1000, usage=100)
    assert list(_cgroup_room(root, member_of(tmp_path, "4:memory:/docker/abc"))) == [900]


def test_both_versions_at_once(tmp_path: Path, root: Path) -> None:
    group_v1(root / "memory" / "a", limit=1000, usage=100)
    group_v2(root / "a", limit=800, usage=100)
    assert sorted(_cgroup_room(root, member_of(tmp_path, "4:memory:/a", "0::/a"))) == [700, 900]


# ------------------------------------------------------------------------------------------------------ other systems


def test_a_system_without_control_groups(tmp_path: Path, root: Path) -> None:
    assert list(_cgroup_room(root, tmp_path / "not there")) == []
    assert list(_cgroup_room(root, member_of(tmp_path))) == []
    assert list(_cgroup_room(tmp_path / "not there", member_of(tmp_path, "0::/a", "4:memory:/a"))) == []


@pytest.mark.parametrize(("rooms", "expected"), [([], 500), ([700], 500), ([300, 900], 300), ([0], 0)])
def test_the_smallest_limit_is_what_is_available(
    rooms: list[int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=500))
    monkeypatch.setattr(hardware, "_cgroup_room", lambda: iter(rooms))
    assert available_host_bytes() == expected


def test_this_machine_has_memory() -> None:
    assert 1 << 20 < process_bytes() < 1 << 40
    assert 0 < available_host_bytes() < 1 << 50


@pytest.mark.parametrize(
    ("accelerator", "device"),
    [(None, "cpu"), ("mps", "cpu"), ("cuda", "cuda:1"), ("xpu", "xpu:1")],
)
def test_the_default_device(accelerator: str | None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = None if accelerator is None else torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    assert default_device() == torch.device(device)
