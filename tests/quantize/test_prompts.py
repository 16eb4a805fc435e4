"""The built-in prompts, and finding the user's in a workflow."""

import pytest
from comfy.sd1_clip import escape_important, token_weights
from comfyui_modelopt.quantize import prompts


def test_the_built_in_list_survives_a_text_box():
    assert prompts.split("\n".join(prompts.BUILT_IN)) == list(prompts.BUILT_IN)
    assert len(set(prompts.BUILT_IN)) == len(prompts.BUILT_IN) >= 16


def test_split_ignores_blank_lines():
    assert prompts.split(" a cat \n\n\t\r\na dog\n") == ["a cat", "a dog"]


def test_brackets_that_comfyui_reads():
    """As deep as they may be, however often; escaped ones are text."""
    deep = "(" * 100 + "fox" + ")" * 100
    for text in (f"{deep}, {deep}", "\\(" * 3000, ")" * 3000 + deep):
        prompts.check(text, "prompts.txt")
        assert "".join(word for word, _ in token_weights(escape_important(text), 1.0))
    for text in ("(" * 3000, f"({deep})", f"{')' * 3000}({deep}"):
        with pytest.raises(ValueError, match="at most 100 deep, line 3 of prompts.txt has them"):
            prompts.check(f"a cat\n\n{text}", "prompts.txt")


WORKFLOW = {
    "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["9", 1]}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["9", 1]}},
    "3": {
        "class_type": "ControlNetApplyAdvanced",
        "inputs": {"positive": ["1", 0], "negative": ["2", 0], "strength": 1.0},
    },
    "4": {"class_type": "ModelOptRecordCalibration", "inputs": {"positive": ["3", 0], "seed": 1}},
    "5": {"class_type": "ModelOptRecordCalibration", "inputs": {"positive": ["6", 0]}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["7", 0]}},
    "8": {"class_type": "Loop", "inputs": {"positive": ["8", 0]}},
}


def test_find_follows_conditioning_to_the_written_text():
    assert prompts.find(WORKFLOW, "4", "positive") == "a cat"
    assert prompts.find(WORKFLOW, "3", "negative") == "blurry"


def test_find_gives_none_where_no_text_is_written():
    for node in ("5", "8", "99", None):
        assert prompts.find(WORKFLOW, node, "positive") is None
    assert prompts.find(None, "4", "positive") is None
