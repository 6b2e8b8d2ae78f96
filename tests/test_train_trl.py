"""TRL's GRPOTrainer and the kit's loop on the same texts: the same numbers, and after three steps the same weights."""

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from refkl_lib import TrainRun, add_lora, create_reference, load_model, load_tokenizer
from refkl_lib.train import run as loop
from refkl_lib.train.texts import Texts

PROMPTS, GROUP, TOKENS, STEPS, BETA = ["ab", "the c"], 8, 6, 4, 2.0


TEXTS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


def low_bytes(text):
    return sum(ord(letter) < 64 for letter in text) / max(len(text), 1)


def make_policy(lora):
    policy = load_model("pocket")
    if lora:
        torch.manual_seed(0)
        policy = add_lora(policy, rank=4)
    return policy


def configuration(folder, **options):
    """What the kit's loop does, said in TRL's words."""
    return GRPOConfig(
        output_dir=folder,
        beta=BETA,
        loss_type="dr_grpo",  # sums over a text, so the length is not divided by
        scale_rewards="none",  # nor is the deviation of a group
        num_generations=GROUP,
        per_device_train_batch_size=GROUP * len(PROMPTS),
        max_completion_length=TOKENS,
        max_steps=STEPS,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **options,
    )


def texts_of(inputs, tokenizer):
    """TRL's texts as the kit's."""
    tokens, mask = inputs["completion_ids"], inputs["completion_mask"]
    attention = torch.cat([inputs["prompt_mask"], mask], 1)
    given = {"input_ids": torch.cat([inputs["prompt_ids"], tokens], 1), "attention_mask": attention}
    given |= {"position_ids": (attention.cumsum(1) - 1).clamp(min=0), "logits_to_keep": tokens.shape[1] + 1}
    return Texts(given, tokens, mask, tokenizer.batch_decode(tokens, skip_special_tokens=True))


def trained_by_trl(policy, folder, **options):
    """Train `policy`, and return the texts of each step, its loss, and what TRL logged."""
    tokenizer, texts = load_tokenizer("pocket"), []
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=lambda completions, **_: [low_bytes(text) for text in completions],
        args=configuration(folder, **options),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
    )
    compute = trainer._compute_loss

    def heard(model, inputs):
        order = inputs["prompt_mask"].sum(1).argsort()  # TRL has shuffled what the groups wrote
        texts.append(texts_of({name: inputs[name][order] for name in TEXTS}, tokenizer))
        return compute(model, inputs)

    trainer._compute_loss = heard
    trainer.train()
    return texts, [entry for entry in trainer.state.log_history if "reward" in entry]


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """Train in TRL, then in the kit on the same texts; return how far apart the weights are, and both logs.

    How far apart is said as a share of how far they moved. Adam makes a full step even of a gradient that is only
    rounding, so it is not 0.
    """

    def compare(lora, theirs, ours):
        policy, mine, start = (make_policy(lora) for _ in range(3))
        rate = 1e-2 if lora else 1e-3
        texts, logged = trained_by_trl(policy, tmp_path, learning_rate=rate, **theirs)
        assert len(texts) == STEPS
        reference = create_reference(mine, "adapter" if lora else "clone")
        options = {"beta": BETA, "group": GROUP, "new_tokens": TOKENS, "learning_rate": rate} | ours
        run = TrainRun(mine, reference, load_tokenizer("pocket"), PROMPTS, low_bytes, **options)
        monkeypatch.setattr(loop, "write_texts", lambda *_: texts[len(run.history)])
        run.train(STEPS)
        apart, moved = (flat(policy) - flat(mine)).norm(), (flat(policy) - flat(start)).norm()
        return (apart / moved).item(), run.history, logged

    return compare


def flat(policy):
    return torch.cat([weight.detach().flatten() for weight in policy.parameters() if weight.requires_grad])


@pytest.mark.parametrize(
    ("lora", "theirs", "ours"),
    [
        (True, {}, {"kl": "k3", "ratio": True}),  # TRL's default
        (False, {}, {"kl": "k3", "ratio": True}),
        (True, {"use_bias_correction_kl": False}, {"kl": "k3"}),
    ],
)
def test_the_same_texts_give_the_same_numbers_and_weights(compared, lora, theirs, ours):
    apart, history, logged = compared(lora, theirs, ours)
    for record, entry in zip(history, logged, strict=True):
        assert record.reward == pytest.approx(entry["reward"], rel=1e-3)  # TRL logs four digits
        assert record.loss / TOKENS == pytest.approx(entry["loss"], rel=5e-3, abs=1e-6)  # it divides by the length
        assert record.entropy == pytest.approx(entry["entropy"], rel=1e-3)
    assert history[-1].loss > 0.01
    assert apart < 0.02


def test_k2_has_the_gradient_of_trls_weighted_k3(compared):
    apart, *_ = compared(True, {}, {"kl": "k2"})
    assert apart < 0.02


@pytest.mark.parametrize("ours", [{"kl": "k3"}, {"beta": 2 * BETA, "kl": "k2"}, {"kl": "k1", "place": "reward"}])
def test_another_penalty_gives_other_weights(compared, ours):
    apart, *_ = compared(True, {}, ours)
    assert apart > 0.1
