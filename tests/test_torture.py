"""The frame of the campaigns: what they found as JSON and as a page."""

from __future__ import annotations

import argparse
import json
import types
from collections import Counter

import pytest
from comfyui_modelopt.devtools.common import ROOT, UserError
from comfyui_modelopt.devtools.torture import main
from comfyui_modelopt.devtools.torture.outcome import NotHere, Row


def options(**given) -> argparse.Namespace:
    return argparse.Namespace(**{"only": None, "minutes": None, "share": 1.0, "seed": 0} | given)


@pytest.fixture
def campaigns(monkeypatch):
    """name -> rows that it gives, or an error that ends it after one of them."""
    found: dict[str, list] = {}

    def module(name: str, package: str) -> types.SimpleNamespace:
        def run(effort, tell):
            for one in found[name.lstrip(".")]:
                if isinstance(one, Exception):
                    raise one
                yield one

        return types.SimpleNamespace(NAME=name.lstrip("."), run=run)

    monkeypatch.setattr(main.importlib, "import_module", module)
    return found


def test_results_are_written_and_those_of_other_campaigns_stay(campaigns, tmp_path):
    out = tmp_path / "out" / "found.json"
    campaigns["kills"] = [Row("kills", "a kill", Counter({"the old": 2, "the new": 1}), ["seed 7"])]
    campaigns["damage"] = [Row("damage", "a flip", Counter({"an error": 5}))]
    assert main.main(options(only="kills", out=out, seed=3)) == 1
    assert main.main(options(only="damage", out=out)) == 0
    found = json.loads(out.read_text())
    assert list(found) == ["damage", "kills"]
    assert found["kills"]["command"] == "python dev.py torture --only kills --seed 3"
    assert found["kills"]["rows"] == [
        {
            "campaign": "kills",
            "kind": "a kill",
            "outcomes": {"the old": 2, "the new": 1},
            "findings": ["seed 7"],
            "tried": 4,
        }
    ]
    page = out.with_suffix(".md").read_text()
    assert "9 cases, 1 findings." in page
    assert "| kills | a kill | 4 | 2 the old; 1 the new | 1 |" in page
    assert "- kills, a kill: seed 7" in page


def test_a_campaign_that_fails_is_a_finding_and_loses_nothing(campaigns, tmp_path):
    out = tmp_path / "found.json"
    campaigns["kills"] = [Row("kills", "a kill", Counter({"the old": 2})), KeyError("x")]
    campaigns["soak"] = [Row("soak", "cycles", Counter({"right": 1}))]
    assert main.main(options(only="kills,soak", out=out)) == 1
    found = json.loads(out.read_text())
    assert [row["kind"] for row in found["kills"]["rows"]] == ["a kill", "the campaign"]
    assert found["kills"]["rows"][1]["findings"] == ["it ended with KeyError('x')"]
    assert found["soak"]["rows"][0]["tried"] == 1


def test_a_campaign_that_cannot_run_here_is_told_and_the_others_run(campaigns, tmp_path):
    out = tmp_path / "found.json"
    campaigns["kills"] = [NotHere("kills need fork")]
    campaigns["soak"] = [Row("soak", "cycles", Counter({"right": 1}))]
    assert main.main(options(only="kills,soak", out=out)) == 0
    found = json.loads(out.read_text())
    (row,) = found["kills"]["rows"]
    assert (row["kind"], row["tried"]) == ("not possible here: kills need fork", 0)
    assert found["soak"]["rows"][0]["tried"] == 1
    assert "| kills | not possible here: kills need fork | 0 |  | 0 |" in (
        out.with_suffix(".md").read_text()
    )
    with pytest.raises(NotHere, match="fork"):
        main.main(options(only="kills", out=None))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"seed": 1}, "--only kills --seed 1"),
        ({"minutes": 1.0}, "--only kills --minutes 1"),
        ({"minutes": 30.0}, "--only kills --minutes 30"),
        ({"share": 0.1, "seed": 7}, "--only kills --share 0.1 --seed 7"),
    ],
)
def test_the_command_repeats_what_was_run(campaigns, tmp_path, given, wanted):
    out = tmp_path / "found.json"
    campaigns["kills"] = [Row("kills", "a kill", Counter({"the old": 2}))]
    main.main(options(only="kills", out=out, **given))
    assert json.loads(out.read_text())["kills"]["command"] == f"python dev.py torture {wanted}"


def test_each_campaign_names_its_own_share_of_the_minutes(campaigns, tmp_path):
    out = tmp_path / "found.json"
    campaigns["kills"] = campaigns["soak"] = [Row("kills", "a kill", Counter({"the old": 2}))]
    main.main(options(only="kills,soak", out=out, minutes=10.0))
    found = json.loads(out.read_text())
    assert found["kills"]["command"].endswith(" --minutes 5")
    assert found["soak"]["command"].endswith(" --minutes 10")  # the first needed none of its own


def test_the_guide_names_all_campaigns():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"`--only {','.join(main.CAMPAIGNS)}`" in text


def test_unknown_campaigns_are_refused():
    with pytest.raises(UserError, match="got pranks"):
        main.main(options(only="kills,pranks", out=None))
