"""Shared by all tests: hypothesis profiles, and the certificates of one run.

NBDSRV_FUZZ=full runs everything that searches for much longer.
"""

import os
import signal

import pytest
from authority import Authority, Certificates
from hypothesis import HealthCheck, settings

settings.register_profile("quick", deadline=None)
settings.register_profile(
    "full", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("full" if os.environ.get("NBDSRV_FUZZ") == "full" else "quick")

# Who runs these tests may itself have been started by nohup, or behind a script's back: all
# programs would ignore the signals that are to stop them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """The certificates of this run."""
    directory = tmp_path_factory.mktemp("certificates")
    ours, other = Authority(directory, "ours"), Authority(directory, "other")
    return Certificates(ours.certificate, ours.server(), ours.client(), other.client("stranger"))
