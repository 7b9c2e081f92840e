"""`nearpeak bench bisect`, on a repository of a user's that holds one kernel in Python."""

import pathlib
import subprocess

import pytest
from nearpeak_bench import bisection_step, duel, exits, suites, verdicts
from nearpeak_bench.bisection_step import BAD, GOOD, SKIP
from toys import invoke, noisy

ROW = "rms_norm-16x768-float32-forward"
KERNEL = """
import torch
from nearpeak_bench import norm


@norm.rms_norm.implementation("mine")
def _(x, weight):
    def mine():
        for _ in range({times}):
            y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.EPS) * weight
        return y * {factor}

    return mine
"""


def git(*arguments):
    identity = "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"
    return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def commits(tmp_path, monkeypatch):
    """Makes a repository with one commit per text of mine.py, and returns their names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suites, "added", [])
    rms_norm = suites.find(ROW).operator
    monkeypatch.setattr(rms_norm, "implementations", dict(rms_norm.implementations))

    def make(*texts):
        git("init", "--quiet")
        names = []
        for number, text in enumerate(texts):
            pathlib.Path("mine.py").write_text(text)
            git("add", "mine.py")
            git("commit", "--quiet", "--allow-empty", "-m", f"change {number}")
            names.append(git("rev-parse", "HEAD"))
        return names

    return make


def bisect(good, bad, *options):
    return invoke("bench", "bisect", good, bad, "--add", "mine.py", "--case", ROW, *options)


def test_the_commit_that_made_a_row_slower_is_found(commits):
    right, slow = (KERNEL.format(times=times, factor=1) for times in (1, 8))
    names = commits(right, f"{right}# again", slow)
    result = bisect(names[0], names[-1])
    assert result.exit_code == 0, result.output
    assert f"the first bad commit is\n{names[2]}" in result.stdout
    assert "change 1: good" in result.stdout
    assert len(git("worktree", "list").splitlines()) == 1, "the temporary work trees are gone"
    assert git("rev-parse", "HEAD") == names[-1], "the user's checkout is as it was"


@pytest.mark.slow
def test_commits_that_cannot_be_told_apart_are_all_named(commits):
    right, wrong = (KERNEL.format(times=1, factor=factor) for factor in (1, 1.1))
    names = commits(right, "1 +", wrong)
    result = bisect(names[0], names[-1])
    assert result.exit_code == exits.UNSTABLE, result.output
    assert "BAD: wrong: result[0]: mean error" in result.stdout
    assert "change 1: skipped" in result.stdout
    assert all(name in result.stdout for name in names[1:])
    assert names[0] not in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        pytest.param(1, 1, "BAD is not slower than GOOD", id="same"),
        pytest.param(1.1, 1, "GOOD itself is wrong", id="good is wrong"),
    ],
)
def test_what_is_no_regression_is_said(commits, good, bad, message):
    names = commits(*(KERNEL.format(times=1, factor=factor) for factor in (good, bad)))
    result = bisect(*names)
    assert result.exit_code == exits.REQUEST
    assert message in result.stderr


@pytest.mark.parametrize(("arguments", "message"), [
    (["bisect", "HEAD"], "bisect takes two commits"),
    (["bisect", "HEAD", "HEAD", "--filter", ROW], "is not nearpeak's repository"),
    (["bisect", "no-such", "HEAD", "--add", "mine.py", "--filter", ROW], "git rev-parse"),
    (["bisect", "HEAD", "HEAD", "--add", "mine.py", "--filter", "rms_norm-16x768"], "must leave one row of mine, not "),
])  # fmt: skip
def test_wrong_requests_get_one_line(commits, arguments, message):
    commits(KERNEL.format(times=1, factor=1))
    result = invoke("bench", *arguments)
    assert (result.exit_code, len(result.stderr.splitlines())) == (exits.REQUEST, 1)
    assert message in result.stderr


def changed(scale, sigma=0.01):
    return duel.Outcome("ok", "", verdicts.change(noisy(1, sigma), scale * noisy(1, sigma, seed=2), 0.05))


BROKEN = duel.Outcome("crashed", "SIGSEGV")


@pytest.mark.parametrize(("middle", "outcome", "code"), [
    pytest.param(0.9, changed(1.0), GOOD, id="as fast"),
    pytest.param(0.9, changed(0.8), BAD, id="slower"),
    pytest.param(0.9, changed(0.95), GOOD, id="a little slower: on GOOD's side of the middle"),
    pytest.param(0.9, changed(0.9, sigma=0.3), SKIP, id="noise hides it"),
    pytest.param(0.9, BROKEN, SKIP, id="crash while one looks for slowness"),
    pytest.param(None, BROKEN, BAD, id="crash while one looks for it"),
    pytest.param(None, changed(0.5), GOOD, id="slow while one looks for a crash"),
    pytest.param(None, duel.Outcome(duel.UNUSABLE, "no module"), SKIP, id="cannot be run"),
])  # fmt: skip
def test_exit_codes_are_those_that_git_knows(middle, outcome, code):
    search = bisection_step.Search("good", duel.Contest(ROW, "mine", [], 1.0), 0.05, middle)
    assert bisection_step.verdict_of(outcome, search) == code
    assert {GOOD, BAD, SKIP} == {0, 1, 125}


def test_what_does_not_build_is_skipped(tmp_path):
    (tmp_path / "setup.py").write_text("raise SystemExit('no compiler')")
    search = bisection_step.Search("good", duel.Contest(ROW, "mine", [], 1.0), 0.05, None)
    assert bisection_step.judge(tmp_path, search) == (SKIP, "does not build: no compiler")
