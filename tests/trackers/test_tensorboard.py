"""TensorBoard's event files, read back as TensorBoard reads them."""

from __future__ import annotations

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.util import tensor_util

from sapwood.errors import ConfigError
from sapwood.trackers import TrackedRun
from sapwood.trackers.check import check_tracker
from sapwood.trackers.tensorboard import TensorBoard


@pytest.fixture(autouse=True)
def files_in_order(monkeypatch):
    """Files of one second are read in the order of their names, where a tenth file comes before a second one."""
    from tensorboard.summary.writer.event_file_writer import AtomicCounter

    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer._global_uid", AtomicCounter(0))


def session(folder, steps, resumed_from=None, factor=1.0):
    tracker = TensorBoard()
    tracker.check()
    tracker.start(TrackedRun(folder, "run", {"algorithm": {"name": "grpo"}}, resumed_from))
    for step in steps:
        tracker.scalars(step, {"reward": factor * step, "eval/pass@8": 0.5})
        tracker.texts(step, {"samples/best": "hello\n<script>alert(1)</script> ![x](http://host/x.png)\n```\n# head"})
        tracker.histograms(step, {"histograms/rewards": np.array([0.0, 1.0, 1.0, 3.0])})
    tracker.finish("finished")
    return read(folder)


def read(folder):
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0})
    found.Reload()
    return found


def test_numbers_texts_and_distributions_are_read_back(tmp_path):
    found = session(tmp_path, (0, 1, 2))
    assert [(event.step, event.value) for event in found.Scalars("reward")] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert found.Scalars("eval/pass@8")[0].value == 0.5
    histogram = found.Histograms("histograms/rewards")[1].histogram_value
    assert (histogram.num, histogram.sum, histogram.min, histogram.max) == (4.0, 5.0, 0.0, 3.0)
    [recipe] = found.Tensors("recipe/text_summary")
    assert tensor_util.make_ndarray(recipe.tensor_proto).item().decode().splitlines()[0] == "    algorithm:"


def test_texts_of_a_model_are_shown_as_they_are(tmp_path):
    [event] = session(tmp_path, (1,)).Tensors("samples/best/text_summary")
    html = markdown_to_safe_html(tensor_util.make_ndarray(event.tensor_proto).item())
    assert "<script" not in html
    assert "<img" not in html
    assert "<h1" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; ![x](http://host/x.png)" in html


def test_what_was_written_after_the_checkpoint_is_purged(tmp_path):
    session(tmp_path, (1, 2, 3, 4))
    found = session(tmp_path, (3, 4, 5), resumed_from=2, factor=10.0)
    told = [(event.step, event.value) for event in found.Scalars("reward")]
    assert told == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    again = session(tmp_path, (0, 1), resumed_from=-1, factor=7.0)  # resumed from before its first step
    assert [(event.step, event.value) for event in again.Scalars("reward")] == [(0, 0.0), (1, 7.0)]


def test_it_keeps_its_contract(tmp_path):
    check_tracker(TensorBoard, tmp_path)
    assert [event.step for event in read(tmp_path).Scalars("loss")] == [0, 1, 2, 3, 4, 5]


def test_a_missing_package_is_a_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install tensorboard, or set trackers=\[\]"):
        TensorBoard().check()
