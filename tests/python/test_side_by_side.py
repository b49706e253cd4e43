"""The comparison script, on the CPU: masks, order of measurement, and a whole run."""

import json
import subprocess
import sys
import unittest
from pathlib import Path

import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import peers  # noqa: E402
import side_by_side  # noqa: E402

CPU = torch.device("cpu")


class Masks(unittest.TestCase):
    def test_densities_are_those_asked_for(self):
        for kind in ("video", "random"):
            for density in (0.1, 0.25, 0.5, 1.0):
                mask = side_by_side.make_mask(8, 60 * 128 - 5, density, kind, CPU)
                self.assertEqual(mask.shape, (8, 60, 60))
                self.assertTrue(mask.any(-1).all())
                self.assertAlmostEqual(mask.float().mean().item(), density, delta=0.03)

    def test_heads_of_a_video_mask_differ(self):
        shares = side_by_side.make_mask(5, 60 * 128, 0.25, "video", CPU).float().mean((1, 2)).tolist()
        self.assertEqual(shares, sorted(shares))
        self.assertGreater(shares[-1], 2 * shares[0])

    def test_lists_name_the_kept_blocks_in_order(self):
        mask = torch.tensor([[[True, False, True], [False, True, False]]])
        count, index = peers.index_lists(mask)
        self.assertEqual(count.tolist(), [[[2, 1]]])
        self.assertEqual((index[0, 0, 0, :2].tolist(), index[0, 0, 1, 0].item()), ([0, 2], 1))


class Order(unittest.TestCase):
    def test_fast_kernels_stand_between_fast_ones(self):
        for n in range(1, 7):
            providers = [peers.Provider(str(i), None) for i in range(n)]
            entries = [side_by_side.Entry(provider, None, 0.0, 0.0) for provider in providers]
            order = [int(e.provider.name) for e in side_by_side.mountain(entries, {str(i): i for i in range(n)})]
            self.assertEqual(sorted(order), list(range(n)))
            top = order.index(0)
            # Slower and slower to both sides, and the two fastest adjacent.
            self.assertEqual(order[:top], sorted(order[:top], reverse=True))
            self.assertEqual(order[top:], sorted(order[top:]))
            if n > 1:
                self.assertEqual(abs(top - order.index(1)), 1)


class WholeRun(unittest.TestCase):
    def run_script(self, *args):
        words = [sys.executable, EXAMPLES / "side_by_side.py", "--device", "cpu", *args]
        return subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300)

    def test_a_report(self):
        options = [
            "--shape",
            "2x300x64",
            "--density",
            "0.4",
            "--kind",
            "video",
            "random",
            "--rounds",
            "2",
            "--order",
            "hot",
        ]
        done = self.run_script(*options, "--json", "-")
        self.assertEqual(done.returncode, 0, done.stderr)
        report = json.loads(done.stdout)
        self.assertEqual((report["schema_version"], report["device"], report["rounds"]), (1, "CPU", 2))
        self.assertEqual(report["absent"]["fa3-dense"], "needs a GPU")
        self.assertEqual([result["rows"][0]["kind"] for result in report["results"]], ["video", "random"])
        for result in report["results"]:
            self.assertEqual(result["failed"], {})
            rows = {row["provider"]: row for row in result["rows"]}
            self.assertEqual(set(rows), {"calibc", "sdpa-cpu"})
            self.assertEqual(rows["calibc"]["ratio_to_ours"], 1.0)
            self.assertEqual(rows["sdpa-cpu"]["speedup_over_dense"], 1.0)
            for row in rows.values():
                self.assertLess(row["error"], 1e-5)
                self.assertLessEqual(row["ms_min"], row["ms"])

    def test_wrong_usage(self):
        for args, words in [(["--only", "nobody"], "no provider nobody"), (["--shape", "big"], "`big` is neither")]:
            done = self.run_script(*args)
            self.assertEqual(done.returncode, 2)
            self.assertIn(words, done.stderr)


if __name__ == "__main__":
    unittest.main()
