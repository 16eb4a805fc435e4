"""Records keep real calls as they were; a recorder keeps few of many, evenly, in bounded memory."""

import pytest
import torch
from comfyui_modelopt.quantize import records
from comfyui_modelopt.quantize.records import Record, Recorder, Run


def call(i: int, batch: int = 2) -> dict:
    """Distinct x, equal context: as a sampler calls a UNet."""
    return {
        "x": torch.full((batch, 4, 2, 2), float(i)),
        "timesteps": torch.full((batch,), 1000.0 - i),
        "context": torch.ones(batch, 3, 5),
        "y": torch.zeros(batch, 7),
    }


def feed(recorder: Recorder, count: int, kinds: int = 1) -> None:
    for i in range(count):
        recorder.add(i % kinds, **call(i))


@pytest.mark.parametrize("budget", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("count", [1, 2, 7, 64, 65, 129, 1000])
@pytest.mark.parametrize("kinds", [1, 2, 3])
def test_a_recorder_fills_its_budget_and_keeps_both_ends(budget, count, kinds):
    recorder = Recorder(budget)
    feed(recorder, count, kinds)
    kept = [record.index for record in recorder.records]
    assert recorder.calls == count
    assert kept == sorted(set(kept))
    assert [float(r.x[0, 0, 0, 0]) for r in recorder.records] == kept
    assert len(kept) <= budget
    if kinds == 1:
        assert len(kept) == min(budget, count)
    if budget >= 2:
        assert kept[0] == 0 and kept[-1] == count - 1


@pytest.mark.parametrize("count", [100, 127, 128, 129, 1000])
@pytest.mark.parametrize("budget", [4, 10, 33])
def test_records_are_spaced_evenly(count, budget):
    recorder = Recorder(budget)
    feed(recorder, count)
    kept = [record.index for record in recorder.records]
    gaps = [b - a for a, b in zip(kept, kept[1:], strict=False)]
    assert max(gaps) <= 2 * (count - 1) / (budget - 1)
    assert min(gaps) >= 0.3 * (count - 1) / (budget - 1)


@pytest.mark.parametrize("kinds", [1, 2, 5])
@pytest.mark.parametrize("budget", [1, 2, 5, 16])
def test_memory_is_bounded_while_recording(budget, kinds):
    recorder = Recorder(budget)
    before = set(records._shared)  # every live copy is in there
    for i in range(300):
        recorder.add(i % kinds, **call(i, batch=3))
        alive = sum(t.ndim == 4 for k, t in records._shared.items() if k not in before)
        assert 1 <= alive <= 2 * budget


@pytest.mark.parametrize("count", [16, 100, 1024])
def test_cond_and_uncond_in_turn_are_both_kept(count):
    """A plain stride of two would keep only one of them."""
    recorder = Recorder(8)
    feed(recorder, count, kinds=2)
    for parity in (0, 1):
        kept = [r.index for r in recorder.records if r.index % 2 == parity]
        assert len(kept) == 4 and kept[0] == parity and kept[-1] == count - 2 + parity


def test_a_recorder_needs_room_for_one():
    with pytest.raises(ValueError, match="at least 1 record, got 0 in max_records: raise it"):
        Recorder(0)


def test_identical_tensors_are_one_object_and_changed_ones_are_not():
    recorder = Recorder(8)
    feed(recorder, 4)
    first, *rest = recorder.records
    assert all(record.context is first.context and record.y is first.y for record in rest)
    assert len({id(record.x) for record in recorder.records}) == 4
    half = records.keep(torch.ones(2, 3, 5).half())
    assert half is not first.context and half.dtype == torch.float16
    assert records.keep(torch.ones(5, 3, 2)) is not first.context


def test_records_are_copies_that_work_outside_inference_mode():
    recorder = Recorder(2)
    with torch.inference_mode():
        seen = call(5)
        control = {"input": [torch.ones(2, 4, 2, 2), None], "middle": [], "output": [None]}
        recorder.add(0, **seen, control=control, kwargs={"mask": torch.ones(2), "frames": 3})
        seen["x"].zero_()
        control["input"].pop()
    (record,) = recorder.records
    assert torch.equal(record.x, torch.full((2, 4, 2, 2), 5.0))
    assert not record.x.is_inference() and not record.control["input"][0].is_inference()
    assert [t is None for t in record.control["input"]] == [False, True]
    assert list(record.kwargs) == ["mask"] and record.plain == {"frames": 3}
    assert record.arguments()[1]["frames"] == 3


def test_arguments_are_fresh_and_cast_all_but_the_timesteps():
    control = {"input": [torch.ones(2, 4, 2, 2), None], "output": []}
    mask = torch.ones(2, dtype=torch.int64)
    record = Record(**call(3), control=control, kwargs={"mask": mask})
    (x, timesteps), named = record.arguments(dtype=torch.float16)
    assert x.dtype == named["context"].dtype == named["y"].dtype == torch.float16
    assert named["control"]["input"][0].dtype == torch.float16
    assert timesteps.dtype == torch.float32 and named["mask"].dtype == torch.int64
    named["control"]["input"].pop()
    named["transformer_options"]["block"] = 1
    _, again = record.arguments()
    assert len(again["control"]["input"]) == 2 and again["transformer_options"] == {}
    assert again["context"].dtype == torch.float32


def test_a_record_without_conditioning_replays_without():
    record = Record(torch.zeros(1, 4, 2, 2), torch.tensor([999.0]))
    _, named = record.arguments("cpu", torch.bfloat16)
    assert named["context"] is named["control"] is None and "y" not in named


def test_single_records_of_many_runs_cover_the_trajectory():
    trajectory = tuple(Record(**call(i), index=i) for i in range(101))
    taken = [Run(trajectory, number=n).thinned(1).records[0].index for n in range(7)]
    assert sorted(taken) == [12, 25, 37, 50, 62, 75, 87]  # eighths of 100, ties to the earlier
