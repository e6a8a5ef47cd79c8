import os
import warnings

import pytest

# This must precede the imports of the packages. Models and tokenizers come from folders that the tests write.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def nothing_falls_back():
    """Warnings of a fallback are errors, because a model that runs Hugging Face's own code always agrees with it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="deberta_fast: running Hugging Face's own")
        yield


@pytest.fixture
def same_when_patched(fused_calls):
    """same_when_patched(build, run, tolerance=..., **options): ``run(build())`` gives the same with the model patched.

    ``options`` are those of ``patch``. ``build`` returns a module that contains a DeBERTa, or a pair: a client that is
    not a module, and the module in it. ``run`` returns tensors and numbers in dicts and lists; anything else in them
    must be equal.
    """
    from tiny import TOLERANCE, assert_close
    from transformers import set_seed

    from deberta_fast import patch

    def outcome(build, run, change):
        set_seed(0)
        made = build()
        client, module = made if isinstance(made, tuple) else (made, made)
        change(module)
        set_seed(0)
        return run(client)

    def compare(build, run, tolerance=TOLERANCE, **options):
        expected = outcome(build, run, lambda module: None)
        assert not fused_calls
        got = outcome(build, run, lambda module: patch(module, **options))
        assert fused_calls
        fused_calls.clear()
        assert_close(got, expected, tolerance)
        return got

    return compare


@pytest.fixture(scope="session")
def processes():
    """Two processes of one group, see tests/helpers/processes.py."""
    from processes import Processes

    with Processes(2) as pool:
        yield pool
