"""Several processes: they agree, fail together, and go on; docs/reliability.md has the table."""

import json
import shutil
import sys

import pytest
from crowds import (
    LONGEST_WAIT,
    SCENARIOS,
    collecting_again,
    killed,
    killed_and_noticed_as_usual,
    killed_while_collecting,
    main_jobs,
    play,
    three,
    write_alone,
)
from processes import run

KILLED = (0, -9)


def test_every_scenario_is_right_or_named(tmp_path):
    """One test, because it takes seconds to start a process."""
    write_alone(tmp_path)
    run(killed, tmp_path, exits=KILLED)
    run(play, tmp_path)
    seconds = [json.loads((tmp_path / f"seconds-{rank}.json").read_text()) for rank in (0, 1)]
    for name in SCENARIOS:
        longest = max(one[name] for one in seconds)
        sys.stdout.write(f"{name}: {longest:.1f} s\n")
        assert longest < LONGEST_WAIT


@pytest.mark.slow
@pytest.mark.parametrize("work", [killed_and_noticed_as_usual, killed_while_collecting])
def test_a_kill_ends_the_other_process_within_30_seconds(work, tmp_path):
    run(work, tmp_path, exits=KILLED)
    sys.stdout.write(f"{work.__name__}: {(tmp_path / 'seconds-killed').read_text()} s\n")
    if work is killed_while_collecting:
        run(collecting_again, tmp_path)


@pytest.mark.slow
def test_main_jobs_on_disks_of_their_own(model_folder, questions, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    run(main_jobs, tmp_path)


@pytest.mark.slow
def test_three_processes_of_which_two_share_a_disk(tmp_path):
    write_alone(tmp_path)
    run(three, tmp_path, exits=(0, 0, 0))
