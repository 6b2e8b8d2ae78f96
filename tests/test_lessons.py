"""Exercises: the solution passes, each mistake gets its own name, and nothing that a learner does breaks a notebook."""

import contextlib
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
from refkl_lib.lessons import check as check_module
from refkl_lib.lessons import course, timeout
from refkl_lib.lessons.kl import EXERCISES, k3, masked_mean, penalised_reward, token_kl

SPECS = {spec.id: spec for spec in course.exercises().values()}
MISTAKES = [
    pytest.param(spec, mistake, id=f"{spec.id}-{mistake.says}") for spec in SPECS.values() for mistake in spec.mistakes
]

# Wrong in ways that have no name; "05.k3" and the others are what a learner should write.
MUTANTS = {
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
}


@pytest.fixture(autouse=True)
def _own_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REFKL_DATA", str(tmp_path / "data"))


def test_the_course_has_the_exercises_of_each_notebook():
    assert tuple(SPECS.values()) == EXERCISES
    assert SPECS.keys() == MUTANTS.keys()
    assert all(name.split(".")[0] in course.FILES for name in SPECS)


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


def test_an_unknown_exercise_is_an_error_that_lists_the_known():
    for function in (hint, solution, lambda name: check(name, k3)):
        with pytest.raises(ValueError, match=r"no exercise '05\.k4'; there are 05\.k3, "):
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
