"""What a bill says, what it rests on, and what it refuses; `test_price_truth` holds it against real steps."""

import pickle
import threading
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from test_price_truth import ADAPTER, CONFIGS, step
from transformers import BartConfig, LlamaConfig, PreTrainedConfig

from refkl_lib import MemoryLedger, known_models, load_model, price
from refkl_lib.memory.extrapolate import at_depth, depths_for, period_of
from refkl_lib.memory.meta import MetaDevice
from refkl_lib.memory.optimizers import StatesOnly, Training
from refkl_lib.memory.partition import zero3_of
from refkl_lib.memory.price import with_layers
from refkl_lib.memory.shapes import config_of
from refkl_lib.memory.trace import layers_of, model_of, trace
from refkl_lib.models import ModelUnavailableError

MIB, GIB = 2**20, 2**30


def of_llama(strategy: str = "clone", **settings: Any):
    return price(CONFIGS["llama"], strategy, **{"batch": 2, "seq": 64} | settings)


# The bill


def test_a_bill_adds_up():
    bill = price("smollm2", "clone", dtype="fp32")
    weights = 134_515_008 * 4
    assert bill.parameters == bill.trained == 134_515_008
    assert weights <= bill.reference_bytes <= weights + 1024  # and the buffers
    assert bill.at_rest["policy"] == bill.at_rest["reference"] == bill.reference_bytes
    assert 2 * weights <= bill.at_rest["optimizer"] <= 2 * weights + 4096
    assert bill.at_rest["gradients"] == 0
    assert bill.peak == sum(bill.owners.values()) == max(sum(owners.values()) for owners in bill.phases.values())
    assert list(bill.phases) == ["reference", "forward", "loss", "backward", "optimizer"]
    assert bill.phases[bill.moment.phase] == bill.owners


def test_what_the_reference_adds():
    clone, adapter = of_llama(), of_llama("adapter", lora_rank=4)
    assert clone.without_reference.reference_bytes == clone.without_reference.at_rest["reference"] == 0
    assert clone.without_reference.without_reference is clone.without_reference
    assert clone.reference_adds >= clone.reference_bytes > 0
    assert adapter.reference_bytes == 0
    assert adapter.without_reference.at_rest == adapter.at_rest
    assert 0 <= adapter.reference_adds < clone.reference_bytes


def test_a_bill_reads_as_a_table():
    text = repr(of_llama(checkpointing=True))
    assert text.startswith("llama: ")
    assert "checkpointing=True" in text
    for word in (
        "policy",
        "reference",
        "gradients",
        "optimizer",
        "activations",
        "at the peak",
        "at rest",
        "not counted",
    ):
        assert word in text
    assert "The peak is " in text
    assert "at layer" in of_llama(kl="linear", batch=8, checkpointing=True, attention="eager").where


def test_fits_says_why():
    bill = price("smollm2", "clone")
    assert bill.fits(80 * GIB)
    tight = bill.fits(bill.peak, headroom=0)
    assert tight
    assert tight.left == 0
    lacking = bill.fits(bill.peak)
    assert not lacking
    assert str(lacking).startswith("does not fit: ")
    assert lacking.left == -lacking.headroom == bill.peak - lacking.needed
    with pytest.raises(ValueError, match=r"device_memory is 80, but it is counted in bytes: write 80 \* 2\*\*30"):
        bill.fits(80)
    with pytest.raises(ValueError, match="headroom is -1"):
        bill.fits(80 * GIB, headroom=-1)


def test_a_bill_can_be_pickled():
    bill = of_llama()
    assert pickle.loads(pickle.dumps(bill)) == bill
    assert pickle.loads(pickle.dumps(bill)).without_reference == bill.without_reference


# What a setting does


def test_precision():
    full, pure, mixed = (of_llama(dtype=dtype) for dtype in ("fp32", "bf16", "mixed"))
    weights = full.at_rest["policy"] // 4
    for bill, policy, states in ((full, 4, 8), (pure, 2, 4), (mixed, 2, 12)):
        assert bill.at_rest["policy"] == pytest.approx(policy * weights, rel=0.01)
        assert bill.at_rest["optimizer"] == pytest.approx(states * weights, rel=0.01)


def test_optimizers():
    bills = [price("smollm2", "clone", optimizer=name) for name in ("adamw", "adamw8bit", "sgd")]
    adamw, eight, none = (bill.at_rest["optimizer"] for bill in bills)
    assert none == 0
    weights = bills[0].parameters
    assert eight == pytest.approx(weights * (2 + 8 / 256), rel=0.01)
    assert adamw == pytest.approx(weights * 4, rel=0.01)


def test_one_kernel_keeps_what_pytorchs_fused_adamw_keeps():
    ours, theirs = (torch.nn.Parameter(torch.randn(64, 65)) for _ in range(2))
    training = Training("adamw", [ours], fused=True, masters=False)
    training.warm_up()
    fused = torch.optim.AdamW([theirs], fused=True)
    theirs.grad = torch.zeros_like(theirs)
    with MemoryLedger() as ledger:
        ledger.own("optimizer", fused)
        fused.step()
    assert isinstance(training._optimizers[0], StatesOnly)
    assert sum(tensor.nbytes for tensor in training.held()) == ledger.now()["optimizer"] == sum(ledger.peak().values())


def test_masters_train_as_full_precision_does():
    torch.manual_seed(0)
    wide = torch.nn.Parameter(torch.randn(8, 8))
    half = torch.nn.Parameter(wide.detach().bfloat16())
    training = Training("sgd", [half], fused=False, masters=True)
    for _ in range(3):
        half.grad = torch.ones_like(half) * 0.5
        training.step()
    # 1e-5 · 0.5 is less than bfloat16 can add to a weight, and the master has kept it.
    assert torch.allclose(training.masters[0][1], wide.bfloat16().float() - 3 * 0.5e-5, atol=1e-7)
    assert training.masters[0][1].grad is None


def test_a_configuration_is_only_read():
    config = LlamaConfig(**CONFIGS["llama"].to_dict())
    before = dict(vars(config))
    plain = price(config, "clone", batch=2, seq=64)
    assert price(config, "clone", batch=2, seq=64, attention="eager", dtype="fp32").owners != plain.owners
    assert vars(config) == before
    assert price(config, "clone", batch=2, seq=64).owners == plain.owners  # so what was asked before changes nothing


def test_logits_attention_and_checkpointing_cost_what_they_should():
    config = LlamaConfig(**CONFIGS["llama"].to_dict() | {"vocab_size": 4096, "num_hidden_layers": 8})
    settings: dict[str, Any] = {"batch": 4, "seq": 512}
    plain = price(config, "clone", **settings)
    logits = 4 * 512 * 4096 * 2
    assert price(config, "clone", kl="full", **settings).peak > plain.peak + logits
    scores = 4 * config.num_attention_heads * 512 * 512 * 2
    assert price(config, "clone", attention="eager", **settings).peak > plain.peak + 8 * scores
    assert price(config, "clone", checkpointing=True, **settings).peak < plain.peak


def test_data_parallel_ranks_hold_their_gradients_twice():
    one, eight = of_llama(), of_llama(ranks=8)
    trained = one.trained * 2
    assert eight.at_rest == one.at_rest | {"gradients": trained}
    assert eight.peak >= one.peak + trained


def test_a_swapped_reference_waits_in_host_memory():
    swap, clone = (of_llama(strategy, kl="full") for strategy in ("swap", "clone"))
    whole = clone.reference_bytes
    assert swap.reference_bytes == whole
    assert swap.host == {"policy": whole, "reference": whole}
    assert swap.at_rest == swap.without_reference.at_rest
    assert swap.owners["reference"] == 0
    # In the pass the policy's storages hold the reference: on the device, a copy less than with a clone.
    totals = [{phase: sum(owners.values()) for phase, owners in bill.phases.items()} for bill in (swap, clone)]
    assert totals[0] == {phase: total - whole for phase, total in totals[1].items()}
    assert "reference, in host memory" in repr(swap)
    assert "in each rank's host memory wait" in repr(swap)
    here = of_llama("swap", kl="full", device="cpu")
    assert here.host == {}, "on a CPU it is all one memory"
    assert here.at_rest["reference"] == whole
    assert sum(here.phases["reference"].values()) > sum(here.at_rest.values()) + whole, "the policy waits as well"


def test_hidden_states_of_a_swap_cost_a_head():
    swap, clone = (of_llama(strategy, kl="linear") for strategy in ("swap", "clone"))
    head = CONFIGS["llama"].vocab_size * CONFIGS["llama"].hidden_size * 2
    assert sum(swap.phases["loss"].values()) == sum(clone.phases["loss"].values()) - clone.reference_bytes + head


def test_precomputed_log_probs_are_all_there_is_of_a_reference():
    batch, seq = 2, 64
    bill = of_llama("precomputed", batch=batch, seq=seq)
    assert bill.reference_bytes == 0
    assert bill.at_rest == bill.without_reference.at_rest
    during, before = bill.phases["reference"], bill.at_rest
    assert during["activations"] == before["activations"] + batch * (seq - 1) * 4
    assert bill.peak < of_llama("clone").peak
    assert "the KL is estimated from them (k2)" in repr(bill)


def test_data_parallel_ranks_each_swap():
    one, eight = of_llama("swap"), of_llama("swap", ranks=8)
    assert eight.host == one.host
    assert eight.peak >= one.peak + one.trained * 2


def test_a_reference_that_follows_has_its_own_phase():
    bill = of_llama(sync=0.6)
    assert list(bill.phases)[-1] == "sync"
    assert "sync" not in bill.without_reference.phases


def test_gemma_has_eager_attention_without_being_asked():
    assert "attention is eager" in repr(price("gemma-2-2b", "adapter", lora_rank=8))


# ZeRO-3


def test_ranks_share_what_zero3_cuts():
    one, eight = (price("Qwen2.5-0.5B", "zero3", ranks=ranks) for ranks in (1, 8))
    for owner in ("policy", "reference", "optimizer"):
        assert eight.at_rest[owner] == pytest.approx(one.at_rest[owner] / 8, rel=0.001)
    assert one.at_rest["gathered"] == 0 < eight.at_rest["gathered"]
    assert eight.at_rest["optimizer"] == pytest.approx(eight.parameters * 12 / 8, rel=0.001)  # masters and two moments


def test_a_plain_reference_is_whole_on_every_rank():
    cut, whole = (price("Qwen2.5-0.5B", strategy, ranks=8) for strategy in ("zero3", "plain"))
    assert whole.reference_bytes == pytest.approx(8 * cut.reference_bytes, rel=0.001)
    assert whole.at_rest["policy"] == cut.at_rest["policy"]


def test_offloaded_shards_wait_in_host_memory():
    here, there = (price("Qwen2.5-0.5B", "zero3", ranks=4, offload=offload) for offload in (None, "cpu"))
    assert here.host == {}
    assert there.host["reference"] + there.at_rest["reference"] == here.at_rest["reference"]
    assert there.at_rest["reference"] < 1024  # buffers
    disk = price("Qwen2.5-0.5B", "zero3", ranks=4, offload="nvme")
    assert disk.host == {}
    job = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}
    away = price("Qwen2.5-0.5B", "zero3", ranks=4, ds_config=job)
    assert set(away.host) == {"policy", "reference", "gradients", "optimizer"}
    assert away.at_rest["optimizer"] == 0
    assert away.host["optimizer"] == here.at_rest["optimizer"]
    assert "in host memory" in repr(away)


def test_ds_config_sizes_buckets():
    zero = zero3_of({"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8, "sub_group_size": "auto"}}, 2, 100)
    assert (zero.reduce_bucket, zero.prefetch_bucket, zero.persistence_threshold) == (500_000_000, 9000, 1000)
    assert zero.sub_group == 10**9
    small, large = (
        price(CONFIGS["llama"], "zero3", ranks=2, ds_config={"zero_optimization": {"reduce_bucket_size": size}})
        for size in (1000, 2000)
    )
    assert large.at_rest["gradients"] - small.at_rest["gradients"] == 2000
    with pytest.raises(ValueError, match='stage"\\] is 2, but what is priced here is stage 3'):
        price(CONFIGS["llama"], "zero3", ds_config={"zero_optimization": {"stage": 2}})


def test_what_may_stay_gathered_is_counted_for_each_model():
    jobs = [{"stage3_max_reuse_distance": reuse, "stage3_prefetch_bucket_size": 0} for reuse in (0, 10**9)]
    held = {}
    for strategy in ("zero3", "plain"):
        bills = [price(CONFIGS["llama"], strategy, ranks=2, ds_config={"zero_optimization": job}) for job in jobs]
        held[strategy] = bills[1].phases["forward"]["gathered"] - bills[0].phases["forward"]["gathered"]
        whole = 2 * bills[0].parameters
    assert held == {"zero3": 2 * whole, "plain": whole}


def test_a_policy_that_makes_two_passes_a_step_keeps_nothing_gathered():
    jobs = [{"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": most} for most in (0, 10**9)]
    priced = partial(price, CONFIGS["llama"], "adapter", lora_rank=4, ranks=2)
    short, long = (priced(ds_config={"zero_optimization": job}) for job in jobs)
    assert short.moments == long.moments
    gathered = {phase: [o["gathered"] for m, o in short.moments if m.phase == phase] for phase in short.phases}
    assert max(gathered["reference"]) >= short.at_rest["gathered"] > max(gathered["backward"]) > 0
    assert gathered["optimizer"] == [0]


def test_a_configuration_may_be_a_file(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 4000}}')
    assert price(CONFIGS["llama"], "zero3", ds_config=file).at_rest["gradients"] > 8000


# A deep model from two shallow ones


@pytest.mark.parametrize("shape", CONFIGS)
@pytest.mark.parametrize(
    "settings",
    [
        {"kl": "full", "device": "cpu"},
        ADAPTER | {"kl": "linear", "device": "cuda", "dtype": "bf16"},
        {"kl": "linear", "checkpointing": True, "dtype": "mixed", "device": "cuda"},
        {"strategy": "zero3", "dtype": "bf16", "zero": zero3_of({}, 4, 64)},
        ADAPTER | {"dtype": "fp32", "zero": zero3_of({}, 4, 64)},
        {"strategy": "swap", "kl": "full", "dtype": "bf16", "device": "cuda"},
        {"strategy": "precomputed", "kl": "linear", "dtype": "mixed", "device": "cuda"},
    ],
)
def test_two_depths_give_the_trace_of_a_third(shape, settings):
    depth = 20 if shape == "gemma2" else 11
    deep = of_depth(CONFIGS[shape], depth)
    whole = step(deep, **settings)
    layers = layers_of(model_of(deep, whole, "meta"))
    period = period_of(layers)
    assert period == (2 if shape == "gemma2" else 1)
    depths = depths_for(depth, period)
    assert depths is not None
    shallow, deeper = (trace(replace(whole, config=with_layers(deep, d))) for d in depths)
    assert at_depth((shallow, deeper), depths, period, depth) == trace(whole)


def of_depth(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    known = {name: value for name, value in config.to_dict().items() if name != "layer_types"}
    return type(config)(**known | {"num_hidden_layers": depth})


def test_layers_that_do_not_repeat_are_traced_one_by_one():
    layers = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 8)])
    assert period_of(layers) == 3
    assert depths_for(3, 3) is None
    assert depths_for(126, 1) == (4, 5)
    assert depths_for(47, 2) == (9, 11)


def test_traces_off_the_line_are_refused():
    config = CONFIGS["llama"]
    shallow, deeper = (trace(step(with_layers(of_depth(config, 8), d))) for d in (4, 5))
    bent = [(m, o | {"activations": o["activations"] + (8 if m.layer == 2 else 0)}) for m, o in deeper.moments]
    assert at_depth((shallow, deeper), (4, 5), 1, 8) is not None
    assert at_depth((shallow, replace(deeper, moments=tuple(bent))), (4, 5), 1, 8) is None
    assert at_depth((shallow, replace(deeper, moments=deeper.moments[:-2])), (4, 5), 1, 8) is None


# Models


@pytest.mark.parametrize("name", known_models())
def test_known_models_have_the_number_of_parameters_that_is_written_beside_them(name):
    model = model_of(config_of(name), step(config_of(name)), "meta")
    assert sum(weight.numel() for weight in model.parameters()) == known_models()[name]


def test_known_models_go_from_small_to_large():
    sizes = sorted(known_models().values())
    assert sizes[0] < 2e8
    assert sizes[-1] > 4e11


def test_a_model_can_be_named_in_several_ways(tmp_path):
    by_name = price("qwen2.5-0.5b", "clone")
    assert by_name.parameters == price("Qwen/Qwen2.5-0.5B", "clone").parameters == 494_032_768
    config = load_model("pocket").config
    config.save_pretrained(tmp_path)
    assert price(tmp_path, "clone").owners == price("pocket", "clone").owners == price(config, "clone").owners


def test_an_unknown_model_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailableError, match="'nobody/nothing' is not a model whose shapes are known here"):
        price("nobody/nothing", "clone")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        price(tmp_path, "clone")
    for content in ("{", '{"model_type": "nonsense"}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"transformers cannot read .*config\.json"):
            price(tmp_path, "clone")
    with pytest.raises(ValueError, match=r"this BartForCausalLM has no stack of .* layers"):
        price(BartConfig(vocab_size=64, d_model=32, decoder_ffn_dim=32), "clone")
    with pytest.raises(TypeError, match="model is a int"):
        price(7, "clone")  # type: ignore[arg-type]


def test_the_largest_needs_no_more_than_a_small_one():
    assert price("Llama-3.1-405B", "adapter", lora_rank=16).parameters == 405_853_388_800


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "twin"}, "strategy is 'twin', but must be one of"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"optimizer": "lion"}, "optimizer is 'lion'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"attention": "flash"}, "attention is 'flash'"),
        ({"kl": "half"}, "kl is 'half'"),
        ({"batch": 0}, "batch is 0"),
        ({"seq": 1}, "seq is 1, but must be a whole number, at least 2"),
        ({"ranks": 1.5}, "ranks is 1.5"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"lora_rank": True}, "lora_rank is True"),
        ({"strategy": "adapter"}, "give lora_rank=16"),
        ({"ds_config": {}}, "of shards there is no clone reference"),
        ({"strategy": "zero3", "kl": "linear"}, 'use kl="full"'),
        ({"offload": "cpu"}, 'is for the shards of strategy="zero3"'),
        ({"strategy": "zero3", "offload": "moon"}, "offload is 'moon'"),
        ({"strategy": "adapter", "lora_rank": 4, "sync": 0.5}, "leave it out"),
        ({"sync": 2.0}, "alpha is 2"),
        ({"strategy": "swap", "lora_rank": 4}, 'use strategy="adapter"'),
        ({"strategy": "swap", "ds_config": {}}, "of shards there is no swap reference"),
        ({"strategy": "precomputed", "ds_config": {}}, "of shards there is no precomputed reference"),
        ({"strategy": "swap", "sync": 0.5}, "leave it out"),
        ({"lora_rank": 4, "targets": "no_such_layer"}, "no_such_layer"),
    ],
)
def test_an_argument_that_cannot_work_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        of_llama(**settings)


# The device that is not there


def test_what_is_made_of_the_batch_keeps_its_values():
    with MetaDevice("cpu") as device:
        mask = device.put({"mask": torch.tensor([[1, 1, 0], [1, 0, 0]])})["mask"]
        assert mask.is_meta
        assert mask.sum().item() == 3
        assert mask.bool().nonzero().shape == (3, 2)
        values = torch.empty(2, 3, device="meta")
        assert values[mask.bool()].shape == (3,)
        values[mask.bool()] = 0.0
        assert not torch.isnan(values).any()
        positions = torch.arange(3, device="meta")
        positions[1:].add_(mask[0, :2])
        assert [place.item() for place in positions] == [0, 2, 3]


def test_what_is_made_of_numbers_has_no_value():
    with MetaDevice("cpu"):
        values = torch.empty(2, 3, device="meta")
        assert torch.isfinite(values).all(), "but none is NaN or infinite"
        assert bool((values < torch.inf).all())
        for unknown in (values < 1.0, values == torch.zeros(2, 3, device="meta"), values != 0.5):
            with pytest.raises(NotImplementedError, match="depends on the model's numbers"):
                bool(unknown.all())
        with pytest.raises(NotImplementedError, match="depends on the model's numbers"):
            values.sum().item()
        with pytest.raises(NotImplementedError, match="selects by a mask that depends"):
            values[values > 0]


def test_tensors_elsewhere_are_let_alone():
    usual = F.scaled_dot_product_attention, F.dropout, torch.autocast
    q = torch.randn(1, 2, 4, 8)
    expected = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    with MetaDevice("cuda"):
        assert torch.equal(F.scaled_dot_product_attention(q, q, q, is_causal=True), expected)
        assert torch.tensor([True, False]).nonzero().tolist() == [[0]]
        assert torch.tensor(3.5).item() == 3.5
        assert torch.equal(q[q > 0], q[(q > 0).nonzero(as_tuple=True)])
    assert (F.scaled_dot_product_attention, F.dropout, torch.autocast) == usual


@pytest.mark.parametrize(
    ("device", "dtype", "heads"), [("cpu", "float32", 2), ("cuda", "bfloat16", 2), ("cuda", "float32", 4)]
)
def test_attention_stays_one_kernel(device, dtype, heads):
    q, k = (
        torch.empty(1, n, 256, 16, dtype=getattr(torch, dtype), device="meta", requires_grad=True) for n in (4, heads)
    )
    with MetaDevice(device), MemoryLedger(meta=True) as ledger:
        F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=heads != 4).sum().backward()
    assert sum(ledger.peak().values()) < 4 * 256 * 256 * q.dtype.itemsize


def test_two_threads_can_price_at_once():
    usual = F.scaled_dot_product_attention
    bills: dict[str, Any] = {}
    devices = ("cpu", "cuda", "cpu", "cuda")
    threads = [
        threading.Thread(target=lambda n=n, d=d: bills.update({f"{n}": of_llama(device=d)}))
        for n, d in enumerate(devices)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert F.scaled_dot_product_attention is usual
    assert torch.get_default_dtype() is torch.float32
    assert [bills[f"{n}"].owners for n in range(4)] == [of_llama(device=d).owners for d in devices]
