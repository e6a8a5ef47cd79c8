"""Events for TensorBoard, which only this environment has."""

import pytest
from pretraining_run import trained

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_events_are_the_logs(tmp_path):
    log = trained(tmp_path, "run", reporting__tensorboard=True, training__steps=10)["log"]
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in ("mlm_loss", "rtd_loss", "learning_rate"):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert found == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in log]
