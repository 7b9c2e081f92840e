"""What all tests share: the fixture `serving`, which runs a test on every implementation that this machine has."""

import nearpeak
import pytest
import torch
from nearpeak import backends


def _servings():
    """The reference, and the C++ kernels at each instruction set of this build; what cannot run says why."""
    yield pytest.param("reference", id="reference")
    if backends.native.missing:
        yield pytest.param("cpu", id="cpu", marks=pytest.mark.skip(reason=backends.native.missing))
    for name in backends.isas_built():
        supported = name in backends.isas_supported()
        marks = () if supported else pytest.mark.skip(reason=f"this processor cannot run {name} code")
        yield pytest.param(name, id=name, marks=marks)


@pytest.fixture(params=list(_servings()))
def serving(request):
    """Serve every nearpeak call of the test by one implementation; the value is its name.

    In one thread: on a busy machine two threads wait for each other at each of a test's thousand small operators
    (measured: 17 times slower). The tests of threads set their own number.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if request.param == "reference":
        with nearpeak.use_backend("reference"):
            yield request.param
    else:
        with nearpeak.use_backend("cpu"), nearpeak.use_isa(request.param):
            yield request.param
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill what torch.empty returns with NaN, so that an element which a kernel forgets to write shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    """Run each case on all servings in a row: then its plain and exact results can be computed once, and forgotten."""

    def case_of(item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return item.module, item.name.split("[")[0], *(str(v) for k, v in parameters.items() if k != "serving")

    first = {}
    for index, item in enumerate(items):
        first.setdefault(case_of(item), index)
    items.sort(key=lambda item: first[case_of(item)])
