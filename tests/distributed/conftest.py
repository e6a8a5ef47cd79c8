import pytest
from processes import Processes


@pytest.fixture(scope="module")
def processes():
    """Two processes of one group."""
    with Processes(2) as pool:
        yield pool
