"""How ranks share the work."""

from __future__ import annotations

import pytest

from overtone.lab.run.sharding import Rank

TASKS = [(length, number) for length in (1, 10, 100) for number in range(12)]


def shares(world_size, tasks=TASKS):
    return [Rank(rank, world_size).share(tasks, cost=lambda task: task[0]) for rank in range(world_size)]


class TestShare:
    @pytest.mark.parametrize("world_size", [1, 2, 3, 5, 50])
    def test_every_task_belongs_to_one_rank(self, world_size):
        assert sorted(task for share in shares(world_size) for task in share) == TASKS

    def test_keeps_the_order(self):
        assert all(share == sorted(share) for share in shares(3))

    def test_costs_are_even(self):
        """Of each length, the ranks differ by one task at most."""
        for length in (1, 10, 100):
            counts = [sum(task[0] == length for task in share) for share in shares(5)]
            assert max(counts) - min(counts) <= 1

    def test_neighbours_do_not_always_go_to_the_same_rank(self):
        """With two losses and two ranks, dealing in turn would give one rank all edits with the slow loss."""
        tasks = [(1, number) for number in range(40)]
        even = [sum(number % 2 == 0 for _, number in share) for share in shares(2, tasks)]
        assert min(even) > 4


class TestEnvironment:
    def test_a_process_of_its_own_is_alone(self):
        assert Rank.from_environment({}) == Rank(0, 1)
        assert Rank.from_environment({}).is_alone

    def test_reads_what_torchrun_sets(self):
        shard = Rank.from_environment({"RANK": "1", "WORLD_SIZE": "4"})
        assert shard == Rank(1, 4)
        assert not shard.is_alone

    def test_refuses_a_rank_that_cannot_be(self):
        with pytest.raises(ValueError, match="rank must be from 0 to world_size - 1, got 4 of 4"):
            Rank(4, 4)
