"""On which machine, and from which commit, a result comes."""

import pathlib
import subprocess

from nearpeak import system


def git_commit() -> str | None:
    """The commit of the checkout that this file lies in, with "+" if files differ from it; None without one."""

    def git(*arguments):
        command = ["git", "-C", str(pathlib.Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def describe() -> dict:
    return {**system.describe(), "commit": git_commit()}
