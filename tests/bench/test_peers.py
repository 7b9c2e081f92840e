"""Other libraries' kernels as baselines: what this machine cannot run is absent, with the reason."""

import pytest
import torch
from nearpeak_bench import peers, suites
from nearpeak_bench.cases import Absent

PEERS = [
    (operator, implementation)
    for operator in suites.OPERATORS
    for implementation in operator.implementations.values()
    if implementation.prepare.__module__ == peers.__name__
]


@pytest.mark.parametrize(("operator", "peer"), PEERS, ids=lambda each: each.name)
def test_peers_say_why_they_are_absent_on_a_cpu(operator, peer):
    case = next(case for cases in suites.SUITES.values() for case in cases if case.operator is operator)
    with pytest.raises((Absent, ModuleNotFoundError)):
        case.bind(peer.prepare, case.inputs(torch.device("cpu")))
    assert peer.baseline


def test_every_peer_of_a_family_is_registered():
    assert {peer.name for _, peer in PEERS} >= {"Liger", "FlashInfer", "flash-attn", "xformers", "quack", "onnxruntime"}
