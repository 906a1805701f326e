from collections.abc import Sequence
from math import cos, pi, sqrt

import pytest
import torch
from decent_dp.topo import Edge, TopologyReg
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from averaging.topology import Group, group_of, groups

anyhow = settings(deadline=None, max_examples=50)  # a busy machine is no failure
ALL = ["complete", "ring", "one-peer-exp", "alternating-exp-ring"]


def names(n: int) -> list[str]:
    """Zero-padded, so that sorting them is sorting by number."""
    return [f"{index:03d}" for index in range(n)]


def of_two(n: int) -> list[list[str]]:
    """Machines with two members each, the last with one if n is odd."""
    return [names(n)[first:first + 2] for first in range(0, n, 2)]


def mixing(n: int, found: Sequence[Group]) -> Tensor:
    """W [n, n]: each takes the mean of its group."""
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for group in found:
        indices = torch.tensor([int(member) for member in group])
        matrix[indices[:, None], indices] = 1 / len(group)
    return matrix


def product(topology: str, n: int, steps: range, machines: list[list[str]] | None = None) -> Tensor:
    """W(last) ... W(first) - 1 1^T / n: what is left of the differences between the members."""
    total = torch.eye(n, dtype=torch.float64)
    for step in steps:
        total = mixing(n, groups(topology, names(n), step, machines)) @ total
    return total - 1 / n


def rate(matrix: Tensor, steps: int) -> float:
    """How the distance to consensus falls in the long run, per step, where `matrix` is of one whole period."""
    return float(torch.linalg.eigvals(matrix).abs().max() ** (1 / steps))


@st.composite
def some_machines(draw: st.DrawFn) -> list[list[str]]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=9))
    members = draw(st.permutations(names(sum(sizes))))
    return [members[sum(sizes[:index]):sum(sizes[:index + 1])] for index in range(len(sizes))]


@pytest.mark.parametrize("topology", ALL)
@anyhow
@given(machines=some_machines(), step=st.integers(0, 10_000))
def test_every_member_is_in_one_group(topology: str, machines: list[list[str]], step: int) -> None:
    members = [member for machine in machines for member in machine]
    found = groups(topology, members, step, machines)
    assert sorted(member for group in found for member in group) == sorted(members)
    assert all(member in group_of(member, found) for member in members)


@pytest.mark.parametrize("topology", ALL)
@anyhow
@given(machines=some_machines(), step=st.integers(0, 10_000), seed=st.integers(0, 1000))
def test_the_mean_stays_and_nobody_moves_away_from_it(topology: str, machines: list[list[str]], step: int,
                                                      seed: int) -> None:
    members = sorted(member for machine in machines for member in machine)
    matrix = mixing(len(members), groups(topology, members, step, machines))
    ones = torch.ones(len(members), dtype=torch.float64)
    torch.testing.assert_close(matrix @ ones, ones)
    torch.testing.assert_close(ones @ matrix, ones)
    assert torch.equal(matrix, matrix.T)
    values = torch.randn(len(members), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert (matrix @ values).var(correction=0) <= values.var(correction=0) + 1e-12


@pytest.mark.parametrize("topology", ALL)
@anyhow
@given(n=st.integers(1, 17), step=st.integers(0, 1000), data=st.data())
def test_the_order_in_which_members_are_known_does_not_matter(topology: str, n: int, step: int,
                                                              data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(names(n)))
    assert groups(topology, shuffled, step, of_two(n)) == groups(topology, names(n), step, of_two(n))


@pytest.mark.parametrize(("topology", "n", "of_a_machine"), [
    *(("complete", n, 1) for n in (2, 3, 7, 8)), *(("ring", n, 1) for n in (2, 4, 6, 10, 16)),
    *(("one-peer-exp", n, 1) for n in (2, 4, 8, 16, 32)),
    *(("alternating-exp-ring", n, size) for n, size in ((4, 2), (8, 2), (12, 3), (16, 2), (32, 4), (64, 4)))])
def test_groups_are_those_of_decent_dp(topology: str, n: int, of_a_machine: int) -> None:
    theirs = object.__new__(TopologyReg.registry[topology])  # its constructor needs as many processes
    theirs._world_size, theirs._local_world_size, theirs._n_nodes = n, of_a_machine, n // of_a_machine
    published: list[list[Edge]] = theirs._get_topo_edges()
    machines = [names(n)[first:first + of_a_machine] for first in range(0, n, of_a_machine)]
    for step in range(2 * len(published) + 1):
        edges = published[step % len(published)]
        assert [sorted(int(member) for member in group) for group in groups(topology, names(n), step, machines)
                ] == sorted(sorted(edge.ranks) for edge in edges)


@anyhow
@given(n=st.integers(1, 40), step=st.integers(0, 1000))
def test_complete_agrees_in_one_step(n: int, step: int) -> None:
    assert product("complete", n, range(step, step + 1)).abs().max() < 1e-12


@anyhow
@given(k=st.integers(1, 6), step=st.integers(0, 1000))
def test_one_peer_exp_of_two_to_the_k_agrees_in_k_steps_and_not_before(k: int, step: int) -> None:
    assert product("one-peer-exp", 2**k, range(step, step + k)).abs().max() < 1e-12
    assert torch.linalg.matrix_norm(product("one-peer-exp", 2**k, range(step, step + k - 1)), 2) > 0.99


@anyhow
@given(k=st.integers(1, 4), start=st.integers(0, 1000), of_a_machine=st.integers(2, 3))
def test_alternating_exp_ring_of_two_to_the_k_machines_agrees_in_2k_steps(k: int, start: int,
                                                                          of_a_machine: int) -> None:
    n = of_a_machine * 2**k
    machines = [names(n)[first:first + of_a_machine] for first in range(0, n, of_a_machine)]
    steps = range(2 * start, 2 * start + 2 * k)
    assert product("alternating-exp-ring", n, steps, machines).abs().max() < 1e-12


@anyhow
@given(n=st.integers(1, 17), step=st.integers(0, 100))
def test_machines_of_one_member_mix_as_one_peer_exp(n: int, step: int) -> None:
    assert groups("alternating-exp-ring", names(n), step) == groups("one-peer-exp", names(n), step)


@anyhow
@given(n=st.integers(2, 12), step=st.integers(0, 100))
def test_pairs_of_machines_mix_while_their_neighbours_mix_within(n: int, step: int) -> None:
    """So that not all load the network at once."""
    def crosses(group: Group) -> bool:
        return len({int(member) // 2 for member in group}) > 1

    found = groups("alternating-exp-ring", names(2 * n), step, of_two(2 * n))
    across = sum(crosses(group) for group in found)
    assert across <= -(-n // 4)


@pytest.mark.parametrize("n", [4, 6, 8, 14, 24])
@pytest.mark.parametrize("double_steps", [1, 2, 7])
def test_an_even_ring_contracts_at_the_known_rate(n: int, double_steps: int) -> None:
    """Two steps are a product of projections, whose second eigenvalue is cos^2(2 pi / n): so is the norm of T of them,
    but for one factor of cos.
    """
    two = product("ring", n, range(2))
    eigenvalues = torch.linalg.eigvals(two).abs().sort(descending=True).values
    torch.testing.assert_close(float(eigenvalues[0]), cos(2 * pi / n)**2, rtol=1e-9, atol=1e-9)
    norm = torch.linalg.matrix_norm(product("ring", n, range(2 * double_steps)), 2)
    torch.testing.assert_close(float(norm), abs(cos(2 * pi / n))**(2 * double_steps - 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [5, 7, 9, 13, 21])
def test_an_odd_ring_contracts_no_slower_than_the_next_even_one(n: int) -> None:
    assert rate(product("ring", n, range(n)), n) <= cos(2 * pi / (n + 1)) + 1e-9


@pytest.mark.parametrize("topology", ["ring", "one-peer-exp"])
@pytest.mark.parametrize("n", [3, 5, 9, 15])
def test_with_an_odd_number_everyone_sits_out_equally_often(topology: str, n: int) -> None:
    period = n * ((n - 1).bit_length() if topology == "one-peer-exp" else 1)
    alone = [group for step in range(period) for group in groups(topology, names(n), step) if len(group) == 1]
    assert sorted(alone) == sorted((member,) for member in names(n) for _ in range(period // n))


@pytest.mark.parametrize("n", [3, 5, 6, 7, 9, 11, 12, 13, 15, 24, 29])
def test_one_peer_exp_contracts_by_a_tenth_a_step_or_more_for_other_numbers_too(n: int) -> None:
    steps = 4 * n
    assert torch.linalg.matrix_norm(product("one-peer-exp", n, range(steps)), 2) < 0.9**steps


@pytest.mark.parametrize("n", range(3, 20))
@pytest.mark.parametrize("topology", ALL)
def test_differences_fall_to_nothing(topology: str, n: int) -> None:
    """Whatever the number, and with machines of two and a half one."""
    enough = 60 * n
    left = torch.linalg.matrix_norm(product(topology, n, range(enough), of_two(n)), 2)
    assert left < 1e-6 / sqrt(n)
