"""`benchmarks/quality.py`: the drawings, who reads them, the figures, the training, a whole quick run."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from comfyui_modelopt.benchmarks import quality
from comfyui_modelopt.benchmarks.learned import classifier, judging, page, pictures, training
from comfyui_modelopt.quantize.recipe import Recipe
from safetensors.torch import load_file

# --- the drawings ---


def _drawn(each: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(pictures.CLASSES).repeat(each)
    return labels, pictures.latents(labels, size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [8, 16])
def test_classes_are_told_apart_by_the_nearest_mean(size):
    labels, known = _drawn(200, size, 0)
    means = torch.stack([known[labels == i].mean(0) for i in range(pictures.CLASSES)])
    labels, asked = _drawn(50, size, 1)
    nearest = torch.cdist(asked.flatten(1), means.flatten(1)).argmin(1)
    right = (nearest == labels).double().mean()
    # places and sizes vary, which a mean knows nothing of; by chance it is 1 in 24
    assert right > 0.6
    colours = len(pictures.COLOURS)
    assert (nearest % colours == labels % colours).double().mean() > 0.95


def test_latents_have_unit_variance_and_give_the_picture_back():
    labels, latents = _drawn(100, 8, 3)
    drawn = pictures.draw(labels, 8, torch.Generator().manual_seed(3))
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.05
    assert latents.mean((0, 2, 3)).abs().max() < 0.05
    assert (pictures.rgb(latents) - drawn[:, :3].clamp(0, 1)).abs().max() < 1e-5


def test_contexts_differ_by_class_and_stay_the_same():
    labels = torch.arange(-1, pictures.CLASSES)
    contexts = pictures.context(labels)
    assert contexts.shape == (pictures.CLASSES + 1, pictures.TOKENS, pictures.WIDTH)
    apart = torch.cdist(contexts.flatten(1), contexts.flatten(1))
    apart.fill_diagonal_(math.inf)
    assert apart.min() > 100  # two of a shape differ in 38 tokens of 768 values of deviation 1
    assert torch.equal(pictures.context(labels[5:6])[0], contexts[5])


# --- the figures ---


@pytest.mark.parametrize(("right", "count"), [(0, 24), (24, 24), (230, 240)])
def test_interval_is_wilsons(right, count):
    z, p = 1.959963984540054, right / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count**2))
    assert judging.interval(right, count) == pytest.approx([middle - half, middle + half], abs=1e-9)


def test_paired_comparison():
    before = torch.tensor([True] * 90 + [False] * 10)
    after = before.clone()
    after[:10] = False
    after[90:92] = True
    found = judging.paired(before, after)
    assert (found["lost"], found["won"], found["change"]) == (10, 2, -0.08)
    assert found["p"] == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    low, high = found["change_interval"]
    assert low < -0.08 < high < 0.0
    same = judging.paired(before, before)
    assert (same["lost"], same["won"], same["p"]) == (0, 0, 1.0)
    low, high = same["change_interval"]
    assert low == -high < 0


def test_holm():
    assert judging.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_psnr_has_a_range_of_one():
    latents = _drawn(1, 8, 0)[1]
    assert judging.psnr_db(latents, latents) == math.inf
    matrix, _ = pictures._map()
    middle = pictures.latents(torch.zeros(1).long(), 8, torch.Generator()) * 0
    other = middle + (matrix @ torch.tensor([0.1, 0.1, 0.1, 0.0])).view(1, 4, 1, 1)
    assert judging.psnr_db(middle, other) == pytest.approx(20, abs=1e-3)


def test_gain_is_paired():
    rng = torch.Generator().manual_seed(0)
    before = (torch.rand(192, generator=rng) + 0.1) ** 4  # cases differ far more than recipes do
    after = before * (0.7 + 0.2 * torch.rand(192, generator=rng))
    found = judging.gain(before.tolist(), after.tolist())
    assert found["db"] == pytest.approx(10 * math.log10(before.sum() / after.sum()), abs=1e-5)
    low, high = found["interval"]
    assert 0.8 < low < found["db"] < high < 1.2
    # cases drawn together vary less, and sum to the same
    runs = judging.gain(before.tolist(), after.tolist(), 48)
    assert runs["db"] == pytest.approx(found["db"])
    assert judging.gain([1.0, 2.0], [0.5, 1.0])["interval"] == pytest.approx([3.0103] * 2, abs=1e-4)
    assert judging.gain([1.0, 2.0], [1.0, 2.0]) == {"db": 0.0, "interval": [0.0, 0.0]}
    assert judging.gain([1.0, 2.0], [0.0, 0.0])["db"] == math.inf


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ([(0.3, 0.1, 0.5), (0.0, -0.1, 0.1)], "better"),
        ([(0.3, -0.1, 0.7), (-0.4, -0.6, -0.2)], "worse"),
        ([(0.3, 0.1, 0.5), (-0.4, -0.6, -0.2)], "mixed"),
        ([(0.3, -0.1, 0.7), (0.05, 0.01, 0.09)], "tie"),
        ([(-0.05, -0.09, -0.01), (math.inf, math.inf, math.inf)], "better"),
    ],
)
def test_verdict(gains, said):
    assert page.verdict(*({"db": db, "interval": [low, high]} for db, low, high in gains)) == said


def test_page_sets_every_recipe_beside_its_default():
    def row(algorithm, error, readings, **facts):
        before = torch.ones(len(readings), dtype=torch.bool)
        right = readings.count("1")
        return (
            {
                "format": "int8",
                "layers": "linear + conv",
                "options": "",
                "algorithm": algorithm,
                "errors": [error * (1 + 0.01 * (i % 7)) for i in range(100)],
                "noise": [error, 2 * error, error, 3 * error],
                "calls_a_run": 2,
                "activations": "static",
                "bytes": 1000,
                "opens_in_stock": True,
                "right": right,
                "readings": readings,
                "default": False,
            }
            | judging.paired(before, judging.bits_of(readings))
            | facts
        )

    rows = [
        row("max", 1.0, "1" * 80 + "0" * 20, default=True),
        row("mse", 1.0, "1" * 80 + "0" * 20),
        row("percentile", 2.0, "1" * 80 + "0" * 20),
        row("smoothquant", 0.1, "1" * 99 + "0", bytes=1100, opens_in_stock=False),
        row("other", 0.5, "1" * 80 + "0" * 20, noise=[2.0, 4.0, 2.0, 6.0]),
    ]
    same, worse, best, mixed = page.defaults(rows)
    assert (same["other"], same["verdict"], same["costs"]) == ("mse", "tie", [])
    assert worse["verdict"] == "worse"
    assert worse["psnr"]["db"] == pytest.approx(-10 * math.log10(2))
    assert (best["verdict"], best["lost"], best["won"]) == ("better", 0, 19)
    assert best["psnr"]["db"] == pytest.approx(10) == best["sqnr"]["db"]
    assert best["costs"] == [
        "10 % larger",
        "not for stock ComfyUI",
        "smoothing at every call",
    ]
    assert (mixed["verdict"], mixed["costs"]) == ("mixed", [])
    own, branched = row("awq_lite", 1.0, "1" * 100), row("svdquant", 0.5, "1" * 100)
    assert page.costs(own, branched) == ["branches to compute"]
    assert page.costs(branched, own) == []
    text = "\n".join(page._default_lines(rows))
    assert "at no cost: none. Better at a cost: int8 smoothquant (linear + conv). " in text
    assert "Better in one and worse in the other: int8 other (linear + conv)." in text
    eight = page.eight_bits(rows)
    assert eight["beyond_noise"] == 4
    assert eight["largest_loss"] == pytest.approx(0.2)


# --- classifier and training ---


@pytest.fixture(scope="module")
def judge():
    return classifier.train(steps=120)


def test_classifier_reads_drawings_it_has_not_seen(judge):
    found = classifier.accuracy(judge, (8, 16), count=480)
    assert min(found.values()) > 0.9
    again = classifier.train(steps=2).state_dict()
    for name, tensor in classifier.train(steps=2).state_dict().items():
        assert torch.equal(tensor, again[name]), name


class CutOff(Exception):
    pass


def test_training_is_the_same_by_seed_and_after_being_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "STATE_EVERY", 1)
    settings = dataclasses.replace(training.QUICK, steps=2, batches=((8, 2),))
    whole = training.train(settings, tmp_path / "whole", lambda text: None)

    def stop(text: str) -> None:
        raise CutOff(text)

    with pytest.raises(CutOff, match="step 1 of 2"):
        training.train(settings, tmp_path / "cut", stop)
    said = []
    cut = training.train(settings, tmp_path / "cut", said.append)
    assert said[0] == "Training goes on from step 1"
    assert [path.name for path in cut.parent.iterdir()] == [cut.name] == [whole.name]
    one, other = load_file(whole), load_file(cut)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    assert settings.key != dataclasses.replace(settings, seed=1).key


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return training.train(training.QUICK, tmp_path_factory.mktemp("quality"), lambda text: None)


def test_training_learns(trained):
    import comfy.model_sampling

    unet = training.new_unet(training.QUICK.seed)
    sigmas = comfy.model_sampling.ModelSamplingDiscrete().sigmas
    with torch.no_grad():
        before = training.loss(unet, sigmas, training.QUICK, 1000).item()
        weights = {k.removeprefix(training.PREFIX): v for k, v in load_file(trained).items()}
        unet.load_state_dict(weights)
        after = training.loss(unet, sigmas, training.QUICK, 1000).item()
    assert 0.8 < before < 1.2  # it starts by predicting 0 for noise of variance 1
    assert after < before


# --- the whole ---


def test_quick_run(trained, judge, tmp_path):
    extent = quality.Extent(24, 2, 120, [Recipe("int8")], calibration_runs=1, held_out_runs=2)
    results = []
    quality.run(trained, judge, extent, results.append)
    (result,) = results
    own, (row,) = result["reference"], result["rows"]
    assert own["sqnr_db"] == own["psnr_db"] == math.inf
    assert (own["lost"], own["won"], own["p"]) == (0, 0, 1.0)
    assert row["default"]
    assert row["sqnr_db"] > 15
    assert 15 < row["psnr_db"] < math.inf  # not one that was left as it is
    assert row["right"] - own["right"] == row["won"] - row["lost"]
    assert len(row["readings"]) == len(row["errors"]) == row["samples"] == 24
    assert sum(row["errors"]) / 24 == pytest.approx(10 ** (-row["psnr_db"] / 10), rel=1e-3)
    assert len(row["noise"]) == result["held_out"]["records"] == 4
    result["training"] = dataclasses.asdict(training.QUICK)
    parsed = json.loads(json.dumps(page.without_infinity(result), allow_nan=False))
    assert parsed["reference"]["sqnr_db"] is None
    text = page.markdown(result)
    assert page.line(row) in text.splitlines()
    assert page.share(own) in text
    # a run that goes on measures what is not there yet, and nothing twice
    both = dataclasses.replace(extent, recipes=[Recipe("int8"), Recipe("fp8_e5m2")])
    later = quality.run(trained, judge, both, lambda so_far: None, parsed)
    assert later["rows"][0] == json.loads(json.dumps(row))
    assert [one["format"] for one in later["rows"]] == ["int8", "fp8_e5m2"]
    parsed["sampling"]["steps"] = 3
    with pytest.raises(ValueError, match="sampling is .* leave out --keep"):
        quality.known_rows(parsed, result)


def test_the_shipped_table_is_of_the_defaults_of_now():
    shipped = json.loads((quality.RESULTS / "quality_sd15.json").read_text(encoding="utf-8"))
    assert len(shipped["rows"]) > 30
    for row in shipped["rows"]:
        assert row["default"] == quality.is_default(row), row["format"]
    found = page.defaults(shipped["rows"])
    beaten = [one for one in found if one["verdict"] == "better" and not one["costs"]]
    assert beaten == [], "as the README says"
