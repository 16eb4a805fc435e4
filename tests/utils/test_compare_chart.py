"""Compare's chart, and that of Info, as matplotlib draws them: every point is where it belongs, the
numbers are at the worst layers, and all text can be read."""

from __future__ import annotations

import itertools
import math
import random
import re

import pytest
import torch
from comfyui_modelopt.devtools import synthetic
from comfyui_modelopt.formats.checkpoint import Layer
from comfyui_modelopt.quantize import compare, local, quality
from comfyui_modelopt.utils import chart
from comfyui_modelopt.utils.compare_chart import NAMED, compare_chart, figure_of
from comfyui_modelopt.utils.compare_report import POINTWISE
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

BELOW = 4  # pixels of a text's box for what hangs below its line, which digits do not
SMALLEST = 13  # points: 420 pixels wide, the picture shows half of them
UNQUANTIZED = ("input_blocks.0.0", "out.2", "time_embed", "label_emb")
FORMATS = [
    Layer("int8", "linear"),
    Layer("int8", "linear", smoothed=True),
    Layer("fp8", "linear", activations="per token"),
    Layer("int4", "linear", smoothed=True),
    Layer("w4a8", "linear", smoothed=True),
    Layer("nvfp4", "linear", smoothed=True, rank=32),
    Layer("mxfp8", "linear"),
    Layer("int8", "conv2d"),
    Layer("fp8", "conv2d"),
    Layer("int4", "conv2d"),
    Layer("w4a8", "conv2d"),
]


def result(name: str, kind: str, layer: object, db: float) -> compare.LayerResult:
    """db: infinite where it is exact, NaN or minus infinity where it is lost."""
    noise = math.nan if math.isnan(db) or db == -math.inf else 10 ** (-db / 10)
    return compare.LayerResult(name, layer, kind, 1000, quality.Energy(1.0, noise))


def names(size: str) -> list[tuple[str, str]]:
    """(name, kind) of an SDXL UNet's layers, as Quantize chooses them."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = synthetic.unet_config("sdxl", size)
    with torch.device("meta"):
        unet = UNetModel(**config, dtype=torch.float16, operations=comfy.ops.disable_weight_init)
    found = []
    for name, module in unet.named_modules():
        left = name.startswith(UNQUANTIZED) or "emb_layers" in name or "skip_conn" in name
        if local.kind(module) and not left:
            wide = tuple(module.weight.shape[2:]) == (1, 1)
            found.append((name, POINTWISE if wide else local.kind(module)))
    return found


def int8(places: list[tuple[str, str]], dbs: dict[int, float] | None = None) -> list:
    """Layers in int8 of about 30 dB, but for those of `dbs`."""
    noise = random.Random(0)
    return [
        result(
            name,
            kind,
            Layer("int8", "linear" if kind == "linear" else "conv2d"),
            (dbs or {}).get(place, 30 + noise.uniform(-2, 2)),
        )
        for place, (name, kind) in enumerate(places)
    ]


def many_formats() -> list:
    """A large UNet in 11 groups."""
    noise, made = random.Random(0), []
    turns = {"linear": itertools.cycle(FORMATS[:7]), "conv2d": itertools.cycle(FORMATS[7:])}
    for name, kind in names("full"):
        if kind != POINTWISE:
            made.append(result(name, kind, next(turns[kind]), 30 + noise.uniform(-2, 2)))
    return made


def place_of(places: list[tuple[str, str]], end: str) -> int:
    (found,) = (place for place, (name, _) in enumerate(places) if name.endswith(end))
    return found


def steps(count: int, lost: bool = False) -> list[compare.Step]:
    noises = [math.nan if lost else 10 ** (-(15 + i) / 10) for i in range(count)]
    return [
        compare.Step(999.0 - 50 * i, 14.6 * 0.75**i, 2, quality.Energy(1.0, noise))
        for i, noise in enumerate(noises)
    ]


def compared(layers: list, times: list[compare.Step] | None = None) -> compare.Compared:
    times = times or steps(20)
    return compare.Compared(times, times[0], layers, (4, 64))


def qkv(places):
    start = place_of(places, "output_blocks.1.1.transformer_blocks.4.attn1.to_q")
    return int8(places, {start: 5.2, start + 1: 5.0, start + 2: 5.1})


def lost(places):
    """Three layers lost, two of bad dB."""
    return int8(places, {3: math.nan, 200: -math.inf, 400: math.nan, 500: 7.0, 100: 6.0})


def flux() -> list[tuple[str, str]]:
    ends = ["img_in", "time_in.in_layer", "time_in.out_layer", "vector_in.in_layer", "txt_in"]
    ends += [f"double_blocks.{i}.img_attn.qkv" for i in range(60)]
    ends += [f"single_blocks.{i}.linear1" for i in range(60)] + ["final_layer.linear"]
    return [(name, "linear") for name in ends]


def long() -> list[tuple[str, str]]:
    return [("x" * 118 + f".{i}", "linear") for i in range(10)]


CASES = {
    "small": lambda: compared(int8(names("tiny"))),
    "large": lambda: compared(int8(names("full"))),
    "11 groups": lambda: compared(many_formats()),
    "qkv": lambda: compared(qkv(names("full"))),
    "the first five": lambda: compared(int8(names("full"), {i: 5 + 0.1 * i for i in range(5)})),
    "the last five": lambda: compared(int8(flux(), {i: 5 + 0.1 * i for i in range(121, 126)})),
    "lost": lambda: compared(lost(names("full")), steps(20, lost=True)),
    "all lost": lambda: compared(int8(flux(), dict.fromkeys(range(126), math.nan))),
    "exact": lambda: compared(int8(names("tiny"), dict.fromkeys(range(999), math.inf))),
    "exact and lost": lambda: compared(int8(flux(), {1: math.inf, 2: math.nan})),
    "one": lambda: compared(int8(flux()[:1]), steps(1)),
    "two": lambda: compared(int8(flux()[:2], {0: 10.0, 1: math.nan}), steps(2)),
    "none": lambda: compared([]),
    "flux": lambda: compared(int8(flux())),
    "long names": lambda: compared(int8(long())),
}


@pytest.fixture(scope="module")
def drawn():
    """case -> (Compared, its figure, drawn). Each is made once."""
    made = {}

    def of(case: str):
        if case not in made:
            found = CASES[case]()
            figure = figure_of(found)
            FigureCanvasAgg(figure).draw()
            made[case] = found, figure
        return made[case]

    return of


def points(axes) -> dict[float, tuple[float, str]]:
    """Place -> (height, label of its group)."""
    found: dict[float, tuple[float, str]] = {}
    for group in axes.collections:
        for place, height in group.get_offsets():
            assert place not in found
            found[place] = float(height), group.get_label()
    return found


def numbers(axes) -> list[tuple[float, float]]:
    """Where 1, 2, … point."""
    found = {int(one.get_text()): one.xy for one in axes.texts}
    assert sorted(found) == list(range(1, len(found) + 1))
    return [found[number] for number in sorted(found)]


def visible_ticks(axis) -> list:
    low, high = sorted(axis.get_view_interval())
    return [
        tick
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        if low <= tick.get_loc() <= high and tick.label1.get_text() and tick.label1.get_visible()
    ]


def texts(figure) -> list[Text]:
    """Every text that is drawn."""
    found = []
    for axes in figure.axes:
        found += [axes.title, *axes.texts]
        if axes.axison:
            found += [axes.xaxis.label, axes.yaxis.label]
            for axis in (axes.xaxis, axes.yaxis):
                found += [tick.label1 for tick in visible_ticks(axis)]
        if axes.get_legend() is not None:
            found += axes.get_legend().get_texts()
    return [one for one in found if one.get_text().strip() and one.get_visible()]


def check_texts(figure) -> None:
    """All within the picture, none over another, none too small to be read."""
    renderer = figure.canvas.get_renderer()
    # not `one.get_window_extent`: an annotation's has its line, too
    boxes = [(one.get_text(), Text.get_window_extent(one, renderer)) for one in texts(figure)]
    assert len(boxes) > 5
    for text, box in boxes:
        assert box.width > 0 and box.height > 0, text
        assert box.x0 >= 0 and box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
    for (text, box), (other, over) in itertools.combinations(boxes, 2):
        wide = min(box.x1, over.x1) - max(box.x0, over.x0)
        high = min(box.y1, over.y1) - max(box.y0, over.y0)
        assert wide <= 0 or high <= BELOW, f"{text!r} overlaps {other!r}"
    assert min(one.get_fontsize() for one in texts(figure)) >= SMALLEST


@pytest.mark.parametrize("case", CASES)
def test_text_can_be_read(drawn, case):
    found, figure = drawn(case)
    check_texts(figure)
    assert figure.bbox.width == 800 and 1000 <= figure.bbox.height <= 1300


@pytest.mark.parametrize("case", [name for name in CASES if name != "none"])
def test_points_are_at_their_place_and_height(drawn, case):
    found, figure = drawn(case)
    times, layers, _ = figure.axes
    made = points(layers)
    assert sorted(made) == list(range(len(found.layers)))
    low, high = layers.get_ylim()
    for place, one in enumerate(found.layers):
        height, label = made[place]
        if math.isfinite(one.energy.db):
            assert height == pytest.approx(one.energy.db)
        assert low < height < high
        kind = {"linear": "Linear", "conv2d": "conv", POINTWISE: "1x1 conv"}[one.kind]
        assert label.startswith(f"{kind} {one.layer.format}")
    (line,) = (one for one in times.lines if one.get_marker() == "o")
    assert list(line.get_xdata()) == [one.sigma for one in found.steps]
    for one, height in zip(found.steps, line.get_ydata(), strict=True):
        assert not math.isfinite(one.energy.db) or height == pytest.approx(one.energy.db)
    assert times.xaxis_inverted()


# case -> places of the worst layers, the worst first
WORST = {
    "qkv": lambda p: [place_of(p, f"1.1.transformer_blocks.4.attn1.to_{x}") for x in "kvq"],
    "the first five": lambda p: [0, 1, 2, 3, 4],
    "lost": lambda p: [3, 200, 400, 100, 500],
}


@pytest.mark.parametrize("case", WORST)
def test_numbers_are_at_the_worst_layers_in_order(drawn, case):
    found, figure = drawn(case)
    worst = WORST[case](names("full"))
    assert len(numbers(figure.axes[1])) == NAMED
    assert [place for place, _ in numbers(figure.axes[1])][: len(worst)] == worst


@pytest.mark.parametrize("case", CASES)
def test_each_number_points_at_a_point_and_stands_before_its_name(drawn, case):
    found, figure = drawn(case)
    _, layers, words = figure.axes
    at = numbers(layers) if found.layers else []
    lines = words.texts[0].get_text().splitlines()[1:] if words.texts else []
    count = sum(one.energy.db < math.inf for one in found.layers)
    assert len(at) == len(lines) == min(NAMED, count)
    made = points(layers)
    for number, ((place, height), line) in enumerate(zip(at, lines, strict=True), start=1):
        assert height == made[place][0]
        one = found.layers[int(place)]
        begin, middle, end = re.fullmatch(r"(\d) +(\S+(?: dB)?)  (.+)", line).groups()
        assert begin == str(number)
        assert middle == ("lost" if one.energy.db == -math.inf else f"{one.energy.db:.1f} dB")
        assert one.name.endswith(end.lstrip("…")) and (end == one.name or end[0] == "…")


def test_worse_ones_have_lower_numbers(drawn):
    """In a model of one kind, where nothing stands out."""
    found, figure = drawn("flux")
    lowest = sorted(range(len(found.layers)), key=lambda i: found.layers[i].energy.db)[:NAMED]
    assert [place for place, _ in numbers(figure.axes[1])] == lowest


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("lost", ["lost"]),
        ("all lost", ["lost"]),
        ("exact", ["exact"]),
        ("exact and lost", ["lost", "exact"]),
        ("two", ["lost"]),
    ],
)
def test_what_has_no_number_has_no_place_among_the_numbers(drawn, case, words):
    found, figure = drawn(case)
    axes = figure.axes[1]
    named = {tick.label1.get_text(): tick.get_loc() for tick in visible_ticks(axes.yaxis)}
    assert [word for word in ("lost", "exact") if word in named] == words
    at = {word: named.pop(word) for word in words}
    assert all(float(text.replace("\N{MINUS SIGN}", "-")) == x for text, x in named.items())
    finite = [one.energy.db for one in found.layers if math.isfinite(one.energy.db)]
    assert bool(named) == bool(finite)
    made = points(axes)
    for place, one in enumerate(found.layers):
        if not math.isfinite(one.energy.db):
            assert made[place][0] == at["exact" if one.energy.db > 0 else "lost"]
    for place in [*named.values(), *finite]:
        assert at.get("lost", -math.inf) < place < at.get("exact", math.inf)
    if case == "lost":  # the output as well
        ticks = [tick.label1.get_text() for tick in visible_ticks(figure.axes[0].yaxis)]
        assert ticks == ["lost"]


def group(number: int) -> compare.LayerResult:
    """One of groups that are formats and kinds in turn."""
    kind = ("linear", "conv2d", POINTWISE)[number % 3]
    layer = Layer("int8", "linear" if kind == "linear" else "conv2d", rank=1 + number // 3)
    return result(f"blocks.{number}", kind, layer, 30.0 + number % 5)


@pytest.mark.parametrize("kinds", [1, 3])
@pytest.mark.parametrize("count", [2, 7, 8, 14, 21, 63])
def test_groups_are_told_apart(count, kinds):
    if kinds == 1 and count > 21:
        pytest.skip("more formats than 7 colours and 3 shapes tell apart")
    step = 1 if kinds == 3 else 3  # of Linear layers alone
    made = figure_of(compared([group(step * i) for i in range(count)])).axes[1].collections
    assert len(made) == count
    looks = set()
    for one in made:
        (path,) = one.get_paths()
        looks.add((tuple(one.get_facecolor()[0]), path.vertices.tobytes()))
    assert len(looks) == count
    if count <= 7:  # by colour alone
        assert len({colour for colour, _ in looks}) == count


@pytest.mark.parametrize("count", [8, 11, 14])
def test_the_legend_of_many_groups_fits(count):
    figure = figure_of(compared([group(i) for i in range(count)]))
    FigureCanvasAgg(figure).draw()
    legend = figure.axes[1].get_legend()
    labels = [one.get_text() for one in legend.get_texts()]
    assert len(set(labels)) == count
    check_texts(figure)


def test_the_picture_is_the_figure():
    found = compared(int8(flux()))
    image = compare_chart(found)
    assert image.dtype == torch.float32 and image.shape == (1, 1000, 800, 3)
    assert 0 <= image.min() < image.max() <= 1
    ground = torch.tensor([0xFA, 0xFA, 0xFA]) / 255
    assert torch.allclose(image[0, 0, 0], ground)


# ---- Info's


def blocks(middle: int) -> dict[str, tuple[float, float]]:
    """An UNet's blocks, as many as `middle` in each half."""
    made = {"time_embed": (16.0, 3.3), "label_emb": (16.0, 11.1)}
    made |= {f"input_blocks.{i}": (8.0 + i, 10.0 * i) for i in range(middle)}
    made["middle_block"] = (8.1, 400.0)
    made |= {f"output_blocks.{i}": (4.25, 100.0 + i) for i in range(middle)}
    return made | {"out": (16.0, 0.02)}


@pytest.mark.parametrize("middle", [2, 12])
def test_blocks_have_one_label_each(monkeypatch, middle):
    """27 of them and fewer; matplotlib leaves none out."""
    figures = []
    real = chart.as_image
    monkeypatch.setattr(chart, "as_image", lambda figure: figures.append(figure) or real(figure))
    given = blocks(middle)
    if middle == 12:
        del given["label_emb"]
        assert len(given) == 27
    image = chart.blocks_chart(given, "Quantized UNet by block")
    assert image.shape == (1, 800, 800, 3)
    (figure,) = figures
    sizes, bits = figure.axes
    wanted = [name.replace("_blocks.", " ").replace("_block", "") for name in given]
    ticks = visible_ticks(bits.xaxis)
    assert [tick.label1.get_text() for tick in ticks] == wanted
    for axes, column in ((bits, 0), (sizes, 1)):
        bars = sorted(axes.patches, key=lambda bar: bar.get_x())
        assert [bar.get_height() for bar in bars] == [one[column] for one in given.values()]
        centres = [bar.get_x() + bar.get_width() / 2 for bar in bars]
        assert centres == pytest.approx([tick.get_loc() for tick in ticks])
    check_texts(figure)
