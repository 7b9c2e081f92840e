"""How a run ends: exit codes of `nearpeak bench`, `check` and `inspect`, and the error that is the user's to mend."""

# Of several, the first that applies.
INTERRUPTED = 130
WRONG = 1  # a kernel's result was less exact than the rule allows
REQUEST = 2  # the request could not be served
SELFTEST = 3  # the selftest missed a goal
CRASHED = 6  # a kernel raised, crashed, did not compile, or did not return in time
REGRESSION = 4  # a kernel has become slower
GATE = 7  # a condition of --fail-on holds
UNSTABLE = 5  # noise hides whether one has


class UsageError(ValueError):
    """A request that cannot be served; its message is one line that says what to do."""
