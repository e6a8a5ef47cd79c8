"""Times the attention module by pytest-benchmark, one group per length: ``python -m pytest bench --benchmark-only``."""

import pytest

pytest.importorskip("pytest_benchmark")
pytest.importorskip("transformers")

from bench import cpu  # noqa: E402


@pytest.fixture(scope="module", params=[(passes, length) for length in (128, 512) for passes in cpu.PASSES], ids=str)
def calls(request):
    passes, length = request.param
    return f"{passes}, length {length}", cpu.calls("attention", passes, 1, length)


@pytest.mark.parametrize("variant", cpu.VARIANTS)
def test_attention(benchmark, calls, variant):
    benchmark.group, by_variant = calls
    benchmark.pedantic(by_variant[variant], rounds=10, warmup_rounds=2)
