"""Strangers' checkpoints of torch.save and exported folders: refused by name, bounded, never executed."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import time
import zipfile

import pytest
import torch
from comfyui_modelopt.devtools.torture import faults
from comfyui_modelopt.devtools.torture.mutations import samples, torch_files
from comfyui_modelopt.loaders import foreign
from comfyui_modelopt.loaders.foreign import architecture, folder, names, pickled, torch_file
from safetensors.torch import save_file

pytest.importorskip("modelopt.torch.quantization")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = tmp_path_factory.mktemp("saved")
    with torch.random.fork_rng():
        samples._saved(made)
    return made / "saved-int8.pt"


def put(tmp_path, data: bytes):
    path = tmp_path / "strange.pt"
    path.write_bytes(data)
    return path


def refused(path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        foreign.read(path)
    assert str(path) in str(caught.value)


def test_a_flipped_bit_in_a_tensor(saved, tmp_path):
    """torch maps tensors into memory and looks at no checksum of them."""
    data = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        member = max(archive.infolist(), key=lambda one: one.file_size)
    data[member.header_offset + 200] ^= 1
    path = put(tmp_path, data)
    torch.load(path, weights_only=True, mmap=True)
    refused(path, "must be a whole file of torch.save.*Bad CRC-32")


def test_a_file_written_without_checksums(saved, tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.load(saved, weights_only=True), tmp_path / "without.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert foreign.read(tmp_path / "without.pt").layers == foreign.read(saved).layers


def test_packed_members(saved, tmp_path):
    members = torch_files._members(saved.read_bytes())
    members["archive/bomb"] = bytes(2**24)
    path = put(tmp_path, torch_files._zipped(members, packed=True))
    assert path.stat().st_size < 10**5
    refused(path, "must hold its data as it is.*unpacks to more than the file holds")


@pytest.mark.parametrize("shape", [(2**14, 2**14), (2**40,)])
def test_a_value_stretched_over_gigabytes(saved, tmp_path, shape):
    objects = torch.load(saved, weights_only=True)
    objects["model_state_dict"]["out.0.weight"] = torch.ones(1).expand(shape)
    torch.save(objects, tmp_path / "strange.pt")
    refused(tmp_path / "strange.pt", "must hold whole tensors only")


def test_a_directory_that_is_no_text(saved, tmp_path):
    data = saved.read_bytes()
    place = data.index(b"PK\x01\x02")
    made = data[:place] + data[place:].replace(b"data.pkl", b"data.\xff\xff\xff", 1)
    made = made[: place + 8] + b"\x00\x08" + made[place + 10 :]  # names in UTF-8
    refused(put(tmp_path, made), "must be a whole file of torch.save")


def test_scales_that_modelopt_refuses(saved, tmp_path):
    """Of a layer whose numerics ModelOpt computes."""
    path = saved.with_name("saved-int4.pt")
    objects = torch.load(path, weights_only=True)
    name = f"{samples.NAMES[1]}.weight_quantizer._amax"
    objects["model_state_dict"][name] = -objects["model_state_dict"][name]
    torch.save(objects, tmp_path / "strange.pt")
    refused(
        tmp_path / "strange.pt", f"ModelOpt must be able to compute {samples.NAMES[1]}'s weight"
    )


def test_a_weight_that_its_scales_would_stretch(saved, tmp_path):
    """Flat, it and the amax of its rows broadcast to rows times as much memory."""
    objects = torch.load(saved, weights_only=True)
    name = f"{samples.NAMES[1]}.weight"
    objects["model_state_dict"][name] = objects["model_state_dict"][name].reshape(-1)
    torch.save(objects, tmp_path / "strange.pt")
    refused(tmp_path / "strange.pt", "a weight's amax must broadcast to its shape")


BOMB = b"\x80\x02}N" + b"\x85" * 10**5 + b"Ns."


@pytest.mark.parametrize("name", ["data.PKL", "Data.Pkl"])
def test_a_pickle_under_a_name_that_torch_takes_for_its_own(saved, tmp_path, name):
    members = torch_files._members(saved.read_bytes())
    (own,) = (one for one in members if one.endswith("data.pkl"))
    del members[own]
    path = put(tmp_path, torch_files._zipped({own.replace("data.pkl", name): BOMB} | members))
    refused(path, "must hold little beside its tensors.*nested more than 200 deep")


def test_a_second_directory(saved, tmp_path):
    members = torch_files._members(saved.read_bytes())
    (own,) = (one for one in members if one.endswith("data.pkl"))
    size = max(len(BOMB), len(members[own]))  # what follows a pickle's end is not read
    good, bad = (members | {own: data.ljust(size)} for data in (members[own], BOMB))
    path = put(tmp_path, torch_files.two_directories(bad, good))
    with zipfile.ZipFile(path) as archive:
        assert archive.read(own) == good[own]
    assert torch._C.PyTorchFileReader(str(path)).get_record("data.pkl") == bad[own]
    refused(path, "must be a whole file of torch.save.*a directory that is not where it says")


@pytest.mark.parametrize(
    ("name", "why"),
    [("archive/VERSION", "two members of one name"), ("archive/a\\b", "not all read alike")],
)
def test_members_that_not_all_readers_tell_apart(saved, tmp_path, name, why):
    members = torch_files._members(saved.read_bytes())
    assert any(one.endswith("/version") for one in members)
    prefix = next(iter(members)).partition("/")[0]
    made = members | {name.replace("archive", prefix): b"3"}
    refused(put(tmp_path, torch_files._zipped(made)), f"must be a whole file.*{why}")


def test_a_long_end_of_the_directory(saved, tmp_path):
    """As torch writes it; what it says must be what the short one says, and where it is."""
    torch.save(torch.load(saved, weights_only=True), tmp_path / "own.pt")
    data = (tmp_path / "own.pt").read_bytes()
    end = len(data) - 98
    assert data[end : end + 4] == b"PK\6\6"
    assert foreign.read(tmp_path / "own.pt").layers == foreign.read(saved).layers
    for place in (end + 4, end + 32, end + 48, end + 56 + 8):
        made = bytearray(data)
        made[place] ^= 1
        refused(put(tmp_path, bytes(made)), "must be a whole file of torch.save")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(3).to(torch.float8_e8m0fnu), "must hold whole tensors only"),
        (torch.ones(3, dtype=torch.complex64), "must hold whole tensors only"),
        (torch.nested.nested_tensor([torch.ones(2)]), "must hold whole tensors only"),
        (torch.ones(3, dtype=torch.uint16), "must hold whole tensors only"),
    ],
)
def test_tensors_that_are_no_weights(saved, tmp_path, tensor, message):
    objects = torch.load(saved, weights_only=True)
    objects["model_state_dict"]["out.0.bias"] = tensor
    torch.save(objects, tmp_path / "strange.pt")
    refused(tmp_path / "strange.pt", message)


def test_one_tensor_under_many_names(saved, tmp_path):
    objects = torch.load(saved, weights_only=True)
    base = torch.ones(1000, 1000)
    objects["model_state_dict"] |= {f"x{i}.weight": base.t() for i in range(60)}
    torch.save(objects, tmp_path / "strange.pt")
    refused(tmp_path / "strange.pt", "must hold whole tensors only, those of .* share 4")


@pytest.mark.parametrize("said", [5, ["\x1b" * 10**5]])
def test_a_shape_that_is_none(saved, tmp_path, said):
    objects = torch.load(saved, weights_only=True)
    modes = objects["modelopt_state"]["modelopt_state_dict"]
    for _, state in modes:
        for one in state["metadata"]["quantizer_state"].values():
            if "_pytorch_state_metadata" in one and "_amax" in (
                buffers := one["_pytorch_state_metadata"]["buffers"]
            ):
                buffers["_amax"]["shape"] = said
    torch.save(objects, tmp_path / "strange.pt")
    refused(tmp_path / "strange.pt", "must have the shape that ModelOpt's state says")
    with pytest.raises(ValueError) as caught:
        foreign.read(tmp_path / "strange.pt")
    assert len(str(caught.value)) < 1000


def test_long_blocks(saved, tmp_path):
    objects = torch.load(saved.with_name("saved-int4.pt"), weights_only=True)
    for _, state in objects["modelopt_state"]["modelopt_state_dict"]:
        for name, one in state["metadata"]["quantizer_state"].items():
            if name.endswith("weight_quantizer"):
                one["_block_sizes"] = {-1: 10**12}
    torch.save(objects, tmp_path / "strange.pt")
    refused(tmp_path / "strange.pt", "at most 1024 values, .* has 1000000000000")


def nested(times: int) -> list:
    """Ten billions of values and more, in a pickle of a few hundred bytes."""
    made = [0] * 10
    for _ in range(times):
        made = [made] * 10
    return made


def loop() -> list:
    made = []
    made.append(made)
    return made


def tuples(times: int, width: int) -> tuple:
    made = (0,) * width
    for _ in range(times):
        made = (made,) * width
    return made


PLACES = {
    "slice": lambda o, x: o["modelopt_state"].update(modelopt_version=slice(x)),
    "version": lambda o, x: o["modelopt_state"].update(modelopt_version=x),
    "mode": lambda o, x: o["modelopt_state"]["modelopt_state_dict"].append((tuple(x), {})),
    "weights": lambda o, x: o["model_state_dict"].update(x=x),
}


def saved_with(tmp_path, saved, place, value):
    objects = torch.load(saved, weights_only=True)
    PLACES[place](objects, value)
    torch.save(objects, tmp_path / "strange.pt")
    assert (tmp_path / "strange.pt").stat().st_size < saved.stat().st_size + 10**4
    return tmp_path / "strange.pt"


@pytest.mark.parametrize("place", ["slice", "version", "mode", "weights"])
@pytest.mark.parametrize("value", [nested(30), nested(9), tuples(20, 10)])
def test_one_list_that_is_referred_to_again_and_again(saved, tmp_path, place, value):
    path = saved_with(tmp_path, saved, place, value)
    refused(path, "has more than 3000000 values, many of them the same one")


@pytest.mark.parametrize("place", ["version", "mode", "weights"])
def test_a_list_that_holds_itself(saved, tmp_path, place):
    refused(saved_with(tmp_path, saved, place, loop()), "has values nested more than 200 deep")


def test_a_key_that_no_one_hashes_in_time(saved, tmp_path):
    members = torch_files._members(saved.read_bytes())
    (name,) = (one for one in members if one.endswith("data.pkl"))
    for key, message in (
        (
            b"N" + b"".join(b"q\x00" + b"h\x00" * 2 + b"\x87" for _ in range(40)),
            "many of them the same",
        ),
        (b"N" + b"\x85" * 10**5, "nested more than 200 deep"),
    ):
        members[name] = b"\x80\x02}" + key + b"Ns."
        refused(put(tmp_path, torch_files._zipped(members)), message)


def test_a_long_pickle_is_not_opened(saved, tmp_path):
    members = torch_files._members(saved.read_bytes())
    (name,) = (one for one in members if one.endswith("data.pkl"))
    assert len(members[name]) < torch_file.LONGEST_PICKLE / 100
    for pickle, message in (
        (b"]" * torch_file.LONGEST_PICKLE, "has a pickle of 16777219 bytes"),
        (b"]" * (pickled.MOST_HOLDERS + 1), "has more than 1000000 lists and tables"),
        (b"N0" * pickled.MOST_OPERATIONS, "has more than 5000000 operations"),
    ):
        members[name] = b"\x80\x02" + pickle + b"."
        path = put(tmp_path, torch_files._zipped(members))
        started = time.process_time()
        refused(path, message)
        assert time.process_time() - started < 10


# ---- folders


def test_deep_json(tmp_path):
    (tmp_path / folder.CONFIG).write_text("[" * 100_000 + "]" * 100_000)
    refused(tmp_path, "must be JSON, found values nested more than 64 deep")


def test_a_million_lists(tmp_path):
    (tmp_path / folder.CONFIG).write_text('{"x": [' + "[]," * 10**6 + "[]]}")
    refused(tmp_path, "must be JSON, found more than 200000 lists and tables")


NAMES = {
    "levels": [f"down_blocks.{i}.resnets.0.x.weight" for i in range(60_000)],
    "ResBlocks": [f"down_blocks.0.resnets.{i}.x.weight" for i in range(60_000)],
    "transformers": [
        f"mid_block.attentions.0.transformer_blocks.{i}.x.weight" for i in range(60_000)
    ],
    "both": [f"down_blocks.{i}.resnets.{j}.x.weight" for i in range(3000) for j in range(20)],
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_unet_of_thousands_of_blocks(kind):
    started = time.process_time()
    with pytest.raises(
        ValueError, match="a UNet must have at most 100 blocks and levels, the file"
    ):
        names.modules(["conv_in.weight", *NAMES[kind]], "the file")
    assert time.process_time() - started < 5


def test_names_of_strangers_stay_short():
    long = "x" * 10**6
    for keys in ([long], ["conv_in.weight", f"{long}.weight"], [names.COMFYUI, "\x1b[2J.weight"]):
        with pytest.raises(ValueError) as caught:
            names.modules(keys, "the file")
        assert len(str(caught.value)) < 1000


def test_a_tensor_in_two_shards(tmp_path):
    (tmp_path / folder.CONFIG).write_text("{}")
    for number in (1, 2):
        tensors = {"a": torch.ones(1), f"b{number}": torch.ones(1)}
        save_file(tensors, tmp_path / f"{number}.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b1": "1.safetensors", "b2": "2.safetensors"}}
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, "every tensor must be in one shard, a in .*2.safetensors is in another too")


FOUND = {"model_channels": 320, "channel_mult": [1], "num_heads": 8, "in_channels": 4}
FOUND |= {"out_channels": 4, "context_dim": 768}


def test_a_configuration_of_another_architecture():
    config = {"attention_head_dim": 8, "down_block_types": ["CrossAttnDownBlock2D"] * 10}
    architecture.check(config, FOUND, "the folder")
    with pytest.raises(ValueError, match="must be a UNet2D.*says another architecture"):
        architecture.check(config, {"image_model": "flux"}, "the folder")


def test_json_without_an_end(tmp_path):
    with (tmp_path / folder.CONFIG).open("wb") as file:
        file.truncate(2**31)
    refused(tmp_path, "must be JSON, found more than 16777216 bytes")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are POSIX")
@pytest.mark.parametrize("name", [folder.CONFIG, "x.safetensors", "x.safetensors.index.json"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    (tmp_path / folder.CONFIG).write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    refused(tmp_path, "must")


@pytest.mark.parametrize("point", range(8))
def test_a_disk_that_fails_is_no_damage(saved, point):
    """`zipfile` calls what the disk does not give no zip."""
    passed = []

    def reached():
        passed.append(point)
        if len(passed) == point + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with faults.file_calls(reached, str(saved.parent)):
        refused(saved, "must be a file that can be read, got Input/output error: check .* the disk")


def test_a_folder_that_may_not_be_entered(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(pathlib.Path, "is_file", denied)
    refused(tmp_path, "must be a file that can be read, got Permission denied: check")


def test_a_long_configuration_is_cut():
    config = {"attention_head_dim": "x" * 10**5, "down_block_types": ["CrossAttn"]}
    with pytest.raises(ValueError, match="attention heads of a level must be") as caught:
        architecture.check(config, FOUND, "the folder")
    assert len(str(caught.value)) < 1000


def test_an_error_stays_short(tmp_path):
    (tmp_path / folder.CONFIG).write_text("{}")
    names = {"weight_map": {"a": "x" * 10**6 + ".safetensors"}}
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match="every shard of the index must be there") as caught:
        foreign.read(tmp_path)
    assert len(str(caught.value)) < 1000
