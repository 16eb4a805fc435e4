"""Recording on ComfyUI's own sampler: the latent is KSampler's, the records are the real calls."""

import gc
import hashlib
import pickle

import comfy.controlnet
import comfy.model_management
import comfy.patcher_extension
import comfy.sd
import comfy.utils
import pytest
import torch
from comfyui_modelopt.devtools import synthetic
from comfyui_modelopt.quantize.bridge import sampling
from comfyui_modelopt.quantize.calibration import Calibration, load, save
from comfyui_modelopt.quantize.records import Recorder

import nodes

SPY = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return synthetic.sd15(tmp_path_factory.mktemp("models") / "tiny.safetensors")


@pytest.fixture(scope="module")
def loaded(checkpoint, tmp_path_factory):
    """MODEL with a LoRA on it, and CLIP."""
    model, clip, _, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=False)
    path = synthetic.lora(tmp_path_factory.mktemp("models") / "lora.safetensors", checkpoint)
    lora = comfy.utils.load_torch_file(str(path))
    model, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.8, 0)
    assert model.patches
    return model, clip


@pytest.fixture(scope="module")
def conds(loaded):
    def encode(text):
        return nodes.CLIPTextEncode().encode(loaded[1], text)[0]

    return encode("a red fox in the snow"), encode("blurry")


def empty(width=64, height=64, batch=1):
    return nodes.EmptyLatentImage().generate(width, height, batch)[0]


def settings(conds, **changes):
    named = {"seed": 7, "steps": 4, "cfg": 6.5, "sampler_name": "euler", "scheduler": "normal"}
    named |= {"positive": conds[0], "negative": conds[1], "latent_image": empty(), "denoise": 1.0}
    return named | changes


def ksampler(model, named):
    return nodes.KSampler().sample(model, **named)[0]


def spied(model, at=None, action=None):
    """A clone that keeps each UNet call's output, and runs `action` before call number `at`."""
    outputs = []

    def wrapper(executor, *args, **kwargs):
        if len(outputs) == at:
            action()
        outputs.append(None)
        outputs[-1] = executor(*args, **kwargs).clone()
        return outputs[-1]

    clone = model.clone()
    clone.add_wrapper_with_key(SPY, "spy", wrapper)
    return clone, outputs


def fingerprint(model):
    """Hash of every tensor, patch and option of a MODEL."""
    comfy.model_management.unload_all_models()
    state = hashlib.sha256()
    for name, tensor in sorted(model.model.state_dict().items()):
        state.update(name.encode() + str(tensor.dtype).encode() + tensor.cpu().numpy().tobytes())
    for name in sorted(model.patches):
        state.update(name.encode())
        for patch in model.patches[name]:
            state.update(pickle.dumps([t for t in (patch[0], *patch[1].weights[:2], patch[2])]))
    state.update(repr(sorted(model.wrappers.items())).encode())
    state.update(repr(sorted(model.model_options.items())).encode())
    state.update(f"{model.patches_uuid}{model.object_patches}{model.callbacks}".encode())
    return state.hexdigest()


def unet_of(model):
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    return model.model.diffusion_model


def replay(model, record):
    args, kwargs = record.arguments(model.load_device)
    with torch.inference_mode():
        return unet_of(model)(*args, **kwargs)


class Residuals(comfy.controlnet.ControlBase):
    """Stands for a ControlNet: residuals for the tiny UNet, only some of them."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        def tensor(seed):
            shape = (x_noisy.shape[0], 320, *x_noisy.shape[2:])
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

        at = int(float(t[0]) * 1000)
        shared = tensor(at)
        return {"input": [None, shared], "middle": [tensor(at + 1)], "output": [shared, None]}

    def pre_run(self, model, percent_to_timestep_function):
        pass

    def copy(self):
        return self


def controlled(cond):
    return [[tensor, {**facts, "control": Residuals()}] for tensor, facts in cond]


# --- the latent ---


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampler_name": "heun", "scheduler": "karras"},
        {"sampler_name": "dpmpp_2m_sde"},
        {"sampler_name": "ddim", "cfg": 1.0},
        {"sampler_name": "uni_pc", "latent_image": empty(72, 40, batch=2)},
        {
            "denoise": 0.5,
            "latent_image": {"samples": torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8)},
        },
        {"denoise": 0.0},
    ],
    ids=str,
)
def test_the_latent_is_ksamplers_bit_for_bit(loaded, conds, changes):
    named = settings(conds, **changes)
    expected = ksampler(loaded[0], named)
    latent, made = sampling.record(loaded[0], **named, max_records=3)
    assert torch.equal(latent["samples"], expected["samples"])
    assert latent.keys() == expected.keys()
    assert len(made) == (0 if named["denoise"] == 0 else 3)


def test_mask_and_batch_index_pass_through(loaded, conds):
    latent = empty(batch=2) | {"batch_index": [3, 1], "noise_mask": torch.ones(1, 1, 64, 64) / 2}
    named = settings(conds, latent_image=latent)
    expected = ksampler(loaded[0], named)
    got, _ = sampling.record(loaded[0], **named, max_records=3)
    assert torch.equal(got["samples"], expected["samples"])
    assert got["batch_index"] == [3, 1] and got["noise_mask"] is latent["noise_mask"]


# --- the records ---


@pytest.mark.parametrize("sampler_name", ["euler", "heun"])
def test_replaying_a_record_gives_the_output_that_was_seen(loaded, conds, sampler_name):
    model, outputs = spied(loaded[0])
    named = settings(conds, sampler_name=sampler_name)
    _, made = sampling.record(model, **named, max_records=100)
    calls = {"euler": 4, "heun": 7}[sampler_name]
    assert len(made) == len(outputs) == made.runs[0].calls == calls
    for record, output in zip(made, outputs, strict=True):
        assert record.x.shape == (2, 4, 8, 8) and record.context.shape[::2] == (2, 768)
        assert torch.equal(replay(loaded[0], record), output)
    timesteps = [float(record.timesteps[0]) for record in made]
    assert timesteps == sorted(timesteps, reverse=True) and timesteps[0] == 999


def test_records_survive_the_file(loaded, conds, tmp_path):
    model, outputs = spied(loaded[0])
    _, made = sampling.record(model, **settings(conds), max_records=2)
    back = load(save(made, tmp_path / "a.safetensors"))
    for record, output in zip(back, (outputs[0], outputs[-1]), strict=True):
        assert torch.equal(replay(loaded[0], record), output)
    back.check_matches(sampling.signature(loaded[0]))


def test_control_residuals_are_recorded(loaded, conds):
    """The ControlNet is on the positive side only: cond and uncond are then two calls a step."""
    model, outputs = spied(loaded[0])
    named = settings((controlled(conds[0]), conds[1]))
    named["negative"] = [[t, {**facts, "control_apply_to_uncond": False}] for t, facts in conds[1]]
    plain = ksampler(loaded[0], settings(conds))["samples"]
    latent, made = sampling.record(model, **named, max_records=100)
    assert not torch.equal(latent["samples"], plain)
    assert len(made) == len(outputs) == 8
    with_control = [record for record in made if record.control is not None]
    assert len(with_control) == 4
    for record in with_control:
        assert [len(record.control[k]) for k in ("input", "middle", "output")] == [2, 1, 2]
        assert record.control["input"][1] is record.control["output"][0]
    for record, output in zip(made, outputs, strict=True):
        assert torch.equal(replay(loaded[0], record), output)
        assert torch.equal(replay(loaded[0], record), output)  # the first one popped a fresh list


def test_thinning_keeps_calls_with_and_without_control(loaded, conds):
    named = settings((controlled(conds[0]), conds[1]), steps=8)
    _, made = sampling.record(loaded[0], **named, max_records=4)
    assert made.runs[0].calls == 16 and len(made) == 4
    assert sum(record.control is not None for record in made) == 2


def test_what_another_wrapper_hands_to_the_unet_is_recorded(loaded, conds):
    seen = []

    def change(executor, x, timesteps, context=None, *rest, **kwargs):
        seen.append(context * 2)
        return executor(x, timesteps, seen[-1], *rest, **kwargs)

    model = loaded[0].clone()
    model.add_wrapper_with_key(SPY, "change", change)
    _, made = sampling.record(model, **settings(conds), max_records=100)
    assert len(seen) == 4
    for record, context in zip(made, seen, strict=True):
        assert torch.equal(record.context, context)


def test_facts_of_the_run(loaded, conds, checkpoint):
    named = settings(conds, latent_image=empty(72, 40), denoise=0.75)
    _, made = sampling.record(loaded[0], **named, max_records=2, prompt="a fox")
    assert made.source == checkpoint.name
    assert made.runs[0].facts() == {
        "calls": 4, "prompt": "a fox", "steps": 4, "cfg": 6.5, "sampler": "euler",
        "scheduler": "normal", "seed": 7, "denoise": 0.75, "width": 72, "height": 40, "number": 0,
    }  # fmt: skip


def test_adding_to_a_calibration_shares_the_budget(loaded, conds):
    _, first = sampling.record(loaded[0], **settings(conds), max_records=4)
    _, both = sampling.record(
        loaded[0], **settings(conds, seed=8), max_records=4, calibration=first
    )
    assert len(first) == 4 and [len(run.records) for run in both.runs] == [2, 2]
    assert [run.seed for run in both.runs] == [7, 8]
    (a, _), (b, _) = (run.records for run in both.runs)
    assert a.context is b.context and not torch.equal(a.x, b.x)
    _, same = sampling.record(
        loaded[0], **settings(conds, denoise=0.0), max_records=4, calibration=both
    )
    assert same is both


# --- prompts ---


def test_prompts_are_sampled_as_a_graph_would(loaded):
    model, clip = loaded
    prompts = ["a cat", "a dog", "a very long prompt " * 30]
    named = {"steps": 3, "cfg": 5.0, "sampler_name": "heun", "scheduler": "karras"}
    made = sampling.record_prompts(
        model, clip, prompts, "blurry", 64, 72, seed=2**64 - 2, max_records=100, **named
    )
    assert [run.prompt for run in made.runs] == prompts
    assert [run.seed for run in made.runs] == [2**64 - 2, 2**64 - 1, 0]
    for run in made.runs:
        positive, negative = (
            nodes.CLIPTextEncode().encode(clip, text)[0] for text in (run.prompt, "blurry")
        )
        cond = {"positive": positive, "negative": negative, "latent_image": empty(64, 72)}
        _, one = sampling.record(
            model, **named, **cond, seed=run.seed, denoise=1.0, max_records=100, prompt=run.prompt
        )
        assert one.runs[0].facts() == run.facts() | {"number": 0}
        assert len(one) == len(run.records) == 5
        for a, b in zip(one, run.records, strict=True):
            assert torch.equal(a.x, b.x) and torch.equal(a.context, b.context)
            assert torch.equal(a.timesteps, b.timesteps)


def sample_prompts(loaded, prompts, max_records, steps=2):
    rest = {"seed": 1, "max_records": max_records, "cfg": 1.0}
    return sampling.record_prompts(
        *loaded, prompts, "", 64, 64, steps, sampler_name="euler", scheduler="normal", **rest
    )


def test_prompts_share_the_budget_and_one_progress_bar(loaded, monkeypatch):
    seen = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total))
    )
    made = sample_prompts(loaded, ["a", "b", "c"], 4, steps=2)
    assert len(made) == 4 and [len(run.records) for run in made.runs] == [1, 2, 1]
    assert {total for _, total in seen} == {6}
    values = [value for value, _ in seen]
    assert values == sorted(values) and values[0] == 1 and values[-1] == 6


def test_fewer_records_than_prompts_samples_evenly_spaced_prompts(loaded):
    model, outputs = spied(loaded[0])
    made = sample_prompts((model, loaded[1]), list("abcde"), 3)
    assert [run.prompt for run in made.runs] == ["a", "c", "e"]
    assert len(made) == 3 and len(outputs) == 6


def test_prompts_need_a_prompt_a_clip_and_a_budget(loaded):
    for (model, clip), prompts, budget, message in (
        (loaded, [], 4, "at least 1 prompt, got 0 in prompts"),
        ((loaded[0], None), ["a"], 4, "text encoder, got no CLIP in clip"),
        (loaded, ["a"], 0, "at least 1 record, got 0 in max_records"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_prompts((model, clip), prompts, budget)


# --- nothing is lost ---


def recorders():
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is Recorder]


def test_the_model_is_as_it_was(loaded, conds):
    before = fingerprint(loaded[0])
    sampling.record(loaded[0], **settings(conds), max_records=3)
    assert fingerprint(loaded[0]) == before
    assert recorders() == []


@pytest.mark.parametrize("how", ["record", "record_prompts"])
def test_cancel_takes_effect_within_one_call_and_leaves_nothing(loaded, conds, how):
    before = fingerprint(loaded[0])

    def interrupt():
        comfy.model_management.interrupt_current_processing(True)

    ran = []
    hook = loaded[0].model.diffusion_model.out.register_forward_hook(lambda *_: ran.append(1))
    model, outputs = spied(loaded[0], at=2, action=interrupt)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            if how == "record":
                sampling.record(model, **settings(conds), max_records=3)
            else:
                sample_prompts((model, loaded[1]), ["a", "b"], 4, steps=4)
    finally:
        hook.remove()
        comfy.model_management.interrupt_current_processing(False)
    assert len(outputs) == 3 and len(ran) == 2
    del model
    assert fingerprint(loaded[0]) == before
    assert recorders() == []
    named = settings(conds)
    expected = ksampler(loaded[0], named)["samples"]
    assert torch.equal(sampling.record(loaded[0], **named, max_records=1)[0]["samples"], expected)


def test_a_failing_unet_leaves_the_model_as_it_was(loaded, conds):
    before = fingerprint(loaded[0])

    def fail():
        raise RuntimeError("out of memory, say")

    model, _ = spied(loaded[0], at=1, action=fail)
    with pytest.raises(RuntimeError, match="ran out: choose a smaller"):
        sampling.record(model, **settings(conds), max_records=3)
    del model
    assert fingerprint(loaded[0]) == before


def test_a_model_that_runs_into_nan_gives_no_calibration(loaded, conds):
    poisoned = torch.full((1, 4, 8, 8), float("nan"))
    named = settings(conds, latent_image={"samples": poisoned}, denoise=0.5)
    with pytest.raises(ValueError, match=r"finite UNet inputs, got NaN .* UNet call 1 of 4"):
        sampling.record(loaded[0], **named, max_records=3)


# --- whose calibration ---


def test_signature_tells_architectures_apart(loaded):
    found = sampling.signature(loaded[0])
    assert found["model"] == "BaseModel" and found["context_dim"] == 768
    assert found["channel_mult"] == [1] and found["transformer_depth_output"] == [1, 1]
    assert sampling.signature(loaded[0].clone()) == found


def test_a_calibration_of_another_architecture_is_refused_before_sampling(loaded, conds):
    _, made = sampling.record(loaded[0], **settings(conds), max_records=2)
    other = Calibration(made.runs, {**made.signature, "context_dim": 2048}, "xl.safetensors")
    model, outputs = spied(loaded[0])
    with pytest.raises(ValueError, match=r"context_dim 2048 recorded from xl.safetensors .* 768"):
        sampling.record(model, **settings(conds), max_records=2, calibration=other)
    assert outputs == []


def test_pooled_conditioning_of_sdxl_is_recorded(tmp_path):
    specs = synthetic.unet_specs("sdxl", "tiny")
    state = synthetic.state_dict(specs, prefix=synthetic.UNET)
    model, outputs = spied(comfy.sd.load_diffusion_model_state_dict(state))
    conds = [
        [[torch.full((1, 77, 2048), value), {"pooled_output": torch.full((1, 1280), value)}]]
        for value in (0.5, -0.5)
    ]
    named = settings(conds, steps=2)
    expected = ksampler(model, named)["samples"]
    outputs.clear()
    latent, made = sampling.record(model, **named, max_records=4)
    assert torch.equal(latent["samples"], expected)
    assert made.signature["adm_in_channels"] == 2816
    back = load(save(made, tmp_path / "a.safetensors"))
    for record, output in zip(back, outputs, strict=True):
        assert record.y.shape == (2, 2816)
        assert torch.equal(replay(model, record), output)


def test_a_compiled_model_is_recorded(loaded, conds):
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    node = TorchCompileModel.execute(loaded[0].clone(), backend="eager")
    _, plain = sampling.record(loaded[0], **settings(conds, steps=2), max_records=2)
    _, found = sampling.record(node.args[0], **settings(conds, steps=2), max_records=2)
    assert len(found) == len(plain) == 2
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one.timesteps, other.timesteps)
        assert torch.allclose(one.x, other.x, atol=1e-4)
        assert torch.equal(one.context, other.context)
