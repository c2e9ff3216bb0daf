"""Random trees: the plan equals the oracle, apply makes the trees equal, a second plan is empty.

SEEDS sets how many rounds (of PAIRS tree pairs each) and SEED where they begin; "make soak" runs
many.
"""

from __future__ import annotations

import base64
import os
import random
import unittest

import trees
from lab import Lab, read_plan, snapshot

PAIRS = 12
SEED = int(os.environ.get("SEED", "1"))
SEEDS = int(os.environ.get("SEEDS", "3"))


def plan_as_oracle(document: dict) -> dict:
    """Return the first target's plan in the oracle's form."""
    found = {}
    for kind in ("added", "modified", "missing", "leftover"):
        for entry in document["targets"][0][kind]:
            path = (
                base64.b64decode(entry["path_b64"])
                if "path_b64" in entry
                else os.fsencode(entry["path"])
            )
            found[path] = (kind, tuple(entry.get("changes", ())))
    return found


class RandomTrees(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.lab = Lab()
        cls.addClassCleanup(cls.lab.close)
        cls.target = cls.lab.configured_target("target")
        cls.lab.configure(delete="true")

    def make_pair(self, rng: random.Random) -> tuple:
        """Fill source and target with PAIRS random pairs of trees."""
        source, target = os.fsencode(self.lab.source), os.fsencode(self.target.path)
        for root in (source, target):
            for entry in os.listdir(root):
                trees.remove(os.path.join(root, entry))
        for number in range(PAIRS):
            ours, theirs = (os.path.join(root, b"pair%d" % number) for root in (source, target))
            os.mkdir(ours)
            trees.build(rng, ours)
            if rng.random() < 0.1:
                continue
            os.mkdir(theirs)
            if rng.random() < 0.2:
                trees.build(rng, theirs)
            else:
                trees.copy(ours, theirs)
                trees.mutate(rng, theirs)
        return source, target

    def test_plan_is_the_oracle_and_apply_does_exactly_it(self) -> None:
        for seed in range(SEED, SEED + SEEDS):
            with self.subTest(seed=seed):
                source, target = self.make_pair(random.Random(seed))
                expected = trees.oracle(source, target)
                first = self.lab.offsync("plan --json", check=0).stdout
                self.assertEqual(plan_as_oracle(read_plan(first)), expected)
                self.assertEqual(self.lab.offsync("plan --json", check=0).stdout, first)
                before = snapshot(source)
                self.lab.offsync("apply --plan", read_plan(first)["plan"], check=0)
                self.assertEqual(snapshot(source), before)
                self.assertEqual(snapshot(target), before)
                record = self.lab.records()[-1]
                self.assertEqual(
                    [len(record["files_changed"]), len(record["files_deleted"])],
                    [
                        sum(kind != "missing" for kind, _ in expected.values()),
                        sum(kind == "missing" for kind, _ in expected.values()),
                    ],
                )
                again = read_plan(self.lab.offsync("plan --json --exit-code", check=0).stdout)
                self.assertEqual(plan_as_oracle(again), {})


if __name__ == "__main__":
    unittest.main()
