"""CUDA graphs of a UNet: when a call is captured, replayed, or run as always.

Without a GPU what a graph does is done by the same call on the inputs it was captured with: Python has
no say in a replay, new numbers come through those inputs alone.
"""

from __future__ import annotations

import inspect

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.patcher_extension
import pytest
import torch
from comfyui_modelopt.formats import files
from comfyui_modelopt.loaders import graphs
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.quantize.recipe import Recipe

GPU = torch.cuda.is_available()


@pytest.fixture
def counted(monkeypatch):
    """How many calls were captured and replayed; on a CPU with a stand-in for the graph itself."""
    counts = {"captured": 0, "replayed": 0}
    real = graphs.captured

    def stand_in(call, pool):
        # the call takes ControlNet's tensors out of their lists, a graph finds them nevertheless
        control = next((c for c in inspect.getclosurevars(call).nonlocals["call"] if type(c) is dict
                        and "middle" in c), {})  # fmt: skip
        lists = {name: list(tensors) for name, tensors in control.items()}
        out = call()

        def replay():
            control.update({name: list(tensors) for name, tensors in lists.items()})
            out.copy_(call())

        return replay, out

    def captured(call, pool):
        counts["captured"] += 1
        replay, out = (real if GPU else stand_in)(call, pool)

        def counting():
            counts["replayed"] += 1
            replay()

        return counting, out

    monkeypatch.setattr(graphs, "captured", captured)
    if not GPU:
        monkeypatch.setattr(graphs, "unfit", lambda device: None)
        monkeypatch.setattr(graphs, "new_pool", object)
        monkeypatch.setattr(graphs, "free_share", lambda device: 0.5)
    return counts


@pytest.fixture
def made(quantized):
    return quantized(Recipe("int8"))


@pytest.fixture
def model(made, counted, tmp_path):
    path = str(tmp_path / "unet.safetensors")
    files.write(made.checkpoint, path)
    found = loader.load_file(path, cuda_graphs=True)
    assert found.cached_patcher_init == (loader.load_file, (path, False, True))
    return found


def call(model, record, options: dict | None = None, factor: float = 1.0, **more):
    """One UNet call as the sampler makes it, the latent times `factor`."""
    comfy.model_management.load_models_gpu([model])
    model.pre_run()
    device = model.load_device
    given = {**model.model_options.get("transformer_options", {}), **(options or {})}
    given["wrappers"] = comfy.patcher_extension.copy_nested_dicts(model.wrappers)
    x = record.x.float().to(device) * factor
    y = {} if record.y is None else {"y": record.y.float().to(device)}
    with torch.inference_mode():
        return model.model.apply_model(
            x,
            torch.full((len(x),), 3.0, device=device),
            c_crossattn=record.context.float().to(device),
            transformer_options=given,
            **y,
            **more,
        )


def plain(made, record, **more):
    return call(loader.load(made.checkpoint), record, **more)


def test_the_second_call_is_captured_and_later_ones_replayed(made, model, counted):
    record = made.records[0]
    wanted = [plain(made, record, factor=f) for f in (1.0, 1.0, 0.5, 0.25)]
    found = [call(model, record, factor=f) for f in (1.0, 1.0, 0.5, 0.25)]
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)
    assert counted == {"captured": 1, "replayed": 3}


def test_each_size_has_its_own_and_the_oldest_goes(made, model, counted, monkeypatch):
    monkeypatch.setattr(graphs, "RECENT", 4)
    record = made.records[0]
    for size in (1, 2, 3, 4, 5):
        bigger = torch.cat([record.x] * size, dim=3)
        other = type(record)(**{**vars(record), "x": bigger})
        assert torch.equal(call(model, other), call(model, other))
    assert counted["captured"] == 5
    assert len(model.model.modelopt_graphs.kept) == graphs.KEPT
    call(model, record)  # was the oldest: warms up again
    assert counted["captured"] == 5
    call(model, record)
    assert counted["captured"] == 6


def test_clones_share_and_a_lora_drops_what_was_captured(made, model, counted):
    record = made.records[0]
    before = [call(model.clone(), record) for _ in range(3)]
    assert counted["captured"] == 1
    key = next(k for k in model.model.state_dict() if k.endswith("attn1.to_q.weight"))
    weight = comfy.utils.get_attr(model.model, key)
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(tuple(weight.shape), generator=generator) * 0.2
    patched = model.clone()
    patched.add_patches({key: ("diff", (change,))}, 1.0)
    reference = loader.load(made.checkpoint)
    reference.add_patches({key: ("diff", (change,))}, 1.0)
    wanted = call(reference, record)
    assert not torch.equal(wanted, before[0])
    for _ in range(3):
        assert torch.equal(call(patched, record), wanted)
    assert counted["captured"] == 2
    for _ in range(3):  # without the LoRA again
        assert torch.equal(call(model, record), before[0])
    assert counted["captured"] == 3


def test_patches_run_as_always(made, model, counted, caplog):
    record = made.records[0]
    for _ in range(3):
        call(model, record)
    strength = {"now": 1.0}

    def patch(h, options):
        return h * strength["now"]

    options = {"patches": {"input_block_patch": [patch]}}
    reference = loader.load(made.checkpoint)
    with caplog.at_level("INFO"):
        for strength["now"] in (0.5, 2.0):  # what Python says at each call is heard
            wanted = call(reference, record, options)
            assert torch.equal(call(model, record, options), wanted)
    assert counted == {"captured": 1, "replayed": 2}
    told = [r.getMessage() for r in caplog.records if "without a CUDA graph" in r.getMessage()]
    assert told == [
        "ModelOpt: UNet calls run without a CUDA graph: the MODEL has patches: input_block_patch"
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("foreign", "a layer is another pack's, a "),
        ("own _forward", "another pack has replaced the UNet's _forward"),
        ("own _conv_forward", "has a hook or a forward that is not its own"),
        (
            "function",
            "another pack has replaced comfy.ldm.modules.diffusionmodules.openaimodel.forward_",
        ),
        ("hook", "has a hook or a forward that is not its own"),
        ("forward", "has a hook or a forward that is not its own"),
        ("weight_function", "is patched at each call"),
        ("option", "transformer_options has strength_of_mine"),
        ("override", "transformer_options has optimized_attention_override"),
        ("wrapper", "another wrapper is around the UNet"),
        ("stock", "another pack has replaced ResBlock._forward"),
    ],
)
def test_what_python_has_a_say_in(made, model, counted, caplog, monkeypatch, change, reason):
    record, options = made.records[0], {}
    for _ in range(2):
        call(model, record)
    assert counted["captured"] == 1
    layer = next(m for m in model.model.diffusion_model.modules() if hasattr(m, "weight_function"))
    unet = model.model.diffusion_model
    conv = next(m for m in unet.modules() if type(m).__name__ == "Conv2d")
    if change == "foreign":
        unet.out[1] = Foreign()
    elif change == "own _forward":
        unet._forward = lambda *args, own=unet._forward, **more: own(*args, **more)
    elif change == "own _conv_forward":
        conv._conv_forward = lambda *args, own=conv._conv_forward: own(*args)
    elif change == "function":
        module = comfy.ldm.modules.diffusionmodules.openaimodel
        ours = module.forward_timestep_embed
        monkeypatch.setattr(
            module, "forward_timestep_embed", lambda *args, **more: ours(*args, **more)
        )
    elif change == "hook":
        layer.register_forward_hook(lambda *args: None)
    elif change == "forward":
        layer.forward = lambda x, own=layer.forward: own(x)
    elif change == "weight_function":
        layer.weight_function = [lambda w: w]
    elif change == "option":
        options = {"strength_of_mine": 1.0}
    elif change == "override":
        options = {"optimized_attention_override": lambda own, *args, **kw: own(*args, **kw)}
    elif change == "wrapper":
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        model.add_wrapper_with_key(kind, "mine", lambda executor, *a, **k: executor(*a, **k))
    else:
        block = comfy.ldm.modules.diffusionmodules.openaimodel.ResBlock
        own = block._forward
        monkeypatch.setattr(block, "_forward", lambda self, x, emb: own(self, x, emb))
    with caplog.at_level("INFO"):
        for _ in range(3):
            call(model, record, options)
    assert counted == {"captured": 1, "replayed": 1}
    told = [r.getMessage() for r in caplog.records if "without a CUDA graph" in r.getMessage()]
    assert len(told) == 1 and reason in told[0]


class Foreign(torch.nn.SiLU):
    """A layer of another pack."""


def test_a_change_in_place_drops_what_was_captured(made, model, counted):
    """Seamless pictures: packs set the padding of convolutions."""
    record = made.records[0]
    for _ in range(2):
        call(model, record)
    conv = model.model.diffusion_model.input_blocks[0][0]
    conv.padding_mode = "circular"
    assert not model.model.modelopt_graphs.state.still()
    call(model, record)
    assert counted == {"captured": 1, "replayed": 1}
    conv.padding_mode = "zeros"


def test_sizes_that_take_turns_do_not_push_each_other_out(made, model, counted, caplog):
    record = made.records[0]
    others = [
        type(record)(**{**vars(record), "x": torch.cat([record.x] * size, dim=3)})
        for size in range(1, graphs.KEPT + 3)
    ]
    with caplog.at_level("INFO"):
        for _ in range(4):
            for other in others:
                call(model, other)
    assert counted["captured"] == graphs.KEPT
    assert counted["replayed"] == 3 * graphs.KEPT
    assert f"more than {graphs.KEPT} sizes take turns" in caplog.text


def test_memory_that_a_call_lacks_is_taken_from_the_graphs(made, model, counted, monkeypatch):
    record = made.records[0]
    wanted = [call(model, record) for _ in range(2)][0]
    unet = model.model.diffusion_model
    block, failed = unet.middle_block[0], []

    def once(module, args):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("no memory")

    hook = block.register_forward_pre_hook(once)  # with a hook the call runs as always
    assert torch.equal(call(model, record), wanted)
    hook.remove()
    assert failed and not model.model.modelopt_graphs.kept


def test_a_cancel_while_one_is_captured(made, model, counted, monkeypatch):
    record = made.records[0]
    wanted = call(model, record)
    stand_in = graphs.captured

    def cancelled(call, pool):
        raise comfy.model_management.InterruptProcessingException()

    monkeypatch.setattr(graphs, "captured", cancelled)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        call(model, record)
    assert model.model.modelopt_graphs.pool is None
    monkeypatch.setattr(graphs, "captured", stand_in)
    assert torch.equal(call(model, record), wanted)
    assert counted == {"captured": 1, "replayed": 1}


def test_comfyuis_usual_allocator_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    reason = graphs.unfit(torch.device("cuda:0"))
    assert "cudaMallocAsync" in reason and "--disable-cuda-malloc" in reason
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    assert graphs.unfit(torch.device("cuda:0")) is None


def test_controlnets_tensors_are_inputs(made, model, counted):
    record = made.records[0]
    reference = loader.load(made.checkpoint)
    seen: dict = {}
    last = reference.model.diffusion_model.middle_block[-1]
    hook = last.register_forward_hook(lambda module, args, out: seen.update(shape=out.shape))
    call(reference, record)
    hook.remove()
    shape, generator = seen["shape"], torch.Generator().manual_seed(1)
    outputs = []
    for _ in range(3):
        control = torch.randn(shape, generator=generator).to(model.load_device)
        given = [
            {"middle": [control.clone()]} for _ in range(2)
        ]  # a call takes them out of the list
        wanted = call(reference, record, control=given[0])
        outputs.append(call(model, record, control=given[1]))
        assert torch.equal(outputs[-1], wanted)
    assert counted == {"captured": 1, "replayed": 2}
    assert not torch.equal(outputs[0], outputs[1])


def test_another_unet_is_not_replayed(made, model, counted):
    """Benchmark's 16-bit twin takes the wrappers along."""
    record = made.records[0]
    for _ in range(2):
        call(model, record)
    twin = loader.load(made.checkpoint, arithmetic="fake")
    wanted = call(twin, record)
    twin.wrappers = model.wrappers
    assert torch.equal(call(twin, record), wanted)
    assert torch.equal(call(twin, record), wanted)
    assert counted == {"captured": 1, "replayed": 1}


def test_unloading_gives_the_memory_back(made, model, counted):
    record = made.records[0]
    for _ in range(2):
        call(model, record)
    assert len(model.model.modelopt_graphs.kept) == 1
    comfy.model_management.unload_all_models()
    found = model.model.modelopt_graphs
    assert not found.kept and found.state is None and found.pool is None


def test_what_is_kept_from_one_picture_to_the_next(made, model, counted, monkeypatch):
    record = made.records[0]
    wanted = call(model, record)
    for free, captured in ((0.5, 1), (0.2, 1), (0.2, 2), (0.5, 3), (0.5, 3)):
        monkeypatch.setattr(graphs, "free_share", lambda device, free=free: free)
        assert torch.equal(call(model, record), wanted)
        assert counted["captured"] == captured
        model.cleanup()
        assert len(model.model.modelopt_graphs.kept) == (free == 0.5)


def test_a_capture_that_fails_is_told_and_runs_as_always(made, model, counted, caplog, monkeypatch):
    record = made.records[0]
    wanted = call(model, record)

    def fails(call, pool):
        counted["captured"] += 1
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "captured", fails)
    with caplog.at_level("INFO"):
        for _ in range(3):
            assert torch.equal(call(model, record), wanted)
    assert counted == {"captured": 1, "replayed": 0}
    told = [r.getMessage() for r in caplog.records if "without a CUDA graph" in r.getMessage()]
    assert len(told) == 1 and "not permitted when stream is capturing" in told[0]


def test_a_cancel_is_seen_before_a_replay(made, model, counted):
    record = made.records[0]
    for _ in range(2):
        call(model, record)
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        call(model, record)
    assert counted["replayed"] == 1
    call(model, record)
    assert counted["replayed"] == 2


def test_without_a_gpu_the_node_says_so(made, tmp_path):
    if GPU:
        pytest.skip("this machine has a GPU")
    path = str(tmp_path / "unet.safetensors")
    files.write(made.checkpoint, path)
    model = loader.load_file(path, cuda_graphs=True)
    assert "the device is cpu" in graphs.describe(model)
    record = made.records[0]
    outputs = [call(model, record) for _ in range(3)]
    assert torch.equal(outputs[0], outputs[2])
    assert not model.model.modelopt_graphs.seen


def test_inside_torch_compile_it_steps_aside(made, model, monkeypatch):
    attention = comfy.ldm.modules.attention
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    comfy.model_management.load_models_gpu([model])
    unet, device = model.model.diffusion_model, model.load_device
    args, kwargs = made.records[0].arguments(device, torch.float32, {"wrappers": model.wrappers})
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch._dynamo.explain(unet)(*args, **kwargs)
    assert found.graph_count == 1, [b.reason for b in found.break_reasons]
    assert not model.model.modelopt_graphs.seen
