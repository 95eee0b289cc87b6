"""What several tests of bad luck share."""

import pytest
from writers import two_versions


@pytest.fixture(scope="session")
def made(lm):
    """What the writers write, in two versions: made once, because it takes seconds."""
    return two_versions(lm)
