"""The training loop: what it makes larger, that it can be stopped and resumed anywhere, and what it refuses."""

import signal
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from refkl_lib import TrainRun, add_lora, copy_adapter, create_reference, load_model, load_tokenizer
from refkl_lib.reference.base import fingerprint_of
from refkl_lib.train import run as loop
from refkl_lib.train.run import group_loss
from refkl_lib.train.texts import Texts, write_texts

SMALL = {"group": 8, "new_tokens": 6, "learning_rate": 1e-2, "beta": 0.1}


def low_bytes(text: str) -> float:
    """A reward that random texts have some of: the share of the first half of ASCII."""
    return sum(ord(letter) < 64 for letter in text) / max(len(text), 1)


def make(strategy="adapter", lora=True, reward=low_bytes, prompts=("ab", "the c"), **options):
    policy = load_model("pocket")
    if lora:
        torch.manual_seed(0)
        policy = add_lora(policy, rank=4)
    reference = create_reference(policy, strategy)
    return TrainRun(policy, reference, load_tokenizer("pocket"), prompts, reward, **SMALL | options)


def weights(run):
    return fingerprint_of(run.trained.items())


def last(run, field="reward", of=5):
    return sum(getattr(record, field) for record in run.history[-of:]) / of


# What it makes larger


def test_the_reward_rises_and_without_a_leash_the_policy_leaves():
    free, held = (make(beta=beta).train(25) for beta in (0.0, 1.0))
    assert last(free) > sum(record.reward for record in free.history[:5]) / 5 + 0.2
    assert last(free, "kl") > 10 * last(held, "kl") > 0
    assert [record.iteration for record in free.history] == list(range(25))


def test_who_watches_a_step_sees_it_learn_and_not_write():
    seen = []

    class Watch:
        def __enter__(self):
            seen.append(("learning begins", len(run.history)))

        def __exit__(self, *exception):
            seen.append(("learning ends", len(run.history)))

    run = make(reward=lambda text: seen.append("a text") or 0.0, prompts=["ab"], group=2)
    run.step(watch=Watch())
    assert seen == ["a text", "a text", ("learning begins", 0), ("learning ends", 1)]
    run.step()  # as unseen as before
    assert seen[4:] == ["a text", "a text"]


@pytest.mark.parametrize(("strategy", "lora"), [("clone", True), ("swap", False), ("clone", False)])
def test_every_strategy_gives_the_same_run(strategy, lora):
    learning_rate = 1e-2 if lora else 1e-3
    other = make("adapter" if lora else "clone", lora, learning_rate=learning_rate).train(5)
    run = make(strategy, lora, learning_rate=learning_rate).train(5)
    assert run.history[-1].kl > 0
    assert run.history == other.history
    assert weights(run) == weights(other)


def test_a_seed_gives_the_same_run_and_leaves_the_callers_dice_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (make(seed=seed) for seed in (1, 1, 2))
    torch.set_rng_state(before)
    for run in (first, again, other):
        run.train(2)
    assert first.history == again.history != other.history
    assert torch.equal(torch.get_rng_state(), before)


def test_a_leash_may_be_changed_while_it_runs():
    run = make(beta=0.0).train(2)
    run.beta = 3.0
    assert [record.beta for record in run.train(3).history] == [0.0, 0.0, 3.0]


def texts_of(tokens, mask):
    return Texts({}, tokens, mask, [""] * len(tokens))


@pytest.fixture
def case():
    """Logits of policy and reference (4, 3, 7) in float64, texts of unequal length, rewards of two groups of two."""
    dice = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 4, 3, 7, generator=dice, dtype=torch.float64)
    tokens = torch.randint(7, (4, 3), generator=dice)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    rewards = torch.tensor([[1.0, 0.0], [2.0, 5.0]], dtype=torch.float64)
    return logits.requires_grad_(), ref_logits, texts_of(tokens, mask), rewards


def by_hand(logits, ref_logits, texts, rewards, beta, kl, place, ratio):
    """The loss of REINFORCE with the group's mean as its baseline, text by text and token by token."""
    penalties, log_probs = [], []
    for row in range(len(texts.tokens)):
        penalty = log_prob = 0
        for at in range(int(texts.mask[row].sum())):
            p, q = logits[row, at].log_softmax(-1), ref_logits[row, at].log_softmax(-1)
            r = (q - p)[texts.tokens[row, at]]
            token = {"k1": -r, "k2": r**2 / 2, "k3": r.exp() - 1 - r, "exact": (p.exp() * (p - q)).sum()}[kl]
            own = p[texts.tokens[row, at]]
            penalty = penalty + (token * (own - own.detach()).exp() if ratio else token)
            log_prob = log_prob + own
        penalties.append(penalty)
        log_probs.append(log_prob)
    penalties, log_probs = torch.stack(penalties), torch.stack(log_probs)
    scores = rewards.flatten()
    if place == "reward":
        scores = scores - beta * penalties.detach()
    advantages = scores - scores.view(2, 2).mean(1).repeat_interleave(2)
    return -(advantages * log_probs).mean() + (beta * penalties.mean() if place == "loss" else 0)


@pytest.mark.parametrize(
    ("kl", "place", "ratio"),
    [(kl, place, False) for kl in ("k1", "k2", "k3", "exact") for place in ("loss", "reward")]
    + [(kl, "loss", True) for kl in ("k1", "k2", "k3")],
)
def test_the_gradient_is_that_of_reinforce_and_of_the_penalty(case, kl, place, ratio):
    logits, *_ = case
    [ours] = torch.autograd.grad(group_loss(*case, 0.3, kl, place, ratio), logits)
    [right] = torch.autograd.grad(by_hand(*case, 0.3, kl, place, ratio), logits)
    torch.testing.assert_close(ours, right)


def test_what_stands_after_the_end_changes_nothing(case):
    logits, ref_logits, texts, rewards = case
    other = texts_of(torch.where(texts.mask.bool(), texts.tokens, 6 - texts.tokens), texts.mask)
    losses = [group_loss(logits, ref_logits, one, rewards, 0.3, "k3", "loss", False) for one in (texts, other)]
    assert losses[0] == losses[1]


# What the policy writes


@pytest.fixture(scope="module")
def pocket():
    return load_model("pocket")


def test_texts_are_the_policys_own(pocket):
    tokenizer = load_tokenizer("pocket")
    torch.manual_seed(0)
    texts = write_texts(pocket, tokenizer, ["ab"], group=3000, new_tokens=1)
    want = pocket(**tokenizer(["ab"], return_tensors="pt")).logits[0, -1].softmax(-1)
    counts = torch.bincount(texts.tokens[:, 0], minlength=len(want)) / 3000
    assert (counts - want).abs().max() < 5 * (want.max() / 3000).sqrt()  # some five standard deviations


def test_a_prompt_beside_a_longer_one_is_as_alone(pocket):
    tokenizer = load_tokenizer("pocket")
    texts = write_texts(pocket, tokenizer, ["ab", "a longer one"], group=2, new_tokens=4)
    together = pocket(**texts.inputs).logits[:2, :-1]
    alone = torch.cat([tokenizer(["ab"] * 2, return_tensors="pt").input_ids, texts.tokens[:2]], 1)
    torch.testing.assert_close(together, pocket(alone).logits[:, 1:-1], rtol=1e-4, atol=1e-4)


def test_a_text_counts_up_to_its_end_token():
    policy, tokenizer = load_model("pocket"), load_tokenizer("pocket")
    torch.manual_seed(0)
    policy.lm_head = nn.Linear(128, 259)  # with a bias, so that half of what it says is the end
    policy.lm_head.weight.data.zero_()
    policy.lm_head.bias.data.zero_()[tokenizer.eos_token_id] = 5.5
    texts = write_texts(policy, tokenizer, ["ab"], group=16, new_tokens=5)
    lengths = texts.mask.sum(1).tolist()
    assert len(set(lengths)) > 2
    for row, length in enumerate(lengths):
        ended = texts.tokens[row, length - 1] == tokenizer.eos_token_id
        assert ended or length == texts.tokens.shape[1]
        assert tokenizer.eos_token_id not in texts.tokens[row, : length - 1]
        assert texts.words[row] == tokenizer.decode(texts.tokens[row, :length], skip_special_tokens=True)


# Stopped and resumed


class Interrupt:
    """A reward that is interrupted once, in the middle of an iteration's texts."""

    def __init__(self, at):
        self.at = at
        self.calls = 0

    def __call__(self, text):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return low_bytes(text)


def test_an_interrupted_run_goes_on_as_if_nothing_had_been():
    whole = make().train(5)
    run = make(reward=Interrupt(at=2 * 16 + 7))
    with pytest.raises(KeyboardInterrupt):
        run.train(5)
    assert len(run.history) == 2
    run.train(5)
    assert run.history == whole.history
    assert weights(run) == weights(whole)


def test_ctrl_c_does_not_cut_a_step_in_two(monkeypatch):
    whole, run = make().train(3), make().train(1)
    step = run.optimizer.step

    def interrupted():
        signal.raise_signal(signal.SIGINT)
        step()

    monkeypatch.setattr(run.optimizer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.train(3)
    monkeypatch.undo()
    assert len(run.history) == 2
    assert run.train(3).history == whole.history
    assert weights(run) == weights(whole)


@pytest.mark.parametrize("options", [{}, {"strategy": "clone", "sync_every": 2, "alpha": 0.5}])
def test_a_saved_run_goes_on_in_another_process_as_if_nothing_had_been(tmp_path, options):
    whole = make(**options).train(3)
    whole.beta = 0.7
    whole.save(tmp_path / "run.pt")
    whole.train(6)
    resumed = make(**options).load(tmp_path / "run.pt")
    assert len(resumed.history) == 3
    resumed.train(6)
    assert resumed.history == whole.history
    assert weights(resumed) == weights(whole)
    assert resumed.reference.fingerprint() == whole.reference.fingerprint()
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_a_save_that_fails_leaves_the_older_file(tmp_path, monkeypatch):
    run = make().train(1)
    run.save(tmp_path / "run.pt")
    before = (tmp_path / "run.pt").read_bytes()

    def full(state, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run.train(2).save(tmp_path / "run.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]
    assert (tmp_path / "run.pt").read_bytes() == before


def test_a_run_that_is_asked_to_stop_ends_with_its_iteration():
    run = make()
    run.train(5, on_record=lambda record: run.stop() if record.iteration == 1 else None)
    assert len(run.history) == 2
    assert len(run.train(3).history) == 3


def test_a_reference_follows_when_it_is_told_to():
    run = make("clone", sync_every=2, alpha=1.0)
    seen = [run.reference.fingerprint()]
    run.train(5, on_record=lambda record: seen.append(run.reference.fingerprint()))
    assert [before != after for before, after in pairwise(seen)] == [False, True, False, True, False]
    assert run.history[2].kl == pytest.approx(0.0, abs=1e-6) != run.history[1].kl


def test_a_frozen_adapter_follows_too():
    policy = add_lora(load_model("pocket"), rank=4)
    copy_adapter(policy, "ref")
    reference = create_reference(policy, "adapter", adapter="ref")
    run = TrainRun(policy, reference, load_tokenizer("pocket"), ["ab"], low_bytes, sync_every=1, **SMALL)
    assert {record.kl for record in run.train(3).history} == {0.0}
    with pytest.raises(ValueError, match=r"alpha is 0.5, but a frozen adapter can only be replaced"):
        TrainRun(policy, reference, load_tokenizer("pocket"), ["ab"], low_bytes, sync_every=1, alpha=0.5)


# What it refuses


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"prompts": []}, ValueError, "prompts is empty"),
        ({"prompts": "ab"}, TypeError, r"prompts is the text 'ab', but must be a list of texts: \['ab'\]"),
        ({"prompts": ["ab", ""]}, ValueError, "the prompt '' has no token"),
        ({"reward": 3}, TypeError, "reward is 3, but must be a function"),
        ({"kl": "k4"}, ValueError, "kl is 'k4', but must be one of"),
        ({"place": "prompt"}, ValueError, "place is 'prompt', but must be one of"),
        ({"place": "reward", "ratio": True}, ValueError, "ratio=True weights an estimate in the loss"),
        ({"kl": "exact", "ratio": True}, ValueError, "ratio=True weights an estimate in the loss"),
        ({"group": 1}, ValueError, "group is 1, but must be at least 2"),
        ({"new_tokens": 0}, ValueError, "new_tokens is 0, but must be at least 1"),
        ({"sync_every": 0}, ValueError, "sync_every is 0, but must be at least 1"),
        ({"alpha": 2.0}, ValueError, r"alpha is 2.0"),
        ({"sync_every": 5}, ValueError, "it cannot move towards the policy"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate is 0.0"),
        ({"beta": -1.0}, ValueError, "beta is -1.0"),
        ({"beta": float("nan")}, ValueError, "beta is nan"),
    ],
)
def test_what_cannot_work_is_named(options, error, words):
    with pytest.raises(error, match=words):
        make(**options)


def test_a_policy_in_which_nothing_trains_is_named():
    policy = load_model("pocket").requires_grad_(False)
    with pytest.raises(ValueError, match="no weight of the policy requires grad"):
        TrainRun(policy, create_reference(policy, "clone"), load_tokenizer("pocket"), ["ab"], low_bytes)


def test_a_model_is_no_reference():
    policy = load_model("pocket")
    with pytest.raises(TypeError, match="reference is a LlamaForCausalLM"):
        TrainRun(policy, load_model("pocket"), load_tokenizer("pocket"), ["ab"], low_bytes)


@pytest.mark.parametrize(
    ("reward", "error", "words"),
    [
        (lambda text: float("inf"), ValueError, "the reward of the text .* is inf"),
        (lambda text: None, TypeError, "the reward of the text .* is None, but must be a number"),
    ],
)
def test_a_reward_that_is_no_number_stops_before_anything_moves(reward, error, words):
    run = make(reward=reward)
    before = weights(run)
    with pytest.raises(error, match=words):
        run.train(1)
    assert (weights(run), run.history) == (before, [])


def test_a_loss_that_is_not_finite_stops_before_anything_moves(monkeypatch):
    run = make().train(1)
    before = weights(run)
    monkeypatch.setattr(loop, "group_loss", lambda *given: group_loss(*given) * float("inf"))
    with pytest.raises(ValueError, match=r"not finite in iteration 1, so no step was taken.* learning_rate below 0.01"):
        run.train(2)
    assert weights(run) == before
    assert len(run.history) == 1


def test_a_wrong_leash_is_noticed_while_it_runs():
    run = make().train(1)
    run.beta = float("nan")
    with pytest.raises(ValueError, match="beta is nan"):
        run.train(2)


@pytest.mark.parametrize("field", ["group", "kl", "prompts", "seed"])
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, field):
    make().train(1).save(tmp_path / "run.pt")
    other = {"group": 4, "kl": "exact", "prompts": ["x"], "seed": 9}[field]
    run = make(**{field: other})
    with pytest.raises(ValueError, match=f"is of a training with {field}=.*, but this one has {field}="):
        run.load(tmp_path / "run.pt")
    assert run.history == []


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    make().train(1).save(tmp_path / "run.pt")
    run = make("clone", lora=False)
    before = weights(run)
    with pytest.raises(ValueError, match="is of a training of other weights: they differ in"):
        run.load(tmp_path / "run.pt")
    assert weights(run) == before


@pytest.mark.parametrize("content", [b"", b"no file of torch", None])
def test_what_is_no_checkpoint_is_named(tmp_path, content):
    file = tmp_path / "run.pt"
    make().train(1).save(file)
    file.write_bytes(file.read_bytes()[:1000] if content is None else content)
    with pytest.raises(ValueError, match=r"run.pt is not a checkpoint of a training, or not a whole one"):
        make().load(file)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"the folder .*none does not exist"):
        make().save(tmp_path / "none" / "run.pt")


def test_a_record_compares_by_what_it_saw():
    [record] = make().train(1).history
    assert replace(record) == record != replace(record, kl=9.0)
