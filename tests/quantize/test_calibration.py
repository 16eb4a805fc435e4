"""A calibration: budget over runs, architecture check, and its file, whole or refused."""

import json
import os
import struct
import sys
from dataclasses import replace

import pytest
import torch
from comfyui_modelopt.quantize import calibration
from comfyui_modelopt.quantize.calibration import Calibration, Record, Run, load, save
from comfyui_modelopt.quantize.records import keep
from comfyui_modelopt.utils.finite import all_finite
from safetensors import safe_open
from safetensors.torch import save_file

SIGNATURE = {"model": "SDXL", "in_channels": 4, "context_dim": 5, "adm_in_channels": 7}


def a_record(i: int, run: int = 0, control: bool = False) -> Record:
    residuals = {"input": [torch.full((2, 8, 2, 2), float(i)), None], "middle": [], "output": []}
    return Record(
        x=keep(torch.full((2, 4, 2, 2), i + 1000.0 * run, dtype=torch.float16)),
        timesteps=keep(torch.full((2,), 999.0 - i)),
        context=keep(torch.full((2, 3, 5), float(run), dtype=torch.bfloat16)),
        y=keep(torch.zeros(2, 7)),
        control=residuals if control else None,
        kwargs={"mask": keep(torch.ones(2, dtype=torch.int64))} if control else {},
        index=i,
        kind=i % 2,
    )


def a_run(number: int, count: int = 20, **facts) -> Run:
    records = tuple(a_record(i, number) for i in range(count))
    settings = {"prompt": f"prompt {number}", "steps": count, "cfg": 7.5, "sampler": "heun"}
    settings |= {"scheduler": "karras", "seed": 2**64 - 1 - number, "width": 512, "height": 768}
    return Run(records, calls=count, **(settings | facts))


def a_calibration(runs: int = 2, max_records: int = 12) -> Calibration:
    made = Calibration(signature=SIGNATURE, source="mine.safetensors")
    for number in range(runs):
        made = made.add_run(a_run(number), max_records)
    return made


def tensors_of(record: Record) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    record.map(lambda tensor: found.append(tensor) or tensor)
    return found


# --- the budget ---


def test_runs_share_the_budget_old_and_new_alike():
    made = Calibration(signature=SIGNATURE)
    for number in range(8):
        made = made.add_run(a_run(number), 16)
        counts = [len(run.records) for run in made.runs]
        assert sum(counts) == len(made) == 16
        assert max(counts) - min(counts) <= 1
        for run in made.runs:
            assert run.records[0].index == 0 and run.records[-1].index == 19
    assert [run.number for run in made.runs] == list(range(8))


def test_fewer_records_than_runs_keeps_evenly_spaced_runs():
    made = a_calibration(runs=40, max_records=4)
    numbers = [run.number for run in made.runs]
    assert len(made) == len(numbers) == 4
    assert numbers[0] == 0 and numbers[-1] == 39
    assert all(5 <= b - a <= 26 for a, b in zip(numbers, numbers[1:], strict=False))


def test_adding_a_run_changes_neither_the_old_calibration_nor_the_run():
    made, run = a_calibration(1), a_run(7)
    before = [(r.number, r.records) for r in made.runs]
    bigger = made.add_run(run, 4)
    assert [(r.number, r.records) for r in made.runs] == before
    assert len(run.records) == 20 and run.number == 0 and len(bigger) == 4
    with pytest.raises(AttributeError):
        made.runs = ()


def test_merge_puts_runs_one_after_the_other():
    both = a_calibration(2).merge(a_calibration(3), 15)
    assert [run.number for run in both.runs] == [0, 1, 2, 3, 4]
    assert [len(run.records) for run in both.runs] == [3, 3, 3, 3, 3]
    assert len(a_calibration(2).merge(a_calibration(3))) == 24
    with pytest.raises(ValueError, match="same architecture"):
        a_calibration().merge(Calibration(a_calibration().runs, {**SIGNATURE, "context_dim": 6}))


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1 record, got 0 in max_records"):
        a_calibration(1).add_run(a_run(1), 0)


def test_summary_says_what_was_recorded():
    summary = a_calibration(3, 10).summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["records"] == 10 and summary["runs"] == 3 and summary["calls"] == 60
    assert summary["prompts"] == ["prompt 0", "prompt 1", "prompt 2"]
    assert summary["steps"] == [20] and summary["resolutions"] == ["512x768"]
    assert summary["samplers"] == ["heun/karras"] and summary["source"] == "mine.safetensors"


def test_check_matches_names_the_difference():
    made = a_calibration()
    made.check_matches(SIGNATURE)
    with pytest.raises(ValueError, match=r"context_dim 5 .*mine.safetensors.* has 8: record"):
        made.check_matches({**SIGNATURE, "context_dim": 8})
    with pytest.raises(ValueError, match=r"transformer_depth None .* has \[1, 2\]"):
        made.check_matches({**SIGNATURE, "transformer_depth": (1, 2)})
    Calibration(made.runs, {"depth": (1, 2)}).check_matches({"depth": [1, 2]})
    strange = "\x1b[2J" * 10**5
    with pytest.raises(ValueError, match="same architecture") as refused:
        Calibration(made.runs, {strange: strange}, strange).check_matches({strange: 1})
    assert len(str(refused.value)) < 1000 and str(refused.value).isprintable()


def test_check_matches_refuses_an_empty_one():
    with pytest.raises(ValueError, match="at least 1 UNet call, got 0"):
        Calibration(signature=SIGNATURE).check_matches(SIGNATURE)


# --- the file ---


def test_round_trip_is_exact(tmp_path):
    made = a_calibration(3, 9)
    made = made.add_run(Run((a_record(0, 9, control=True), a_record(1, 9, control=True))), 20)
    back = load(save(made, tmp_path / "a.safetensors"))
    assert back.signature == made.signature and back.source == made.source
    assert [run.facts() for run in back.runs] == [run.facts() for run in made.runs]
    assert len(back) == len(made) == 11
    for old, new in zip(made, back, strict=True):
        assert (new.index, new.kind, list(new.kwargs)) == (old.index, old.kind, list(old.kwargs))
        for a, b in zip(tensors_of(old), tensors_of(new), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
    last = list(back)[-1].control
    assert last["input"][1] is None and last["middle"] == []


def test_identical_tensors_are_stored_once_in_the_file_and_in_memory(tmp_path):
    records = tuple(Record(a_record(i).x, torch.ones(2), torch.ones(2, 3, 5)) for i in range(10))
    path = save(Calibration((Run(records),), SIGNATURE), tmp_path / "a.safetensors")
    with safe_open(path, framework="pt") as file:
        assert len(list(file.keys())) == 12
    assert len({id(record.context) for record in load(path)}) == 1


def test_views_of_one_storage_are_saved(tmp_path):
    whole = torch.arange(64.0).reshape(2, 8, 2, 2)
    records = tuple(Record(whole[:, i : i + 4], torch.ones(2)) for i in (0, 4))
    back = load(save(Calibration((Run(records),), SIGNATURE), tmp_path / "a.safetensors"))
    assert torch.equal(torch.cat([record.x for record in back], 1), whole)


def test_a_file_is_never_overwritten(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="never overwritten"):
        save(a_calibration(), path)
    # nor one that another process writes meanwhile, on file systems with hard links and without
    flush = os.fsync
    for link in (os.link, refuse_links):
        path.unlink()

        def flush_while_another_saves(file):
            flush(file)
            path.write_bytes(b"precious")

        monkeypatch.setattr(os, "fsync", flush_while_another_saves)
        monkeypatch.setattr(os, "link", link)
        with pytest.raises(FileExistsError, match="never overwritten"):
            save(a_calibration(), path)
        assert path.read_bytes() == b"precious" and os.listdir(tmp_path) == [path.name]


def refuse_links(*_args, **_kwargs):
    raise PermissionError(1, "Operation not permitted")


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse_links)
    path = save(a_calibration(), tmp_path / "a.safetensors")
    assert len(load(path)) == 12 and os.listdir(tmp_path) == [path.name]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX file size limit stands for a full disk")
def test_a_full_disk_leaves_nothing_behind(tmp_path):
    import resource

    big = Run((Record(torch.randn(2, 4, 128, 128), torch.ones(2)),))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(OSError, match=r"saving needs a folder .*: free some"):
            save(Calibration((big,), SIGNATURE), tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"saving needs a folder .*: free some space"):
        save(a_calibration(), tmp_path / "file" / "a.safetensors")
    assert os.listdir(tmp_path) == ["file"]


def test_an_interrupted_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def stop(_fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        save(a_calibration(), tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("part", [0, 4, 8, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, part):
    data = save(a_calibration(), tmp_path / "a.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(data[: part if isinstance(part, int) else int(part * len(data))])
    with pytest.raises(
        ValueError, match=r"whole safetensors file, .*cut.* is not .*: copy it again"
    ):
        load(cut)


def test_a_foreign_or_missing_file_is_refused(tmp_path):
    path = tmp_path / "lora.safetensors"
    with pytest.raises(ValueError, match="must be a file that can be read, got No such file"):
        load(path)
    save_file({"a": torch.ones(1)}, path, metadata={"ss_network": "lora"})
    with pytest.raises(ValueError, match=r"modelopt_calibration header, got none .*lora"):
        load(path)


def edit(path, change):
    """Rewrite a saved calibration with `change(header, tensors)` applied."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[calibration.METADATA])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    changed = change(header, tensors)
    text = changed if isinstance(changed, str) else json.dumps(header)
    save_file(tensors, path, metadata={calibration.METADATA: text})
    return path


def first(header):
    return header["runs"][0]["records"][0]


def set_tensor(name, value):
    def change(header, tensors):
        tensors[first(header)[name]] = value

    return change


DAMAGE = {
    "missing tensor": (lambda h, t: t.pop(first(h)["x"]), "no '0"),
    "name that is no name": (lambda h, t: first(h).update(y=["a"]), "unhashable|no "),
    "x rank": (set_tensor("x", torch.ones(2, 4, 2)), r"x with shape \(2, 4, 2\)"),
    "x channels": (set_tensor("x", torch.ones(2, 9, 2, 2)), "in_channels 4"),
    "timesteps rank": (set_tensor("timesteps", torch.ones(2, 1)), "timesteps with shape"),
    "context width": (set_tensor("context", torch.ones(2, 3, 6)), "context_dim 5"),
    "y batch": (set_tensor("y", torch.ones(3, 7)), "y with batch 3 beside x with batch 2"),
    "x integers": (set_tensor("x", torch.ones(2, 4, 2, 2).int()), "values in x"),
    "x nan": (set_tensor("x", torch.full((2, 4, 2, 2), float("nan"))), "values in x"),
    "x of no pixels": (set_tensor("x", torch.ones(2, 4, 0, 0)), "which holds no values"),
    "context of nothing": (set_tensor("context", torch.ones(2, 0, 5)), "which holds no values"),
    "x of 4 bits": (
        set_tensor("x", torch.zeros(2, 4, 2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)),
        "of dtype torch.float4_e2m1fn_x2, which no UNet call has",
    ),
    "a tensor of exponents": (
        lambda h, t: t.update(other=torch.zeros(2, dtype=torch.uint8).view(torch.float8_e8m0fnu)),
        "other of dtype torch.float8_e8m0fnu",
    ),
    "x among the others": (
        lambda h, t: first(h).update(kwargs={"x": first(h)["x"]}),
        "x among the values passed by other names",
    ),
    "timesteps and y among the others": (
        lambda h, t: first(h).update(plain={"timesteps": 1, "y": [1]}),
        "timesteps, y among the values",
    ),
    "no records": (lambda h, t: [run.update(records=[]) for run in h["runs"]], "0 UNet calls of 2"),
    "no run": (lambda h, t: h.update(runs=[]), "0 UNet calls of 0 runs"),
    "many records": (
        lambda h, t: h["runs"][0].update(records=[first(h)] * (calibration.MOST_RECORDS + 1)),
        "163.. UNet calls of 2 runs, not 1 to 16384",
    ),
    "no timesteps": (lambda h, t: first(h).update(timesteps=None), "timesteps|subscriptable|no "),
    "no runs": (lambda h, t: h.pop("runs"), "no 'runs'"),
    "runs no list": (lambda h, t: h.update(runs=3), "not iterable"),
    "no signature": (lambda h, t: h.pop("signature"), "no 'signature'"),
    "signature no dict": (lambda h, t: h.update(signature=[1]), "object"),
    "unknown field": (lambda h, t: first(h).update(noise=1), "noise"),
    "calls a word": (lambda h, t: h["runs"][0].update(calls="x"), "calls that is 'x'"),
    "number a list": (lambda h, t: h["runs"][0].update(number=[]), r"number that is \[\]"),
    "prompt a list": (lambda h, t: h["runs"][0].update(prompt=[1]), r"prompt that is \[1\]"),
    "kind no number": (lambda h, t: first(h).update(kind=True), "kind that is True"),
    "missing fact": (lambda h, t: h["runs"][0].pop("cfg"), "no 'cfg'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_hand_edited_file_is_refused(tmp_path, damage):
    change, found = DAMAGE[damage]
    path = edit(save(a_calibration(), tmp_path / "edited.safetensors"), change)
    with pytest.raises(ValueError, match=rf"as it was saved, got .*({found}).*edited.*: copy"):
        load(path)


def test_records_that_share_a_tensor_have_it_looked_through_once(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(calibration, "all_finite", lambda x: looked.append(id(x)) or all_finite(x))

    def change(header, tensors):
        header["runs"][0]["records"] *= 1000

    path = edit(save(a_calibration(), tmp_path / "many.safetensors"), change)
    assert len(load(path)) >= 1000
    assert looked and len(looked) == len(set(looked))


def test_nothing_or_too_much_is_not_saved(tmp_path, monkeypatch):
    """`load` would refuse it."""
    path = tmp_path / "a.safetensors"
    monkeypatch.setattr(calibration, "MOST_RECORDS", 11)
    for made in (Calibration(signature=SIGNATURE), a_calibration()):
        with pytest.raises(ValueError, match=f"must hold 1 to 11 UNet calls, got {len(made)} for"):
            save(made, path)
    assert not path.exists()


def test_as_many_records_as_the_nodes_keep_are_read_again(tmp_path):
    """With a ControlNet, tensors by other names and a prompt of its own each."""
    x, other = torch.ones(1, 4, 8, 8), torch.ones(1, 700)
    control = {"input": [other] * 12, "middle": [other], "output": [other] * 10}
    values = {f"name{i}": other for i in range(4)}
    plain = {"sizes": [1, 2, 3]}
    runs = [
        Run((Record(x + i, other[0, i : i + 1], control=control, kwargs=values, plain=plain),))
        for i in range(4)
    ]
    prompt = "a [red:blue:0.5] (fox:1.2), " * 4
    runs = [replace(runs[i % 4], prompt=f"{prompt}{i}", number=i) for i in range(4096)]
    path = save(Calibration(tuple(runs), SIGNATURE), tmp_path / "a.safetensors")
    assert len(load(path)) == 4096


def test_an_unedited_file_survives_the_editing_helper(tmp_path):
    assert len(load(edit(save(a_calibration(), tmp_path / "a.safetensors"), lambda h, t: None)))


@pytest.mark.parametrize("text", ["{", "[]", "{}", "3"])
def test_a_damaged_header_is_refused(tmp_path, text):
    path = edit(save(a_calibration(), tmp_path / "a.safetensors"), lambda h, t: text)
    with pytest.raises(ValueError, match="JSON with a format_version"):
        load(path)


@pytest.mark.parametrize("version", [calibration.FORMAT_VERSION + 1, "1", None])
def test_another_format_version_is_refused(tmp_path, version):
    path = save(a_calibration(), tmp_path / "a.safetensors")
    edit(path, lambda h, t: h.update(format_version=version))
    with pytest.raises(ValueError, match="format version 1, got .*: update the pack"):
        load(path)


def test_a_header_that_claims_to_be_huge_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(ValueError, match="whole safetensors file"):
        load(path)
