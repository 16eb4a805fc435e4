"""The header in words: everything on the STRING output, shortened on the node."""

import pytest
from comfyui_modelopt.formats.checkpoint import Layer
from comfyui_modelopt.utils.provenance import LONGEST, provenance
from comfyui_modelopt.utils.report import calibration_line, model_report

HEADER = {
    "recipe": {
        "format": "int8",
        "algorithm": "smoothquant",
        "alpha": 0.5,
        "layers": "linear + conv",
        "skip": ["input_blocks.0.0", "out.2", "time_embed.*", "label_emb.*", "*.emb_layers.*"],
    },
    "source": {"name": "mine.safetensors", "sha256": "ab" * 32},
    "calibration": {
        "source": "mine.safetensors",
        "runs": 9,
        "records": 64,
        "calls": 180,
        "prompts": [f"prompt {i}, " + "in the snow " * 12 for i in range(9)],
        "steps": [20],
        "cfg": [7.0, 5.5],
        "samplers": ["euler/normal"],
        "resolutions": ["1024x1024", "832x1216"],
    },
    "quality": {"sqnr_db": 31.25, "worst_sqnr_db": 28.5, "records": 8},
    "versions": {"comfyui": "0.30.0", "comfyui-modelopt": "0.1.0", "modelopt": "0.47.0"},
    "model": "SDXL",
    "unet_config": {"model_channels": 320, "channel_mult": [1, 2, 4]},
    "baked_patches": 12,
    "imported": {"kind": "a folder", "notes": [f"note {i}" for i in range(6)], "layers_kept": 2},
    "assignment": {f"layer{i}": "fp8" for i in range(7)},
    "opens_in_stock": False,
    "format_version": 1,
}
LAYERS = {
    "a": Layer("int8", "linear", smoothed=True),
    "b": Layer("int8", "linear", smoothed=True),
    "c": Layer("int8", "conv2d"),
    "d": Layer("fp8", "linear"),
    "e": Layer("fp8", "linear", activations="per token"),
    "f": Layer("int4", "linear", smoothed=True, rank=8, activations="16 bits"),
}


def leaves(value):
    if isinstance(value, dict):
        for entry in value.values():
            yield from leaves(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from leaves(entry)
    elif not isinstance(value, bool):
        yield value


def test_the_whole_text_has_all_of_the_header():
    text = "\n".join(provenance(HEADER, LAYERS, full=True))
    for value in leaves({k: v for k, v in HEADER.items() if k != "quality"}):
        assert str(value) in text, value
    assert "SQNR 31.2 dB on 8 recorded UNet calls, worst call 28.5 dB" in text
    for name in ("alpha", "calls", "samplers", "model_channels", "layers_kept", "assignment"):
        assert f"  {name}: " in text or f"  {name} (" in text or f"{name}:" in text, name
    for line in (
        "2 Linear layers in int8 with smoothing",
        "1 convolution layers in int8",
        "1 Linear layers in fp8",
        "1 Linear layers in fp8, activations per token",
        "1 Linear layers in int4 with smoothing and a branch of rank 8, activations 16 bits",
    ):
        assert f"  {line}\n" in text
    assert "\nFormat version of the file: 1\n" in text
    assert "more" not in text.replace("numbers more", "")


def test_the_node_shows_the_beginnings_of_lists_and_how_much_more_there_is():
    lines = provenance(HEADER, LAYERS)
    assert max(map(len, lines)) <= LONGEST + 6
    assert len(lines) < 60
    text = "\n".join(lines)
    assert "  skip: input_blocks.0.0, out.2, time_embed.*, and 2 more" in text
    assert "  prompts (9):\n    prompt 0, in the snow" in text and "…\n    and 6 more" in text
    assert "  cfg: 7.0, 5.5" in text
    assert "SHA-256 " + "ab" * 32 in text
    assert "  note 2\n  and 3 more\n" in text
    assert "model_channels" not in text and "Format version" not in text
    assert "assignment" in text and "and 4 more" in text


@pytest.mark.parametrize("full", [False, True])
def test_a_file_that_says_little(full):
    text = "\n".join(provenance({"recipe": {}, "versions": None}, LAYERS, full))
    assert "Made from: a file that ComfyUI did not name" in text
    assert "Calibration: none" in text and "Recipe: unknown" in text
    assert "SQNR: not measured" in text
    assert "Format version" not in text


STRANGE = "\x1b[2J" * 20_000
HOSTILE = {
    "recipe": {
        "format": "mixed",
        "choices": [{"format": STRANGE, "algorithm": STRANGE, "alpha": STRANGE}] * 1000,
        "assignment": {"0": [STRANGE]},
    },
    "source": {"name": STRANGE, "sha256": STRANGE},
    "calibration": {"runs": 1, "records": 2, "resolutions": [f"{i}x1" for i in range(20_000)]},
    "versions": {f"{STRANGE}{i}": STRANGE for i in range(300)},
    "imported": {"kind": STRANGE, "notes": [STRANGE] * 50},
    "model": STRANGE,
    **{f"{i}{STRANGE}": {STRANGE: STRANGE} for i in range(300)},
}


def test_a_strangers_words_stay_short_and_are_no_commands_to_a_terminal():
    report = model_report(HOSTILE, LAYERS, (), 1)
    short = "\n".join(provenance(HOSTILE, LAYERS))
    assert len(report) < 80_000 and len(short) < 80_000
    whole = "\n".join(provenance(HOSTILE, LAYERS, full=True))
    for text in (report, short, whole):
        assert text.replace("\n", "").isprintable()
    assert "and 280 more entries of the header" in short and "  and 280 more\n" in short
    assert len(calibration_line(HOSTILE["calibration"])) < 300
    plain = {**HOSTILE, "recipe": {name: STRANGE for name in ("format", "algorithm", "layers")}}
    assert len(model_report(plain, LAYERS, (), 1)) < 80_000


def test_the_whole_text_has_every_entry():
    header = {"recipe": {}, **{f"name{i}": i for i in range(300)}}
    text = "\n".join(provenance(header, LAYERS, full=True))
    assert all(f"  name{i}: {i}\n" in text for i in range(300)) and " more" not in text
