"""How much memory a process may have, wherever its limits are stated."""

import pytest

from bigseg.machine import memory_of_machine

MIB = 1 << 20


def limit(folder, name, value):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"{value}\n")


def memory(tmp_path, own):
    (tmp_path / "own").write_text(own)
    return memory_of_machine(cgroups=tmp_path / "cgroup", own=tmp_path / "own")


def test_without_limits_it_is_that_of_the_machine(tmp_path):
    whole = memory_of_machine(cgroups=tmp_path, own=tmp_path / "none")
    assert whole > 100 * MIB
    limit(tmp_path / "cgroup", "memory.max", "max")
    assert memory(tmp_path, "0::/\n") == whole


@pytest.mark.parametrize(
    "limited", ["", "system.slice", "system.slice/job_7", "system.slice/job_7/step_0"]
)
def test_the_limit_of_a_group_further_out_counts_for_those_in_it(tmp_path, limited):
    limit(tmp_path / "cgroup" / limited, "memory.max", 64 * MIB)
    limit(tmp_path / "cgroup/system.slice/other", "memory.max", MIB)
    assert memory(tmp_path, "0::/system.slice/job_7/step_0\n") == 64 * MIB


def test_the_smallest_of_several_limits_counts(tmp_path):
    limit(tmp_path / "cgroup", "memory.max", 96 * MIB)
    limit(tmp_path / "cgroup/job", "memory.max", 32 * MIB)
    limit(tmp_path / "cgroup/job/step", "memory.max", 64 * MIB)
    assert memory(tmp_path, "0::/job/step\n") == 32 * MIB


def test_groups_of_the_first_version(tmp_path):
    limit(tmp_path / "cgroup/memory/slurm/job_7", "memory.limit_in_bytes", 64 * MIB)
    limit(tmp_path / "cgroup/slurm/other", "memory.max", MIB)
    own = "5:devices:/slurm/other\n4:cpu,memory:/slurm/job_7/step_0\n0::/slurm/none\n"
    assert memory(tmp_path, own) == 64 * MIB
