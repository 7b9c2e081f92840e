"""Settings of `pytest bench/`: a few short rounds, unless the command line asks for others."""

# pytest-benchmark's own defaults take at least five rounds and a second per case, 10 minutes for the quick ones.
MIN_ROUNDS, MAX_SECONDS = 3, 0.2


def pytest_configure(config):
    option = config.option
    given = {argument.split("=")[0] for argument in config.invocation_params.args if isinstance(argument, str)}
    if "--benchmark-min-rounds" not in given:
        option.benchmark_min_rounds = MIN_ROUNDS
    if "--benchmark-max-time" not in given:
        option.benchmark_max_time = MAX_SECONDS
    if "--benchmark-disable-gc" not in given:
        option.benchmark_disable_gc = True
