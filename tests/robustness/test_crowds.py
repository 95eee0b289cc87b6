"""Several processes: they agree, fail together, and go on; each scenario is right or named."""

from crowds import play, write_alone
from processes import run


def test_every_scenario_is_right_or_named(tmp_path):
    """One test, because it takes seconds to start a process."""
    write_alone(tmp_path)
    run(play, tmp_path)
