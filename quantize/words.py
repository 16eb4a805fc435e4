"""What users read about each setting, on the nodes and in the help of `convert.py`."""

from __future__ import annotations

ALGORITHMS = {
    "max": "max: scales from the largest values seen.",
    "mse": "mse: weight scales of least squared error.",
    "percentile": "percentile: max, but convolutions clip their activations to what the steps share.",
    "smoothquant": "smoothquant: moves outliers of the activations into the weights first; not for stock ComfyUI.",
    "awq_lite": "awq_lite: searches a scale for every input channel, so that those that matter "
    "are rounded less.",
    "awq_full": "awq_full: awq_lite, and a search for where to clip each block. Slow.",
    "svdquant": "svdquant: awq_lite, and a low-rank branch in 16 bits takes what is hard to round.",
}
RECIPE = {
    "alpha": "How much of the activations' outliers moves into the weights: 0 none, 1 all.",
    "convolutions": "How the activations of convolutions, which smoothing does not reach, are "
    "calibrated: to the largest value, or clipped to what the steps share. percentile can "
    "be better or much worse: compare the report's SQNR.",
    "percentile": "The share of the sampling steps, from the first one on, whose smallest range "
    "convolutions are clipped to: lower clips less.",
    "rank": "Rank of the 16-bit branch: higher is nearer to the original, larger, slower. 0: the "
    "largest, at least 1, with which the quantized layers stay within 4.6 bits a weight in nvfp4, 4.2 in "
    "int4; that is a small one, in int4 it measured no gain. 32 is common.",
    "weights": "e4m3: more digits, FP8 arithmetic. e5m2: more range, activations stay in 16 bits.",
    "activations": "Linear layers: one calibrated scale, or one for each token while the model runs "
    "(nearer to the original, a little slower, does not open in stock ComfyUI).",
    "layers": "linear + conv: the smallest file, opens with this pack only. "
    "linear only: fp8, int8, mxfp8 and nvfp4 open in stock ComfyUI too (int8 not "
    "with smoothquant, nvfp4 not with svdquant).",
}
SAMPLING = {
    "negative": "The negative prompt of all of them.",
    "width": "In pixels: 1024 for SDXL, 512 for SD1.5.",
    "height": "In pixels: 1024 for SDXL, 512 for SD1.5.",
    "steps": "Sampling steps. Use as many as you will use later.",
    "cfg": "How closely to follow the prompt.",
    "sampler_name": "The sampling algorithm.",
    "scheduler": "How the noise is taken away over the steps.",
    "seed": "The seed of the first prompt; each next one has one more.",
    "max_records": "UNet calls to keep, evenly over prompts and steps. With fewer than prompts, "
    "only so many prompts are sampled.",
}
