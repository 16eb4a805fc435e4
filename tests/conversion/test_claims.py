"""Claims: one process of many makes a file, whoever dies on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from comfyui_modelopt.conversion import claims
from comfyui_modelopt.conversion.claims import Claim, Owner

ROOT = Path(__file__).resolve().parent.parent.parent
# a process that does something with claims, without torch and ComfyUI
LOAD = f"""
import sys, time, types, pathlib
package = types.ModuleType("pack")
package.__path__ = [{str(ROOT)!r}]
sys.modules["pack"] = package
from pack.conversion import claims
folder = pathlib.Path(sys.argv[1])
"""
RACE = """
rounds, start = int(sys.argv[2]), float(sys.argv[3])
for number in range(rounds):
    time.sleep(max(0, start + 0.1 * number - time.time()))
    got = claims.take(folder / f"{number}.safetensors")
    print(int(isinstance(got, claims.Claim)), flush=True)
sys.stdin.read()  # hold them
"""
HOLD = """
claims.take(folder / "a.safetensors")
print("held", flush=True)
time.sleep(600)
"""
INSIDE = """
import os, random
random.seed(sys.argv[2])
output, inside, until = folder / "a.safetensors", folder / "inside", time.time() + 120
done = 0
while done < int(sys.argv[3]) and time.time() < until:  # rounds, however slow the machine is
    claim = claims.take(output)
    if isinstance(claim, claims.Owner):
        continue
    if inside.exists() and claims.born(int(inside.read_text() or 0)) is not None:
        print("two at once", flush=True)
    inside.write_text(str(os.getpid()))
    if sys.argv[2] != "0" and random.random() < 0.05:  # one lives
        os._exit(9)
    inside.write_text("0")
    claim.release()
    done += 1
print(done, flush=True)
"""


def start(code: str, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", LOAD + code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def dead(tmp_path_factory) -> Owner:
    """Who held a claim and was killed."""
    folder = tmp_path_factory.mktemp("dead")
    with start(HOLD, folder) as process:
        assert process.stdout.readline() == "held\n"
        process.kill()
    (path,) = claims.litter(folder / "a.safetensors")
    return Owner(**json.loads(path.read_text()))


def leave(output: Path, owner: Owner, after: Owner | None = None) -> Path:
    """A claim of that owner, following that of another."""
    root, begin = claims._paths(output)
    path = root if after is None else output.with_name(begin + after.token)
    path.write_text(json.dumps(asdict(owner)))
    return path


def test_one_gets_it_and_leaves_nothing(tmp_path):
    output = tmp_path / "a [x] 100%.safetensors"
    with claims.take(output) as claim:
        assert isinstance(claim, Claim)
        other = claims.take(output)
        assert isinstance(other, Owner) and other.pid == os.getpid() and other == claim.owner
        assert claims.holder(output) == claim.owner
        assert str(other) == f"process {os.getpid()} on {claim.owner.host}"
        assert isinstance(claims.take(tmp_path / "b.safetensors"), Claim)
    assert claims.holder(output) is None and not claims.litter(output)
    with claims.take(output) as again:
        assert isinstance(again, Claim)


def test_a_living_process_keeps_it_however_old_it_is(tmp_path):
    output = tmp_path / "a.safetensors"
    with claims.take(output) as claim:
        os.utime(claim.path, (0, 0))
        assert isinstance(claims.take(output, patience=0.001), Owner)


def test_a_dead_process_of_this_machine_loses_it_at_once(tmp_path, dead):
    output = tmp_path / "a.safetensors"
    leave(output, dead)
    assert claims.holder(output) is None
    with claims.take(output) as claim:
        assert isinstance(claim, Claim)
        assert isinstance(claims.take(output), Owner), "the heir's claim counts"
    assert not claims.litter(output)


def test_a_number_that_another_process_has_now_is_not_its_owner(tmp_path, dead):
    output = tmp_path / "a.safetensors"
    leave(output, replace(dead, pid=os.getpid()))
    assert isinstance(claims.take(output), Claim)


@pytest.mark.parametrize("silent, taken", [(50.0, False), (70.0, True)])
def test_another_machine_is_dead_when_it_is_silent(tmp_path, dead, silent, taken):
    """By the file system's clock; whether a process of that number runs here does not count."""
    output = tmp_path / "a.safetensors"
    path = leave(output, replace(dead, host="elsewhere", place="elsewhere 1 2"))
    then = time.time() - silent
    os.utime(path, (then, then))
    got = claims.take(output, patience=60)
    assert isinstance(got, Claim) == taken
    if not taken:
        assert str(got) == f"process {dead.pid} on elsewhere"


def test_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT", 0.05)
    with claims.take(tmp_path / "a.safetensors") as claim:
        os.utime(claim.path, (0, 0))
        until = time.monotonic() + 10
        while claim.path.stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.02)
        assert time.time() - claim.path.stat().st_mtime < 20


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"host": 1}', "9" * 5000, '{"token": "../../x"}', "[" * 100000]
)
def test_what_is_no_claim_is_an_unknown_process(tmp_path, text):
    output = tmp_path / "a.safetensors"
    path, _ = claims._paths(output)
    path.write_text(text)
    got = claims.take(output)
    assert isinstance(got, Owner) and str(got) == "an unknown process"
    os.utime(path, (0, 0))
    with claims.take(output) as claim:
        assert isinstance(claim, Claim)
    assert not claims.litter(output)


OBSTACLES = {
    "a folder": lambda path: path.mkdir(),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}
if hasattr(os, "mkfifo"):
    OBSTACLES["a pipe"] = os.mkfifo


@pytest.mark.parametrize("kind", OBSTACLES)
def test_what_is_no_file_in_a_claims_place(tmp_path, kind):
    """Nobody gets the claim, and it stays for its owner to remove."""
    output = tmp_path / "a.safetensors"
    path, _ = claims._paths(output)
    OBSTACLES[kind](path)
    for ask in (claims.take, claims.holder):
        with pytest.raises(ValueError, match="a claim must be a file") as refused:
            ask(output)
        assert str(path) in str(refused.value) and str(refused.value).endswith(": remove it")
    assert [x.name for x in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", OBSTACLES)
def test_what_is_no_file_among_what_others_left(tmp_path, kind):
    output = tmp_path / "a.safetensors"
    junk = tmp_path / f"{claims._paths(output)[1]}junk"
    with claims.take(output) as claim:
        OBSTACLES[kind](junk)
        assert isinstance(claim, Claim)
    assert [x.name for x in tmp_path.iterdir()] == [junk.name] and not claims.litter(output)


def test_a_long_file_is_no_claim(tmp_path, dead):
    """It is not read whole."""
    output = tmp_path / "a.safetensors"
    path = leave(output, dead)
    path.write_text(path.read_text() + " " * 5000)
    assert str(claims.take(output)) == "an unknown process"


def test_an_owners_name_is_text_of_a_stranger(tmp_path, dead):
    output = tmp_path / "a.safetensors"
    leave(output, replace(dead, host="\x1b[2J" * 300, place="elsewhere"))
    told = str(claims.take(output))
    assert told.startswith(f"process {dead.pid} on ") and len(told) < 300 and told.isprintable()


@pytest.mark.parametrize("length", [1, 2])
def test_claims_that_follow_themselves(tmp_path, dead, length):
    """No process makes such; a stranger's folder may hold them."""
    output = tmp_path / "a.safetensors"
    one, other = replace(dead, token="1" * 16), replace(dead, token="2" * 16)
    leave(output, one)
    leave(output, one if length == 1 else other, after=one)
    if length == 2:
        leave(output, one, after=other)
    for path in claims.litter(output):
        os.utime(path, (0, 0))
    with claims.take(output) as claim:
        assert isinstance(claim, Claim) and claims.holder(output) == claim.owner
    assert not claims.litter(output)


@pytest.mark.parametrize("name", ["../../escape", "x" * 16, "A" * 16])
def test_a_token_names_no_other_file(tmp_path, dead, name):
    output = tmp_path / "folder" / "a.safetensors"
    output.parent.mkdir()
    path = leave(output, replace(dead, token=name))
    assert isinstance(claims.take(output), Owner), "not readable, and young"
    os.utime(path, (0, 0))
    assert isinstance(claims.take(output), Claim)
    assert [x.name for x in tmp_path.iterdir()] == ["folder"]


def test_a_process_that_was_taken_for_dead_takes_nothing_away(tmp_path, dead):
    output = tmp_path / "a.safetensors"
    late = claims.take(output)
    heir = leave(output, replace(dead, pid=os.getpid(), born=claims.born(os.getpid())), late.owner)
    late.release()
    assert heir.exists() and claims.holder(output).token == dead.token


def test_without_hard_links(tmp_path, monkeypatch, dead):
    def link(*_):
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", link)
    output = tmp_path / "a.safetensors"
    leave(output, dead)
    with claims.take(output) as claim:
        assert isinstance(claim, Claim) and isinstance(claims.take(output), Owner)
    assert not claims.litter(output)


@pytest.mark.parametrize("between", ["take", "take release", "take release take"])
@pytest.mark.parametrize("stale", [0, 1, 3])
def test_others_come_between_looking_and_taking(tmp_path, dead, monkeypatch, stale, between):
    """What was found free or dead may not be any more when the claim is made."""
    output, before, others = tmp_path / "a.safetensors", None, []
    for index in range(stale):
        owner = replace(dead, token=f"{index:016x}")
        leave(output, owner, before)
        before = owner
    really = claims._made

    def made(new: Path, path: Path) -> bool:
        monkeypatch.setattr(claims, "_made", really)
        for what in between.split():
            if what == "take":
                others.append(claims.take(output))
                assert isinstance(others[-1], Claim)
            else:
                others[-1].release()
        return really(new, path)

    monkeypatch.setattr(claims, "_made", made)
    got = claims.take(output)
    if between.endswith("take"):
        assert got == others[-1].owner
        others[-1].release()
    else:
        assert isinstance(got, Claim) and claims.holder(output) == got.owner
        got.release()
    assert not claims.litter(output)


def test_a_race_has_one_winner(tmp_path, dead):
    """Eight processes at the same moment, for what is free or was a dead process's."""
    rounds, racers = 24, 8
    for number in range(rounds):
        before = None
        for index in range((0, 1, 3)[number % 3]):
            owner = replace(dead, token=f"{index:016x}")
            leave(tmp_path / f"{number}.safetensors", owner, before)
            before = owner
    processes = [start(RACE, tmp_path, rounds, time.time() + 2) for _ in range(racers)]
    won = [[int(p.stdout.readline()) for _ in range(rounds)] for p in processes]
    for process in processes:
        process.communicate()
    assert [sum(each) for each in zip(*won, strict=True)] == [1] * rounds
    left = {path.name for path in tmp_path.iterdir() if ".new-" in path.name}
    assert not left


def test_one_at_a_time_while_processes_end_and_die(tmp_path):
    rounds = 40
    processes = [start(INSIDE, tmp_path, seed, rounds) for seed in range(8)]
    said = [process.communicate()[0].split("\n")[0] for process in processes]
    assert "two at once" not in said
    assert {process.returncode for process in processes} == {0, 9}, "some lived and some died"
    assert set(said) == {str(rounds), ""}, "the claim went from hand to hand"
    with claims.take(tmp_path / "a.safetensors") as claim:
        assert isinstance(claim, Claim)
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
