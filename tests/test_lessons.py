"""Exercises: the solution passes, each mistake gets its own name, and nothing that a learner does breaks a notebook."""

import contextlib
import copy
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from IPython.lib.pretty import pretty
from torch import Tensor

from refkl_lib import check, hint, solution
from refkl_lib.lessons import adapter, capstone, choose, clone, course, probes, timeout, why, zero3
from refkl_lib.lessons import check as check_module
from refkl_lib.lessons.kl import k3, masked_mean, penalised_reward, token_kl
from refkl_lib.units import WIDTH

SPECS = {spec.id: spec for spec in course.exercises().values()}
MISTAKES = [
    pytest.param(spec, mistake, id=f"{spec.id}-{mistake.says}") for spec in SPECS.values() for mistake in spec.mistakes
]


def clone_but(spoil):
    """Return a function that makes a right copy and then does something wrong to it or to the policy."""

    def create_reference_model(policy):
        reference = clone.create_reference_model(policy)
        spoil(reference, policy)
        return reference

    return create_reference_model


EVEN_AND_STEEP = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
PADDED = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]), torch.zeros(1, 2, 2), torch.tensor([[1, 0]])
TWO_TOKENS = *PADDED[:2], torch.ones(1, 2)

# Wrong in ways that have no name; "05.k3" and the others are what a learner should write.
MUTANTS = {
    "01.leash": {
        "a tenth of beta": lambda q, r, beta: why.best_policy(q, r, beta / 10),
        "logits of the reference": lambda q, r, beta: why.best_policy(q.exp(), r, beta),
        "clamped": lambda q, r, beta: why.best_policy(q, r, beta).clamp(min=-3),
        "centred reward squared": lambda q, r, beta: why.best_policy(q, (r - r.mean()).square(), beta),
        "one word": lambda q, r, beta: why.best_policy(q, r, beta)[:, :1],
        "factor clamped": lambda q, r, beta: why.best_policy(q, (r / beta).clamp(max=80), 1.0),
        "reference detached": lambda q, r, beta: why.best_policy(q.detach(), r, beta) + 0 * q,
    },
    "01.objective": {
        "beta squared": lambda k, r, m, beta: why.leashed_loss(k, r, m, beta * beta),
        "a mean of means": lambda k, r, m, beta: ((beta * k - r) * m).sum(-1).div(m.sum(-1)).mean(),
        "KL clamped": lambda k, r, m, beta: why.leashed_loss(k.clamp(max=0.5), r, m, beta),
        "reward over KL": lambda k, r, m, beta: -(r / (beta * k))[m.bool()].mean(),
        "padded KL": lambda k, r, m, beta: beta * k.mean() - r[m.bool()].mean(),
        "half a gradient": lambda k, r, m, beta: (
            why.leashed_loss(k, r, m, beta) / 2 + why.leashed_loss(k.detach(), r, m, beta) / 2
        ),
    },
    "01.sampled_kl": {
        "never negative": lambda p, q, m: why.sampled_kl(p, q, m).clamp(min=0),
        "first text": lambda p, q, m: why.sampled_kl(p[:1], q[:1], m[:1]),
        "k3": lambda p, q, m: (k3(p, q) * m).sum(-1).mean(),
        "weighted again": lambda p, q, m: (p.exp() * (p - q) * m).sum(-1).mean(),
        "last token left out": lambda p, q, m: why.sampled_kl(p[:, :-1], q[:, :-1], m[:, :-1]),
        "a mean of means": lambda p, q, m: ((p - q) * m).sum(-1).div(m.sum(-1)).mean(),
    },
    "02.clone": {
        "one weight of the policy's": clone_but(
            lambda reference, policy: setattr(reference.norm.weight, "data", policy.norm.weight.data)
        ),
        "untied": clone_but(lambda reference, _: setattr(reference, "head", copy.deepcopy(reference.head))),
        "one weight moved": clone_but(lambda reference, _: reference.norm.bias.add_(1e-6)),
        "buffers at their start": clone_but(lambda reference, _: reference.norm.reset_running_stats()),
        "the policy thawed": clone_but(lambda _, policy: policy.requires_grad_()),
    },
    "02.sync": {
        "half": lambda p, r, alpha: clone.synced(p, r, 0.5),
        "alpha squared": lambda p, r, alpha: clone.synced(p, r, alpha * alpha),
        "minus": lambda p, r, alpha: ((1 - alpha) * r - alpha * p).detach(),
        "geometric": lambda p, r, alpha: (r.abs() ** (1 - alpha) * p.abs() ** alpha).detach(),
        "averaged": lambda p, r, alpha: clone.synced(p, r, alpha).mean(),
    },
    "02.bytes": {
        "one storage too many": lambda tensors: clone.bytes_of(tensors) + 4,
        "the first tensor": lambda tensors: tensors[0].nbytes,
        "the first two tensors": lambda tensors: clone.bytes_of(tensors[:2]),
        "bits": lambda tensors: 8 * clone.bytes_of(tensors),
        "two bytes an element": lambda tensors: sum(2 * t.numel() for t in tensors),
    },
    "04.owner": {
        "the last rank": lambda index, numel, ranks: ranks - 1,
        "from the end": lambda index, numel, ranks: ranks - 1 - zero3.owner_of(index, numel, ranks),
        "rounded to nearest": lambda index, numel, ranks: index // max(round(numel / ranks), 1),
        "never the last": lambda *given: min(zero3.owner_of(*given), given[2] - 2),
    },
    "04.bytes": {
        "one weight left out": lambda numels, ranks, size: zero3.rank_bytes(numels[1:], ranks, size),
        "one more each": lambda numels, ranks, size: sum(n // ranks + 1 for n in numels) * (size + 1),
        "padded to even pieces": lambda ns, ranks, size: sum(-(-n // ranks) + -(-n // ranks) % 2 for n in ns) * size,
    },
    "04.reference_config": {
        "no precision": lambda job: {k: v for k, v in zero3.reference_config(job).items() if k != "bf16"},
        "stage 2": lambda job: {k: v for k, v in copy.deepcopy(job).items() if k not in ("optimizer", "scheduler")},
        "nothing else": lambda job: {**zero3.reference_config(job), "zero_optimization": {"stage": 3}},
        "a scheduler without an optimizer": lambda job: {**zero3.reference_config(job), "scheduler": None},
        "optimizer taken for granted": lambda job: {
            k: v for k, v in zero3.reference_config({**job, "x": job["optimizer"]}).items() if k != "x"
        },
    },
    "03.lora_layer": {
        "scale squared": lambda x, W, A, B, a, on: adapter.lora_layer(x, W, A, B, a * a / len(A), on),
        "half a switch": lambda x, W, A, B, a, on: adapter.lora_layer(x, W, A, B, a if on else a / 2, True),
        "scaled weight": lambda x, W, A, B, a, on: adapter.lora_layer(x, a / len(A) * W, A, B, a, on),
        "first rank": lambda x, W, A, B, a, on: adapter.lora_layer(x, W, A[:1], B[:, :1], a, on),
        "half a gradient": lambda x, W, A, B, a, on: x @ W.T + adapter.lora_layer(x.detach(), 0 * W, A, B, a, on),
    },
    "03.share": {
        "rank squared": lambda ws, rank, base: adapter.adapter_share(ws, rank * rank, base),
        "with a bias": lambda ws, rank, base: adapter.adapter_share(ws, rank, base) + 1,
        "the longer side": lambda ws, rank, base: 100 * sum(rank * max(w.shape) for w in ws) / base,
        "a mean": lambda ws, rank, base: adapter.adapter_share(ws, rank, base) / len(ws),
        "rounded": lambda ws, rank, base: round(adapter.adapter_share(ws, rank, base)),
    },
    "03.reference_pass": {
        "the policy as it is": lambda policy, inputs: policy(**inputs).logits,
        "log-probs": lambda policy, inputs: adapter.reference_logits(policy, inputs).log_softmax(-1),
        "only detached": lambda policy, inputs: adapter._with_a_gradient(policy, inputs).detach() + 0.1,
        "on after an off one": lambda policy, inputs: (
            adapter.reference_logits(policy, inputs) + adapter._with_the_adapter_on(policy, inputs)
        ),
        "the last token": lambda policy, inputs: adapter.reference_logits(policy, inputs)[:, -1:],
    },
    "05.k3": {
        "clamped": lambda p, q: k3(p, q).clamp(max=0.25),
        "one sign": lambda p, q: torch.expm1(q - p) + (q - p),
        "averaged": lambda p, q: k3(p, q).mean(),
        "half": lambda p, q: k3(p, q) / 2,
        "float64": lambda p, q: k3(p, q).double(),
        "half a gradient": lambda p, q: torch.expm1((q - p).detach()) - (q - p),
        "series of three terms": lambda p, q: (q - p) ** 2 / 2 + (q - p) ** 3 / 6 + (q - p) ** 4 / 24,
    },
    "05.direction": {
        "both directions": lambda p, q: (token_kl(p, q) + token_kl(q, p)) / 2,
        "temperature": lambda p, q: token_kl(p / 2, q / 2),
        "logits not normalised": lambda p, q: (p.softmax(-1) * (p - q)).sum(-1),
        "over all": lambda p, q: token_kl(p, q).sum(),
        "clamped": lambda p, q: token_kl(p, q).clamp(max=1.0),
        "epsilon": lambda p, q: (p.softmax(-1) * ((p.softmax(-1) + 1e-8).log() - (q.softmax(-1) + 1e-8).log())).sum(-1),
    },
    "05.masked_mean": {
        "one token too many": lambda v, mask: v[mask.bool()].sum() / (mask.sum() + 1),
        "median": lambda v, mask: v[mask.bool()].median(),
        "by row": lambda v, mask: torch.where(mask.bool(), v, 0.0).sum(-1) / mask.sum(-1),
        "first row": lambda v, mask: v[0][mask[0].bool()].mean(),
        "NaN counted as one": lambda v, mask: v.nan_to_num(1.0)[mask.bool() | v.isnan()].mean(),
        "kept dimension": lambda v, mask: masked_mean(v, mask)[None],
    },
    "05.reward": {
        "beta squared": lambda p, q, r, b: (r - b * b * (p - q)).detach(),
        "never a bonus": lambda p, q, r, b: (r - b * (p - q).clamp(min=0)).detach(),
        "scaled reward": lambda p, q, r, b: (b * r - (p - q)).detach(),
        "averaged": lambda p, q, r, b: (r - b * (p - q).mean()).detach(),
        "per sequence": lambda p, q, r, b: (r - b * (p - q)).sum(-1).detach(),
    },
    "06.hand": {
        "bits": lambda f, t, c: 8 * choose.held_bytes(f, t, c),
        "a clone that trains": lambda f, t, c: choose.held_bytes(f, t + c, 0),
        "one byte more": lambda f, t, c: choose.held_bytes(f, t, c) + 1,
        "all weights alike": lambda f, t, c: 2 * (f + t + c),
    },
    "06.largest": {
        "half the memory": lambda models, needed, memory: choose.largest_that_fits(models, needed, memory // 2),
        "never anything": lambda models, needed, memory: "nothing",
        "by name": lambda models, needed, memory: max(models),
        "needs a little more": lambda models, needed, memory: choose.largest_that_fits(
            models, {name: need + 2 for name, need in needed.items()}, memory
        ),
    },
    "06.misadvice": {
        "never": lambda parameters, memory, needed: False,
        "always": lambda parameters, memory, needed: True,
        "ten times the parameters": lambda p, memory, needed: choose.misled(10 * p, memory, needed),
        "memory halved": lambda p, memory, needed: choose.misled(p, memory // 2, needed),
    },
    "07.advantages": {
        "the others' mean": lambda r: r - (r.sum(1, keepdim=True) - r) / (r.shape[1] - 1),
        "the group's median": lambda r: r - r.median(1, keepdim=True).values,
        "the first of the group": lambda r: r - r[:, :1],
        "never a bad one": lambda r: capstone.group_advantages(r).clamp(min=0),
        "squared": lambda r: capstone.group_advantages(r) * capstone.group_advantages(r).abs(),
        "half a gradient": lambda r: r - r.mean(1, keepdim=True).detach(),
    },
    "07.policy_loss": {
        "good texts alone": lambda p, a, m: capstone.policy_loss(p, a.clamp(min=0), m),
        "signs alone": lambda p, a, m: capstone.policy_loss(p, a.sign(), m),
        "the last token left out": lambda p, a, m: capstone.policy_loss(p[:, :-1], a, m[:, :-1]),
        "one loss a text": lambda p, a, m: -(a * torch.where(m.bool(), p, 0.0).sum(1)),
        "half a gradient": lambda p, a, m: (
            capstone.policy_loss(p, a, m) / 2 + capstone.policy_loss(p.detach(), a, m) / 2
        ),
    },
    "07.text_reward": {
        "beta squared": lambda r, p, q, m, b: capstone.text_reward(r, p, q, m, b * b),
        "never a bonus": lambda r, p, q, m, b: r - b * torch.where(m.bool(), p - q, 0.0).sum(1).clamp(min=0),
        "scaled reward": lambda r, p, q, m, b: capstone.text_reward(b * r, p, q, m, 1.0),
        "no penalty": lambda r, p, q, m, b: r.detach(),
        "the first token": lambda r, p, q, m, b: capstone.text_reward(r, p[:, :1], q[:, :1], m[:, :1], b),
    },
    "08.direction": {
        "never sure": lambda kl: "neither",
        "always the second": lambda kl: "q‖p",
        "by size": lambda kl: "p‖q" if kl(*EVEN_AND_STEEP) > 0.4 else "q‖p",
        "zero is a KL": lambda kl: "p‖q" if kl(*EVEN_AND_STEEP) == 0 else probes.direction_of(kl),
    },
    "08.judge": {
        "no ratio": lambda before, after: probes.judge(before, before * 7.5 / 14),
        "half of what was said": lambda before, after: probes.judge(before / 2, after / 2),
        "before alone": lambda before, after: "holds" if abs(before - 14) <= 1.4 else "does not hold",
        "the second verdict for all": lambda before, after: "holds with a condition",
        "a ratio of one half": lambda before, after: probes.judge(before, 7.5 / 7 * after),
    },
    "08.padding": {
        "a sum is wrong": lambda kl_of: probes.padding_counts(kl_of) or bool(kl_of(*TWO_TOKENS) > 0.5),
        "much is wrong": lambda kl_of: bool(kl_of(*PADDED) > 0.45),
        "little is wrong": lambda kl_of: bool(kl_of(*PADDED) < 0.35),
    },
}


@pytest.fixture(autouse=True)
def _own_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REFKL_DATA", str(tmp_path / "data"))


def test_the_course_has_the_exercises_of_each_notebook():
    assert SPECS.keys() == MUTANTS.keys()
    assert {name.split(".")[0] for name in SPECS} == course.FILES.keys()


@pytest.mark.parametrize("name", SPECS)
def test_a_solution_passes(name):
    verdict = check(name, SPECS[name].solution)
    assert verdict.solved
    assert repr(verdict) == f'{name}: solved. solution("{name}") shows one way to write it.'


@pytest.mark.parametrize("name", SPECS)
def test_the_oracle_gives_the_answer_found_by_hand(name):
    case = SPECS[name].by_hand
    torch.testing.assert_close(SPECS[name].oracle(*case.args).float(), case.want)


@pytest.mark.parametrize("name", SPECS)
def test_the_text_of_a_solution_runs_and_passes(name):
    text, spec, space = str(solution(name)), SPECS[name], {}
    exec(text, space)
    assert "    # " in text  # the comment on why
    assert check(name, space[spec.solution.__name__]).solved


@pytest.mark.parametrize(("spec", "mistake"), MISTAKES)
def test_a_mistake_is_called_by_its_name(spec, mistake):
    verdict = check(spec.id, mistake.function)
    assert not verdict.solved
    assert verdict.message == (
        f"{spec.id}: this looks like {mistake.says}.\n"
        f"  Look at line {mistake.line} of the idea: {spec.idea[mistake.line - 1]}"
    )


@pytest.mark.parametrize("name", SPECS)
def test_what_is_said_of_a_stub_fits_a_narrow_window(name):
    verdict = check(name, ...)
    assert max(map(len, repr(verdict).splitlines())) <= WIDTH
    assert repr(verdict).split() == verdict.message.split()


@pytest.mark.parametrize("name", SPECS)
def test_no_two_mistakes_have_one_name(name):
    names = [mistake.says for mistake in SPECS[name].mistakes]
    assert len(set(names)) == len(names) >= 3


@pytest.mark.parametrize(("name", "mutant"), [(name, mutant) for name in MUTANTS for mutant in MUTANTS[name]])
def test_a_mutant_is_rejected_without_a_name(name, mutant):
    verdict = check(name, MUTANTS[name][mutant])
    assert not verdict.solved
    assert "looks like" not in verdict.message


def untouched(*_):
    """Return nothing, as a stub does."""
    ...


def raises_not_implemented(*_):
    raise NotImplementedError


@pytest.mark.parametrize(
    "stub", [untouched, raises_not_implemented, lambda *_: ..., lambda *_: NotImplemented, ..., None]
)
@pytest.mark.parametrize("name", SPECS)
def test_a_stub_is_not_solved_yet(name, stub):
    verdict = check(name, stub)
    assert not verdict.solved
    assert verdict.message.startswith(f"{name}: not solved yet")
    assert verdict.message.endswith(SPECS[name].idea[-1])


def test_no_policy_is_better_than_the_best():
    generator = torch.Generator().manual_seed(0)
    ref, reward, beta = why.LEASH.draw(generator)

    def objective(log_probs):
        probs = log_probs.exp()
        return (probs * (reward - beta * (log_probs - ref))).sum(-1)

    best = why.best_policy(ref, reward, beta)
    for _ in range(100):
        other = (best + 0.1 * torch.randn(best.shape, generator=generator)).log_softmax(-1)
        assert bool((objective(other) < objective(best)).all())


def test_an_unknown_exercise_is_an_error_that_lists_the_known():
    for function in (hint, solution, lambda name: check(name, k3)):
        with pytest.raises(ValueError, match=r"no exercise '05\.k4'; there are .*05\.k3, "):
            function("05.k4")


def said(answer, name="05.k3"):
    verdict = check(name, answer)
    assert not verdict.solved
    return verdict.message


def two_deep(log_probs, ref_log_probs):
    def inner():
        return log_probs @ ref_log_probs + {}["beta"]

    return k3(log_probs, ref_log_probs) + inner() if log_probs.numel() > 2 else k3(log_probs, ref_log_probs)


def test_a_learners_exception_is_shown_short_and_as_theirs():
    message = said(two_deep)
    first, second = message.split("\n")
    assert first.startswith("05.k3: your code raised RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert second.endswith('return log_probs @ ref_log_probs + {}["beta"]')


def test_an_exception_inside_torch_points_at_the_learners_line():
    def reshaped(log_probs, ref_log_probs):
        return F.kl_div(log_probs, ref_log_probs, reduction="mena")

    assert said(reshaped).endswith('return F.kl_div(log_probs, ref_log_probs, reduction="mena")')


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda p, q: 0.5, "your function returned a float; it must return a tensor."),
        (lambda p, q: k3(p, q).numpy(), "your function returned a ndarray; it must return a tensor."),
        (lambda p, q: k3(p, q)[0], "your answer has the shape (2,); it must be (1, 2)."),
        (lambda p, q: k3(p, q).half(), "your answer has the dtype torch.float16; it must be torch.float32."),
        (lambda p, q: k3(p, q).to("meta"), "your answer has the device meta; it must be cpu."),
        (lambda p, q: k3(p, q).to_sparse(), "your answer has the layout torch.sparse_coo; it must be torch.strided."),
        (lambda p, q: k3(p, q.sub_(p) + p), "your function changed its argument 2"),
        (lambda p, q: k3(p, q).detach(), "the numbers are right, but your answer has lost its gradient"),
        (lambda p, q: torch.expm1((q - p).detach()) - (q - p), "the numbers are right, but their gradient is not"),
        (lambda p, q: k3(p, q) + 0.1, "on probabilities 1/2 and 1/4, and 1/4 and 1/2, of policy and reference, your "
         "answer is [0.2931, 0.4069]; it must be [0.1931, 0.3069]."),
        (lambda: 0, "your code raised TypeError: "),
        (lambda p, q: sys.exit(1), "your code raised SystemExit: 1"),
        (lambda p, q: torch.multinomial(p.long(), 1), "your code raised "),
        (lambda p, q: p.long().log_softmax(-1), "your code raised NotImplementedError: "),
        (torch.zeros(1), "give check the function itself, not what it returned (this is a Tensor)."),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_answers_form_has_its_own_sentence(answer, sentence):
    assert sentence in said(answer)


def test_an_answer_that_must_not_carry_a_gradient_says_so(monkeypatch):
    nameless = replace(SPECS["05.reward"], mistakes=())
    monkeypatch.setattr(check_module, "find", lambda name: nameless)
    attached = said(lambda p, q, reward, beta: reward - beta * (p - q), "05.reward")
    assert "your answer still carries a gradient, and it must not: detach it." in attached


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (
            clone_but(lambda reference, policy: (reference.norm.requires_grad_(), policy.dropout.eval())),
            "02.clone: on a model with tied weights, a batch norm and dropout, which trains, this is not so: "
            "none of its weights requires grad; the policy's modules are in the modes they were in.",
        ),
        (
            clone_but(lambda reference, policy: policy.requires_grad_()),
            "02.clone: on a model of which a part is frozen, this is not so: the policy's weights train as before.",
        ),
        (lambda model: (model, 1), "your function returned a tuple; it must return a module: the copy."),
        (lambda model: model.weight, "your code raised AttributeError: '_Tied' object has no attribute 'weight'"),
    ],
)
def test_of_a_function_of_models_the_facts_that_fail_are_said(answer, sentence):
    assert sentence in said(answer, "02.clone")


def test_an_answer_of_a_wrong_type_is_told_so_by_what_asks():
    message = said(lambda tensors: clone.bytes_of(tensors) / 1, "02.bytes")
    assert message == "02.bytes: your function returned a float; bytes are counted: return an int."


def test_an_exercise_that_asks_without_facts_compares_numbers():
    message = said(lambda tensors: clone.bytes_of(tensors) + 4, "02.bytes")
    assert message.endswith("and its copy in bfloat16, your answer is 40; it must be 36.")


def test_a_case_that_is_only_hard_says_that_the_rest_is_right():
    message = said(lambda v, m: v[m.bool()].mean() if not v.isnan().any() else v[m.bool()].sum(), "05.masked_mean")
    assert "right on ordinary numbers, but not here: on NaN in the padding, your answer is 20; it must be 4." in message


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_context_around_check_changes_nothing(context):
    with context():
        assert check("05.k3", k3).solved
        assert check("05.reward", penalised_reward).solved


def endless(*_: Tensor) -> None:
    while True:
        with contextlib.suppress(Exception):
            time.sleep(0.001)


@pytest.mark.parametrize("loop", [endless, lambda *_: [None for _ in iter(int, 1)]])
def test_an_endless_loop_ends(monkeypatch, loop):
    monkeypatch.setattr(check_module, "SECONDS", 0.2)
    before = threading.active_count()
    assert "your function had not returned after 0.2 s" in said(loop)
    assert threading.active_count() == before


def test_a_call_that_cannot_be_ended_does_not_keep_the_learner(monkeypatch):
    monkeypatch.setattr(check_module, "SECONDS", 0.2)
    monkeypatch.setattr(timeout, "_GRACE_SECONDS", 0.01)
    started = threading.Event()
    assert "had not returned" in said(lambda *_: (started.set(), time.sleep(2)))
    assert started.is_set()


def test_hints_come_one_by_one_and_then_stay(monkeypatch):
    monkeypatch.setattr(course, "_hints_given", course.Counter())
    for name, spec in SPECS.items():
        texts = [str(hint(name)) for _ in range(4)]
        for count in (1, 2, 3):
            shown = texts[count - 1]
            assert [text in shown for text in spec.hints] == [number < count for number in range(3)]
        assert f'solution("{name}")' in texts[2]
        assert texts[3] == texts[2]


def test_a_plain_script_prints_the_messages(tmp_path):
    script = tmp_path / "lesson.py"
    script.write_text(
        "import torch\nfrom refkl_lib import check, hint, predict, reveal\n"
        "def k3(log_probs, ref_log_probs): ...\n"
        "print(check('05.k3', k3))\nprint(hint('05.k3'))\nprint(predict('q', 2))\nprint([reveal('q', 3)])\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, encoding="utf-8")
    assert run.stderr == ""
    assert run.stdout.startswith("05.k3: not solved yet (your function returned None). The idea:\n  1. r = ")
    assert "\nHint 1 of 3: What is k3 where" in run.stdout
    assert run.stdout.endswith("  measured / guess  1.50]\n")


def test_a_message_is_what_jupyter_shows():
    verdict = check("05.k3", untouched)
    assert pretty(verdict) == verdict.message
    assert pretty(solution("05.k3")) == str(solution("05.k3"))
